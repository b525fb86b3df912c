"""The arms of a comparison: the examples and weights of each retrain."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.schema import SOURCE_BASELINES
from bilevel_jax.runs.engine.retrain import LOSS_DIGITS, Retrainer, RetrainVariant
from bilevel_jax.runs.scoring.scores import TRAINABLE_HOLDOUT_SCORES
from bilevel_jax.runs.stats import top_indices
from bilevel_jax.runs.tasks.evaluation import KnownLabels, evaluate_per_example, is_validation_trainable
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.sources import MAX_USAGE, find_sources
from bilevel_jax.runs.tasks.text import TextTask

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of the examples that are tried on dev."""
NEEDS_DEV = {"validation_early_stop": "its stopping step", "low_loss_dev": "its share"}
"""Arms that cannot be without dev examples -> what they choose on them."""
SHARE_ON_DEV = ("low_loss_dev", "validation_model")
"""Arms that try every share of SHARES on dev."""
MAX_NAMED_SOURCES = 3
"""Sources that the meaning of an arm names."""


class Arm(NamedTuple):
    """A choice of examples, and what it was chosen by."""

    variant: RetrainVariant
    scores: Float[np.ndarray, "examples"] | None = None
    """What ranked the examples, larger is better; None where nothing did."""


class ArmInputs(NamedTuple):
    """What the arms that learn no weights are made from."""

    losses: Float[np.ndarray, "examples"]
    """Of each training example at the end of uniform training, nats."""
    alignment: Float[np.ndarray, "examples"]
    """d L_v / d weight by one step at that end; below 0: the step lowers validation loss."""
    subset_size: int
    """Examples of a subset whose size is given."""
    random_seed: int | tuple[int, ...]
    """Of the random subset."""
    labels: KnownLabels | None
    good_label: str = "clean"


def why_absent(name: str, task: Task, labels: KnownLabels | None) -> str:
    """Why an arm cannot be part of the comparison, in words; nothing where it can."""
    if name in NEEDS_DEV and "dev" not in task.held_out_streams:
        return (
            f"{name} chooses {NEEDS_DEV[name]} on dev, and there are no dev examples: give data.dev, or a share of "
            "data.split (for arrays, arrays.dev_examples)"
        )
    if not is_validation_trainable(task) and (name in TRAINABLE_HOLDOUT_SCORES or "validation" in name):
        return f"{name} trains on validation examples, and here they judge by another loss than that of training"
    if name == "stratified" and find_sources(task).num_trained < 2:
        return "stratified gives several sources equal shares, and all examples come from one: give data.source_field"
    if name.startswith("oracle") and (labels is None or not labels.good.any()):
        return f"{name} trains on the good examples, and none is labelled so: give data.label_field and data.good_label"
    return ""


def with_source_baselines(names: Sequence[str], task: Task) -> list[str]:
    """The baselines of a comparison: of text of several sources uniform and stratified, too, beside which every mixture
    is read."""
    beside = SOURCE_BASELINES if isinstance(task, TextTask) and find_sources(task).num_trained > 1 else ()
    return [*names, *(name for name in beside if name not in names)]


def count_trainings(names: Sequence[str], task: Task, labels: KnownLabels | None, seeds: int) -> int:
    """Trainings of a comparison of these arms: one a seed, and those that choose on dev or rank the examples."""
    has_dev = "dev" in task.held_out_streams
    present = [name for name in names if not why_absent(name, task, labels)]
    choices = sum(len(SHARES) - 1 for name in present if name in SHARE_ON_DEV and has_dev)  # one is the first retrain
    return len(present) * seeds + choices + ("validation_model" in present)


