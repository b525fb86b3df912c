"""What a run will do, counted in training steps before it is done."""

import math
from typing import NamedTuple

from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.config import SelectConfig, TrainConfig
from bilevel_jax.runs.sections import SINGLE_LOOP_METHODS
from bilevel_jax.runs.single import FORWARD, steps_of, work_of
from bilevel_jax.runs.task import Task
from bilevel_jax.runs.training import PRODUCT, REPLAY


class Stage(NamedTuple):
    """A part of a run: how often it makes each kind of step."""

    name: str
    forwards: float = 0.0
    """Training steps, replayed ones too."""
    backwards: float = 0.0
    """Steps back through a training step."""
    others: float = 0.0
    """All else, in training steps: products of a solve, entries of all rows, steps of a single-loop method."""

    @property
    def work(self) -> float:
        """In training steps, as a run counts them."""
        return self.forwards + PRODUCT * self.backwards + self.others

    def times(self, count: float, name: str) -> "Stage":
        """The same, so many times."""
        return Stage(name, count * self.forwards, count * self.backwards, count * self.others)


def selection(task: Task | ArrayTask, config: SelectConfig) -> list[Stage]:
    """The stages of a `select` run that goes through to its end.

    It is the most that a run does: a loop may end early (outer.patience, outer.ess_floor), a solve before
    outer.max_iterations, and the certificates at the learned weights are left out where no step was better than the
    first. Only `implicit` may do more, where it doubles outer.curvature_batches. Not counted, as a run does not count
    them: readings of losses, and scores made to start from or to compare with.
    """
    outer, steps = config.outer, task.steps
    one_pass = math.ceil(len(task.trainable()) / task.batch)
    training, estimate = Stage("", forwards=steps), _estimate(config, steps, one_pass)
    baselines = Stage("", others=2 * one_pass)
    if outer.method in SINGLE_LOOP_METHODS:
        alone = Stage("", others=steps_of(config) * work_of(config))
        stages = [_sum("learning", training, baselines, alone)]
    else:
        stages = [_sum("learning", _sum("", training, estimate).times(outer.steps + 1, ""), baselines)]
    if config.certify.enabled and outer.method not in SINGLE_LOOP_METHODS:
        retrains = 2 * len(config.certify.step_sizes) + config.certify.retrains + 1
        places = 2 if outer.restart == "cold" else 1
        stages.append(_sum("", training.times(retrains, ""), estimate).times(places, "certificates"))
    if config.retrain.enabled:
        known = bool(config.data.label_field) and any(one.label == config.data.good_label for one in task.examples)
        arms = [row for row in config.retrain.variants if row != "oracle" or known]
        stages.append(training.times(len(arms) * config.retrain.seeds, "comparison"))
    return [*stages, training.times(1, "the model that is written")]


def readings(task: Task, config: SelectConfig | TrainConfig) -> float:
    """What reading L_v takes beside the stages, in training steps: a forward pass is a third of one.

    Each estimate takes the gradient of L_v too, and each retrain of a certificate reads V_fit alone.
    """
    each = {part: stream.steps for part, stream in task.held_out.items()}
    everything, fit = sum(each.values()) * FORWARD, each.get("fit", 0)
    if isinstance(config, TrainConfig):
        return everything * (task.steps // config.train.eval_steps + 2)
    total = (config.outer.steps + 1) * (everything + fit)
    if config.certify.enabled:
        places = 2 if config.outer.restart == "cold" else 1
        total += places * (2 * len(config.certify.step_sizes) + config.certify.retrains) * fit * FORWARD
    if config.retrain.enabled:
        total += len(config.retrain.variants) * config.retrain.seeds * everything
    return total


def _estimate(config: SelectConfig, steps: int, one_pass: int) -> Stage:
    """One hypergradient of a finished training."""
    outer = config.outer
    if outer.method in ("unrolled", "window"):
        swept = min(outer.window, steps) if outer.method == "window" else steps
        return Stage("", forwards=REPLAY * swept, backwards=swept)
    if outer.method != "implicit":
        return Stage("", others=2 * one_pass)
    # a direct solve makes as many products as there are parameters, which are few where it is used
    products = outer.max_iterations if outer.solver in ("cg", "neumann") else 0
    return Stage("", others=2 * one_pass + PRODUCT * products * min(outer.curvature_batches, one_pass))


def _sum(name: str, *stages: Stage) -> Stage:
    return Stage(
        name,
        sum(stage.forwards for stage in stages),
        sum(stage.backwards for stage in stages),
        sum(stage.others for stage in stages),
    )
