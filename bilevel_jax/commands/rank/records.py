"""Metrics judged by known accuracies over many pairs of a model and a task."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from bilevel_jax.commands.rank.metrics import METRICS
from bilevel_jax.commands.rank.strategies import finite_number
from bilevel_jax.lm.data import files
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.lm.data.turns import check_row, read_field
from bilevel_jax.runs import stats
from bilevel_jax.runs.config.schema import RankSection
from bilevel_jax.runs.config.yaml_reader import suggest_nearest
from bilevel_jax.runs.report.numbers import MISSING
from bilevel_jax.runs.report.results import float_or_nan
from bilevel_jax.runs.stats import BootstrapInterval

KEY_FIELDS = ("model", "task", "strategy")
"""What a row is about; no two rows have the same three."""
MIN_PAIRS = 10
"""Pairs from which on a difference is claimed: by simulation its 95 % interval, of Student's t, then holds what it says
also for skewed differences, and of fewer pairs nobody should hear more than the means."""
ROUNDING = 1e-6
"""How far a share may be above 1, as of float32, and a spread above its threshold."""


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

    The known metrics are read in their own direction; rank.least_wins and rank.largest_wins name columns of one's own,
    which are judged first. Raises ValueError, with file and line, for a row without one of these, a number that is not
    finite or no share (rank.accuracy_unit), a strategy that stands twice, and a pair with one strategy.
    """
    path = options.records
    rows = []
    for line, row in files.read_rows(path):
        check_row(row, f"{path}:{line}")
        rows.append((f"{path}:{line}", row))
    if not rows:
        raise ValueError(f"{path}: no rows. Each is a strategy of a model and a task, with its accuracy and scores.")
    signs, notes = _choose_metrics(list(dict.fromkeys(name for _, row in rows for name in row)), options)
    largest = {"share": 1, "percent": 100}[options.accuracy_unit]
    places: dict[tuple[str, ...], str] = {}
    lines: dict[tuple[str, str], list[tuple[str, float, list[float]]]] = {}
    for where, row in rows:
        key = tuple(_read_text(row, name, where) for name in KEY_FIELDS)
        if (other := places.setdefault(key, where)) != where:
            raise ValueError(f"{where}: {key[2]!r} of {key[0]!r} and {key[1]!r} stands at {other}, too. Remove one.")
        numbers = [_read_number(row, name, where) for name in ("accuracy", *signs)]
        if not 0 <= numbers[0] <= largest * (1 + ROUNDING):
            remedy = "Set rank.accuracy_unit to percent, if that is its unit." if largest == 1 else "Correct the row."
            raise ValueError(
                f"{where}: 'accuracy' is {numbers[0]:g}; a number from 0 to {largest} is wanted, as rank.accuracy_unit "
                f"is {options.accuracy_unit}. {remedy}"
            )
        lines.setdefault((key[0], key[1]), []).append((key[2], numbers[0], numbers[1:]))
    notes.append(f"accuracies are read as {'shares' if largest == 1 else 'percent'} (rank.accuracy_unit)")
    pairs = []
    for (model, task), some in sorted(lines.items()):
        if len(some) < 2:
            raise ValueError(
                f"{places[model, task, some[0][0]]}: {some[0][0]!r} is the only strategy of {model!r} and {task!r}; "
                "there is nothing to choose from. Add another one, or remove the row."
            )
        names, accuracies, scores = zip(*sorted(some), strict=True)
        shares = np.minimum(np.array(accuracies) / largest, 1.0)
        pairs.append(Pair(model, task, names, shares, np.array(scores).T))
    return Records(tuple(signs), signs, pairs, notes)


