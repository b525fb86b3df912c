"""Validation examples whose loss rises when the others choose the training weights."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from bilevel_jax.core import weightings
from bilevel_jax.core.types import Params
from bilevel_jax.core.unrolled import check_differentiable
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config import load
from bilevel_jax.runs.config.load import SelectConfig
from bilevel_jax.runs.config.local_paths import short_file_names
from bilevel_jax.runs.engine import artifacts
from bilevel_jax.runs.engine.folds import Turn, turn_validation_stream
from bilevel_jax.runs.engine.trainer import Trainer, check_hypergradient_finite
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir
from bilevel_jax.runs.infra.placement import padded_table_size, place_table
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example, judge_places
from bilevel_jax.runs.tasks.text import TextTask

STEP = 0.3
"""Root mean square of the one step that the logits of the training examples make: small, so that it changes what is
trained on and does not concentrate it."""
LARGEST_STEP = 1.5
"""The most that a logit moves in it."""
STANDARD_ERRORS = 1.645
"""How far below 0 a gain must be: of examples without any effect about 1 in 20 are."""
ALARMING_SHARE = 0.3
"""Of validation: where more of it contradicts, a person is asked to read."""
FIRST_ORDER_SEED = 20_000
"""Of the data order of the first draw, on top of data.seed: apart from those of the loop and of the comparison."""


class Contradictions(NamedTuple):
    """What each validation example gains where other parts of validation choose the training weights."""

    places: Int[np.ndarray, "judges"]
    """Of the examples, in `held_out_examples`."""
    gains: Float[np.ndarray, "draws judges"]
    """Loss after training with equal weights, less that after training with the chosen ones, by draw."""

    @property
    def gain(self) -> Float[np.ndarray, "judges"]:
        """The mean over draws."""
        return self.gains.mean(0)

    @property
    def standard_errors(self) -> Float[np.ndarray, "judges"]:
        """Of those means: root of the variance over draws, half an example's own and half that of all, over their
        number. Few draws tell little of one example's spread, and examples differ in it."""
        variances = self.gains.var(0, ddof=1)
        return np.sqrt((variances + variances.mean()) / 2 / len(self.gains))

    @property
    def contradicts(self) -> Bool[np.ndarray, "judges"]:
        """Whether the gain of an example is below 0 by `STANDARD_ERRORS`."""
        return self.gain < -STANDARD_ERRORS * self.standard_errors


def apply_contradictions(task: TextTask, config: SelectConfig, session: Session) -> tuple[TextTask, dict[str, Any]]:
    """Measure, write down what contradicts, and drop it if that is asked for: the task to go on with, and what
    result.json holds."""
    outer = replace(config.outer, product_precision="highest")  # nothing has measured yet what a lower one changes
    contradictions = measure_contradictions(task, config, Trainer(task, outer, session), session)
    summary = summarize_contradictions(contradictions, config)
    session.print_line(summary["sentence"])
    write_contradictions(session.folder, task, contradictions, config)
    if summary["is_dropped"]:
        task = task.without_validation(contradictions.places[contradictions.contradicts])
    return task, summary


def measure_contradictions(task: TextTask, config: SelectConfig, trainer: Trainer, session: Session) -> Contradictions:
    """What each validation example gains where the other parts of validation choose the training weights.

        gain_j = l_j(theta_T(1)) - l_j(theta_T(w)),
        w = N softmax(-clip(STEP g / rms(g), +-LARGEST_STEP)),  g = d L_-f / d logits at equal weights

    L_-f is the mean loss of validation without the part f that has j, so no example has a say in what it is judged by;
    its derivative is by outer.method. Both trainings are made: a gain is no prediction. Each draw divides validation
    anew and has a data order of its own.

    Raises:
        ValueError: for fewer than two validation examples for each part.
        FloatingPointError: where a loss, or a hypergradient, is not finite.
    """
    places, settings = judge_places(task), config.contradictions
    if len(places) < 2 * settings.folds:
        raise ValueError(
            f"contradictions.folds = {settings.folds} parts of {format_count('validation example', len(places))}: each "
            f"part needs two. Give {2 * settings.folds} examples or more, lower it, or set contradictions.draws to 0."
        )
    gains = [_Draw(task, config, trainer, session, places, number).gains() for number in range(settings.draws)]
    return Contradictions(places, np.array(gains))


