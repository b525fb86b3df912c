"""The `train` command, which fine-tunes with a weight for every example."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel_jax.commands.train import report
from bilevel_jax.commands.train.loop import TrainingInput, TrainingLoop, TrainingResult
from bilevel_jax.core.types import Batch, Hyper, Stream
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.examples import describe_unread_keys, format_count
from bilevel_jax.lm.data.vocabulary import largest_token_id
from bilevel_jax.runs.budget import usage
from bilevel_jax.runs.budget.work import count_train_steps
from bilevel_jax.runs.config.load import TrainConfig, config_hash
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.engine import artifacts
from bilevel_jax.runs.evaluation.measures import Evaluation
from bilevel_jax.runs.evaluation.run_models import RunModel, compare_run_models, prepare_run_evaluation
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.infra.placement import place_stream, place_table, replicate
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.scoring import from_file, likelihoods, scores
from bilevel_jax.runs.scoring.online import Reweighting
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import resolve_builtin
from bilevel_jax.runs.tasks.objective import check_examples
from bilevel_jax.runs.tasks.streaming import StreamingBatches
from bilevel_jax.runs.tasks.text import TextTask, prepare_text_task, tokenize_examples


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises ValueError for input that cannot be used, FileExistsError for a folder that holds a run, FloatingPointError
    for a training run that diverges, and `Interrupted` when asked to stop.
    """
    with open_run_dir(config) as folder:
        resolved = resolve_builtin(config, folder)
        dataset = splits.load_splits(resolved.data)
        if config.train.load_best and not dataset.held_out["dev"]:
            raise ValueError(
                "train.load_best chooses by dev, which has no examples: give data.dev, or data.validation with a "
                "share for dev in data.split."
            )
        if config.weights.score:
            scores.check_score_name(config.weights.score, holdout=bool(dataset.held_out["validation"]))
            likelihoods.check_embeddings(config.scores, dataset.train, dataset.held_out["validation"])
        loaded_weights = (
            from_file.load_weights(resolved.weights, dataset.train)
            if dataset.train
            else from_file.describe_unread_weights(resolved.weights)
        )
        kept_examples = [
            example for example, is_kept in zip(dataset.train, loaded_weights.keep_mask, strict=True) if is_kept
        ]
        dataset = dataset._replace(train=kept_examples)
        if config.weights.tokens:
            token_weights, note = from_file.load_token_weights(resolved.weights.tokens, kept_examples)
            dataset = dataset._replace(token_weights=token_weights, notes=[*dataset.notes, note])
        steps = count_train_steps(config.train, len(kept_examples))
        task = prepare_text_task(resolved, dataset, folder, num_steps=steps, seeds=[config.data.seed])
        evaluation = prepare_run_evaluation(config, resolved.evaluate.prompts, task)
        with start_session(config, folder) as session:
            usage.predict_usage(task, config, session)
            example_weights = loaded_weights.weights[loaded_weights.keep_mask]
            if not (config.data.streaming or example_weights[task.trainable_indices()].any()):
                raise ValueError(
                    "every example that fits data.max_length has weight 0, so nothing would be learned. Raise "
                    "data.max_length, or choose another weights.column."
                )
            reweighting = _make_reweighting(task, config, session)
            loaded_weights = loaded_weights._replace(source=reweighting.source) if reweighting else loaded_weights
            for note in [
                *task.notes,
                f"weights: {loaded_weights.source}{'' if reweighting else _describe_weights(example_weights)}"
                f"{_describe_unused(loaded_weights)}.",
            ]:
                session.print_line(note)
            stream: StreamingBatches | None = None
            if reweighting:
                training_input = _scored_weights_input(task, config.data, reweighting)
            elif config.data.streaming:
                streamed_weights = from_file.StreamedWeights(resolved.weights)
                training_input, stream = _streaming_input(task, resolved, streamed_weights)
            else:
                training_input = _constant_weights_input(task, example_weights, config)
            training_result = TrainingLoop(
                task,
                training_input,
                session,
                train=config.train,
                optimizer=config.optimizer,
                is_streaming=config.data.streaming,
            ).run()
            if reweighting:
                example_weights = reweighting.summarize_weights().weights
            if stream is not None:
                task = task._replace(examples=list(stream.seen_examples.values()))
                for note in describe_unread_keys(task.examples):
                    session.print_line(note)
                example_weights = np.array([stream.weight_of(example) for example in task.examples], float)
                loaded_weights = loaded_weights._replace(num_missing=streamed_weights.count_missing(task.examples))
            return _write_outputs(
                task, config, loaded_weights, example_weights, reweighting, training_result, evaluation, session, folder
            )


def _make_reweighting(task: TextTask, config: TrainConfig, session: Session) -> Reweighting | None:
    """What weighs the examples by a score as the model trains, where weights.score names one."""
    if not config.weights.score:
        return None
    return Reweighting(
        task,
        session,
        weights=config.weights,
        scores=config.scores,
        data=config.data,
        param_dtype=config.model.param_dtype,
    )


def _constant_weights_input(task: TextTask, example_weights: np.ndarray, config: TrainConfig) -> TrainingInput:
    """One weight for each example, from the beginning to the end."""
    hyper = place_table(task.mesh, example_weights.astype(config.model.param_dtype))
    stream = task.training_stream(config.data.seed)
    return TrainingInput(lambda step: (hyper, stream.batch(step)), task.problem)


