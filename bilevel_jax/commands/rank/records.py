"""Metrics judged by known accuracies over many pairs of a model and a task."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from bilevel_jax.commands.rank.metrics import METRICS
from bilevel_jax.lm.data import files
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.lm.data.turns import check_row, read_field
from bilevel_jax.runs import stats
from bilevel_jax.runs.config.schema import RankSection
from bilevel_jax.runs.config.yaml_reader import suggest_nearest
from bilevel_jax.runs.stats import BootstrapInterval, rank_correlation

KEY_FIELDS = ("model", "task", "strategy")
"""What a row is about; no two rows have the same three."""


class Pair(NamedTuple):
    """What is known of one model on one task."""

    model: str
    task: str
    strategies: tuple[str, ...]
    accuracies: Float[np.ndarray, "strategies"]
    """After training on each strategy's responses, as shares."""
    scores: Float[np.ndarray, "metrics strategies"]
    """As they stand in the table."""


class Records(NamedTuple):
    """A table of stored scores and accuracies."""

    metrics: tuple[str, ...]
    """Columns, the one that is judged first."""
    signs: dict[str, int]
    """1: the largest wins, -1: the least."""
    pairs: list[Pair]
    notes: list[str]


def load_records(options: RankSection) -> Records:
    """Read rank.records: rows of model, task, strategy, accuracy, and a column of numbers for each metric.

    The known metrics are read in their own direction; rank.least_wins and rank.largest_wins name further columns.
    Accuracies are shares, or percent where one is above 1. Raises ValueError, with file and line, for a row without one
    of these, a number that is not finite, a strategy that stands twice, and a pair with one strategy.
    """
    path = options.records
    rows = []
    for line, row in files.read_rows(path):
        check_row(row, f"{path}:{line}")
        rows.append((f"{path}:{line}", row))
    if not rows:
        raise ValueError(f"{path}: no rows. Each is a strategy of a model and a task, with its accuracy and scores.")
    signs, notes = _choose_metrics(list(dict.fromkeys(name for _, row in rows for name in row)), options)
    places: dict[tuple[str, ...], str] = {}
    lines: dict[tuple[str, str], list[tuple[str, float, list[float]]]] = {}
    for where, row in rows:
        key = tuple(_read_text(row, name, where) for name in KEY_FIELDS)
        if (other := places.setdefault(key, where)) != where:
            raise ValueError(f"{where}: {key[2]!r} of {key[0]!r} and {key[1]!r} stands at {other}, too. Remove one.")
        numbers = [_read_number(row, name, where) for name in ("accuracy", *signs)]
        if not 0 <= numbers[0] <= 100:
            raise ValueError(f"{where}: 'accuracy' is {numbers[0]:g}; a share, or a percentage, is wanted.")
        lines.setdefault((key[0], key[1]), []).append((key[2], numbers[0], numbers[1:]))
    is_percent = any(accuracy > 1 for some in lines.values() for _, accuracy, _ in some)
    if is_percent:
        notes.append("accuracies above 1 stand in the table, so all of them are read as percent")
    pairs = []
    for (model, task), some in sorted(lines.items()):
        if len(some) < 2:
            raise ValueError(
                f"{places[model, task, some[0][0]]}: {some[0][0]!r} is the only strategy of {model!r} and {task!r}; "
                "there is nothing to choose from. Add another one, or remove the row."
            )
        names, accuracies, scores = zip(*sorted(some), strict=True)
        shares = np.array(accuracies) / (100 if is_percent else 1)
        pairs.append(Pair(model, task, names, shares, np.array(scores).T))
    return Records(tuple(signs), signs, pairs, notes)


