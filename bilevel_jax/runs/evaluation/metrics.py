"""Metrics of answers: values of each question, paired intervals, and which model is better."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.runs.evaluation.models import ROLES
from bilevel_jax.runs.stats import BootstrapInterval, bootstrap_mean, sign_flip_p

LEVEL = 0.05
"""Two-sided level of the sign-flip test that a difference must pass beside its interval."""


class Metric(NamedTuple):
    """What is measured, and how it is written."""

    title: str
    unit: str
    sign: int
    """1: the largest wins, -1: the least wins, 0: neither is better."""
    is_share: bool
    """Written in percent."""
    digits: int
    """Behind the point."""
    meaning: str


METRICS = {
    "preference": Metric(
        "preference",
        "win rate, ties count half",
        1,
        True,
        1,
        "how often the judge prefers the model's answer to the baseline's",
    ),
    "accuracy": Metric("accuracy", "share of answers", 1, True, 1, "answers that the verifier finds right"),
    "perplexity": Metric(
        "reference loss",
        "nats per token",
        -1,
        False,
        3,
        "minus log-likelihood of the reference, the mean over questions",
    ),
    "chrf": Metric("chrF", "0 to 100", 1, False, 1, "character n-grams shared with the reference"),
    "bleu": Metric("BLEU", "0 to 100, of single answers", 1, False, 1, "word n-grams shared with the reference"),
    "rouge_l": Metric("ROUGE-L", "0 to 100, F-measure", 1, False, 1, "longest common subsequence with the reference"),
    "safety": Metric("safety", "share of answers", 1, True, 1, "answers that the judge finds safe"),
    "refusal": Metric("refusal rate", "share of answers", 0, True, 1, "answers that decline to do what was asked"),
}
BITS_PER_BYTE = METRICS["perplexity"]._replace(
    unit="bits per byte",
    meaning="minus log-likelihood of the reference per byte of its text, as the models have different tokenizers",
)


class PairOutcomes(NamedTuple):
    """What the judge said of each pair of answers."""

    scores: Float[np.ndarray, "questions draws orders"]
    """1: the model's answer is better, 0: the baseline's, .5: neither; nan: no verdict. Order 0 shows the model's
    first, order 1 the baseline's; both are .5 where the answers are equal and nothing was asked."""
    asked: Any
    """[questions, draws]: whether the judge was asked."""

    @property
    def shares(self) -> Float[np.ndarray, "questions draws"]:
        """The win share of the model over both orders; nan unless both have a verdict: one alone has its bias."""
        return self.scores.mean(2)

    @property
    def first_wins(self) -> Float[np.ndarray, "questions"]:
        """How far the answer that is shown first is preferred: its mean score minus 1/2, over the judged pairs."""
        first = np.stack([self.scores[..., 0], 1 - self.scores[..., 1]], -1).mean(-1) - 0.5
        return nanmean_rows(np.where(self.asked, first, math.nan))

    @property
    def num_contradictions(self) -> int:
        """Pairs in which the judge prefers the same place in both orders: ties."""
        forward, backward = self.scores[..., 0], self.scores[..., 1]
        return int((self.asked & (np.abs(forward - backward) == 1)).sum())

    @property
    def num_unjudged(self) -> int:
        """Pairs that lack a verdict in at least one order."""
        return int(np.isnan(self.shares).sum())


def nanmean_rows(values: Float[np.ndarray, "questions draws"]) -> Float[np.ndarray, "questions"]:
    """The mean of each row over what is known; nan where nothing is."""
    known = ~np.isnan(values)
    counts = known.sum(1)
    return np.divide(np.where(known, values, 0).sum(1), counts, out=np.full(len(values), math.nan), where=counts > 0)


def summarize_metric(
    name: str, metric: Metric, values: Mapping[str, Float[np.ndarray, "questions"]], seed: int
) -> dict[str, Any]:
    """What result.json holds of a metric of one or two models: means, their difference, and which is better.

    `values` are those of each question by the role of the model (model, baseline); of `preference` the win shares
    of the model alone. Questions that lack a value of either model are left out. A model is better where the 95 %
    bootstrap interval of the paired difference (of win shares: from 1/2) leaves out 0 and a sign-flip test has p < .05,
    which also holds for few questions and for many without a difference.
    """
    known = ~np.isnan(np.stack(list(values.values()))).any(0)
    kept, key = {role: of_role[known] for role, of_role in values.items()}, (seed, *name.encode())
    line: dict[str, Any] = {
        **metric_facts(metric),
        "questions": int(known.sum()),
        **dict.fromkeys(ROLES),
        **{
            role: mean_interval(of_role, (0, 1) if metric.is_share else None, (*key, ROLES.index(role)))
            for role, of_role in kept.items()
        },
        "difference": None,
        "p": None,
    }
    if name == "preference":
        rate = line["model"]
        line["baseline"] = BootstrapInterval(1 - rate.value, 1 - rate.high, 1 - rate.low)
        differences = kept["model"] - 0.5
    elif len(kept) == 2:
        differences = kept["model"] - kept["baseline"]
    else:
        return line | {"level": "single"}
    if not len(differences):
        return line | {"level": "none"}
    difference = mean_interval(differences, (-1, 1) if metric.is_share else None, (*key, 2))
    p = sign_flip_p(differences, (*key, 3))
    if name == "preference":  # the same items
        difference = BootstrapInterval(*(end - 0.5 for end in line["model"]))
    return line | {"difference": difference, "p": p, "level": decide_level(metric.sign, difference, p)}


