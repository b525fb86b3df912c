"""What a person should know before the numbers: the judge's bias, its tastes, what it left open."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.schema import JudgeSection
from bilevel_jax.runs.evaluation.answers import ModelAnswers
from bilevel_jax.runs.evaluation.judge import Judge
from bilevel_jax.runs.evaluation.measures import Measures
from bilevel_jax.runs.evaluation.metrics import BITS_PER_BYTE, METRICS, measure_position_bias

MAX_QUOTED = 80
"""Characters of a reply that a remark quotes."""
LONGER = 1.3
"""By which factor the preferred answers are longer on average where that is told."""


def why_undecided(judge: JudgeSection, metric: str, line: Mapping[str, Any], measures: Measures) -> str:
    """Why nothing is concluded by a metric, in words; "" where something is.

    Too many answers of one model have no verdict or, where a question counts only with a value under every seed, too
    many questions are left out, which can be many more.
    """
    share, left_out = measures.unjudged.get(metric, 0.0), line.get("left_out", 0)
    if share <= judge.max_unjudged:
        if left_out > judge.max_unjudged * (left_out + line["questions"]):
            return f"{_describe_left_out(line)} (judge.max_unjudged = {judge.max_unjudged:g})"
        return ""
    of = "pairs" if metric == "preference" else "answers"
    return (
        f"the judge gave no verdict that is understood on {100 * share:.1f} % of the {of} (judge.max_unjudged = "
        f"{judge.max_unjudged:g}), as {_quote_nonsense(metric, measures)}; judgements.parquet has its replies"
    )


def _describe_left_out(line: Mapping[str, Any]) -> str:
    """How many prompts do not count, in words."""
    total, seeds = line["left_out"] + line["questions"], " under some seed" if line["seeds"] > 1 else ""
    lack = "lacks" if line["left_out"] == 1 else "lack"
    are = "is" if line["left_out"] == 1 else "are"
    prompts = format_count("prompt", total)
    return f"{line['left_out']:,} of {prompts} {lack} a verdict or a value{seeds} and {are} left out"


def _quote_nonsense(metric: str, measures: Measures) -> str:
    """The first reply without a verdict, in words."""
    replies = [row["reply"] for row in measures.judgements if row["metric"] == metric and row["verdict"] is None]
    reply = " ".join(replies[0].split())
    return repr(reply if len(reply) <= MAX_QUOTED else f"{reply[: MAX_QUOTED - 1]}…")


def summarize_judge(judge: JudgeSection, measures: Measures, client: Judge, seed: int) -> dict[str, Any]:
    """What result.json holds of the judge: what it was asked, its bias, what it cost."""
    use, pairs = client.use(), measures.pairs
    facts: dict[str, Any] = {
        "name": judge.model,
        "url": judge.url,
        "template": judge.template,
        "requests": use.requests,
        "asked_again": use.asked_again,
        "shortened": use.shortened,
        "tokens": use.usage,
        "pairs": None,
    }
    if pairs is not None:
        facts["pairs"] = {
            "total": int(pairs.asked.size),
            "asked": int(pairs.asked.sum()),
            "unjudged": pairs.num_unjudged,
            "contradictions": pairs.num_contradictions,
            "position_bias": measure_position_bias(pairs, seed),
        }
    return facts


def collect_remarks(
    judge: JudgeSection,
    lines: dict[str, Any],
    judge_facts: dict[str, Any] | None,
    measures: Measures,
    models: Sequence[ModelAnswers],
) -> list[str]:
    """What a person should know before the numbers."""
    remarks = []
    if list(lines) == ["refusal"]:
        remarks.append("refusals alone are measured: name a verifier, a judge, or prompts with references")
    if judge_facts and judge_facts["pairs"]:
        remarks += [*_describe_pairs(judge_facts["pairs"]), *_describe_tastes(judge, lines["preference"], models)]
    for name, share in measures.unjudged.items():
        if share:
            remarks.append(
                f"{METRICS[name].title}: {100 * share:.1f} % have no verdict that is understood after {judge.asks} "
                f"asks, the first {_quote_nonsense(name, measures)}, and are left out"
            )
    for line in lines.values():
        if line.get("left_out"):  # of several seeds
            remarks.append(f"{line['title']}: {_describe_left_out(line)}")
    if judge_facts and judge_facts["shortened"]:
        requests = format_count("request", judge_facts["shortened"])
        remarks.append(f"{requests} showed the judge an answer without its middle (judge.max_characters)")
    if (line := lines.get("perplexity")) and line["unit"] == BITS_PER_BYTE.unit:
        remarks.append("the models have different tokenizers: losses of references are compared in bits per byte")
    return remarks


def _describe_pairs(pairs: dict[str, Any]) -> list[str]:
    """The judge's bias, its contradictions, and pairs that it was not asked about."""
    described, bias = [], pairs["position_bias"]
    if bias.low > 0 or bias.high < 0:
        low, high = sorted((abs(bias.low), abs(bias.high)))
        described.append(
            f"the judge prefers the answer that it sees {'first' if bias.value > 0 else 'second'}: by "
            f"{100 * abs(bias.value):.1f} points, 95 % interval {100 * low:.1f} to {100 * high:.1f}. Each pair was "
            "asked in both orders, so that this cancels"
        )
    if pairs["asked"] and pairs["contradictions"] > pairs["asked"] / 2:
        described.append(
            f"the judge contradicts itself in {pairs['contradictions']:,} of {pairs['asked']:,} pairs, which count as "
            "ties: it hardly tells these answers apart"
        )
    if pairs["asked"] < pairs["total"]:
        same = format_count("pair", pairs["total"] - pairs["asked"], ("has", "have"))
        described.append(f"{same} equal answers, or lack one, and the judge was not asked")
    return described


def _describe_tastes(judge: JudgeSection, line: dict[str, Any], models: Sequence[ModelAnswers]) -> list[str]:
    """What judges are known to favour, where it may be at work: their own answers, and long ones."""
    described = [
        f"the judge is {model.candidate.name} itself, and models tend to prefer their own answers"
        for model in models
        if model.candidate.service == (judge.model, judge.url)
    ]
    sizes = [float(np.mean([len(text) for row in model.texts for text in row])) for model in models]
    preferred, other = sizes if line["level"] == "better" else sizes[::-1]
    if line["level"] in ("better", "worse") and preferred > LONGER * other:
        described.append(
            f"the preferred answers are longer, {preferred:,.0f} characters on average against {other:,.0f}, and "
            "judges tend to favour length: look at some pairs"
        )
    return described