def judge_records(records: Records, options: RankSection, seed: int) -> dict[str, Any]:
    """What result.json holds: for each subset of pairs, what picking by each metric is worth, and their orders.

    For a metric m and pairs p with the accuracies A_ps of their strategies s:

        accuracy of the pick   mean_p A_p,pick(m, p); of strategies that tie for the pick, the mean
        rank correlation       mean_p rho_p, Spearman's of m and A_p, pairs where one of them is constant left out
        weighted               sum_p SD_p rho_p / sum_p SD_p, with SD_p the standard deviation of A_p over strategies

    Subsets are the pairs with SD_p above each of rank.spreads: elsewhere the choice hardly matters. Intervals are 95 %
    percentiles over resampled pairs, the same for all metrics, so that differences are paired. Source: arXiv
    2502.11779. Wrong as a claim about other tasks where pairs share a model or a task: they are resampled as if
    independent, and the intervals are then too narrow.
    """
    pairs, metrics = records.pairs, records.metrics
    spreads = np.array([pair.accuracies.std() for pair in pairs])
    picked, correlations = (np.zeros((len(metrics), len(pairs))) for _ in range(2))
    chosen = [[_pick(records, metric, pair) for pair in pairs] for metric in range(len(metrics))]
    for metric, name in enumerate(metrics):
        for at, pair in enumerate(pairs):
            picked[metric, at] = pair.accuracies[chosen[metric][at]].mean()
            correlations[metric, at] = rank_correlation(records.signs[name] * pair.scores[metric], pair.accuracies)
    subsets = [
        _judge_subset(records, spread, np.flatnonzero((spreads > spread) | (spread == 0)), picked, correlations, seed)
        for spread in sorted({0.0, *options.spreads})
    ]
    result = {
        "metrics": list(metrics),
        "signs": records.signs,
        "subsets": [subset for subset in subsets if subset["pairs"]],
        "pairs": [
            {
                "model": pair.model,
                "task": pair.task,
                "strategies": len(pair.strategies),
                "spread": float(spreads[at]),
                "best": ", ".join(_names_of(pair, pair.accuracies == pair.accuracies.max())),
                "best_accuracy": float(pair.accuracies.max()),
                "picks": {name: ", ".join(_names_of(pair, chosen[metric][at])) for metric, name in enumerate(metrics)},
                "accuracies": dict(zip(metrics, picked[:, at].tolist(), strict=True)),
                "correlations": dict(zip(metrics, correlations[:, at].tolist(), strict=True)),
            }
            for at, pair in enumerate(pairs)
        ],
        "notes": [
            f"{format_count('pair', len(pairs))} of a model and a task, "
            f"{sum(len(pair.strategies) for pair in pairs):,} rows",
            *records.notes,
        ],
    }
    return result | {"sentence": describe_judgement(result)}


def pairs_table(result: dict[str, Any]) -> pa.Table:
    """A row for each pair and metric: the pick, its accuracy, the best strategy, the rank correlation."""
    cells = [(pair, name) for pair in result["pairs"] for name in result["metrics"]]
    return pa.table(
        {
            "model": [pair["model"] for pair, _ in cells],
            "task": [pair["task"] for pair, _ in cells],
            "metric": [name for _, name in cells],
            "pick": [pair["picks"][name] for pair, name in cells],
            "accuracy": [pair["accuracies"][name] for pair, name in cells],
            "best": [pair["best"] for pair, _ in cells],
            "best_accuracy": [pair["best_accuracy"] for pair, _ in cells],
            "spread": [pair["spread"] for pair, _ in cells],
            "rank_correlation": [pair["correlations"][name] for pair, name in cells],
        }
    )


def describe_judgement(result: dict[str, Any]) -> str:
    """What picking by the first metric reaches, and its gain over the best of the others, in words."""
    subset, name = result["subsets"][0], result["metrics"][0]
    words = (
        f"Over {format_count('pair', subset['pairs'])} of a model and a task, picking by {title_of(name)} reaches an "
        f"accuracy of {_format_percent(subset['metrics'][name]['accuracy'])}; the best strategy of each pair "
        f"{100 * subset['best']:.2f}, one drawn at random {100 * subset['mean']:.2f}."
    )
    others = [other for other in result["metrics"] if other != name]
    if not others:
        return words
    other = max(others, key=lambda one: subset["metrics"][one]["accuracy"].value)
    gain = subset["metrics"][other]["behind"]
    words += f" Over {title_of(other)}, the best of the others, it "
    if gain.low > 0 or gain.high < 0:
        return f"{words}{'gains' if gain.low > 0 else 'loses'} {_format_percent(gain)} points."
    told = "one pair tells no interval" if math.isnan(gain.low) else "no difference is told"
    return f"{words}gains {_format_percent(gain)} points: {told}."


def title_of(name: str) -> str:
    """How a metric is called."""
    return METRICS[name].title if name in METRICS else name


# ---- parts


