"""Training losses, accuracies and units of each objective."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bilevel_jax.core.types import CompositeLoss
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.losses import preferences, sft
from bilevel_jax.runs.config import schema

DEFAULT_BETA = {"dpo": 0.1, "simpo": 2.5}
"""DPO: the paper's and the field's default; SimPO: the instruction-tuned setting of its paper."""


class Objective(NamedTuple):
    """What a run minimises: functions of (params, fixed, micro-batch); `fixed["base"]` is the frozen base or None."""

    losses: Callable
    """The loss of each example."""
    accuracy: Callable
    """The share of each example's targets that are the likeliest token; of pairs, whether the chosen side wins."""
    composite_loss: CompositeLoss
    """The same losses as link(outputs)."""
    loss_unit: str
    """Of a loss."""
    accuracy_name: str
    """What `accuracy` is called."""


def build_objective(config: schema.ObjectiveSection, decoder: models.Decoder, *, lora: bool) -> Objective:
    """Compose the objective; with `lora` the trained parameters are adapters over `fixed["base"]`."""
    return {"sft": _sft_objective, "dpo": _preference_objective, "simpo": _preference_objective}[config.name](
        config, decoder, lora
    )


def loss_unit(config: schema.ObjectiveSection) -> str:
    """The unit of a loss."""
    if config.name == "sft":
        return "nats per example" if config.reduction == "token_sum" else "nats per token"
    return "nats per pair"


def check_examples(config: schema.ObjectiveSection, examples: Sequence[Example]) -> None:
    """Raise ValueError where the examples are not what the objective reads: pairs, or single responses."""
    check_kind(examples, config.name, key="objective.name")


def check_kind(examples: Sequence[Example], loss: str, *, key: str) -> None:
    """Raise ValueError where the examples are not what a loss (sft, dpo, simpo), set in `key`, reads."""
    wants_pairs = loss != "sft"
    mismatched = next((example for example in examples if bool(example.rejected) != wants_pairs), None)
    if mismatched is None:
        return
    if wants_pairs:
        raise ValueError(
            f"{mismatched.where}: one response, and {key} = {loss} compares a chosen with a rejected "
            f"one. Give rows with 'chosen' and 'rejected', or set {key} to sft."
        )
    raise ValueError(
        f"{mismatched.where}: a preference pair, and {key} = sft reads single responses. Set {key} to dpo or simpo"
        f"{', or, where validation examples alone are pairs, target.losses' if key == 'objective.name' else ''}."
    )


def _sft_objective(config: schema.ObjectiveSection, decoder: models.Decoder, lora: bool) -> Objective:
    composite = sft.sft_composite_loss(decoder, frozen_head=lora, reduction=config.reduction)
    return Objective(
        _with_frozen_base(sft.sft_losses(decoder, reduction=config.reduction)),
        _with_frozen_base(sft.token_accuracy(decoder)),
        _composite_with_frozen_base(composite),
        loss_unit(config),
        "token accuracy",
    )


def _preference_objective(config: schema.ObjectiveSection, decoder: models.Decoder, lora: bool) -> Objective:
    beta = config.beta or DEFAULT_BETA[config.name]
    if config.name == "dpo":
        smoothing = config.label_smoothing
        example_losses = preferences.dpo_losses(decoder, beta=beta, label_smoothing=smoothing)
        composite = preferences.dpo_composite_loss(decoder, beta=beta, label_smoothing=smoothing)
        accuracy_fn = preferences.pair_accuracy(decoder, method="dpo")
    else:
        example_losses = preferences.simpo_losses(decoder, beta=beta, gamma_ratio=config.gamma_ratio)
        composite = preferences.simpo_composite_loss(decoder, beta=beta, gamma_ratio=config.gamma_ratio)
        accuracy_fn = preferences.pair_accuracy(decoder, method="simpo")
    return Objective(
        _with_frozen_base(example_losses),
        _with_frozen_base(accuracy_fn),
        _composite_with_frozen_base(composite),
        loss_unit(config),
        "pair accuracy",
    )


def _with_frozen_base(function: Callable) -> Callable:
    return lambda params, frozen, batch: function(sft.assemble_params(params, frozen["base"]), batch)


def _composite_with_frozen_base(composite: CompositeLoss) -> CompositeLoss:
    return CompositeLoss(
        lambda params, frozen, batch: composite.outputs(params, frozen["base"], batch),
        lambda outputs, frozen, batch: composite.link(outputs, frozen["base"], batch),
    )
