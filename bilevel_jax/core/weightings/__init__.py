"""Maps from outer variables to example weights, and their update steps.

Every weighting starts at weight 1 for each example. A `Weighting` is pulled back once per estimate, outside the
backward pass; `OnlineWeights` are read and moved in every training step, on the examples that are present.
"""

from bilevel_jax.core.weightings.online import (
    OnlineWeights,
    SoftmaxState,
    SourceState,
    online_per_source,
    online_sigmoid,
    online_softmax,
    online_uniform,
)
from bilevel_jax.core.weightings.rater import RaterVariable, rater
from bilevel_jax.core.weightings.steps import inverse_rms, normalized_gradient_step
from bilevel_jax.core.weightings.tables import (
    effective_sample_size,
    entropy,
    sigmoid,
    softmax,
    weighting_vjp,
)

__all__ = [
    "OnlineWeights",
    "RaterVariable",
    "SoftmaxState",
    "SourceState",
    "effective_sample_size",
    "entropy",
    "inverse_rms",
    "normalized_gradient_step",
    "online_per_source",
    "online_sigmoid",
    "online_softmax",
    "online_uniform",
    "rater",
    "sigmoid",
    "softmax",
    "weighting_vjp",
]