def build_simple_arm(name: str, task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
    """The arm of a name in SIMPLE_ARMS; see `why_absent`.

    Where an arm chooses on dev, each candidate is trained once, under the first seed of the comparison.
    """
    return SIMPLE_ARMS[name](task, retrainer, inputs)


def _whole(
    name: str, meaning: str, find: Callable[[Task, ArmInputs], np.ndarray], *, stop_on_dev: bool = False
) -> Callable[[Task, Retrainer, ArmInputs], Arm]:
    """An arm of all examples of a kind, weight 1."""

    def build(task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
        indices = find(task, inputs)
        scores = np.isin(np.arange(task.num_examples), indices).astype(float) if name.startswith("oracle") else None
        words = meaning.format(good=repr(inputs.good_label), unlabelled=_describe_unlabelled(inputs.labels))
        return Arm(make_variant(name, words, task, indices, stop_on_dev=stop_on_dev), scores)

    return build


def _describe_unlabelled(labels: KnownLabels | None) -> str:
    return f"; {labels.num_unlabelled:,} have no label" if labels is not None and labels.num_unlabelled else ""


def _random(task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
    random = np.random.default_rng(inputs.random_seed)
    indices = np.sort(random.choice(task.trainable_indices(), inputs.subset_size, replace=False))
    scores = np.isin(np.arange(task.num_examples), indices).astype(float)
    return Arm(
        make_variant("random", f"{format_count('example', inputs.subset_size)} drawn at random", task, indices), scores
    )


def _top_alignment(task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
    meaning = f"the {format_count('example', inputs.subset_size)} best aligned with grad L_v after uniform training"
    return _top("top_alignment", meaning, -inputs.alignment, task, inputs)


def _low_loss(task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
    meaning = f"the {format_count('example', inputs.subset_size)} of least loss after uniform training"
    return _top("low_loss", meaning, -inputs.losses, task, inputs)


def _low_loss_dev(task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
    meaning = "the examples of least loss after uniform training, their share chosen on dev"
    return _top_share_on_dev("low_loss_dev", meaning, -inputs.losses, task, retrainer)


def _validation_model(task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
    """Least loss under a model that V alone has trained: one training, stopped on dev where there is dev."""
    name, meaning = "validation_model", "the examples of least loss under a model of validation alone"
    scores = -rank_by_validation_model(task, retrainer)
    if "dev" not in task.held_out_streams:
        return _top(name, f"the {inputs.subset_size:,}{meaning.removeprefix('the')}", scores, task, inputs)
    return _top_share_on_dev(name, f"{meaning}, their share chosen on dev", scores, task, retrainer)


def _stratified(task: Task, retrainer: Retrainer, inputs: ArmInputs) -> Arm:
    sources, meaning = find_sources(task), "every source, equal shares"
    weights = np.ones(task.corpus.num_examples)
    weights[: task.num_examples] = sources.weights(mixture := sources.stratified())
    if tiny := [name for name, share in zip(sources.names, mixture, strict=True) if 0 < share < mixture.max() - 1e-9]:
        shown = ", ".join(tiny[:MAX_NAMED_SOURCES]) + ("" if len(tiny) <= MAX_NAMED_SOURCES else " and others")
        meaning += f", but less of {shown}: no example weighs more than {MAX_USAGE:g}"
    return Arm(make_variant("stratified", meaning, task, task.trainable_indices(), weights))


SIMPLE_ARMS: dict[str, Callable[[Task, Retrainer, ArmInputs], Arm]] = {
    "uniform": _whole("uniform", "every example, weight 1", lambda task, inputs: task.trainable_indices()),
    "validation": _whole("validation", "validation alone, all steps", lambda task, inputs: task.validation_indices()),
    "train+validation": _whole(
        "train+validation",
        "every example and validation, weight 1",
        lambda task, inputs: np.concatenate([task.trainable_indices(), task.validation_indices()]),
    ),
    "validation_early_stop": _whole(
        "validation_early_stop",
        "validation alone, stopped at the step of least dev loss",
        lambda task, inputs: task.validation_indices(),
        stop_on_dev=True,
    ),
    "random": _random,
    "low_loss": _low_loss,
    "low_loss_dev": _low_loss_dev,
    "top_alignment": _top_alignment,
    "validation_model": _validation_model,
    "stratified": _stratified,
    "oracle": _whole(
        "oracle", "the examples whose label is {good}{unlabelled}", lambda task, inputs: _good_indices(inputs)
    ),
    "oracle+validation": _whole(
        "oracle+validation",
        "the examples whose label is {good} and validation",
        lambda task, inputs: np.concatenate([_good_indices(inputs), task.validation_indices()]),
    ),
}
"""The arms that learn no weights, by their name in retrain.variants and compare.baselines."""


def _good_indices(inputs: ArmInputs) -> Int[np.ndarray, "good"]:
    return np.zeros(0, int) if inputs.labels is None else np.flatnonzero(inputs.labels.good)


def make_variant(
    name: str,
    meaning: str,
    task: Task,
    indices: Int[np.ndarray, "chosen"],
    weights: Float[np.ndarray, "corpus"] | None = None,
    *,
    stop_on_dev: bool = False,
) -> RetrainVariant:
    """Examples of the corpus with their weights, 1 where none are given."""
    weights = np.ones(task.corpus.num_examples) if weights is None else weights
    return RetrainVariant(name, meaning, indices, weights, stop_on_dev)


def _top(name: str, meaning: str, scores: np.ndarray, task: Task, inputs: ArmInputs) -> Arm:
    indices = top_indices(scores, inputs.subset_size, task.trainable_indices())
    return Arm(make_variant(name, meaning, task, indices), scores)


def _top_share_on_dev(name: str, meaning: str, scores: np.ndarray, task: Task, retrainer: Retrainer) -> Arm:
    """The arm of the largest scores whose share has the least dev loss under the first seed; a tie: the larger."""
    trainable = task.trainable_indices()
    candidates = []
    for share in SHARES:
        indices = top_indices(scores, max(1, round(share * len(trainable))), trainable)
        words = f"{meaning}: {share:.0%}"
        candidates.append(make_variant(name, words, task, indices)._replace(choice=f"{share:.0%}"))
    losses = [retrainer.retrain(variant, variant.key, 0)["dev"] for variant in candidates]
    least = len(losses) - 1 - int(np.argmin(losses[::-1]))
    return Arm(candidates[least], scores)


def rank_by_validation_model(task: Task, retrainer: Retrainer) -> Float[np.ndarray, "examples"]:
    """The loss of each training example, nats, under a model trained on validation alone; nan for a dropped one.

    Stopped at the step of least dev loss where there is dev.
    """
    variant = make_variant("", "", task, task.validation_indices(), stop_on_dev="dev" in task.held_out_streams)

    def compute() -> list[float]:
        params, frozen, _ = retrainer.train(variant, 0)
        stream = task.full_pass_stream(seed=0)
        losses = evaluate_per_example(task.objective.losses, params, frozen, stream, task.num_examples)
        return [round(float(loss), LOSS_DIGITS) for loss in losses[: task.num_examples]]

    return np.array(
        retrainer.session.run_once(f"{retrainer.prefix}/validation_model, the model of validation", compute)
    )
