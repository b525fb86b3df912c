"""Cold retrains with learned weights and with simple alternatives."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.lm.data.batches import steps_per_epoch
from bilevel_jax.runs.config.load import SelectConfig
from bilevel_jax.runs.engine.outer_loop import LearnedWeights, good_label_mask
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.placement import place_table
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring import scores
from bilevel_jax.runs.stats import mean_interval, top_indices
from bilevel_jax.runs.tasks.splits import PART_NAMES
from bilevel_jax.runs.tasks.text import TextTask, evaluate_per_example

FIRST_RETRAIN_SEED = 10_000
"""Data orders of the comparison begin here: the learned weights have seen none of them."""


class RetrainVariant(NamedTuple):
    """One row of the table: which corpus rows it trains on, with which weights."""

    name: str
    meaning: str
    example_indices: Int[np.ndarray, "chosen"]
    weights: Float[np.ndarray, "corpus"]


def build_variants(
    task: TextTask,
    config: SelectConfig,
    learned: LearnedWeights,
    selected_indices: Int[np.ndarray, "selected"],
    session: Session,
) -> list[RetrainVariant]:
    """The rows of the table that the config asks for and the data allow."""
    all_indices, validation_indices = task.trainable_indices(), task.validation_indices()
    ones = np.ones(task.corpus.num_examples)
    learned_weights = ones.copy()
    learned_weights[: task.num_examples] = learned.weights
    count = len(selected_indices)
    subset_size = f"{count} rows"
    random_indices = np.sort(np.random.default_rng(config.data.seed).choice(all_indices, count, replace=False))
    good = good_label_mask(task, config)
    good_mask = np.zeros(task.num_examples, bool) if good is None else good

    def top_by_score(name: str) -> RetrainVariant:
        params = task.init_params(config.train.seed)
        values = scores.load_or_compute_score(name, name, task, params, config.scores, session).values
        return RetrainVariant(
            f"{name}, top", f"{subset_size} of the largest {name} by the model before training",
            top_indices(values, count, all_indices), ones,
        )  # fmt: skip

    builders: dict[str, Callable[[], RetrainVariant]] = {
        "uniform": lambda: RetrainVariant("uniform", "every row with weight 1", all_indices, ones),
        "learned": lambda: RetrainVariant("learned weights", "every row with its learned weight", all_indices, learned_weights),
        "selected": lambda: RetrainVariant("selected subset", f"the {subset_size} written to selected.jsonl, weight 1", selected_indices, ones),
        "random": lambda: RetrainVariant("random subset", f"{subset_size} drawn at random", random_indices, ones),
        "alignment": lambda: RetrainVariant(
            "alignment", f"{subset_size} best aligned with grad L_v after uniform training",
            top_indices(-learned.alignment, count, all_indices), ones,
        ),
        "low_loss": lambda: RetrainVariant(
            "low_loss", f"{subset_size} with the least loss after uniform training",
            top_indices(-learned.losses, count, all_indices), ones,
        ),
        "validation": lambda: RetrainVariant("validation only", "validation alone, weight 1", validation_indices, ones),
        "train+validation": lambda: RetrainVariant(
            "train + validation", "all rows and validation, weight 1", np.concatenate([all_indices, validation_indices]), ones
        ),
        "oracle": lambda: RetrainVariant(
            "oracle", f"the rows whose label is {config.data.good_label!r}", all_indices[good_mask[all_indices]], ones
        ),
    }  # fmt: skip
    names = [name for name in config.retrain.variants if name != "oracle" or good_mask.any()]
    return [builders[name]() if name in builders else top_by_score(name) for name in names]


def retrain_all_variants(
    task: TextTask, config: SelectConfig, trainer: Trainer, session: Session, variants: list[RetrainVariant]
) -> list[dict[str, Any]]:
    """Train every arm from cold under every seed; means with 95 % intervals over the seeds.

    The same number of steps for all: an arm with fewer rows makes more epochs, which the table states.
    """
    if not config.retrain.enabled:
        return []
    loss_fn = validation_loss_fn(task.problem)
    results = []
    for variant in variants:
        session.set_phase(f"comparing: {variant.name}")
        retrain_seed = partial(retrain_variant, task, config, trainer, session, loss_fn, variant)
        runs = [
            session.run_once(f"compare/{variant.name}/{seed}", partial(retrain_seed, seed))
            for seed in range(config.retrain.seeds)
        ]
        columns = [*PART_NAMES, "accuracy"]
        intervals = {
            column: mean_interval([run[column] for run in runs]) for column in columns if runs[0][column] is not None
        }
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


def retrain_variant(task, config, trainer, session, loss_fn, variant: RetrainVariant, seed: int) -> dict[str, Any]:
    """Train once from cold on the arm's rows and weights: L_v on each part (nats), accuracy on test."""
    start = trainer.init_state(task.init_params(config.train.seed + FIRST_RETRAIN_SEED + seed))
    stream = task.training_stream(config.data.seed + FIRST_RETRAIN_SEED + seed, variant.example_indices, packed=False)
    run = trainer.run(place_table(task.mesh, variant.weights.astype(jnp.result_type(float))), start, stream)
    fixed = task.frozen(start.params)
    losses = {
        part: float(loss_fn(run.end.params, fixed, task.held_out_streams[part]))
        if part in task.held_out_streams
        else None
        for part in PART_NAMES
    }
    test_part = "test" if "test" in task.held_out_streams else "validation"
    accuracies = evaluate_per_example(
        task.objective.accuracy,
        run.end.params,
        fixed,
        task.held_out_streams[test_part],
        len(task.held_out_examples[test_part]),
    )
    return {**losses, "accuracy": float(np.nanmean(accuracies))}


def _format_result(result: dict[str, Any], accuracy_name: str) -> str:
    mean, half = result["mean"].get("test"), result["interval"].get("test")
    loss = "" if mean is None else f"test loss {mean:.4f} ± {half:.4f}   "
    return f"{result['name']:<20}{loss}{accuracy_name} {result['mean']['accuracy']:.3f}   {result['rows']} rows"
