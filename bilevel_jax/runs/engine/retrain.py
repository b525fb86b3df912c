"""Cold retrains with learned weights and with simple alternatives."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.lm.data.batches import steps_per_epoch
from bilevel_jax.runs.config.schema import DataSection, RetrainSection, ScoresSection
from bilevel_jax.runs.engine.outer_loop import LearnedWeights
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.placement import place_table
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.scores import load_or_compute_score
from bilevel_jax.runs.stats import mean_interval, top_indices
from bilevel_jax.runs.tasks.evaluation import accuracy, headline_part, held_out_losses, read_labels
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import PART_NAMES
from bilevel_jax.runs.tasks.text import TextTask

FIRST_RETRAIN_SEED = 10_000
"""Data orders of the comparison begin here: the learned weights have seen none of them."""


class RetrainVariant(NamedTuple):
    """What a retrain is trained on: examples of the corpus and their weights; one line of the comparison table."""

    name: str
    meaning: str
    example_indices: Int[np.ndarray, "chosen"]
    weights: Float[np.ndarray, "corpus"]


def build_variants(
    task: TextTask,
    learned: LearnedWeights,
    selected_indices: Int[np.ndarray, "selected"],
    session: Session,
    *,
    retrain: RetrainSection,
    data: DataSection,
    scores: ScoresSection,
    train_seed: int,
) -> list[RetrainVariant]:
    """The variants that retrain.variants names and the data allow."""
    all_indices, validation_indices = task.trainable_indices(), task.validation_indices()
    ones = np.ones(task.corpus.num_examples)
    learned_weights = ones.copy()
    learned_weights[: task.num_examples] = learned.weights
    count = len(selected_indices)
    subset_size = f"{count} rows"
    random_indices = np.sort(np.random.default_rng(data.seed).choice(all_indices, count, replace=False))
    labels = read_labels(task, data)
    good_indices = np.flatnonzero(labels.good) if labels is not None else np.zeros(0, int)
    unlabelled = f"; {labels.num_unlabelled:,} have no label" if labels is not None and labels.num_unlabelled else ""

    def top_by_score(name: str) -> RetrainVariant:
        params = task.init_params(train_seed)
        values = load_or_compute_score(name, name, task, params, scores, session).values
        return RetrainVariant(
            f"{name}, top",
            f"{subset_size} of the largest {name} by the model before training",
            top_indices(values, count, all_indices),
            ones,
        )

    builders: dict[str, Callable[[], RetrainVariant]] = {
        "uniform": lambda: RetrainVariant("uniform", "every example with weight 1", all_indices, ones),
        "learned": lambda: RetrainVariant(
            "learned weights", "every example with its learned weight", all_indices, learned_weights
        ),
        "selected": lambda: RetrainVariant(
            "selected subset", f"the {subset_size} written to selected.jsonl, weight 1", selected_indices, ones
        ),
        "random": lambda: RetrainVariant("random subset", f"{subset_size} drawn at random", random_indices, ones),
        "top_alignment": lambda: RetrainVariant(
            "top_alignment",
            f"{subset_size} best aligned with grad L_v after uniform training",
            top_indices(-learned.alignment, count, all_indices),
            ones,
        ),
        "low_loss": lambda: RetrainVariant(
            "low_loss",
            f"{subset_size} with the least loss after uniform training",
            top_indices(-learned.losses, count, all_indices),
            ones,
        ),
        "validation": lambda: RetrainVariant("validation only", "validation alone, weight 1", validation_indices, ones),
        "train+validation": lambda: RetrainVariant(
            "train + validation",
            "all rows and validation, weight 1",
            np.concatenate([all_indices, validation_indices]),
            ones,
        ),
        "oracle": lambda: RetrainVariant(
            "oracle", f"the rows whose label is {data.good_label!r}{unlabelled}", good_indices, ones
        ),
    }
    names = [name for name in retrain.variants if name != "oracle" or len(good_indices)]
    return [builders[name]() if name in builders else top_by_score(name) for name in names]


def retrain_all_variants(
    task: TextTask,
    trainer: Trainer,
    session: Session,
    variants: list[RetrainVariant],
    *,
    retrain: RetrainSection,
    train_seed: int,
    data_seed: int,
) -> list[dict[str, Any]]:
    """Train every variant from cold under every seed; means with 95 % intervals over the seeds.

    The same number of steps for all: a variant with fewer examples makes more epochs, which the table states.
    """
    if not retrain.enabled:
        return []
    loss_fn = validation_loss_fn(task.problem)
    results = []
    for variant in variants:
        session.set_phase(f"comparing: {variant.name}")
        runs = [
            session.run_once(
                f"compare/{variant.name}/{seed}",
                partial(retrain_variant, task, trainer, loss_fn, variant, train_seed + seed, data_seed + seed),
            )
            for seed in range(retrain.seeds)
        ]
        columns = [column for column in (*PART_NAMES, "accuracy") if runs[0][column] is not None]
        intervals = {column: mean_interval([run[column] for run in runs]) for column in columns}
        results.append(
            {
                "name": variant.name,
                "meaning": variant.meaning,
                "rows": len(variant.example_indices),
                "steps": task.num_steps,
                "epochs": task.num_steps / steps_per_epoch(len(variant.example_indices), task.batch_size),
                "runs": runs,
                "mean": {column: mean for column, (mean, _) in intervals.items()},
                "interval": {column: half for column, (_, half) in intervals.items()},
            }
        )
        session.print_line(_format_result(results[-1], task.objective.accuracy_name))
    return results


def retrain_variant(
    task: Task, trainer: Trainer, loss_fn: Any, variant: RetrainVariant, train_seed: int, data_seed: int
) -> dict[str, Any]:
    """Train once from cold on the variant's examples and weights: the loss of each part (nats), the accuracy on test.

    The two seeds, of the start and of the data order, are moved by FIRST_RETRAIN_SEED.
    """
    start = trainer.init_state(task.init_params(train_seed + FIRST_RETRAIN_SEED))
    stream = task.training_stream(data_seed + FIRST_RETRAIN_SEED, variant.example_indices, packed=False)
    weights = place_table(task.mesh, variant.weights.astype(jnp.result_type(float)))
    params = trainer.run(weights, start, stream).end.params
    frozen = task.frozen(start.params)
    losses = held_out_losses(task, loss_fn, params, frozen)
    return {**losses, "accuracy": accuracy(task, params, frozen, headline_part(task))}


def _format_result(result: dict[str, Any], accuracy_name: str) -> str:
    mean, half = result["mean"].get("test"), result["interval"].get("test")
    interval = "" if half is None or np.isnan(half) else f" ± {half:.4f}"  # one seed has none
    loss = "" if mean is None else f"test loss {mean:.4f}{interval}   "
    return f"{result['name']:<20}{loss}{accuracy_name} {result['mean']['accuracy']:.3f}   {result['rows']} rows"
