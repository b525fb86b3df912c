"""Choice of scored examples by section selection, in passes over chunks on disk."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.commands.score.chunks import kth_largest, read_columns
from bilevel_jax.runs.config.schema import SelectionSection
from bilevel_jax.runs.engine import selection
from bilevel_jax.runs.engine.raters import Rater
from bilevel_jax.runs.engine.selection import Cut


class Choice(NamedTuple):
    """How often each example is chosen."""

    repeats: Callable[[], Iterator[Int[np.ndarray, "chunk"]]]
    """Of each chunk, anew at each call."""
    total: int
    """Chosen rows, with repeats."""
    note: str
    """What equal weights left to the order of the data, and why there are fewer rows than asked for; "" where nothing.
    """


class Threshold(NamedTuple):
    """The examples of the largest logits of a group: all above a value, and the first of those that equal it."""

    value: float
    cut: Cut


def choose_rows(paths: Sequence[Path], rater: Rater, rule: SelectionSection, *, seed: int) -> Choice:
    """The same choice as `selection.select_examples` makes of weights in memory, for scores of any number.

    Raises ValueError where the rule leaves no row.
    """

    def logits() -> Iterator[Float[np.ndarray, "chunk"]]:
        return (columns[0] for columns in read_columns(paths, "logit"))

    num_scored, least, largest = 0, np.inf, -np.inf
    for chunk in logits():
        num_scored += int((~np.isnan(chunk)).sum())
        least, largest = np.fmin.reduce(chunk, initial=least), np.fmax.reduce(chunk, initial=largest)
    cuts: list[Cut] = []
    if not num_scored:
        raise ValueError("every example was dropped as too long, so there is none to choose. Look at data.truncation.")
    largest_weight = float(rater.weights(np.array(largest)))
    if (rule.resample or rule.per_source) and not largest_weight:
        key = "resample" if rule.resample else "per_source"
        raise ValueError(
            f"every weight underflows to 0, as the largest logit is {largest:.3g} and that of the rater's training "
            f"examples {rater.document['training']['logits']['mean']:.3g} in the mean: selection.{key} has nothing to "
            "go by. Use selection.top_share, which ranks by the logits."
        )
    if rule.resample:
        repeats = _resample(logits, rater, rule, seed)
    elif rule.per_source:
        thresholds = _find_source_thresholds(paths, rater, rule.per_source)
        repeats, cuts = _take_largest(paths, thresholds, grouped=True), [one.cut for one in thresholds.values()]
    elif rule.threshold:
        repeats = lambda: ((weights_of(rater, chunk) >= rule.threshold).astype(int) for chunk in logits())  # noqa: E731
    else:
        count = max(1, round(rule.top_share * num_scored))
        threshold = _find_threshold(logits, count)
        repeats, cuts = _take_largest(paths, {"": threshold}, grouped=False), [threshold.cut]
    total = sum(int(chunk.sum()) for chunk in repeats())
    if not total:
        raise ValueError(
            f"no row has a weight of selection.threshold = {rule.threshold:g} or more; the largest is "
            f"{largest_weight:.3g}. Lower it, or use selection.top_share."
        )
    notes = (
        selection.describe_cuts(cuts, rule, num_equal=num_scored if least == largest else 0),
        selection.describe_shortfall(rule, total),
    )
    return Choice(repeats, total, " ".join(filter(None, notes)))


def weights_of(rater: Rater, logits: Float[np.ndarray, "chunk"]) -> Float[np.ndarray, "chunk"]:
    """The weights; 0 of an example that was dropped as too long."""
    return np.nan_to_num(rater.weights(logits), nan=0.0)


def _find_threshold(logits: Callable[[], Iterator[np.ndarray]], count: int) -> Threshold:
    value, larger = kth_largest(logits, count)
    return Threshold(value, Cut(count - larger, sum(int((chunk == value).sum()) for chunk in logits())))


def _take_largest(
    paths: Sequence[Path], thresholds: dict[str, Threshold], *, grouped: bool
) -> Callable[[], Iterator[Int[np.ndarray, "chunk"]]]:
    def repeats() -> Iterator[np.ndarray]:
        left = {name: threshold.cut.taken for name, threshold in thresholds.items()}
        for columns in read_columns(paths, "logit", *(["source"] if grouped else [])):
            chosen = np.zeros(len(columns[0]), int)
            for name, threshold in thresholds.items():
                is_member = columns[1] == name if grouped else np.ones(len(chosen), bool)
                chosen[is_member & (columns[0] > threshold.value)] = 1
                equal = np.flatnonzero(is_member & (columns[0] == threshold.value))[: left[name]]
                chosen[equal] = 1
                left[name] -= len(equal)
            yield chosen

    return repeats


def _find_source_thresholds(paths: Sequence[Path], rater: Rater, count: int) -> dict[str, Threshold]:
    totals: dict[str, float] = {}
    members: dict[str, int] = {}
    for logits, sources in read_columns(paths, "logit", "source"):
        weights = weights_of(rater, logits)
        for name in set(sources[~np.isnan(logits)]):
            mask = (sources == name) & ~np.isnan(logits)
            totals[name] = totals.get(name, 0.0) + float(weights[mask].sum())
            members[name] = members.get(name, 0) + int(mask.sum())
    names, total = sorted(totals), sum(totals.values())
    quotas = {name: count * totals[name] / total for name in names}
    counts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(names, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: count - sum(counts.values())]:
        counts[name] += 1

    def logits_of(name: str) -> Callable[[], Iterator[np.ndarray]]:
        return lambda: (logits[sources == name] for logits, sources in read_columns(paths, "logit", "source"))

    return {name: _find_threshold(logits_of(name), min(counts[name], members[name])) for name in names if counts[name]}


def _resample(
    logits: Callable[[], Iterator[np.ndarray]], rater: Rater, rule: SelectionSection, seed: int
) -> Callable[[], Iterator[Int[np.ndarray, "chunk"]]]:
    """Systematic resampling: row i is drawn floor or ceil of count w_i / sum w times, and at most max_repeats."""

    def weights() -> Iterator[np.ndarray]:
        return (weights_of(rater, chunk) for chunk in logits())

    def weigh_rows(level: float) -> tuple[int, float]:
        num_above, total = 0, 0.0
        for chunk in weights():
            num_above += int((chunk >= level).sum())
            total += float(chunk[chunk < level].sum())
        return num_above, total

    draw = selection.cap_draw(weigh_rows, rule, sum(int((chunk > 0).sum()) for chunk in weights()))
    offset = np.random.default_rng(seed).random()

    def repeats() -> Iterator[np.ndarray]:
        done, drawn = 0.0, 0
        for chunk in weights():
            is_capped = chunk >= draw.level
            out = np.where(is_capped, rule.max_repeats, 0)
            if draw.num_drawn:
                ends = done + np.cumsum(np.where(is_capped, 0.0, chunk))
                done = float(ends[-1])
                points = np.ceil(ends / draw.total * draw.num_drawn - offset).astype(int)  # below each end
                upto = np.clip(points, 0, draw.num_drawn)
                out += np.diff(upto, prepend=drawn)
                drawn = int(upto[-1])
            yield out

    return repeats