def judge_records(records: Records, options: RankSection, seed: int) -> dict[str, Any]:
    """What result.json holds: for each subset of pairs, what picking by each metric is worth, and their orders.

    For a metric m and pairs p with the accuracies A_ps of their strategies s:

        accuracy of the pick   mean_p A_p,pick(m, p); of strategies that tie for the pick, the mean
        rank correlation       mean_p rho_p, Spearman's of m and A_p, pairs where one of them is constant left out
        weighted               sum_p SD_p rho_p / sum_p SD_p, with SD_p the standard deviation of A_p over strategies

    Subsets are the pairs with SD_p (the variance divided by the number of strategies) above each of rank.spreads:
    elsewhere the choice hardly matters. Intervals are 95 %, by Student's t over pairs for means, which are paired for
    differences, and percentiles over resampled pairs for the weighted one. Source: arXiv 2502.11779. Wrong as a claim
    about other tasks where pairs share a model or a task: they count as independent, and the intervals are too narrow.
    """
    pairs, metrics = records.pairs, records.metrics
    judged = judge_pairs(records)
    spreads = judged.spreads
    subsets = [
        _judge_subset(records, judged, spread, np.flatnonzero((spreads > spread + ROUNDING) | (spread == 0)), seed)
        for spread in sorted({0.0, *options.spreads})
    ]
    result = {
        "metrics": list(metrics),
        "signs": records.signs,
        "subsets": subsets,
        "pairs": [
            {
                "model": pair.model,
                "task": pair.task,
                "strategies": len(pair.strategies),
                "spread": float(spreads[at]),
                "best": ", ".join(_names_of(pair, pair.accuracies == pair.accuracies.max())),
                "best_accuracy": float(pair.accuracies.max()),
                "picks": {
                    name: ", ".join(_names_of(pair, judged.chosen[metric][at])) for metric, name in enumerate(metrics)
                },
                "accuracies": dict(zip(metrics, judged.accuracies[:, at].tolist(), strict=True)),
                "correlations": dict(zip(metrics, judged.correlations[:, at].tolist(), strict=True)),
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


class JudgedPairs(NamedTuple):
    """What each metric says of each pair."""

    chosen: list[list[Bool[np.ndarray, "strategies"]]]
    """Of each metric and pair, the best strategies by it: one, or those that tie."""
    accuracies: Float[np.ndarray, "metrics pairs"]
    """Of what is chosen: of strategies that tie, the mean."""
    hits: Bool[np.ndarray, "metrics pairs"]
    """Whether no strategy is better than any that is chosen."""
    correlations: Float[np.ndarray, "metrics pairs"]
    """Spearman's, with the accuracies; nan where one of the two is constant."""
    spreads: Float[np.ndarray, "pairs"]


def judge_pairs(records: Records) -> JudgedPairs:
    """Picks, their accuracies and rank correlations."""
    pairs, shape = records.pairs, (len(records.metrics), len(records.pairs))
    accuracies, correlations, hits = np.zeros(shape), np.full(shape, math.nan), np.zeros(shape, bool)
    chosen: list[list[np.ndarray]] = [[] for _ in records.metrics]
    for at, pair in enumerate(pairs):
        ranks = rankdata(pair.accuracies)
        for metric, name in enumerate(records.metrics):
            scores = records.signs[name] * pair.scores[metric]
            is_chosen = scores == scores.max()
            values = pair.accuracies[is_chosen]
            chosen[metric].append(is_chosen)
            hits[metric, at] = values.min() == pair.accuracies.max()
            accuracies[metric, at] = values[0] if values_equal(values) else values.mean()
            if not (values_equal(scores) or values_equal(ranks)):
                correlations[metric, at] = np.corrcoef(rankdata(scores), ranks)[0, 1]
    return JudgedPairs(chosen, accuracies, hits, correlations, np.array([pair.accuracies.std() for pair in pairs]))


def values_equal(values: Float[np.ndarray, "strategies"]) -> bool:
    """Whether all values are the same."""
    return bool((values == values[0]).all())


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
        f"accuracy of {format_percents(subset['metrics'][name]['accuracy'])}; the best strategy of each pair "
        f"{100 * subset['best']:.2f}, one drawn at random {100 * subset['mean']:.2f}."
    )
    others = [other for other in result["metrics"] if other != name]
    if not others:
        return words
    other = max(others, key=lambda one: subset["metrics"][one]["accuracy"].value)
    gain = subset["metrics"][other]["gain"]
    words += f" Against {title_of(other)}, the best of the others, "
    if subset["pairs"] < MIN_PAIRS:
        return f"{words}{100 * gain.value:+.2f} points: so few pairs tell no difference.".replace("-", "−")
    if gain.low > 0:
        return f"{words}it gains {format_percents(gain)} points."
    if gain.high < 0:
        return f"{words}it loses {format_percents(BootstrapInterval(-gain.value, -gain.high, -gain.low))} points."
    return f"{words}the difference is {format_percents(gain)} points and may be 0."


def format_reading(interval: Sequence[float | None] | None, *, scale: float = 1.0, digits: int = 3) -> str:
    """A value with the ends of its interval, where there are any."""
    if interval is None or interval[0] is None:
        return MISSING
    value, low, high = (scale * float_or_nan(item) for item in interval)
    text = f"{value:.{digits}f}"
    if not math.isnan(low):
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text.replace("-", "−")


format_percents = partial(format_reading, scale=100.0, digits=2)
"""The same of shares, in percent."""


def title_of(name: str) -> str:
    """How a metric is called."""
    return METRICS[name].title if name in METRICS else name


# ---- parts


def _choose_metrics(columns: Sequence[str], options: RankSection) -> tuple[dict[str, int], list[str]]:
    """(column -> its sign, the judged one first; notes)."""
    path, named = options.records, {**dict.fromkeys(options.least_wins, -1), **dict.fromkeys(options.largest_wins, 1)}
    scores = [name for name in columns if name not in (*KEY_FIELDS, "accuracy")]
    for name in (*named, *options.metrics):
        if name not in scores:
            key = next(key for key in ("least_wins", "largest_wins", "metrics") if name in getattr(options, key))
            raise ValueError(
                f"rank.{key} names {name!r}, which is no column of scores of {path}; "
                f"{suggest_nearest(name, scores)}there are {', '.join(scores) or 'none'}."
            )
    if both := sorted(set(options.least_wins) & set(options.largest_wins)):
        raise ValueError(f"rank.least_wins and rank.largest_wins both name {both[0]!r}; name it in one of them.")
    known = [name for name in options.metrics or METRICS if name in scores and name not in named]
    known.sort(key=lambda name: name != options.pick_by)
    signs = named | {name: METRICS[name].sign for name in known}
    if not signs:
        raise ValueError(
            f"{path}: no column of scores that is known ({', '.join(METRICS)}). Name yours in rank.least_wins or "
            f"rank.largest_wins; the columns are {', '.join(columns)}."
        )
    unused = [name for name in columns if name not in (*KEY_FIELDS, "accuracy", *signs)]
    notes = [f"columns that were not read: {', '.join(unused)} (rank.least_wins, rank.largest_wins)"] if unused else []
    return signs, notes


def _read_text(row: dict[str, Any], name: str, where: str) -> str:
    value = read_field(row, name, f"Every row has {', '.join(KEY_FIELDS)} and accuracy.", where)
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise ValueError(f"{where}: '{name}' is {describe_value(value)}; a name is wanted.")
    return str(value).strip()


def _read_number(row: dict[str, Any], name: str, where: str) -> float:
    value = read_field(row, name, "Every row has a number there.", where)
    if (number := finite_number(value)) is None:
        raise ValueError(f"{where}: '{name}' is {describe_value(value)}; a finite number is wanted.")
    return number


def _names_of(pair: Pair, mask: np.ndarray) -> list[str]:
    return [name for name, is_in in zip(pair.strategies, mask, strict=True) if is_in]


def _judge_subset(
    records: Records, judged: JudgedPairs, spread: float, kept: Int[np.ndarray, "kept"], seed: int
) -> dict[str, Any]:
    pairs, accuracies = [records.pairs[at] for at in kept], judged.accuracies[:, kept]
    if not pairs:
        return {"spread_above": spread, "pairs": 0}
    counts = stats.resample_counts(len(kept), (seed, 23, len(kept))).astype(float)
    lines = {}
    for metric, name in enumerate(records.metrics):
        correlations = judged.correlations[metric, kept]
        defined = np.isfinite(correlations)
        weights = judged.spreads[kept] * defined
        weighted = _divide(counts @ (weights * np.where(defined, correlations, 0.0)), counts @ weights)
        lines[name] = {
            "accuracy": _mean_interval(accuracies[metric]),
            "gain": _mean_interval(accuracies[0] - accuracies[metric]) if metric else None,
            "picks_the_best": int(judged.hits[metric, kept].sum()),
            "correlation": _mean_interval(correlations[defined]),
            "weighted_correlation": stats.percentile_interval(weighted)
            if defined.sum() > 1
            else BootstrapInterval(float(weighted[0]), math.nan, math.nan),
            "pairs_with_correlation": int(defined.sum()),
        }
    sums: dict[str, list[float]] = {}
    for pair in pairs:
        for name, accuracy in zip(pair.strategies, pair.accuracies.tolist(), strict=True):
            sums.setdefault(name, []).append(accuracy)
    return {
        "spread_above": spread,
        "pairs": len(pairs),
        "metrics": lines,
        "best": float(np.mean([pair.accuracies.max() for pair in pairs])),
        "mean": float(np.mean([pair.accuracies.mean() for pair in pairs])),
        "always": {name: float(np.mean(some)) for name, some in sorted(sums.items()) if len(some) == len(pairs)},
    }


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _mean_interval(values: Float[np.ndarray, "pairs"]) -> BootstrapInterval:
    """The mean with its interval over pairs, which two of them at least can tell."""
    if not len(values):
        return BootstrapInterval(math.nan, math.nan, math.nan)
    mean, half = stats.mean_interval(values.tolist())
    return BootstrapInterval(mean, mean - half, mean + half)
