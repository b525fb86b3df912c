"""Exact hypergradients for weighting and selecting training data in JAX.

`hypergradient` takes a loss on plain arrays. The rest is what it is made of: a `Problem`, a training run that is stored
for its backward pass (`train`), and an estimator of the metagradient d L_v / d weights (`unrolled_estimator`,
`implicit_estimator`, `penalty_estimator`). `lm`, `scores` and `commands` are imported when they are first read:
`import bilevel_jax` needs jax and optax alone.

- `bilevel_jax.core.curvature`: Hessian-vector and Gauss-Newton-vector products for `implicit_estimator`
- `bilevel_jax.core.solvers`: linear solvers for `implicit_estimator`
- `bilevel_jax.core.weightings`: maps from outer variables to example weights
- `bilevel_jax.core.single_loop`: methods that move parameters and weights together
- `bilevel_jax.core.certify`: certificates of a hypergradient
- `bilevel_jax.core.checkpointing`: checkpointing plans (Revolve) for the backward pass
- `bilevel_jax.core.types`: types and their fields
- `bilevel_jax.lm`, `bilevel_jax.scores`, `bilevel_jax.commands`: language models, data scores, and the commands

The modules of core are names of this one: `bj.solvers.cg()`. The examples of the reference assume

    import jax, optax
    import jax.numpy as jnp
    import bilevel_jax as bj
"""

import importlib
from typing import TYPE_CHECKING, Any

from bilevel_jax.core import certify, checkpointing, curvature, single_loop, solvers, weightings
from bilevel_jax.core.certify import Verdict
from bilevel_jax.core.hypergradient import full_batch_stream, hypergradient, shuffled_stream
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.penalty import penalty_estimator
from bilevel_jax.core.problem import proximal, shared, weighted
from bilevel_jax.core.training import init_train_state, scan, train, train_step, trajectory_from_params
from bilevel_jax.core.types import Checks, Estimate, Problem, Stream, Trajectory
from bilevel_jax.core.unrolled import check_differentiable, each, unrolled_estimator

if TYPE_CHECKING:
    from bilevel_jax import commands, lm, scores

__version__ = "0.2.0.dev0"
__all__ = [
    "Checks",
    "Estimate",
    "Problem",
    "Stream",
    "Trajectory",
    "Verdict",
    "certify",
    "check_differentiable",
    "checkpointing",
    "commands",
    "curvature",
    "each",
    "full_batch_stream",
    "hypergradient",
    "implicit_estimator",
    "init_train_state",
    "lm",
    "penalty_estimator",
    "proximal",
    "scan",
    "scores",
    "shared",
    "shuffled_stream",
    "single_loop",
    "solvers",
    "train",
    "train_step",
    "trajectory_from_params",
    "unrolled_estimator",
    "weighted",
    "weightings",
]
_LAZY_MODULES = ("commands", "lm", "scores")


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
