"""Certificates of a hypergradient, by retraining."""

import jax
import numpy as np
from jaxtyping import Float

from bilevel_jax.core import certify
from bilevel_jax.core.certify import Certificates, removals
from bilevel_jax.core.certify.verdict import shares_to_remove
from bilevel_jax.core.types import Checks
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.runs.config.schema import CertifySection
from bilevel_jax.runs.engine.folds import Turn, turn_training_stream, turn_validation_stream
from bilevel_jax.runs.engine.trainer import Trainer, measures_product_error
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.evaluation import judges_by_examples
from bilevel_jax.runs.tasks.protocol import Task


def compute_certificates(
    task: Task,
    trainer: Trainer,
    session: Session,
    settings: CertifySection,
    *,
    name: str,
    weights: Float[np.ndarray, "examples"],
    hypergradient: Float[np.ndarray, "examples"],
    validation_loss: float,
    checks: Checks,
    start_seed: int,
    order_seed: int,
    data_seed: int,
    turn: Turn | None = None,
) -> Certificates:
    """Certify an estimate that was made at `weights`, by training again from the same start in the same data order.

    `start_seed`, `order_seed` and `turn` are those of the training that was estimated; what a certificate draws comes
    from `data_seed`. The differences are of L_v(theta_T(w)), the estimand of `unrolled`. For the other methods they
    tell how far the estimate is from the effect on the run that really happens.
    """
    share = certify.effective_share(weights)
    without = Certificates(None, None, None, checks, effective_share=share, is_sampled=judges_by_examples(task))
    if not settings.enabled:
        return without
    device_weights, grad = replicate(task.mesh, (weights, hypergradient))
    start = trainer.init_state(task.init_params(start_seed))
    stream, validation = turn_training_stream(task, order_seed, turn), turn_validation_stream(task, turn)
    loss_fn = validation_loss_fn(task.problem)

    def retrain(new_weights: jax.Array) -> float:
        return trainer.validation_loss(new_weights, start, stream, validation, loss_fn)

    def estimate(new_weights: jax.Array) -> jax.Array:
        run = trainer.run(new_weights, start, stream, for_backward=True)
        return trainer.estimate(run, new_weights, stream, turn=turn).grad

    def compute_exact() -> dict:
        return certify.check_finite_differences(
            retrain, device_weights, grad, settings.step_sizes, value=validation_loss
        )._asdict()

    def compute_draw(share: float, draw: int) -> float | None:
        key = removals.draw_key(jax.random.key(data_seed + 1), share, draw)
        return session.run_once(
            f"certify/{name}/smooth/{share:g}/{draw}",
            lambda: removals.smoothness_of_draw(estimate, key, device_weights, grad, share),
        )

    def compute_predictive() -> dict:
        key = jax.random.key(data_seed + 2)
        return certify.predict_removals(
            retrain,
            key,
            device_weights,
            grad,
            validation_loss,
            fraction=settings.retrain_removed,
            num_retrains=settings.retrains,
        )._asdict()

    def compute_product_error() -> float:
        run = trainer.run(device_weights, start, stream, for_backward=True)
        estimate = trainer.estimate(run, device_weights, stream, turn=turn, with_product_error=True)
        return float(estimate.checks.product_error)

    session.set_phase(f"certifying the gradient at {name}")
    if measures_product_error(trainer.outer) and np.isnan(checks.product_error):
        error = session.run_once(f"certify/{name}/product", compute_product_error)
        checks = checks._replace(product_error=error)
    ratios = session.run_once(f"certify/{name}/exact", compute_exact)
    smoothness = removals.average_draws(compute_draw, shares_to_remove(settings.removed, share), settings.draws)
    predictive = session.run_once(f"certify/{name}/predictive", compute_predictive) if settings.retrains else None
    return without._replace(
        checks=checks,
        finite_differences=certify.FiniteDifferences(**{key: tuple(numbers) for key, numbers in ratios.items()}),
        metasmoothness=smoothness,
        removal_prediction=certify.RemovalPrediction(**predictive) if predictive else None,
    )
