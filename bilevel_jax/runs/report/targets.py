"""Report section on several targets: what each choice of examples and weights does to each of them."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from markupsafe import Markup

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Point
from bilevel_jax.runs.report.html import Column, Table, make_table
from bilevel_jax.runs.report.numbers import MeanInterval
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks.splits import PART_NAMES

MOST_PICTURES = 3
"""Pairs of targets that are drawn."""
Readings = Mapping[str, Sequence[Mapping[str, Sequence[Mapping[str, Any]]]]]
"""variant -> for each seed: part -> name, loss and accuracy of each target."""


def describe_target_results(targets: Sequence[Mapping[str, Any]], readings: Readings) -> dict[str, Any]:
    """The values of the template `targets.html`; nothing where there is one target.

    Args:
        targets: name, coefficient, unit and name of the accuracy of each.
        readings: what was measured; variants without any are left out.
    """
    readings = {name: runs for name, runs in readings.items() if runs and all(runs)}
    if len(targets) < 2 or not readings:
        return {}
    first = next(iter(readings.values()))[0]
    parts = [part for part in reversed(PART_NAMES) if part in first]
    shown = [part for part in parts if part != "validation"] or parts
    read = [
        place
        for place in range(len(targets))
        if all(math.isfinite(_interval(runs, shown[0], place, "loss").mean) for runs in readings.values())
    ]
    return {
        "sum": " + ".join(
            f"{target['coefficient']:g} {target['name']}" for target in targets if target["coefficient"]
        ).replace("+ -", "− "),
        "beside": ", ".join(target["name"] for target in targets if not target["coefficient"]),
        "part": shown[0],
        "tables": [(part, _targets_table(targets, readings, part)) for part in shown],
        "pictures": [
            _plot_trade_off(targets, readings, shown[0], pair) for pair in list(combinations(read, 2))[:MOST_PICTURES]
        ],
    }


def _targets_table(targets: Sequence[Mapping[str, Any]], readings: Readings, part: str) -> Table:
    """A line for each variant: loss and accuracy of each target."""
    columns = [Column("trained on", list(readings))]
    for place, target in enumerate(targets):
        losses = [_interval(runs, part, place, "loss") for runs in readings.values()]
        columns.append(Column(target["name"], losses, f"loss, {target['unit']}"))
        if target["accuracy_name"]:
            accuracies = [_interval(runs, part, place, "accuracy") for runs in readings.values()]
            columns.append(Column(target["name"], accuracies, target["accuracy_name"]))
    return make_table(*columns)


def _plot_trade_off(
    targets: Sequence[Mapping[str, Any]], readings: Readings, part: str, pair: tuple[int, int]
) -> Markup:
    """One target against another: a dot for each variant, hollow where another is better in all targets."""
    means = {
        name: [_interval(runs, part, place, "loss") for place in range(len(targets))] for name, runs in readings.items()
    }
    across, up = pair
    points = []
    for name, own in means.items():
        half = own[up].half_width
        points.append(
            Point(
                own[across].mean,
                own[up].mean,
                own[up].mean - half,
                own[up].mean + half,
                name=name,
                title=f"{name}: {targets[across]['name']} {own[across].mean:.4g}, "
                f"{targets[up]['name']} {own[up].mean:.4g}",
                kind="hollow" if _is_dominated(own, means.values(), targets) else "dot",
            )
        )
    labels = [f"{targets[place]['name']}, {targets[place]['unit']}" for place in pair]
    return figures.plot_lines([], labels[0], labels[1], points=points, width=520)


def _is_dominated(own: Sequence[MeanInterval], others: Any, targets: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another is at least as good in each target and better in one."""

    def costs(means: Sequence[MeanInterval]) -> list[float]:
        return [
            math.copysign(1, t["coefficient"]) * m.mean for t, m in zip(targets, means, strict=True) if t["coefficient"]
        ]

    mine = costs(own)
    return any(
        all(a <= b for a, b in zip(costs(other), mine, strict=True)) and costs(other) != mine for other in others
    )


def _interval(
    runs: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]], part: str, place: int, key: str
) -> MeanInterval:
    values = [run[part][place][key] for run in runs]
    return MeanInterval(*mean_interval([math.nan if value is None else value for value in values]))
