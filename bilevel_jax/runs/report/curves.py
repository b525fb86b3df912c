"""Report curves of training loss, validation loss and learning rate."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.infra.journal import read_journal
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Series
from bilevel_jax.runs.report.numbers import engineering_exponent, format_power_of_ten
from bilevel_jax.runs.report.results import RunResults, float_or_nan
from bilevel_jax.runs.report.weights import all_equal

PART_COLOURS = {"validation": 1, "dev": 2, "test": 0}
"""The same as in the report of `select`; 3 is training, 5 the learning rate."""


class TrainingLog(NamedTuple):
    """Training step by step; the loss of step s is that of the parameters after s steps, on the next batch."""

    steps: list[int]
    losses: list[float]
    learning_rates: list[float]


def read_training_log(path: Path) -> TrainingLog:
    """Losses and learning rates by step. A resumed run repeats some steps: the last time counts."""
    by_step: dict[int, tuple[float, float]] = {}
    for record in read_journal(path):
        if record.get("event") == "steps":
            pairs = zip(record["losses"], record["rates"], strict=True)
            by_step |= {
                record["first"] + at: (float_or_nan(loss), float_or_nan(rate)) for at, (loss, rate) in enumerate(pairs)
            }
    steps = sorted(by_step)
    return TrainingLog(steps, [by_step[step][0] for step in steps], [by_step[step][1] for step in steps])


def plot_losses(run: RunResults, log: TrainingLog) -> Markup:
    """The training loss of each step and its running mean, and the validation losses."""
    best = written_step(run)
    mark = (best, f"written: step {best}") if best is not None else None
    return figures.plot_lines(_loss_series(run, log), "steps made", f"loss, {run.unit}", vertical_mark=mark)


def _loss_series(run: RunResults, log: TrainingLog) -> list[Series]:
    if (width := _window_size(log)) > 1:
        curves = [
            Series("each step", log.steps, log.losses, 3, "cloud"),
            Series("running mean", log.steps, running_mean(log.losses, width), 3, "plain"),
        ]
    else:
        curves = [Series("training", log.steps, log.losses, 3, "plain" if len(log.steps) > 1 else "marked")]
    records = run.result["records"]
    return curves + [
        Series(
            part,
            [one["step"] for one in records],
            [float_or_nan(one["loss"].get(part)) for one in records],
            colour,
        )
        for part, colour in PART_COLOURS.items()
        if any(one["loss"].get(part) is not None for one in records)
    ]


def losses_caption(run: RunResults, log: TrainingLog) -> str:
    """What the picture of the losses shows."""
    words = ["Training: the loss of each step's own batch"]
    words.append(f"and its mean over {_window_size(log)} steps." if _window_size(log) > 1 else "as a line.")
    values = run.columns["weight"].astype(float)
    if all_equal(values) and abs(float(values[0]) - 1) < 1e-6:
        words.append("All losses have one scale.")
    else:
        words.append("It is weighted, and validation losses are not: compare how they move, not how high they stand.")
    y_values = figures.y_axis_values(_loss_series(run, log)) or [0.0]
    if beyond := sum(math.isfinite(loss) and not min(y_values) <= loss <= max(y_values) for loss in log.losses):
        words.append(f"Drawn at the edge: {format_count('step', beyond)} beyond the axis.")
    if nonfinite := sum(not math.isfinite(loss) for loss in log.losses):
        words.append(f"Not drawn: {format_count('step', nonfinite)} without a finite loss.")
    return " ".join(words)


def plot_learning_rates(log: TrainingLog) -> Markup:
    """The learning rate of each step."""
    power = engineering_exponent(max((rate for rate in log.learning_rates if math.isfinite(rate)), default=0.0))
    values = [rate / 10.0**power for rate in log.learning_rates]
    curve = Series("learning rate", log.steps, values, 5, "plain" if len(values) > 1 else "marked")
    return figures.plot_lines(
        [curve],
        "steps made",
        f"learning rate, {format_power_of_ten(power)}".strip(" ,"),
        y_values_shown=[0],
        height=140,
    )


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the finite values among the `width` around each, of fewer at the ends; nan where there is none."""
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(array))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(array))
    with np.errstate(invalid="ignore"):
        return list((sums[last] - sums[first]) / (counts[last] - counts[first]))


def _window_size(log: TrainingLog) -> int:
    """Steps in the running mean: odd, about a tenth of all, and not so many that the beginning is lost."""
    return 2 * min(len(log.steps) // 20, 50) + 1


def written_step(run: RunResults) -> int | None:
    """The step whose parameters were written, where it was chosen."""
    best = run.result["best"]
    return best["step"] if best and run.result["kept"] == "best" else None