def _choose_metrics(columns: Sequence[str], options: RankSection) -> tuple[dict[str, int], list[str]]:
    """(column -> its sign, the judged one first; notes)."""
    path, named = options.records, {**dict.fromkeys(options.least_wins, -1), **dict.fromkeys(options.largest_wins, 1)}
    for name in named:
        if name not in columns or name in (*KEY_FIELDS, "accuracy"):
            raise ValueError(
                f"rank.least_wins and rank.largest_wins name {name!r}, which is no column of scores of {path}; "
                f"{suggest_nearest(name, columns)}its columns are {', '.join(columns)}."
            )
    if both := sorted(set(options.least_wins) & set(options.largest_wins)):
        raise ValueError(f"rank.least_wins and rank.largest_wins both name {both[0]!r}; name it in one of them.")
    signs = {name: metric.sign for name, metric in METRICS.items() if name in columns} | named
    signs = {name: sign for name, sign in signs.items() if not options.metrics or name in (*options.metrics, *named)}
    if not signs:
        raise ValueError(
            f"{path}: no column of scores that is known ({', '.join(METRICS)}). Name yours in rank.least_wins or "
            f"rank.largest_wins; the columns are {', '.join(columns)}."
        )
    unused = [name for name in columns if name not in (*KEY_FIELDS, "accuracy", *signs)]
    notes = [f"columns that were not read: {', '.join(unused)} (rank.least_wins, rank.largest_wins)"] if unused else []
    first = options.pick_by if options.pick_by in signs else next(iter(signs))
    return {first: signs[first]} | signs, notes


def _read_text(row: dict[str, Any], name: str, where: str) -> str:
    value = read_field(row, name, f"Every row has {', '.join(KEY_FIELDS)} and accuracy.", where)
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise ValueError(f"{where}: '{name}' is {describe_value(value)}; a name is wanted.")
    return str(value)


def _read_number(row: dict[str, Any], name: str, where: str) -> float:
    value = read_field(row, name, "Every row has a number there.", where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: '{name}' is {describe_value(value)}; a finite number is wanted.")
    return float(value)


def _pick(records: Records, metric: int, pair: Pair) -> np.ndarray:
    """Which strategies are the best by a metric: one, or those that tie."""
    turned = records.signs[records.metrics[metric]] * pair.scores[metric]
    return turned == turned.max()


def _names_of(pair: Pair, mask: np.ndarray) -> list[str]:
    return [name for name, is_in in zip(pair.strategies, mask, strict=True) if is_in]


def _judge_subset(
    records: Records,
    spread: float,
    kept: np.ndarray,
    picked: Float[np.ndarray, "metrics pairs"],
    correlations: Float[np.ndarray, "metrics pairs"],
    seed: int,
) -> dict[str, Any]:
    pairs = [records.pairs[at] for at in kept]
    if not pairs:
        return {"above": spread, "pairs": 0}
    counts = stats.resample_counts(len(kept), (seed, 23, len(kept))).astype(float)
    means = counts @ picked[:, kept].T / len(kept)
    best = np.array([pair.accuracies.max() for pair in pairs])
    average = np.array([pair.accuracies.mean() for pair in pairs])
    spreads = np.array([pair.accuracies.std() for pair in pairs])
    lines = {}
    for metric, name in enumerate(records.metrics):
        defined = np.isfinite(correlations[metric, kept])
        values = np.where(defined, correlations[metric, kept], 0.0)
        weights = spreads * defined
        lines[name] = {
            "accuracy": _interval(means[:, metric], len(kept)),
            "behind": _interval(means[:, 0] - means[:, metric], len(kept)) if metric else None,
            "hits": int((picked[metric, kept] == best).sum()),
            "correlation": _interval(_divide(counts @ values, counts @ defined), len(kept)),
            "weighted": _interval(_divide(counts @ (weights * values), counts @ weights), len(kept)),
            "defined": int(defined.sum()),
        }
    everywhere = set.intersection(*(set(pair.strategies) for pair in pairs))
    always = {
        name: float(np.mean([pair.accuracies[pair.strategies.index(name)] for pair in pairs]))
        for name in sorted(everywhere)
    }
    return {
        "above": spread,
        "pairs": len(pairs),
        "metrics": lines,
        "best": float(best.mean()),
        "mean": float(average.mean()),
        "always": always,
    }


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _interval(draws: np.ndarray, num_pairs: int) -> BootstrapInterval:
    """The value, and its interval where there are two pairs to resample."""
    if num_pairs < 2:
        return BootstrapInterval(float(draws[0]), math.nan, math.nan)
    return stats.percentile_interval(draws)


def _format_percent(interval: BootstrapInterval) -> str:
    if math.isnan(interval.low):
        return f"{100 * interval.value:.2f}"
    return f"{100 * interval.value:.2f} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]".replace("-", "−")
