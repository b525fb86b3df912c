"""The arms of select's comparison."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.load import SelectConfig
from bilevel_jax.runs.engine.arms import SIMPLE_ARMS, ArmInputs, build_simple_arm, make_variant, why_absent
from bilevel_jax.runs.engine.outer_loop import LearnedWeights
from bilevel_jax.runs.engine.retrain import Retrainer, RetrainVariant
from bilevel_jax.runs.scoring.scores import load_or_compute_score
from bilevel_jax.runs.stats import top_indices
from bilevel_jax.runs.tasks.evaluation import read_labels
from bilevel_jax.runs.tasks.text import TextTask


class Arms(NamedTuple):
    """The arms that are retrained, and why others of retrain.variants are not."""

    variants: list[RetrainVariant]
    absent: list[str]


def build_arms(
    config: SelectConfig,
    task: TextTask,
    retrainer: Retrainer,
    learned: LearnedWeights,
    selected_indices: Int[np.ndarray, "selected"],
) -> Arms:
    """The arms that retrain.variants names and the data allow.

    Subsets whose size is given are as large as the selection.
    """
    labels = read_labels(task, config.data)
    inputs = ArmInputs(
        losses=learned.losses,
        alignment=learned.alignment,
        subset_size=len(selected_indices),
        random_seed=config.data.seed,
        labels=labels,
        good_label=config.data.good_label,
    )
    reasons = {name: why_absent(name, task, labels) for name in config.retrain.variants}
    variants = []
    for name in config.retrain.variants:
        if reasons[name]:
            continue
        if name in SIMPLE_ARMS:
            variants.append(build_simple_arm(name, task, retrainer, inputs).variant)
        elif name in ("learned", "learned+validation", "selected"):
            variants.append(_build_learned_arm(name, task, learned, selected_indices))
        else:
            variants.append(_build_score_arm(name, config, task, retrainer, len(selected_indices)))
    return Arms(variants, [reason for reason in reasons.values() if reason])


def _build_learned_arm(
    name: str, task: TextTask, learned: LearnedWeights, selected_indices: Int[np.ndarray, "selected"]
) -> RetrainVariant:
    if name == "selected":
        meaning = f"the {format_count('example', len(selected_indices))} written to selected.jsonl, weight 1"
        return make_variant(name, meaning, task, selected_indices)
    weights = learned.corpus_weights(task)
    if name == "learned":
        meaning = "every example with its learned weight"
        return make_variant(name, meaning, task, task.trainable_indices(), weights)
    meaning = f"every example with its learned weight, and validation with weight {learned.validation_weight:.3g}"
    indices = np.concatenate([task.trainable_indices(), task.validation_indices()])
    return make_variant(name, meaning, task, indices, weights)


def _build_score_arm(
    name: str, config: SelectConfig, task: TextTask, retrainer: Retrainer, count: int
) -> RetrainVariant:
    params = task.init_params(config.train.seed)
    values = load_or_compute_score(name, name, task, params, config.scores, retrainer.session).values
    meaning = f"the {format_count('example', count)} of the largest {name} by the model before training"
    return make_variant(name, meaning, task, top_indices(values, count, task.trainable_indices()))
