"""From scores of every response to a ranking of strategies: blocks, resamples, agreement of the metrics, the pick."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.runs import bootstrap
from bilevel_jax.runs.bootstrap import Reading
from bilevel_jax.runs.page import number
from bilevel_jax.runs.sections import RankSection
from bilevel_jax.runs.statistics import rank_correlation
from bilevel_jax.scores import strategies

Measured = dict[str, Float[np.ndarray, "blocks block strategies"]]
"""What was measured of each response -> its values."""
Strategy = Callable[[dict[str, Float[np.ndarray, "*draws blocks block strategies"]]], np.ndarray]
"""Measured values -> [*draws, blocks, strategies]."""
MISLED = 2.0
"""The median of SPPL over perplexity from which SPPL picks nothing. It was 1.07 and 1.08 for two small models of
stories, and 179 for one that never read more than one sum."""


class Metric(NamedTuple):
    """How a metric is read."""

    title: str
    meaning: str
    sign: int
    """1: the largest wins, -1: the least."""
    reads: tuple[str, ...]
    """What it is made of, keys of `Measured`."""


METRICS = {
    "sppl": Metric(
        "SPPL", "self-aligned perplexity: after answers of the model's own, how surprising a response is", -1, ("sppl",)
    ),
    "perplexity": Metric("perplexity", "how surprising a response is after its question", -1, ("perplexity",)),
    "ifd": Metric(
        "IFD", "loss with the question over loss without: how little the question tells of the response", 1, ("ifd",)
    ),
    "self_similarity": Metric(
        "self-similarity", "mean cosine of hidden states with the model's own answer (alignment score, v1)", 1,
        ("self_similarity",),
    ),
    "mix": Metric(
        "mix", "perplexity, at most 10, and 1 - self-similarity, each scaled to 0 .. 1 over the strategies", -1,
        ("perplexity", "self_similarity"),
    ),
    "car": Metric("CAR", "mean reward / (1 + 3 mean loss)", 1, ("rewards", "perplexity")),
}  # fmt: skip


def wanted(options: RankSection) -> list[str]:
    """The metrics to compute, the one that decides first."""
    named = options.metrics or [name for name in METRICS if name != "car" or options.reward_field]
    return list(dict.fromkeys([options.pick_by, *named]))


def ranking(options: RankSection, names: Sequence[str], measured: Measured, seed: int) -> dict[str, Any]:
    """What result.json holds of the metrics: scores with intervals, blocks, agreement, the pick.

    A strategy's score is the mean over the blocks of its scores in each. Intervals are percentiles of resamples of the
    questions within their blocks, the same questions for every strategy, so differences are paired.
    """
    blocks, block, _ = next(iter(measured.values())).shape
    chosen = resampled(blocks, block, seed)
    table, draws = {}, {}
    for name in wanted(options):
        score = strategy(name, options)
        each = score(measured)
        read = {key: measured[key] for key in METRICS[name].reads}
        draws[name] = np.stack([each.mean(0), *_drawn(score, read, chosen)])
        table[name] = _lines(draws[name], each, METRICS[name].sign)
    return {
        "strategies": list(names),
        "metrics": table,
        "agreement": agreement({name: METRICS[name].sign * draws[name][0] for name in draws}),
        "verdict": doubted(
            measured, pick(options.pick_by, names, draws[options.pick_by], table[options.pick_by]), options
        ),
    }


def strategy(name: str, options: RankSection) -> Strategy:
    """The metric of each strategy in each block."""
    average = {
        "arithmetic": strategies.mean,
        "geometric": strategies.exp_of_mean,
        "trimmed": strategies.trimmed(options.trim),
    }[options.mean]
    beta = None if options.beta < 0 else options.beta
    of: dict[str, Strategy] = {
        "sppl": lambda measured: average(measured["sppl"]),
        "perplexity": lambda measured: average(measured["perplexity"]),
        "ifd": lambda measured: strategies.mean(measured["ifd"]),
        "self_similarity": lambda measured: strategies.mean(measured["self_similarity"]),
        "mix": lambda measured: strategies.mix(measured["perplexity"], 1 - measured["self_similarity"], beta),
        "car": lambda measured: strategies.car(measured["rewards"], np.log(measured["perplexity"])),
    }
    return of[name]


def resampled(blocks: int, block: int, seed: int) -> Int[np.ndarray, "draws blocks block"]:
    """Questions of each block, drawn from it with replacement."""
    return np.random.default_rng((seed, 5)).integers(0, block, (bootstrap.DRAWS, blocks, block))


def agreement(scores: dict[str, Float[np.ndarray, "strategies"]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation over the strategies of each metric with each; larger scores are better in all."""
    return {one: {other: rank_correlation(scores[one], scores[other]) for other in scores} for one in scores}


