"""Cold retrains on chosen examples and weights, and what they reach."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core.types import Frozen, Params
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.lm.data.batches import steps_per_epoch
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.distributed import fetch_from_first
from bilevel_jax.runs.infra.placement import place_table
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks.evaluation import (
    accuracy,
    accuracy_name,
    evaluate_per_example,
    has_target_readings,
    headline_part,
    held_out_indices,
    held_out_losses,
    read_targets,
)
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import PART_NAMES

FIRST_RETRAIN_SEED = 10_000
"""Data orders of the comparison begin here: the learned weights have seen none of them."""
NUM_STOPS = 16
"""Steps, about, at which a training that stops on dev is read, each later than the last by one factor."""
LOSS_DIGITS = 6
"""Decimals of the losses of single examples that are kept, in the unit of the loss."""


class RetrainVariant(NamedTuple):
    """What a retrain is trained on: examples of the corpus and their weights; one line of the comparison table."""

    name: str
    meaning: str
    example_indices: Int[np.ndarray, "chosen"]
    weights: Float[np.ndarray, "corpus"]
    stop_on_dev: bool = False
    """Take the model of the step with the least dev loss rather than the last."""
    choice: str = ""
    """What was chosen on dev, as jobs are named by it: the first retrain is the one that it was chosen by."""

    @property
    def key(self) -> str:
        """The name of its retrains among the session's jobs."""
        return f"{self.name}, {self.choice}" if self.choice else self.name


class Retrainer:
    """Trains variants from cold under the seeds of one comparison; each retrain is a finished job of the session."""

    def __init__(
        self,
        task: Task,
        trainer: Trainer,
        session: Session,
        prefix: str,
        *,
        train_seed: int,
        data_seed: int,
        keeps_last: bool = False,
    ):
        self.task, self.trainer, self.session, self.prefix = task, trainer, session, prefix
        self._keeps_last = keeps_last
        self._last: tuple[str, Params] | None = None
        self.train_seed, self.data_seed = train_seed + FIRST_RETRAIN_SEED, data_seed + FIRST_RETRAIN_SEED
        self.loss_fn = validation_loss_fn(task.problem)
        self._measured: dict[str, dict[str, Any]] = {}
        """By job: what was asked for twice is not counted as work twice."""

    def retrain(self, variant: RetrainVariant, key: str, seed: int) -> dict[str, Any]:
        """The loss of each part (nats), the accuracy on test, the step that the model is of, and its `dev_losses`: the
        loss of each dev example, None where there is no dev."""
        job = f"{self.prefix}/{key}/{seed}"
        if job not in self._measured:
            self.session.set_phase(f"{self.prefix}: {key}")
            self._measured[job] = self.session.run_once(job, lambda: self._measure(variant, job, seed))
        return dict(self._measured[job])

    def take_params(self, variant: RetrainVariant, key: str, seed: int) -> Params:
        """The parameters that a retrain has ended with: those of the last one are kept until they are taken, where
        `keeps_last` says so, and others are trained again."""
        last, self._last = self._last, None
        if last is not None and last[0] == f"{self.prefix}/{key}/{seed}":
            return last[1]
        del last  # not beside those of the training
        return self.train(variant, seed)[0]

    def drop_params(self) -> None:
        """Free the parameters of the last retrain, which nothing takes."""
        self._last = None

    def _measure(self, variant: RetrainVariant, job: str, seed: int) -> dict[str, Any]:
        self.drop_params()
        params, frozen, step = self.train(variant, seed)
        if self._keeps_last:
            self._last = job, params
        task = self.task
        losses: dict[str, Any] = held_out_losses(task, self.loss_fn, params, frozen)
        losses |= {"accuracy": accuracy(task, params, frozen, headline_part(task)), "step": step}
        if has_target_readings(task):
            losses["targets"] = {part: read_targets(task, params, frozen, part) for part in task.held_out_streams}
        return losses | {"dev_losses": self._dev_losses(params, frozen)}

    def _dev_losses(self, params: Params, frozen: Frozen) -> list[float] | None:
        if "dev" not in self.task.held_out_streams:
            return None
        stream, count = self.task.held_out_streams["dev"], len(self.task.held_out_examples["dev"])
        losses = evaluate_per_example(self.task.outer_objective.losses, params, frozen, stream, count)
        return [round(float(loss), LOSS_DIGITS) for loss in losses[held_out_indices(stream)]]

    def train(self, variant: RetrainVariant, seed: int) -> tuple[Params, Frozen, int]:
        """(parameters, constants of the losses, the step that the parameters are of) of one cold training.

        Seeds of the start and of the data order begin at FIRST_RETRAIN_SEED.
        """
        task = self.task
        start = self.trainer.init_state(task.init_params(self.train_seed + seed))
        stream = task.training_stream(self.data_seed + seed, variant.example_indices, packed=False)
        weights = place_table(task.mesh, variant.weights.astype(jnp.result_type(float)))
        frozen = task.frozen(start.params)
        if not variant.stop_on_dev:
            return self.trainer.run(weights, start, stream).end.params, frozen, task.num_steps
        stops = stopping_steps(task.num_steps)
        best: tuple[float, int, Params] | None = None

        def read_dev(step: int, params: Params) -> None:
            nonlocal best
            if step in stops:
                loss = float(fetch_from_first(self.loss_fn(params, frozen, task.held_out_streams["dev"])))
                if best is None or loss < best[0]:
                    best = loss, step, params

        self.trainer.run(weights, start, stream, on_params=read_dev)
        assert best is not None  # the last step is a stop
        return best[2], frozen, best[1]


def stopping_steps(num_steps: int) -> list[int]:
    """The steps after which a training that stops on dev is read: dense at the start, and the last is one."""
    return sorted({round(num_steps ** (stop / NUM_STOPS)) for stop in range(NUM_STOPS + 1)})


def retrain_variants(
    task: Task, retrainer: Retrainer, variants: Sequence[RetrainVariant], seeds: int
) -> tuple[list[dict[str, Any]], dict[str, Float[np.ndarray, "seeds dev"]]]:
    """Train every variant from cold under every seed: (lines of the table, dev losses of each variant).

    The lines hold means with 95 % intervals over the seeds. All make the same number of steps: a variant with fewer
    examples makes more epochs, which the table states. There are no dev losses where there is no dev.
    """
    lines, dev_losses = [], {}
    for variant in variants:
        runs = [retrainer.retrain(variant, variant.key, seed) for seed in range(seeds)]
        losses = [run.pop("dev_losses") for run in runs]
        if losses[0] is not None:
            dev_losses[variant.name] = np.array(losses)
        columns = [column for column in (*PART_NAMES, "accuracy") if runs[0][column] is not None]
        intervals = {column: mean_interval([run[column] for run in runs]) for column in columns}
        lines.append(
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
        retrainer.session.print_line(_format_line(lines[-1], accuracy_name(task)))
    return lines, dev_losses


def _format_line(line: dict[str, Any], accuracy_name: str) -> str:
    mean, half = line["mean"].get("test"), line["interval"].get("test")
    interval = "" if half is None or np.isnan(half) else f" ± {half:.4f}"  # one seed has none
    loss = "" if mean is None else f"test loss {mean:.4f}{interval}   "
    accuracy = f"{accuracy_name} {line['mean']['accuracy']:.3f}   " if accuracy_name else ""
    return f"{line['name']:<22}{loss}{accuracy}{line['rows']} examples"
