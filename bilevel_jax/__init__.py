"""bilevel_jax: which training examples should a language model trust? Exact bilevel gradients in JAX."""

from bilevel_jax.core.hypergradient import hypergradient

__version__ = "0.1.0"
__all__ = ["hypergradient"]
