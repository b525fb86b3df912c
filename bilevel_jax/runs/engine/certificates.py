"""Certificates of a hypergradient, by retraining."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from bilevel_jax.core import certify
from bilevel_jax.core.certify import Certificates, FiniteDifferences, removals
from bilevel_jax.core.certify.verdict import shares_to_remove
from bilevel_jax.core.types import Checks
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.runs.config.schema import CertifySection, DataSection, OuterSection
from bilevel_jax.runs.engine.folds import Turn, take_turn, turn_training_stream, turn_validation_stream
from bilevel_jax.runs.engine.outer_loop import LearnedWeights, data_order_seed
from bilevel_jax.runs.engine.trainer import Trainer, measures_product_error
from bilevel_jax.runs.infra.distributed import fetch_from_first
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.evaluation import judges_by_examples
from bilevel_jax.runs.tasks.protocol import Task


class GradientPoint(NamedTuple):
    """An estimate of a hypergradient and the training that it is of: what a certificate repeats and compares with."""

    name: str
    """Names its finished jobs; no other point of a run has it."""
    weights: Float[np.ndarray, "examples"]
    hypergradient: Float[np.ndarray, "examples"]
    validation_loss: float
    checks: Checks
    start_seed: int
    order_seed: int
    """With `start_seed` and `turn`, those of the training that was estimated."""
    data_seed: int
    """What a certificate draws comes from it."""
    turn: Turn | None = None


def point_of_step(
    task: Task,
    learned: LearnedWeights,
    step: int,
    name: str,
    *,
    data: DataSection,
    outer: OuterSection,
    train_seed: int,
) -> GradientPoint:
    """The point of an outer step: of step 0, at uniform weights, or else of the best one."""
    if step == 0:
        hypergradient, of_validation = learned.first_hypergradient, learned.first_validation_hypergradient
    else:
        hypergradient, of_validation = learned.hypergradient, learned.validation_hypergradient
    weights = np.ones(task.num_examples) if step == 0 else learned.weights
    if outer.validation_folds:
        hypergradient = np.concatenate([hypergradient, of_validation])
        weights = np.ones(len(hypergradient)) if step == 0 else learned.corpus_weights(task)
    record = learned.records[step]
    return GradientPoint(
        name,
        weights.astype(hypergradient.dtype),
        hypergradient,
        record["loss"]["validation"],
        Checks(**{key: value for key, value in record["checks"].items() if value is not None}),
        start_seed=train_seed,
        order_seed=data_order_seed(data, outer, step),
        data_seed=data.seed,
        turn=take_turn(task, outer.validation_folds, data.seed, step),
    )


def compute_certificates(
    task: Task, trainer: Trainer, session: Session, settings: CertifySection, point: GradientPoint
) -> Certificates:
    """Certify an estimate by training again from the same start in the same data order.

    The differences are of L_v(theta_T(w)), the estimand of `unrolled`. For the other methods they tell how far the
    estimate is from the effect on the run that really happens.
    """
    share = certify.effective_share(point.weights)
    without = Certificates(None, None, None, point.checks, effective_share=share, is_sampled=judges_by_examples(task))
    if not settings.enabled:
        return without
    repeat = _Repeat(task, trainer, session, point)

    def compute_predictive() -> dict:
        key = jax.random.key(point.data_seed + 2)
        return certify.predict_removals(
            repeat.retrain,
            key,
            repeat.weights,
            repeat.grad,
            point.validation_loss,
            fraction=settings.retrain_removed,
            num_retrains=settings.retrains,
        )._asdict()

    session.set_phase(f"certifying the gradient at {point.name}")
    checks = point.checks
    if measures_product_error(trainer.outer) and np.isnan(checks.product_error):
        error = session.run_once(f"certify/{point.name}/product", repeat.measure_product_error)
        checks = checks._replace(product_error=error)
    ratios = repeat.compute_finite_differences(settings)
    smoothness = removals.average_draws(
        repeat.draw_smoothness, shares_to_remove(settings.removed, share), settings.draws
    )
    predictive = session.run_once(f"certify/{point.name}/predictive", compute_predictive) if settings.retrains else None
    return without._replace(
        checks=checks,
        finite_differences=ratios,
        metasmoothness=smoothness,
        removal_prediction=certify.RemovalPrediction(**predictive) if predictive else None,
    )


def compute_finite_differences(
    task: Task, trainer: Trainer, session: Session, settings: CertifySection, point: GradientPoint
) -> FiniteDifferences:
    """The ratios of actual to predicted changes, which `compute_certificates` then does not measure again."""
    return _Repeat(task, trainer, session, point).compute_finite_differences(settings)


def draw_smoothness(
    task: Task, trainer: Trainer, session: Session, point: GradientPoint, share: float, draw: int = 0
) -> float | None:
    """The cosine of one draw of metasmoothness, which `compute_certificates` then does not measure again."""
    return _Repeat(task, trainer, session, point).draw_smoothness(share, draw)


def certificates_to_json(certificates: Certificates) -> dict[str, Any]:
    """What result.json holds of certificates."""
    return {
        "exact": certificates.finite_differences._asdict() if certificates.finite_differences else None,
        "smooth": certificates.metasmoothness._asdict() if certificates.metasmoothness else None,
        "predictive": certificates.removal_prediction._asdict() if certificates.removal_prediction else None,
        "checks": certificates.checks._asdict(),
        "effective_share": certificates.effective_share,
        "reliability": certificates.reliability._asdict() if certificates.reliability else None,
    }


class _Repeat:
    """The training of a point, repeated with other weights."""

    def __init__(self, task: Task, trainer: Trainer, session: Session, point: GradientPoint):
        self.task, self.trainer, self.session, self.point = task, trainer, session, point
        self.weights, self.grad = replicate(task.mesh, (point.weights, point.hypergradient))
        self._start = trainer.init_state(task.init_params(point.start_seed))
        self._stream = turn_training_stream(task, point.order_seed, point.turn)
        self._validation = turn_validation_stream(task, point.turn)
        self._loss_fn = validation_loss_fn(task.problem)

    def retrain(self, weights: jax.Array) -> float:
        """The validation loss after training with other weights."""
        return self.trainer.validation_loss(weights, self._start, self._stream, self._validation, self._loss_fn)

    def estimate(self, weights: jax.Array) -> jax.Array:
        """The hypergradient at other weights."""
        run = self.trainer.run(weights, self._start, self._stream, for_backward=True)
        return self.trainer.estimate(run, weights, self._stream, turn=self.point.turn).grad

    def compute_finite_differences(self, settings: CertifySection) -> FiniteDifferences:
        """The ratios of actual to predicted changes."""

        def compute() -> dict:
            return certify.check_finite_differences(
                self.retrain,
                self.weights,
                self.grad,
                settings.step_sizes,
                value=self.point.validation_loss,
                fetch=fetch_from_first,
            )._asdict()

        ratios = self.session.run_once(f"certify/{self.point.name}/exact", compute)
        return FiniteDifferences(**{key: tuple(numbers) for key, numbers in ratios.items()})

    def draw_smoothness(self, share: float, draw: int) -> float | None:
        """The cosine of one draw of metasmoothness."""
        key = removals.draw_key(jax.random.key(self.point.data_seed + 1), share, draw)
        return self.session.run_once(
            f"certify/{self.point.name}/smooth/{share:g}/{draw}",
            lambda: removals.smoothness_of_draw(self.estimate, key, self.weights, self.grad, share),
        )

    def measure_product_error(self) -> float:
        """What lower precision of the products in the steps back changes."""
        run = self.trainer.run(self.weights, self._start, self._stream, for_backward=True)
        estimate = self.trainer.estimate(run, self.weights, self._stream, turn=self.point.turn, with_product_error=True)
        return float(estimate.checks.product_error)
