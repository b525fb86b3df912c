"""Exact hypergradients for weighting and selecting training data in JAX.

`hypergradient` takes a loss on plain arrays: the metagradient d L_v / d weights in one call. Behind it stand a
`Problem` (`weighted`, or `problem` for any outer variable) and a `BilevelSolver` (`unroll`, `implicit`, `penalty`,
`jointly`), built once and called often; on arrays its `run` is a pure function, which composes with jit, vmap, scan,
pmap and shard_map. Runs that are stored and resumed are made of `train` and an estimator that reads the trajectory
(`unrolled_estimator`, `implicit_estimator`, `penalty_estimator`). `lm`, `scores` and `commands` are imported when they
are first read: `import bilevel_jax` needs jax and optax alone.

- `bilevel_jax.core.curvature`: Hessian-vector and Gauss-Newton-vector products for `implicit`
- `bilevel_jax.core.solvers`: linear solvers for `implicit`
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
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.penalty import penalty_estimator
from bilevel_jax.core.problem import problem, proximal, weighted
from bilevel_jax.core.solve.arrays import batch_order
from bilevel_jax.core.solve.hypergradient import hypergradient
from bilevel_jax.core.solve.implicit import implicit
from bilevel_jax.core.solve.jointly import jointly
from bilevel_jax.core.solve.penalty import penalty
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, Status, raise_for_status
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.streams import full_batch_stream, halve_stream, shuffled_stream
from bilevel_jax.core.training import init_train_state, scan, train, train_step, trajectory_from_params
from bilevel_jax.core.types import Checks, Estimate, Problem, Stream, Trajectory
from bilevel_jax.core.unrolled import check_differentiable, each, unrolled_estimator

if TYPE_CHECKING:
    from bilevel_jax import commands, lm, scores

__version__ = "0.2.0.dev0"
__all__ = [
    "BilevelSolver",
    "Checks",
    "Estimate",
    "Problem",
    "Solution",
    "Status",
    "Stream",
    "Trajectory",
    "Verdict",
    "batch_order",
    "certify",
    "check_differentiable",
    "checkpointing",
    "commands",
    "curvature",
    "each",
    "full_batch_stream",
    "halve_stream",
    "hypergradient",
    "implicit",
    "implicit_estimator",
    "init_train_state",
    "jointly",
    "lm",
    "penalty",
    "penalty_estimator",
    "problem",
    "proximal",
    "raise_for_status",
    "scan",
    "scores",
    "shuffled_stream",
    "single_loop",
    "solvers",
    "train",
    "train_step",
    "trajectory_from_params",
    "unroll",
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
