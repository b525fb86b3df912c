"""The certificates of a run: its hypergradient checked by training again, and by leaving rows out."""

import jax
import numpy as np
from jaxtyping import Float

from bilevel_jax.core import certify
from bilevel_jax.core.certify import Certificates
from bilevel_jax.core.types import Checks
from bilevel_jax.core.unrolled import outer_value
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.learn import order_seed
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task
from bilevel_jax.runs.training import Trainer


def certificates(
    task: Task | ArrayTask,
    config: SelectConfig,
    trainer: Trainer,
    session: Session,
    *,
    name: str,
    weights: Float[np.ndarray, "rows"],
    entries: Float[np.ndarray, "rows"],
    step: int,
    value: float,
    checks: Checks,
) -> Certificates:
    """Certify the estimate that outer step `step` made at `weights`: same start, same data order, trained again.

    The differences are of L_v(theta_T(w)), the estimand of `unrolled`. For the other methods they tell how far the
    estimate is from the effect on the run that really happens.
    """
    settings = config.certify
    if not settings.enabled:
        return Certificates(None, None, None, checks)
    at, grad = placing.everywhere(task.mesh, (weights, entries))
    start = trainer.begin(task.fresh(config.train.seed))
    stream = task.stream(order_seed(config, step))
    read = outer_value(task.problem)

    def retrain(changed: jax.Array) -> float:
        return trainer.value(changed, start, stream, task.held_out["fit"], read)

    def estimate(changed: jax.Array) -> jax.Array:
        return trainer.estimate(trainer.run(changed, start, stream, swept=True), changed, stream).grad

    def exact() -> dict:
        return certify.exact(retrain, at, grad, settings.step_sizes)._asdict()

    def predictive() -> dict:
        key = jax.random.key(config.data.seed + 2)
        return certify.predictive(
            retrain, key, at, grad, value, fraction=settings.retrain_removed, retrains=settings.retrains
        )._asdict()

    session.phase(f"certifying the gradient at {name}")
    key = jax.random.key(config.data.seed + 1)
    ratios = session.once(f"certify/{name}/exact", exact)
    cosine = session.once(f"certify/{name}/smooth", lambda: certify.smooth(estimate, key, at, grad, settings.removed))
    predicted = session.once(f"certify/{name}/predictive", predictive) if settings.retrains else None
    return Certificates(
        certify.Exact(**{key: tuple(value) for key, value in ratios.items()}),
        cosine,
        certify.Predictive(**predicted) if predicted else None,
        checks,
    )
