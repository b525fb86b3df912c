"""The configured loss of an example: as a function, split for Gauss-Newton, with its unit and its accuracy."""

from collections.abc import Callable
from typing import NamedTuple

from bilevel_jax.core.types import Loss
from bilevel_jax.lm import losses, preferences
from bilevel_jax.lm import models as lm
from bilevel_jax.lm.data import Example
from bilevel_jax.runs import sections

USUAL_BETA = {"dpo": 0.1, "simpo": 2.5}
"""DPO: the paper's and the field's default; SimPO: the instruction-tuned setting of its paper."""


class Objective(NamedTuple):
    """What a run minimises: functions of (params, fixed, micro-batch); `fixed["base"]` is the frozen base or None."""

    losses: Callable
    """The loss of each example."""
    accuracy: Callable
    """The share of each example's targets that are the likeliest token; of pairs, whether the chosen side wins."""
    loss: Loss
    """The same losses as link(outputs)."""
    unit: str
    """Of a loss."""
    right: str
    """What `accuracy` is called."""


def objective(config: sections.ObjectiveSection, decoder: lm.Decoder, *, lora: bool) -> Objective:
    """Compose the objective; with `lora` the trained parameters are adapters over `fixed["base"]`."""
    return {"sft": _sft, "dpo": _pairs, "simpo": _pairs}[config.name](config, decoder, lora)


def unit(config: sections.ObjectiveSection) -> str:
    """The unit of a loss."""
    if config.name == "sft":
        return "nats per example" if config.reduction == "token_sum" else "nats per token"
    return "nats per pair"


def check_rows(config: sections.ObjectiveSection, examples: list[Example]) -> None:
    """Raise ValueError where the rows are not what the objective reads: pairs, or single responses."""
    pairs = config.name != "sft"
    odd = next((example for example in examples if bool(example.rejected) != pairs), None)
    if odd is None:
        return
    if pairs:
        raise ValueError(
            f"{odd.where}: one response, and objective.name = {config.name} compares a chosen with a rejected one. "
            "Give rows with 'chosen' and 'rejected', or set objective.name to sft."
        )
    raise ValueError(
        f"{odd.where}: a preference pair, and objective.name = sft reads single responses. "
        "Set objective.name to dpo or simpo."
    )


def _sft(config: sections.ObjectiveSection, decoder: lm.Decoder, lora: bool) -> Objective:
    split = losses.sft_loss(decoder, frozen_head=lora, normalise=config.reduction)
    return Objective(
        _over_base(losses.sft(decoder, normalise=config.reduction)),
        _over_base(losses.accuracy(decoder)),
        _split_over_base(split),
        unit(config),
        "token accuracy",
    )


def _pairs(config: sections.ObjectiveSection, decoder: lm.Decoder, lora: bool) -> Objective:
    beta = config.beta or USUAL_BETA[config.name]
    if config.name == "dpo":
        smoothing = config.label_smoothing
        values = preferences.dpo(decoder, beta=beta, label_smoothing=smoothing)
        split = preferences.dpo_loss(decoder, beta=beta, label_smoothing=smoothing)
        right = preferences.pair_accuracy(decoder, method="dpo")
    else:
        values = preferences.simpo(decoder, beta=beta, gamma_ratio=config.gamma_ratio)
        split = preferences.simpo_loss(decoder, beta=beta, gamma_ratio=config.gamma_ratio)
        right = preferences.pair_accuracy(decoder, method="simpo")
    return Objective(_over_base(values), _over_base(right), _split_over_base(split), unit(config), "pair accuracy")


def _over_base(function: Callable) -> Callable:
    return lambda params, fixed, batch: function(losses.assemble(params, fixed["base"]), batch)


def _split_over_base(split: Loss) -> Loss:
    return Loss(
        lambda params, fixed, batch: split.outputs(params, fixed["base"], batch),
        lambda outputs, fixed, batch: split.link(outputs, fixed["base"], batch),
    )