def _scored_weights_input(task: TextTask, data: DataSection, reweighting: Reweighting) -> TrainingInput:
    """The weights that a score gives to the examples of each step."""
    stream = task.training_stream(data.seed)
    return TrainingInput(
        lambda step: (reweighting.step_weights(step), stream.batch(step)),
        reweighting.problem,
        reweighting.update_scores,
        reweighting.refresh_steps,
        reweighting.restore,
    )


def _streaming_input(
    task: TextTask, config: TrainConfig, weights: from_file.StreamedWeights
) -> tuple[TrainingInput, StreamingBatches]:
    """Rows that are read as training goes, with their weights; and what reads them."""
    dtype = config.model.param_dtype
    example_stream = StreamingBatches(
        config.data,
        task.layout,
        task.mesh,
        weight_of=weights,
        tokenize=lambda examples, allow_empty: tokenize_examples(
            config.data, examples, task.tokenizer, task.architecture, allow_empty=allow_empty
        )[0],
        check_examples=lambda examples: check_examples(config.objective, examples),
        held_out_examples=[example for part in task.held_out_examples.values() for example in part],
    )
    if largest_token_id(task.tokenizer) >= task.architecture.vocab_size:
        example_stream.check_tokens()

    def batch_at(step: int) -> tuple[Hyper, Batch]:
        hyper, batch = example_stream.batch(step)
        device_stream = place_stream(task.mesh, Stream(lambda _: batch, 1))
        return replicate(task.mesh, jnp.asarray(hyper, dtype)), device_stream.batch(0)

    return TrainingInput(batch_at, task.problem, restore=example_stream.restore), example_stream


def _write_outputs(
    task: TextTask,
    config: TrainConfig,
    loaded_weights: from_file.LoadedWeights,
    example_weights: np.ndarray,
    reweighting: Reweighting | None,
    training_result: TrainingResult,
    evaluation: Evaluation | None,
    session: Session,
    folder: Path,
) -> dict[str, Any]:
    session.set_phase("writing")
    run_dir.write_parquet(
        folder / "weights.parquet",
        artifacts.train_weights_table(
            task, example_weights, source=loaded_weights.source, config_hash=config_hash(config)
        ),
    )
    artifacts.write_model(
        folder / "model", task, training_result.params, base_path=config.model.name_or_path, parts=config.output.model
    )
    run_models = [
        RunModel("after", "the model after training", lambda: training_result.params),
        RunModel("before", "the model before training", lambda: task.init_params(config.train.seed)),
    ]
    evaluated = compare_run_models(config, task, evaluation, run_models, session) if evaluation else None
    records, timing = training_result.evaluations, training_result.timing
    best = min(records, key=lambda record: record["loss"]["dev"]) if config.train.load_best else None
    ends = {"before": records[0], "after": training_result.final_metrics} if records else {}
    result = {
        "steps": task.num_steps,
        "epochs": _count_epochs(task, is_streaming=config.data.streaming),
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
        "seconds": timing.seconds,
        "skipped": training_result.num_skipped,
        "tokens_per_second": timing.tokens_per_second,
        "weights": _summarize_weights(loaded_weights, example_weights),
        "scoring": reweighting.to_result(timing.seconds) if reweighting else None,
        "records": records,
        "evaluate": evaluated,
        "notes": task.notes
        + (
            [f"{format_count('step', training_result.num_skipped, ('was', 'were'))} left out: not finite."]
            if training_result.num_skipped
            else []
        ),
        "resumed": timing.start_step,
        "config_hash": config_hash(config),
        "estimate": usage.predict_usage(task, config, session),
        "measured": usage.measure_usage(
            task, session, training_steps=session.work_done, seconds=timing.seconds, timed_steps=task.num_steps
        ),
    }
    run_dir.write_result(folder, result)
    distributed.run_on_first_process(lambda: report.write_train_report(folder, task.examples))
    return result


def _count_epochs(task: TextTask, *, is_streaming: bool) -> float:
    if is_streaming:  # no step is cut short at the end of an epoch
        return task.num_steps * task.batch_size / task.num_examples
    return task.num_steps / batches.steps_per_epoch(len(task.trainable_indices()), task.batch_size)


def _summarize_weights(loaded_weights: from_file.LoadedWeights, example_weights: np.ndarray) -> dict[str, Any]:
    return {
        "source": loaded_weights.source,
        "ess": float(example_weights.sum() ** 2 / (example_weights**2).sum()),
        "mean": float(example_weights.mean()),
        "zero": int((example_weights == 0).sum()),
        "missing": loaded_weights.num_missing,
        "unused": loaded_weights.num_unused,
    }


def _describe_unused(loaded_weights: from_file.LoadedWeights) -> str:
    count = loaded_weights.num_unused
    return f"; {count:,} ids of the file are those of no training example" if count else ""


def _describe_weights(example_weights: np.ndarray) -> str:
    if not len(example_weights):
        return ""
    zero, effective = int((example_weights == 0).sum()), example_weights.sum() ** 2 / (example_weights**2).sum()
    mean, count = example_weights.mean(), len(example_weights)
    return f"; mean {mean:.3g}, {zero:,} of {count:,} are 0, effective size {effective:.0f}"
