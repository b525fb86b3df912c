"""Metrics that rank strategies, with bootstrap intervals and a pick."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.runs import stats
from bilevel_jax.runs.config.schema import RankSection
from bilevel_jax.runs.report.numbers import format_number
from bilevel_jax.runs.stats import BootstrapInterval, rank_correlation
from bilevel_jax.scores import strategies

ResponseMeasures = dict[str, Float[np.ndarray, "blocks block strategies"]]
"""What was measured of each response -> its values."""
StrategyScore = Callable[[dict[str, Float[np.ndarray, "*draws blocks block strategies"]]], np.ndarray]
"""Measured values -> [*draws, blocks, strategies]."""
MAX_SPPL_RATIO = 2.0
"""The median of SPPL over perplexity from which SPPL picks nothing. It was 1.07 and 1.08 for two small models of
stories, and 179 for one that never read more than one sum."""


class Metric(NamedTuple):
    """How a metric is read."""

    title: str
    meaning: str
    sign: int
    """1: the largest wins, -1: the least."""
    inputs: tuple[str, ...]
    """What it is made of, keys of `Measured`."""


METRICS = {
    "sppl": Metric(
        "SPPL", "self-aligned perplexity: after answers of the model's own, how surprising a response is", -1, ("sppl",)
    ),
    "perplexity": Metric("perplexity", "how surprising a response is after its question", -1, ("perplexity",)),
    "ifd": Metric(
        "IFD", "loss with the question over loss without: how little the question tells of the response", -1, ("ifd",)
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


def list_metrics(options: RankSection) -> list[str]:
    """The metrics to compute, the one that decides first."""
    named = options.metrics or [name for name in METRICS if name != "car" or options.reward_field]
    return list(dict.fromkeys([options.pick_by, *named]))


def rank_strategies(
    options: RankSection, names: Sequence[str], measures: ResponseMeasures, seed: int
) -> dict[str, Any]:
    """What result.json holds of the metrics: scores with intervals, blocks, agreement, the pick.

    A strategy's score is the mean over the blocks of its scores in each. Intervals are percentiles of resamples of the
    questions within their blocks, the same questions for every strategy, so differences are paired.
    """
    blocks, block, _ = next(iter(measures.values())).shape
    resamples = resample_questions(blocks, block, seed)
    table, draws = {}, {}
    for name in list_metrics(options):
        score = make_strategy_score(name, options)
        block_scores = score(measures)
        inputs = {key: measures[key] for key in METRICS[name].inputs}
        draws[name] = np.stack([block_scores.mean(0), *_resample_scores(score, inputs, resamples)])
        table[name] = _strategy_records(draws[name], block_scores, METRICS[name].sign)
    return {
        "strategies": list(names),
        "metrics": table,
        "agreement": correlate_metrics({name: METRICS[name].sign * draws[name][0] for name in draws}),
        "verdict": withdraw_confused_pick(
            measures, pick_strategy(options.pick_by, names, draws[options.pick_by], table[options.pick_by]), options
        ),
    }


def make_strategy_score(name: str, options: RankSection) -> StrategyScore:
    """The metric of each strategy in each block."""
    average = {
        "arithmetic": strategies.arithmetic_mean,
        "geometric": strategies.geometric_mean,
        "trimmed": strategies.trimmed_mean(options.trim),
    }[options.mean]
    beta = None if options.beta < 0 else options.beta
    score_by_metric: dict[str, StrategyScore] = {
        "sppl": lambda measured: average(measured["sppl"]),
        "perplexity": lambda measured: average(measured["perplexity"]),
        "ifd": lambda measured: strategies.arithmetic_mean(measured["ifd"]),
        "self_similarity": lambda measured: strategies.arithmetic_mean(measured["self_similarity"]),
        "mix": lambda measured: strategies.alignment_score(
            measured["perplexity"], 1 - measured["self_similarity"], beta
        ),
        "car": lambda measured: strategies.car_score(measured["rewards"], np.log(measured["perplexity"])),
    }
    return score_by_metric[name]


def resample_questions(blocks: int, block_size: int, seed: int) -> Int[np.ndarray, "draws blocks block"]:
    """Questions of each block, drawn from it with replacement."""
    return np.random.default_rng((seed, 5)).integers(0, block_size, (stats.NUM_RESAMPLES, blocks, block_size))


def correlate_metrics(scores: dict[str, Float[np.ndarray, "strategies"]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation over the strategies of each metric with each; larger scores are better in all."""
    return {name: {other: rank_correlation(scores[name], scores[other]) for other in scores} for name in scores}