def pick(
    metric: str, names: Sequence[str], draws: Float[np.ndarray, "draws strategies"], lines: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The strategy to use by one metric, or none; `draws` begin with the sample itself.

    The best two by their scores are compared on the same resampled questions. The best is picked where the 95 %
    interval of their difference does not reach 0; else there is no clear winner, and all that are not told apart from
    the best are named. The interval knows how questions vary, not that the best two were chosen after looking, nor how
    trainings, or other answers drawn from the model, vary.
    """
    title, sign = METRICS[metric].title, METRICS[metric].sign
    order = np.argsort(-sign * draws[0], kind="stable")
    best, second = int(order[0]), int(order[1])
    gaps = [bootstrap.reading(sign * (draws[:, best] - draws[:, other])) for other in order[1:].tolist()]
    close = [names[int(other)] for other, gap in zip(order[1:], gaps, strict=True) if not gap.low > 0]
    end = "least" if sign < 0 else "largest"
    first = sum(block == 1 for block in lines[best]["ranks"])
    said = (
        f"{names[best]} has the {end} {title}, {_said(bootstrap.reading(draws[:, best]))}, then {names[second]}, "
        f"{_said(bootstrap.reading(draws[:, second]))}; by {_said(gaps[0], 3)} on the same questions, and it is first "
        f"in {first} of {len(lines[best]['ranks'])} blocks."
    )
    if gaps[0].low > 0:
        rest = f" Not told apart from it: {', '.join(close)}." if close else ""
        return {"use": names[best], "close": close, "gap": gaps[0], "sentence": f"Use {names[best]}: {said}{rest}"}
    sentence = f"No clear winner: {said} That difference may be 0. Not told apart from it: {', '.join(close)}."
    return {"use": None, "close": close, "gap": gaps[0], "sentence": sentence}


def doubted(measured: Measured, verdict: dict[str, Any], options: RankSection) -> dict[str, Any]:
    """The verdict, without a pick where SPPL decides and the shown answers only confuse the model.

    Then responses are much less probable behind them (`MISLED`), and SPPL ranks how confused the model is.
    """
    if options.pick_by != "sppl" or "perplexity" not in measured:
        return verdict
    ratio = float(np.median(measured["sppl"] / measured["perplexity"]))
    if not ratio > MISLED:
        return verdict
    said = (
        f"No pick by SPPL: answers of its own, shown before a question, make the model find responses less probable "
        f"(median of SPPL over perplexity {number(ratio, 3)}), so it does not take them for examples. Set "
        "rank.template to what it knows, or rank.pick_by to perplexity."
    )
    return verdict | {"use": None, "sentence": said}


def _lines(draws: np.ndarray, each: Float[np.ndarray, "blocks strategies"], sign: int) -> list[dict[str, Any]]:
    """For each strategy: its score with its interval, its gap to the best, its scores and ranks in the blocks."""
    best = int(np.argmax(sign * draws[0]))
    ranks = (sign * each[:, None, :] > sign * each[:, :, None]).sum(-1) + 1
    return [
        {
            "score": bootstrap.reading(draws[:, at]),
            "behind": bootstrap.reading(sign * (draws[:, best] - draws[:, at])) if at != best else None,
            "blocks": each[:, at].tolist(),
            "spread": float(np.std(each[:, at], ddof=1)) if len(each) > 1 else math.nan,
            "ranks": ranks[:, at].tolist(),
        }
        for at in range(each.shape[1])
    ]


def _drawn(score: Strategy, measured: Measured, chosen: Int[np.ndarray, "draws blocks block"]) -> list[np.ndarray]:
    """The scores of each resample; a few resamples at a time."""
    size = max(1, bootstrap.BLOCK // max(values.size for values in measured.values()))
    found = []
    for first in range(0, len(chosen), size):
        some = chosen[first : first + size, ..., None]
        found += list(score({key: np.take_along_axis(v[None], some, 2) for key, v in measured.items()}).mean(1))
    return found


def _said(found: Reading, digits: int = 4) -> str:
    value, low, high = (number(one, digits) for one in found)
    return f"{value} [{low}, {high}]"
