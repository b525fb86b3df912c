"""Hypergradients and bilevel training on JAX pytrees."""