def metric_facts(metric: Metric) -> dict[str, Any]:
    """What result.json holds of a metric itself, from which numbers are written."""
    return {
        "title": metric.title,
        "unit": metric.unit,
        "sign": metric.sign,
        "is_share": metric.is_share,
        "digits": metric.digits,
        "meaning": metric.meaning,
    }


def mean_interval(
    values: Float[np.ndarray, "questions"],
    ends: tuple[float, float] | None,
    seed: tuple[int, ...],
    level: float = LEVEL,
) -> BootstrapInterval:
    """The mean with its 95 % bootstrap interval; of shares that are all alike, the exact binomial one.

    Where all shares are 0, or 1, or all their differences are -1, 0 or 1, no resample differs, and the bootstrap would
    be sure of what n questions cannot tell. Other questions may then be otherwise with a probability of up to
    1 - .025^(1/n) (Clopper and Pearson 1934); the interval goes that far, within `ends`.

    Args:
        values: of each question.
        ends: the least and the largest value of a share, or of a difference of two; None for other numbers.
        seed: of the resamples.
        level: what the interval may miss.

    Returns:
        The mean and its interval; nan for none.
    """
    if ends is not None and len(values) and np.all(values == values[0]) and values[0] in (*ends, 0):
        value, distance = float(values[0]), 1 - (level / 2) ** (1 / len(values))
        return BootstrapInterval(value, max(ends[0], value - distance), min(ends[1], value + distance))
    return bootstrap_mean(values, seed, level)


def decide_level(sign: int, difference: BootstrapInterval, p: float) -> str:
    """better or worse, for the model; none: no difference is told; open: neither direction is better."""
    if sign == 0:
        return "open"
    if not p < LEVEL or not (difference.low > 0 or difference.high < 0):
        return "none"
    return "better" if sign * difference.value > 0 else "worse"


def measure_position_bias(outcomes: PairOutcomes, seed: int) -> BootstrapInterval:
    """The share of wins of the answer that is shown first, minus 1/2, with its interval over questions."""
    first_wins = outcomes.first_wins
    return bootstrap_mean(first_wins[~np.isnan(first_wins)], (seed, 41))


def describe_verdict(name: str, line: Mapping[str, Any], names: Mapping[str, str], *, undecided: str = "") -> str:
    """The result of the deciding metric in one sentence."""
    count = line["questions"]
    questions = f"{count:,} question{'s' if count != 1 else ''}"
    if undecided:
        return f"Undecided {'between ' if len(names) > 1 else 'about '}{' and '.join(names.values())}: {undecided}."
    if not count:
        return f"Nothing told: no question has a value of {line['title']}."
    if line["level"] == "single":
        role = next(role for role in names if line[role] is not None)
        return f"{names[role]}: {line['title']} {format_value(line, line[role])} on {questions}."
    model, baseline = names["model"], names["baseline"]
    if name == "preference":
        rate = format_value(line, line["model"])
        facts = f"the judge prefers the answers of {model} in {rate} of {questions}, ties counting half"
    else:
        both = " against ".join(format_number_of(line, line[role].value) for role in ROLES)
        difference = format_value(line, line["difference"], signed=True)
        facts = f"{line['title']} {both}, difference {difference} on {questions}"
    if line["level"] in ("better", "worse"):
        return f"{model} is {line['level']} than {baseline}: {facts}."
    if line["level"] == "open":
        return f"{model} and {baseline}: {facts}; neither direction is better."
    interval = line["difference"]
    excludes = interval.low > 0 or interval.high < 0
    why = f"; too few questions differ for more (sign-flip test: p = {line['p']:.2g})" if excludes else ""
    return f"No difference told between {model} and {baseline}: {facts}{why}."


def format_value(line: Mapping[str, Any], interval: Sequence[float], *, signed: bool = False) -> str:
    """A value with its interval, in the metric's way of writing; unknown where they are nan or, from a file, None."""
    value, low, high = (math.nan if number is None else float(number) for number in interval)
    if math.isnan(value):
        return "unknown"
    text = format_number_of(line, value, signed=signed)
    if math.isnan(low) or math.isnan(high):
        return f"{text} [unknown]"
    ends = ", ".join(format_number_of(line, end, signed=signed, bare=True) for end in (low, high))
    return f"{text} [{ends}]"


def format_difference(name: str, line: Mapping[str, Any], key: str = "difference") -> str:
    """A difference with its interval, as people read it: of win rates that of the two, not that from 1/2."""
    factor = 2 if name == "preference" else 1
    return format_value(line, [math.nan if end is None else factor * end for end in line[key]], signed=True)


def format_number_of(line: Mapping[str, Any], value: float, *, signed: bool = False, bare: bool = False) -> str:
    """A number in the metric's way of writing: shares in percent, their differences in points."""
    unit = "" if bare or not line["is_share"] else "\u00a0points" if signed else "\u00a0%"
    number = f"{100 * value if line['is_share'] else value:{'+' if signed else ''}.{line['digits']}f}"
    return number.replace("-", "−") + unit
