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
from bilevel_jax.core.weightings.pooling import (
    PartReliability,
    Parts,
    PoolingFeatures,
    measure_part_reliability,
    pool_contributions,
    rank_curves,
    split_contributions,
)
from bilevel_jax.core.weightings.rater import RaterVariable, rater
from bilevel_jax.core.weightings.shared import SharedWeightVariable, append_shared_weight
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
    "PartReliability",
    "Parts",
    "PoolingFeatures",
    "RaterVariable",
    "SharedWeightVariable",
    "SoftmaxState",
    "SourceState",
    "append_shared_weight",
    "effective_sample_size",
    "entropy",
    "inverse_rms",
    "measure_part_reliability",
    "normalized_gradient_step",
    "online_per_source",
    "online_sigmoid",
    "online_softmax",
    "online_uniform",
    "pool_contributions",
    "rank_curves",
    "rater",
    "sigmoid",
    "softmax",
    "split_contributions",
    "weighting_vjp",
]