def divide_validation(num_judges: int, num_folds: int, seed: tuple[int, int]) -> Int[np.ndarray, "judges"]:
    """The part of each validation example, by (data.seed, draw); parts differ in size by one example at most."""
    data_seed, draw = seed
    return np.random.default_rng((data_seed, 23, draw)).permutation(num_judges) % num_folds


def summarize_contradictions(contradictions: Contradictions, config: SelectConfig) -> dict[str, Any]:
    """What result.json holds; the examples stand in validation.parquet."""
    count, total = int(contradictions.contradicts.sum()), len(contradictions.places)
    by_chance = total * 0.05
    least = max(1, config.outer.validation_folds, config.rater.folds)
    is_dropped = config.contradictions.action == "drop" and 0 < count <= total - least
    sentences = [
        f"{count} of {format_count('validation example', total)} {'has' if count == 1 else 'have'} a larger loss where "
        f"the others choose the training weights, by {STANDARD_ERRORS:g} standard errors or more (about "
        f"{by_chance:.1f} would by chance)"
    ]
    if is_dropped:
        sentences.append("dropped: the others alone steer the weights")
    elif count > total - least and config.contradictions.action == "drop":
        sentences.append(f"not dropped: that would leave {total - count}, and the run needs {least} or more")
    elif count:
        sentences.append("all of them steer the weights even so (contradictions.action)")
    sentence = "; ".join(sentences) + "."
    if count > ALARMING_SHARE * total:
        sentence += f" That is more than {ALARMING_SHARE:.0%}: read them, as the others may be those that are wrong."
    return {
        "examples": total,
        "contradicting": count,
        "is_dropped": is_dropped,
        "standard_error": float(contradictions.standard_errors.mean()),
        "sentence": sentence,
    }


def write_contradictions(folder: Path, task: TextTask, contradictions: Contradictions, config: SelectConfig) -> None:
    """validation.parquet, a row for each validation example, and judges.jsonl, those that do not contradict."""
    examples, places = task.held_out_examples["validation"], contradictions.places
    columns = {
        "gain": contradictions.gain,
        "standard_error": contradictions.standard_errors,
        **{f"gain_{draw}": gains for draw, gains in enumerate(contradictions.gains)},
    }
    tables = {name: np.full(len(examples), np.nan) for name in columns}
    for name, values in columns.items():
        tables[name][places] = values
    contradicts = np.zeros(len(examples), bool)
    contradicts[places] = contradictions.contradicts
    file_names = short_file_names(example.file for example in examples)
    table = pa.table(
        {
            "id": [example.id for example in examples],
            "source": [example.source for example in examples],
            "label": pa.array([example.label for example in examples], pa.string()),
            "contradicts": contradicts,
            **tables,
            "file": [file_names[example.file] for example in examples],
            "line": [example.line for example in examples],
        }
    )
    meanings = {
        "gain": "loss after training with equal weights, less that after training with weights that other parts of "
        f"validation chose, {task.outer_objective.unit}: mean over draws; nan: too long to be read",
        "standard_error": "of gain over draws, half by the example's own spread and half by that of all",
        "contradicts": f"whether gain is below 0 by {STANDARD_ERRORS:g} standard errors",
        "config_hash": load.config_hash(config),
    }
    table = table.replace_schema_metadata({key: text.encode() for key, text in meanings.items()})
    run_dir.write_parquet(folder / "validation.parquet", table)
    kept = places[~contradictions.contradicts]
    names = {"source": config.data.source_field, "label": config.data.label_field}
    rows = artifacts.format_jsonl(
        examples, kept, lambda place: {key: getattr(examples[place], name) for name, key in names.items() if key}
    )
    run_dir.write_atomic(folder / "judges.jsonl", rows)


