"""Mathematics on pytrees of arrays: hypergradients, weightings, certificates. Imports jax and optax, nothing else."""
