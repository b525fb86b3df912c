"""Which arm of a comparison to use, chosen on dev."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.runs.stats import BootstrapInterval, bootstrap_means, percentile_interval

SIMPLICITY = (
    "uniform", "validation", "train+validation", "validation_early_stop", "low_loss", "low_loss_dev",
    "validation_model", "loss", "margin", "top_alignment", "reducible", "ica", "oneshot", "selected", "learned",
    "learned+validation",
)  # fmt: skip
"""The arms that can be recommended, the simplest first: nothing to choose; losses of one model; losses of a second;
scores that take gradients or a prompt; then learned weights. `oracle` knows the labels, and `random` is a control."""
NO_DEV = (
    "No arm is recommended: there are no dev examples, which alone may choose one. Give data.dev, or a share of "
    "data.split."
)
NOT_COMPARED = "No arm is recommended: nothing was retrained to compare (--fast, or retrain.enabled: false)."
TOO_FEW_ARMS = "No arm is recommended: fewer than two that may be were retrained (retrain.variants)."


class ArmStanding(NamedTuple):
    """How far an arm is behind the best on dev."""

    name: str
    dev_loss: float
    """Mean over dev examples and seeds."""
    behind: float
    """Its dev loss minus that of the best."""
    standard_error: float
    """Of `behind`, by paired bootstrap."""


class Recommendation(NamedTuple):
    """The arm to use."""

    use: str | None
    """None where there is nothing to choose by."""
    over: str | None
    """The simplest arm of the comparison."""
    gain: BootstrapInterval | None
    """Dev loss of `over` minus that of `use`, with its 95 % interval."""
    standings: tuple[ArmStanding, ...]
    """The simplest first."""
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """For result.json."""
        gain = self.gain and self.gain._asdict()
        return self._asdict() | {"gain": gain, "standings": [standing._asdict() for standing in self.standings]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Recommendation":
        """What `to_json` gave."""
        return cls(
            value["use"],
            value["over"],
            BootstrapInterval(**value["gain"]) if value["gain"] else None,
            tuple(ArmStanding(**standing) for standing in value["standings"]),
            value["sentence"],
        )


def recommend_nothing(why: str) -> Recommendation:
    """No recommendation, and why."""
    return Recommendation(None, None, None, (), why)


def recommend(
    dev_losses: Mapping[str, Float[np.ndarray, "seeds dev"]],
    unit: str,
    groups: Sequence[int] = (),
    *,
    reads_examples: bool = True,
) -> Recommendation:
    """The simplest arm whose mean dev loss is within one standard error of the least.

    The standard error is that of the difference from the best arm, by paired bootstrap: all arms are read on the same
    resampled dev examples and seeds. It depends neither on the order of the arms nor on that of the examples, and a tie
    goes to the simpler arm. Dev examples that stand in `groups` of these sizes, those of each target, are resampled
    within their group.

    Without examples (`reads_examples` false) they are the losses of a function of the parameters alone, one for each
    seed: nothing but the seeds is resampled, and of one seed the best arm is the best.

    Wrong where dev is not like what the model is for, and too sure of an arm that chose many things on the same dev
    (its stopping step, its share, the outer step of its weights).
    """
    names = [name for name in SIMPLICITY if name in dev_losses]
    if len(names) < 2:
        return recommend_nothing(TOO_FEW_ARMS if dev_losses else NO_DEV)
    losses = np.stack([dev_losses[name] for name in names])
    groups = groups or (losses.shape[-1],)
    sorted_losses = [_sort_examples(part) for part in np.split(losses, np.cumsum(groups)[:-1], axis=2)]
    draws = bootstrap_means(np.concatenate(sorted_losses, axis=2), (len(names), losses.shape[-1]), groups)
    means = draws[0]
    best = int(np.argmin(means))  # the first of equals, which is the simplest
    errors = np.std(draws[1:] - draws[1:, best : best + 1], axis=0)
    standings = tuple(
        ArmStanding(name, float(mean), float(mean - means[best]), float(error))
        for name, mean, error in zip(names, means, errors, strict=True)
    )
    chosen = next(place for place, standing in enumerate(standings) if standing.behind <= standing.standard_error)
    gain = percentile_interval(draws[:, 0] - draws[:, chosen])
    sentence = _describe(standings, chosen, best, gain, losses.shape, unit, reads_examples)
    return Recommendation(names[chosen], names[0], gain, standings, sentence)


def _sort_examples(losses: Float[np.ndarray, "arms seeds dev"]) -> Float[np.ndarray, "arms seeds dev"]:
    """Examples and seeds in an order that depends on their losses alone, so that a resample does, too."""
    arms, seeds, examples = losses.shape
    by_seed = losses[:, np.lexsort(np.sort(losses, axis=2).transpose(0, 2, 1).reshape(-1, seeds))]
    return by_seed[:, :, np.lexsort(by_seed.reshape(arms * seeds, examples))]


def _describe(
    standings: tuple[ArmStanding, ...],
    chosen: int,
    best: int,
    gain: BootstrapInterval,
    shape: tuple[int, ...],
    unit: str,
    reads_examples: bool,
) -> str:
    use, simplest, leader = standings[chosen], standings[0], standings[best]
    seeds = "1 seed" if shape[1] == 1 else f"{shape[1]} seeds"
    where = f"{shape[2]:,} dev examples, {seeds}" if reads_examples else f"a loss without examples, {seeds}"
    if not reads_examples and shape[1] == 1:
        where += ", whose own spread retrain.seeds above 1 would tell"
    on = "on dev" if reads_examples else "in validation loss"
    if chosen == best:
        why = (
            f"no arm is better {on}"
            if chosen == 0
            else f"the best {on}, and no simpler arm is within one standard error"
        )
    else:
        why = (
            f"{leader.name} is better {on} by {use.behind:.4f} {unit}, which is within one standard error "
            f"({use.standard_error:.4f})"
        )
    if chosen == 0:
        return f"Use {use.name}, the simplest arm: {why} ({where})."
    chance = "; it may be chance" if gain.low <= 0 else ""
    amount = f"{gain.value:.4f} {unit} (95 % interval {gain.low:.4f} to {gain.high:.4f}{chance})".replace("-", "−")
    return f"Use {use.name}: it gains {amount} over {simplest.name}, the simplest; {why} ({where})."
