"""Training loop of the `train` command, first-order, evaluated and resumable."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core.training import forward_only_step, init_train_state
from bilevel_jax.core.types import Batch, Hyper, Params, Problem, TrainState
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.runs.config.schema import FineTuneSection, OptimizerSection
from bilevel_jax.runs.engine.nonfinite import find_first_nonfinite
from bilevel_jax.runs.engine.trainer import check_finite, describe_example
from bilevel_jax.runs.infra import checkpoint, distributed
from bilevel_jax.runs.infra.placement import replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.infra.step_loop import run_steps
from bilevel_jax.runs.tasks.evaluation import accuracy
from bilevel_jax.runs.tasks.optimizers import learning_rate_schedule
from bilevel_jax.runs.tasks.protocol import Task

LOSS_SYNC_STEPS = 10
"""Steps between two readings of the losses: each reading waits for the device."""


class TrainingInput(NamedTuple):
    """What a training run reads: the weights and the batch of each step."""

    batch_at: Callable[[int], tuple[Hyper, Batch]]
    """step -> (the weights as `problem` reads them, the batch), on the mesh."""
    problem: Problem
    update_weights: Callable[[int, Params], None] = lambda step, params: None
    """(step, parameters before it): called before each step, so that the weights may follow the model."""
    update_steps: tuple[int, ...] = ()
    """The steps at which `update_weights` may take long."""
    restore: Callable[[int], None] = lambda step: None
    """(number of steps): have what those steps left behind; called where a run goes on after them, or has made all."""


class TrainCheckpoint(NamedTuple):
    """The content of a checkpoint."""

    state: TrainState
    best_params: Params
    """The parameters of the least dev loss so far; () where the last ones are written."""


class TrainingTiming(NamedTuple):
    """How long training took: of the process that made the last step, whatever processes come after it."""

    seconds: float
    """Of training, without evaluation."""
    tokens_per_second: float | None
    """Supervised tokens per second after the first steps, which compile; None for a run as short as that."""
    start_step: int
    """The step that the process began with."""


class TrainingResult(NamedTuple):
    """The parameters to write, and how training went."""

    params: Params
    final_metrics: dict[str, Any]
    """Losses and accuracies of these parameters on the held-out examples."""
    evaluations: list[dict[str, Any]]
    tokens: int
    num_skipped: int
    """Steps that were left out because their gradient was not finite."""
    timing: TrainingTiming


class TrainingLoop:
    """A training run and what it has measured so far, restored from its last checkpoint."""

    def __init__(
        self,
        task: Task,
        training_input: TrainingInput,
        session: Session,
        *,
        train: FineTuneSection,
        optimizer: OptimizerSection,
        is_streaming: bool,
    ):
        self.task, self.input, self.session, self.config = task, training_input, session, train
        self.folder = session.folder / "checkpoints" / "train"
        self._is_streaming = is_streaming
        self._optimizer = task.optimizer
        if train.max_nonfinite_steps:  # the step then leaves the parameters and the optimizer's state as they are
            self._optimizer = optax.apply_if_finite(task.optimizer, max_consecutive_errors=train.max_nonfinite_steps)
        self._step = forward_only_step(training_input.problem, self._optimizer)
        schedule = learning_rate_schedule(optimizer, task.num_steps)
        self._learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(task.num_steps)), float)
        self._validation_loss = validation_loss_fn(task.problem)
        # copied: a step takes the memory of the state that it is given, and the model's own must stay
        params = jax.tree.map(jnp.copy, task.init_params(train.seed))
        start = replicate_unplaced(task.mesh, init_train_state(self._optimizer, params))
        self._checkpoint = TrainCheckpoint(start, jax.tree.map(jnp.copy, params) if train.load_best else ())
        self._frozen = task.frozen(params)
        self.records: list[dict[str, Any]] = []
        self.tokens, self.seconds = 0, 0.0
        if restored := checkpoint.restore_checkpoint(self.folder, self._checkpoint):
            self._checkpoint, self.records = restored.tree, restored.meta["records"]
            self.tokens, self.seconds = restored.meta["tokens"], restored.meta["seconds"]
        self._best_params = self._checkpoint.best_params
        self.start_step = int(self._checkpoint.state.step)
        self._unread_losses: dict[int, jax.Array] = {}
        self._unread_tokens: list[jax.Array] = []
        self._timer_start = time.monotonic()
        self._token_rate = _TokenRate()

    def run(self) -> TrainingResult:
        """Train to the end, and evaluate the parameters to write."""
        state = self._checkpoint.state
        self.session.set_phase("training", total=float(self.task.num_steps))
        self.session.advance(self.start_step)
        if not self.records and self.task.held_out_streams:
            self._record_evaluation(0, state)
        self.input.restore(self.start_step)
        self._timer_start = time.monotonic()
        remaining = range(self.start_step, self.task.num_steps)
        state = run_steps(self.session, self._take_step, state, remaining, on_step=self._on_step, save=self._save)
        distributed.run_on_first_process(lambda: checkpoint.keep_last_checkpoints(self.session.folder))
        params = self._best_params if self.config.load_best else state.params
        return TrainingResult(
            params,
            self._evaluate(params, with_accuracy=True),
            self.records,
            self.tokens,
            self._count_skipped(state),
            TrainingTiming(**self.session.run_once("timing", lambda: self._timing()._asdict())),
        )

    def _timing(self) -> TrainingTiming:
        rate = self._token_rate.rate()
        return TrainingTiming(self.seconds, rate if math.isfinite(rate) else None, self.start_step)

    def _take_step(self, index: int, state: TrainState) -> TrainState:
        self._stop_timer()
        self.input.update_weights(index, state.params)
        self._timer_start = time.monotonic()
        if index in self.input.update_steps:
            self._token_rate.pause()
        hyper, batch = self.input.batch_at(index)
        state, self._unread_losses[index] = self._step(state, hyper, self._frozen, batch)
        self._unread_tokens.append(batch["targeted"])
        return state

    def _on_step(self, steps_done: int, state: TrainState, save_due: bool) -> bool:
        """Read the losses and evaluate where it is time to; whether to save now."""
        is_last, is_evaluated = steps_done == self.task.num_steps, steps_done % self.config.eval_steps == 0
        save_due = save_due or steps_done in self.input.update_steps  # computing scores may be stopped, too
        if save_due or is_last or is_evaluated or steps_done % LOSS_SYNC_STEPS == 0:
            self._read_losses(steps_done, state)
        if self.task.held_out_streams and (is_last or is_evaluated):
            self._stop_timer()
            self._record_evaluation(steps_done, state)
            self._timer_start = time.monotonic()
            self._token_rate.pause()
        return save_due or is_last

    def _save(self, steps_done: int, state: TrainState) -> None:
        self._stop_timer()
        self._timer_start = time.monotonic()
        meta = {"records": self.records, "tokens": self.tokens, "seconds": self.seconds}
        checkpoint.save_checkpoint(self.folder, steps_done, TrainCheckpoint(state, self._best_params), meta)

    def _stop_timer(self) -> None:
        self.seconds += time.monotonic() - self._timer_start

    def _read_losses(self, steps_done: int, state: TrainState) -> None:
        """Check and log the losses since the last reading."""
        skipped = self._count_skipped(state)
        losses = check_finite(
            self.task,
            self._unread_losses,
            self._explain_nonfinite,
            state.params,
            allow_nonfinite=0 < skipped <= self.config.max_nonfinite_steps,
        )
        if skipped_steps := [step for step, loss in losses.items() if not math.isfinite(loss)]:
            steps_text = ", ".join(map(str, skipped_steps))
            self.session.print_line(f"left out, as the loss was not finite: step {steps_text} ({skipped} so far)")
        new_tokens = sum(int(count[0]) for count in self._unread_tokens)
        rates = [float(self._learning_rates[step]) for step in losses]
        self.session.log.write(
            {
                "event": "steps",
                "step": steps_done,
                "first": min(losses),
                "losses": list(losses.values()),
                "rates": rates,
            }
        )
        self.tokens += new_tokens
        self._token_rate.add(new_tokens)
        self._unread_losses.clear()
        self._unread_tokens.clear()

    def _record_evaluation(self, steps_done: int, state: TrainState) -> None:
        record = {"step": steps_done, **self._evaluate(state.params, with_accuracy=steps_done == 0)}
        record = distributed.share_from_first(record)  # all must keep the same parameters
        if self.config.load_best and _is_best(self.records, record):
            self._best_params = jax.tree.map(jnp.copy, state.params)
        self.records.append(record)
        self.session.log.write({"event": "evaluated", **record})
        self.session.print_line(_format_evaluation(record, self.task.objective.loss_unit))

    def _evaluate(self, params: Params, *, with_accuracy: bool) -> dict[str, Any]:
        """The loss of each held-out part and, where asked for, the accuracy."""
        streams = self.task.held_out_streams
        losses = {part: float(self._validation_loss(params, self._frozen, stream)) for part, stream in streams.items()}
        accuracies = {part: accuracy(self.task, params, self._frozen, part) for part in streams if with_accuracy}
        return {"loss": losses, "accuracy": accuracies if with_accuracy else None}

    def _explain_nonfinite(self, step: int) -> str:
        """Where the first number that is not finite arose, searched from the last checkpoint to `step`."""
        saved = checkpoint.restore_checkpoint(self.folder, self._checkpoint)
        start = (
            saved.tree.state if saved else init_train_state(self._optimizer, self.task.init_params(self.config.seed))
        )

        def example_name(index: int) -> str:
            return f"row {index + 1} of the batch" if self._is_streaming else describe_example(self.task, index)

        return find_first_nonfinite(
            self.input.problem,
            self._optimizer,
            self.task.objective.losses,
            start,
            step,
            self._frozen,
            self.input.batch_at,
            example_name,
        )

    def _count_skipped(self, state: TrainState) -> int:
        return int(state.opt_state.total_notfinite) if self.config.max_nonfinite_steps else 0


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


def _is_best(records: list[dict[str, Any]], record: dict[str, Any]) -> bool:
    return all(record["loss"]["dev"] < other["loss"]["dev"] for other in records)


def _format_evaluation(record: dict[str, Any], unit: str) -> str:
    loss = " ".join(f"{part} {value:.4f}" for part, value in record["loss"].items())
    return f"step {record['step']:>6}   L_v ({unit}): {loss}"