def pick_strategy(
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
    gaps = [stats.percentile_interval(sign * (draws[:, best] - draws[:, other])) for other in order[1:].tolist()]
    close = [names[int(other)] for other, gap in zip(order[1:], gaps, strict=True) if not gap.low > 0]
    end = "least" if sign < 0 else "largest"
    num_first = sum(block == 1 for block in lines[best]["ranks"])
    explanation = (
        f"{names[best]} has the {end} {title}, {_format_reading(stats.percentile_interval(draws[:, best]))}, then "
        f"{names[second]}, {_format_reading(stats.percentile_interval(draws[:, second]))}; by "
        f"{_format_reading(gaps[0], 3)} on the same questions, and it is first in {num_first} of "
        f"{len(lines[best]['ranks'])} blocks."
    )
    if gaps[0].low > 0:
        rest = f" Not told apart from it: {', '.join(close)}." if close else ""
        return {
            "use": names[best],
            "close": close,
            "gap": gaps[0],
            "sentence": f"Use {names[best]}: {explanation}{rest}",
        }
    sentence = f"No clear winner: {explanation} That difference may be 0. Not told apart from it: {', '.join(close)}."
    return {"use": None, "close": close, "gap": gaps[0], "sentence": sentence}


def withdraw_confused_pick(measures: ResponseMeasures, verdict: dict[str, Any], options: RankSection) -> dict[str, Any]:
    """The verdict, without a pick where SPPL decides and the shown answers only confuse the model.

    Then responses are much less probable behind them, and SPPL ranks how confused the model is.
    """
    if options.pick_by != "sppl" or "perplexity" not in measures:
        return verdict
    ratio = float(np.median(measures["sppl"] / measures["perplexity"]))
    if not ratio > MAX_SPPL_RATIO:
        return verdict
    explanation = (
        f"No pick by SPPL: answers of its own, shown before a question, make the model find responses less probable "
        f"(median of SPPL over perplexity {format_number(ratio, 3)}), so it does not take them for examples. Set "
        "rank.template to what it knows, or rank.pick_by to perplexity."
    )
    return verdict | {"use": None, "sentence": explanation}


def _strategy_records(
    draws: np.ndarray, block_scores: Float[np.ndarray, "blocks strategies"], sign: int
) -> list[dict[str, Any]]:
    """For each strategy: its score with its interval, its gap to the best, its scores and ranks in the blocks."""
    best = int(np.argmax(sign * draws[0]))
    ranks = (sign * block_scores[:, None, :] > sign * block_scores[:, :, None]).sum(-1) + 1
    return [
        {
            "score": stats.percentile_interval(draws[:, at]),
            "behind": stats.percentile_interval(sign * (draws[:, best] - draws[:, at])) if at != best else None,
            "blocks": block_scores[:, at].tolist(),
            "spread": float(np.std(block_scores[:, at], ddof=1)) if len(block_scores) > 1 else math.nan,
            "ranks": ranks[:, at].tolist(),
        }
        for at in range(block_scores.shape[1])
    ]


def _resample_scores(
    score: StrategyScore, measures: ResponseMeasures, resamples: Int[np.ndarray, "draws blocks block"]
) -> list[np.ndarray]:
    """The scores of each resample; a few resamples at a time."""
    size = max(1, stats.MAX_BLOCK_ELEMENTS // max(values.size for values in measures.values()))
    scores = []
    for start in range(0, len(resamples), size):
        indices = resamples[start : start + size, ..., None]
        scores += list(score({key: np.take_along_axis(v[None], indices, 2) for key, v in measures.items()}).mean(1))
    return scores


def _format_reading(reading: BootstrapInterval, digits: int = 4) -> str:
    value, low, high = (format_number(bound, digits) for bound in reading)
    return f"{value} [{low}, {high}]"
