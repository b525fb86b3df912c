"""The `train` command, which fine-tunes with a weight for every example."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.commands.train import report
from bilevel_jax.core.training import forward_only_step, init_train_state
from bilevel_jax.core.types import Batch, Hyper, Params, Problem, Stream, TrainState
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.lm.data import batches
from bilevel_jax.runs.budget import usage
from bilevel_jax.runs.config.load import TrainConfig, config_hash
from bilevel_jax.runs.engine import artifacts
from bilevel_jax.runs.engine.nonfinite import find_first_nonfinite
from bilevel_jax.runs.engine.trainer import check_finite, describe_example
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir
from bilevel_jax.runs.infra.placement import place_stream, place_table, replicate, replicate_unplaced
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.scoring import from_file, scores
from bilevel_jax.runs.scoring.online import Reweighting
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import resolve_builtin
from bilevel_jax.runs.tasks.objective import check_examples
from bilevel_jax.runs.tasks.optimizers import learning_rate_schedule
from bilevel_jax.runs.tasks.streaming import StreamingBatches
from bilevel_jax.runs.tasks.text import TextTask, evaluate_per_example, prepare_text_task, tokenize_examples

LOSS_SYNC_STEPS = 10
"""Steps between two looks at the losses: each look waits for the device."""


class TrainingInput(NamedTuple):
    """What training reads."""

    batch_at: Callable[[int], tuple[Hyper, Batch]]
    """step -> (the weights as `problem` reads them, the batch), on the mesh."""
    problem: Problem
    update_weights: Callable[[int, Params], None] = lambda step, params: None
    """(step, parameters before it): called before each step, so that the weights may follow the model."""
    update_steps: tuple[int, ...] = ()
    """The steps at which `renew` may take long."""


class TrainCheckpoint(NamedTuple):
    """What a checkpoint keeps."""

    state: TrainState
    best_params: Params
    """The parameters of the least dev loss so far; () where the last ones are kept."""


class TrainingResult(NamedTuple):
    """The parameters to keep, and how training went."""

    params: Params
    final_metrics: dict[str, Any]
    """What the kept parameters do on the validation examples."""
    evaluations: list[dict[str, Any]]
    tokens: int
    seconds: float
    """Of training, without evaluation."""
    tokens_per_second: float
    """Supervised tokens per second after the first steps, which compile; nan for a run as short as that."""
    start_step: int
    """The step that this process began with."""
    num_skipped: int
    """Steps that were left out because their gradient was not finite."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the command in `config.output.folder` and return what result.json holds.

    Raises ValueError for input that cannot be used, FileExistsError for a folder that holds a run, FloatingPointError
    for a training that diverges, and `session.Interrupted` when asked to stop.
    """
    with open_run_dir(config) as folder:
        resolved = resolve_builtin(config, folder)
        dataset = splits.load_splits(resolved.data)
        if config.weights.score:
            scores.check_score_name(config.weights.score, holdout=bool(dataset.held_out["validation"]))
        loaded_weights = (
            from_file.load_weights(resolved.weights, dataset.train)
            if dataset.train
            else from_file.describe_unread_weights(resolved.weights)
        )
        kept_examples = [
            example for example, is_kept in zip(dataset.train, loaded_weights.keep_mask, strict=True) if is_kept
        ]
        steps = count_train_steps(config, len(kept_examples))
        task = prepare_text_task(
            resolved, dataset._replace(train=kept_examples), folder, num_steps=steps, seeds=[config.data.seed]
        )
        if config.train.load_best and "dev" not in task.held_out_streams:
            raise ValueError("train.load_best chooses by dev, which has no rows: give data.validation or .select.")
        with start_session(config, folder) as session:
            usage.predict_usage(task, config, session)
            example_weights = loaded_weights.weights[loaded_weights.keep_mask]
            reweighting = Reweighting(task, config, session) if config.weights.score else None
            loaded_weights = loaded_weights._replace(source=reweighting.source) if reweighting else loaded_weights
            for note in [
                *task.notes,
                f"weights: {loaded_weights.source}{'' if reweighting else _describe_weights(example_weights)}.",
            ]:
                session.print_line(note)
            if reweighting:
                training_result = _run_training(task, config, _scored_weights_input(task, config, reweighting), session)
                example_weights = reweighting.summarize_weights().weights
            elif not config.data.streaming:
                training_result = _run_training(
                    task, config, _constant_weights_input(task, config, example_weights), session
                )
            else:
                training_input, example_stream = _streaming_input(task, resolved)
                training_result = _run_training(task, config, training_input, session)
                task = task._replace(examples=list(example_stream.seen_examples.values()))
                example_weights = np.array([example_stream.weight_of(example) for example in task.examples], float)
            return _write_outputs(
                task, config, loaded_weights, example_weights, reweighting, training_result, session, folder
            )


def count_train_steps(config: TrainConfig, num_examples: int) -> int:
    """Optimiser steps of the run: as many as are asked for, or as the epochs over so many rows have."""
    if config.train.max_steps:
        return config.train.max_steps
    return math.ceil(config.train.num_epochs * batches.steps_per_epoch(num_examples, config.train.global_batch_size))


def _constant_weights_input(task: TextTask, config: TrainConfig, example_weights: np.ndarray) -> TrainingInput:
    """One weight for each row, from the beginning to the end."""
    hyper = place_table(task.mesh, example_weights.astype(config.model.param_dtype))
    stream = task.training_stream(config.data.seed)
    return TrainingInput(lambda step: (hyper, stream.batch(step)), task.problem)


def _scored_weights_input(task: TextTask, config: TrainConfig, reweighting: Reweighting) -> TrainingInput:
    """The weights that a score gives to the rows of each step."""
    stream = task.training_stream(config.data.seed)
    return TrainingInput(
        lambda step: (reweighting.step_weights(step), stream.batch(step)),
        reweighting.problem,
        reweighting.update_scores,
        reweighting.refresh_steps,
    )


def _streaming_input(task: TextTask, config: TrainConfig) -> tuple[TrainingInput, StreamingBatches]:
    """Rows that are read as training goes, with their weights; and what reads them."""
    dtype = config.model.param_dtype
    example_stream = StreamingBatches(
        config.data,
        task.layout,
        weight_of=from_file.make_weight_function(config.weights),
        tokenize=lambda examples: tokenize_examples(config, examples, task.tokenizer, task.architecture),
        check_examples=lambda examples: check_examples(config.objective, examples),
        held_out_examples=[example for part in task.held_out_examples.values() for example in part],
    )

    def batch_at(step: int) -> tuple[Hyper, Batch]:
        hyper, batch = example_stream.batch(step)
        device_stream = place_stream(task.mesh, Stream(lambda _: batch, 1))
        return replicate(task.mesh, jnp.asarray(hyper, dtype)), device_stream.batch(0)

    return TrainingInput(batch_at, task.problem), example_stream


def _run_training(
    task: TextTask, config: TrainConfig, training_input: TrainingInput, session: Session
) -> TrainingResult:
    folder, eval_steps = session.folder / "checkpoints" / "train", config.train.eval_steps
    load_best = config.train.load_best
    optimizer = task.optimizer
    if config.train.max_nonfinite_steps:  # the step then leaves the parameters and the optimiser's state as they are
        optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=config.train.max_nonfinite_steps)
    step = forward_only_step(training_input.problem, optimizer)
    rates = np.asarray(
        jax.vmap(learning_rate_schedule(config.optimizer, task.num_steps))(jnp.arange(task.num_steps)), float
    )
    evaluator = _make_evaluator(task)
    # copied: a step takes the memory of the state that it is given, and the model's own must stay
    params = jax.tree.map(jnp.copy, task.init_params(config.train.seed))
    start = replicate_unplaced(task.mesh, init_train_state(optimizer, params))
    progress = TrainCheckpoint(start, jax.tree.map(jnp.copy, params) if load_best else ())
    frozen = task.frozen(params)
    records: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    if restored := checkpoint.restore_checkpoint(folder, progress):
        progress, records = restored.tree, restored.meta["records"]
        tokens, seconds = restored.meta["tokens"], restored.meta["seconds"]
    state, best = progress
    resumed = int(state.step)
    session.set_phase("training", total=float(task.num_steps))
    session.advance(resumed)

    def evaluate(reached: int) -> None:
        nonlocal best
        record = {"step": reached, **evaluator(state.params, frozen, full=reached == 0)}
        if load_best and _is_best(records, record):
            best = jax.tree.map(jnp.copy, state.params)
        records.append(record)
        session.log.write({"event": "evaluated", **record})
        session.print_line(_format_evaluation(record, task.objective.loss_unit))

    def explain(broken: int) -> str:
        saved = checkpoint.restore_checkpoint(folder, progress)
        began = saved.tree.state if saved else init_train_state(optimizer, task.init_params(config.train.seed))
        return find_first_nonfinite(
            training_input.problem, optimizer, task.objective.losses, began, broken, frozen, training_input.batch_at,
            (lambda slot: f"row {slot + 1} of the batch") if config.data.streaming else lambda row: describe_example(task, row),
        )  # fmt: skip

    def count_skipped() -> int:
        return int(state.opt_state.total_notfinite) if config.train.max_nonfinite_steps else 0

    if not records and task.held_out_streams:
        evaluate(0)
    losses: dict[int, jax.Array] = {}
    counts: list[jax.Array] = []
    began, token_rate = time.monotonic(), _TokenRate()
    for index in range(resumed, task.num_steps):
        seconds += time.monotonic() - began
        training_input.update_weights(index, state.params)
        began = time.monotonic()
        if index in training_input.update_steps:
            token_rate.pause()
        hyper, batch = training_input.batch_at(index)
        state, losses[index] = step(state, hyper, frozen, batch)
        counts.append(batch["targeted"])
        session.advance()
        reached, due = (
            index + 1,
            session.should_save() or index + 1 in training_input.update_steps,
        )  # making scores may be stopped, too
        last = reached == task.num_steps
        if due or last or reached % LOSS_SYNC_STEPS == 0 or reached % eval_steps == 0:
            skipped = count_skipped()
            values = check_finite(
                task, losses, explain, state.params, allow_nonfinite=0 < skipped <= config.train.max_nonfinite_steps
            )
            if skipped_steps := [at for at, loss in values.items() if not math.isfinite(loss)]:
                session.print_line(
                    f"left out, as the loss was not finite: step {', '.join(map(str, skipped_steps))} ({skipped} so far)"
                )
            new_tokens = sum(int(count[0]) for count in counts)
            session.log.write(
                {
                    "event": "steps",
                    "step": reached,
                    "first": min(values),
                    "losses": list(values.values()),
                    "rates": [float(rates[at]) for at in values],
                }
            )
            tokens += new_tokens
            token_rate.add(new_tokens)
            losses.clear()
            counts.clear()
        if task.held_out_streams and (last or reached % eval_steps == 0):
            seconds += time.monotonic() - began
            evaluate(reached)
            began = time.monotonic()
            token_rate.pause()
        if due or last:
            meta = {"records": records, "tokens": tokens, "seconds": seconds + time.monotonic() - began}
            checkpoint.save_checkpoint(folder, reached, TrainCheckpoint(state, best), meta)
            session.mark_saved()
    seconds += time.monotonic() - began
    final_params = best if load_best else state.params
    return TrainingResult(
        final_params,
        evaluator(final_params, frozen, full=True),
        records,
        tokens,
        seconds,
        token_rate.rate(),
        resumed,
        count_skipped(),
    )


class _TokenRate:
    """Tokens per second, without the first count (compilation) and without what lies between `pause` and the next."""

    def __init__(self):
        self.tokens, self.seconds, self.last = 0, 0.0, None

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        if self.last is not None:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + now - self.last
        self.last = now

    def pause(self) -> None:
        self.last = time.monotonic() if self.last is not None else None

    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("nan")


def _make_evaluator(task: TextTask):
    """(params, fixed, full) -> L_v of each part, and with `full` the accuracies."""
    value = validation_loss_fn(task.problem)

    def evaluate(params: Params, frozen: Any, *, full: bool) -> dict[str, Any]:
        losses = {part: float(value(params, frozen, stream)) for part, stream in task.held_out_streams.items()}
        accuracy = None
        if full:
            accuracy = {
                part: float(
                    np.nanmean(
                        evaluate_per_example(
                            task.objective.accuracy, params, frozen, stream, len(task.held_out_examples[part])
                        )
                    )
                )
                for part, stream in task.held_out_streams.items()
            }
        return {"loss": losses, "accuracy": accuracy}

    return evaluate


def _write_outputs(
    task: TextTask,
    config: TrainConfig,
    loaded_weights: from_file.LoadedWeights,
    example_weights: np.ndarray,
    reweighting: Reweighting | None,
    training_result: TrainingResult,
    session: Session,
    folder: Path,
) -> dict[str, Any]:
    session.set_phase("writing")
    run_dir.write_parquet(
        folder / "weights.parquet", artifacts.train_weights_table(task, config, example_weights, loaded_weights.source)
    )
    artifacts.write_model(
        folder / "model", task, training_result.params, base_path=config.model.name_or_path, parts=config.output.model
    )
    records = training_result.evaluations
    best = min(records, key=lambda record: record["loss"]["dev"]) if config.train.load_best else None
    ends = {"before": records[0], "after": training_result.final_metrics} if records else {}
    result = {
        "steps": task.num_steps,
        "epochs": task.num_steps
        * task.batch_size
        / task.num_examples  # streamed: no step is cut short at the end of an epoch
        if config.data.streaming
        else task.num_steps / batches.steps_per_epoch(len(task.trainable_indices()), task.batch_size),
        "batch": config.train.global_batch_size,
        "rows": {
            "train": task.num_examples,
            **{part: len(examples) for part, examples in task.held_out_examples.items()},
        },
        "objective": config.objective.name,
        "unit": task.objective.loss_unit,
        "right": task.objective.accuracy_name,
        "parts": {
            part: {
                when: {"loss": record["loss"][part], "accuracy": record["accuracy"][part]}
                for when, record in ends.items()
            }
            for part in task.held_out_streams
        },
        "best": {"step": best["step"], "part": "dev"} if best else None,
        "kept": "best" if config.train.load_best else "last",
        "tokens": training_result.tokens,
        "seconds": training_result.seconds,
        "skipped": training_result.num_skipped,
        "tokens_per_second": training_result.tokens_per_second
        if math.isfinite(training_result.tokens_per_second)
        else None,
        "weights": {
            "source": loaded_weights.source,
            "ess": float(example_weights.sum() ** 2 / (example_weights**2).sum()),
            "mean": float(example_weights.mean()),
            "zero": int((example_weights == 0).sum()),
            "missing": loaded_weights.num_missing,
        },
        "scoring": reweighting.to_result(training_result.seconds) if reweighting else None,
        "records": records,
        "notes": task.notes
        + ([f"{training_result.num_skipped} steps were left out: not finite."] if training_result.num_skipped else []),
        "resumed": training_result.start_step,
        "config_hash": config_hash(config),
        "estimate": usage.predict_usage(task, config, session),
        "measured": usage.measure_usage(
            task, folder, training_steps=session.work_done, seconds=training_result.seconds, timed_steps=task.num_steps
        ),
    }
    run_dir.write_atomic(folder / "result.json", json.dumps(result, indent=1))
    distributed.run_on_first_process(lambda: report.write_train_report(folder, task.examples))
    return result


def summarize_training(result: dict[str, Any]) -> str:
    """One sentence: what the validation loss did."""
    parts = result["parts"]
    steps_text = f"{result['steps']:,} steps on {result['rows']['train']:,} rows"
    part = next((name for name in ("test", "dev", "validation") if name in parts), None)
    if part is None:
        return f"{steps_text}; no validation examples were given, so nothing says whether the model became better."
    before, after = parts[part]["before"]["loss"], parts[part]["after"]["loss"]
    direction = "fell" if after < before else "ROSE"
    return f"{steps_text}; {part} loss {direction} from {before:.4f} to {after:.4f} {result['unit']}."


def _is_best(records: list[dict[str, Any]], record: dict[str, Any]) -> bool:
    return all(record["loss"]["dev"] < other["loss"]["dev"] for other in records)


def _describe_weights(example_weights: np.ndarray) -> str:
    if not len(example_weights):
        return ""
    zero, effective = int((example_weights == 0).sum()), example_weights.sum() ** 2 / (example_weights**2).sum()
    return f"; mean {example_weights.mean():.3g}, {zero:,} of {len(example_weights):,} are 0, effective size {effective:.0f}"


def _format_evaluation(record: dict[str, Any], unit: str) -> str:
    loss = " ".join(f"{part} {value:.4f}" for part, value in record["loss"].items())
    return f"step {record['step']:>6}   L_v ({unit}): {loss}"