class _Draw:
    """One division of validation: training, the hypergradients of all parts, and a training for each, which a stopped
    run goes on with."""

    def __init__(
        self,
        task: TextTask,
        config: SelectConfig,
        trainer: Trainer,
        session: Session,
        places: Int[np.ndarray, "judges"],
        number: int,
    ):
        self.task, self.trainer, self.session, self.places, self.number = task, trainer, session, places, number
        self.num_folds = config.contradictions.folds
        self.part = session.part_session(f"contradictions, draw {number + 1}")
        self.fold_of = divide_validation(len(places), self.num_folds, (config.data.seed, number))
        self.stream = task.training_stream(config.data.seed + FIRST_ORDER_SEED + number, packed=False)
        self.start = trainer.init_state(task.init_params(config.train.seed))
        self.equal = place_table(task.mesh, np.ones(task.num_examples, jnp.result_type(float)))
        self.folder = self.part.folder / "checkpoints" / "hypergradients"

    def gains(self) -> Float[np.ndarray, "judges"]:
        """The gain of each validation example."""
        key = f"contradictions/{self.number}"
        before = np.array(self.session.run_once(key, self._estimate))
        after = np.zeros(len(self.places))
        for fold in range(self.num_folds):
            after[self.fold_of == fold] = self.session.run_once(f"{key}.{fold}", partial(self._retrain, fold))
        distributed.run_on_first_process(partial(run_dir.remove_folder, self.part.folder))
        return before - after

    def _estimate(self) -> list[float]:
        """Train with equal weights, save the hypergradients of the other parts of each; the losses of all examples."""
        self.part.set_phase("hypergradients")
        with self.trainer.saving_in(self.part.folder / "checkpoints" / checkpoint.MID_STEP_FOLDER):
            run = self.trainer.run(self.equal, self.start, self.stream, for_backward=True, outer_step=0)
            if self.number == 0 and self.trainer.outer.method in ("unrolled", "window"):
                frozen = self.task.frozen(self.start.params)
                check_differentiable(
                    self.task.train_step, self.task.optimizer, run, self.equal, frozen, self.stream,
                    fetch=distributed.fetch_from_first,
                )  # fmt: skip
            trained, judges = self.task.trainable_indices(), [self.fold_of != fold for fold in range(self.num_folds)]
            others = [turn_validation_stream(self.task, Turn(trained, self.places[mask])) for mask in judges]
            estimates = self.trainer.estimate_each(run, self.equal, self.stream, others, outer_step=0)
        for estimate in estimates:
            check_hypergradient_finite(estimate, f"draw {self.number + 1} of contradictions")
        checkpoint.save_checkpoint(self.folder, 0, [estimate.grad for estimate in estimates], {})
        return self._losses(run.end.params).tolist()

    def _retrain(self, fold: int) -> list[float]:
        """The losses of a part after training with the weights that the others chose."""
        restored = checkpoint.restore_checkpoint(self.folder, [self.equal] * self.num_folds)
        if restored is None:  # lost: made again
            self._estimate()
            restored = checkpoint.restore_checkpoint(self.folder, [self.equal] * self.num_folds)
            assert restored is not None
        self.part.set_phase(f"part {fold + 1} of {self.num_folds}")
        weights = _step_weights(restored.tree[fold], self.task.num_examples)
        params = self.trainer.run(weights, self.start, self.stream).end.params
        return self._losses(params)[self.fold_of == fold].tolist()

    def _losses(self, params: Params) -> Float[np.ndarray, "judges"]:
        task, examples = self.task, self.task.held_out_examples["validation"]
        frozen, stream = task.frozen(self.start.params), task.held_out_streams["validation"]
        losses = evaluate_per_example(task.outer_objective.losses, params, frozen, stream, len(examples))[self.places]
        if not np.isfinite(losses).all():
            example = examples[self.places[np.argmin(np.isfinite(losses))]]
            raise FloatingPointError(
                f"the validation loss of {example.where} is not finite after training. Lower optimizer.learning_rate, "
                "or look at this row."
            )
        return losses


@partial(jax.jit, static_argnums=1)
def _step_weights(grad: Float[jax.Array, "table"], num_examples: int) -> Float[jax.Array, "table"]:
    """The weights after one step from equal ones, along a hypergradient."""
    weighting = weightings.softmax(num_examples, padded_table_size(num_examples))
    logits = weighting.init()
    slope = weightings.weighting_vjp(weighting, logits, grad)
    return weighting.weights(weightings.normalized_gradient_step(STEP, LARGEST_STEP)(logits, slope))
