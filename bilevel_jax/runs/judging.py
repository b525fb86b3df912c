"""How scores of training rows are judged: by the bank of retrains, exact entries and known labels; the verdict."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.core import certify
from bilevel_jax.runs import bank, bootstrap
from bilevel_jax.runs.bank import Bank
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.learn import good_rows
from bilevel_jax.runs.statistics import auc
from bilevel_jax.runs.task import Task

EXACT: Literal["unrolled"] = "unrolled"
"""The entries that the other scores are ranked against."""


class Score(NamedTuple):
    """The scores of all rows by one method, before they are judged."""

    name: str
    at: str
    """The model that it reads: at the `start` or the `end` of training, `through` all of it, or none."""
    values: Float[np.ndarray, "rows"]
    """Larger is better: of an estimate, -dL_v/dw."""
    each: Float[np.ndarray, "queries rows"] | None
    """The same for each query, where the method tells queries apart."""
    passes: float
    """Forward and backward passes over one batch, the training that it reads included."""
    seconds: float
    notes: tuple[str, ...] = ()


def judged(
    config: SelectConfig,
    task: Task | ArrayTask,
    scores: list[Score],
    made: Bank,
    certified: tuple[certify.Certificates, certify.Verdict] | None,
) -> dict[str, Any]:
    """What result.json holds: each score's readings, and the verdict."""
    kept, seed = task.trainable(), config.data.seed
    good = good_rows(task, config)
    exact = next((one.values for one in scores if one.name == EXACT), None)
    counts = bootstrap.resampled(len(kept), (seed, 4))
    draws = {one.name: bank.scored(made, one.values, one.each, seed) for one in scores}
    lines = []
    for one in scores:
        line = {
            "name": one.name,
            "at": one.at,
            "passes": one.passes,
            "seconds": one.seconds,
            "notes": one.notes,
            "own_queries": one.each is not None,
            "lds": {target: [bootstrap.reading(some) for some in found] for target, found in draws[one.name].items()},
            "auc": None if good is None else auc(one.values[kept], good[kept]),
        }
        if exact is not None and one.name != EXACT:
            alike = bootstrap.rank_correlations(one.values[None, kept], exact[None, kept], counts)[:, 0]
            line["rank"] = bootstrap.reading(alike)
        lines.append(line)
    told = certified[1] if certified else None
    return {
        "rows": lines,
        "verdict": verdict(lines, draws, told, made.fractions[0]),
        "certificate": {**told._asdict(), "sentence": str(told)} if told else None,
        "removed": made.fractions,
        "subsets": made.left_out.shape[1],
        "labels": good is not None,
        "unit": task.objective.unit,
        "steps": task.steps,
        "batch": task.batch,
        "seeds": {"data": config.data.seed, "start": config.train.seed},
        "counts": {"train": len(kept)}
        | {part: len(task.trusted[part]) for part in task.held_out}
        | ({"queries": made.losses["queries"].shape[2]} if "queries" in made.losses else {}),
    }


def verdict(
    lines: list[dict[str, Any]],
    draws: dict[str, dict[str, list[Float[np.ndarray, "draws"]]]],
    certificate: certify.Verdict | None,
    fraction: float,
) -> dict[str, Any]:
    """Which cheap score to use, or none; read from the retrains without `fraction` of the rows.

    The best is the one with the largest linear-datamodelling score for L_v. None where the interval of that score
    includes 0, or where the certificates say that training is too rough for any sum over rows. Where another score
    foretells V_report better, which none of them has read, the sentence says so.
    """
    foretold = {line["name"]: line["lds"]["fit"][0] for line in lines}
    measured = [line for line in lines if math.isfinite(foretold[line["name"]].value)]
    rivals = [line for line in measured if line["name"] not in (EXACT, "random")]
    exact = next((line for line in lines if line["name"] == EXACT), None)
    tail = f" The exact entries reach {_said(foretold[EXACT])} for {exact['passes']:,.0f} passes." if exact else ""
    if not rivals:
        return {"use": None, "instead": None, "sentence": f"None: no cheap score was judged.{tail}"}
    best = max(rivals, key=lambda line: foretold[line["name"]].value)
    name, found = best["name"], foretold[best["name"]]
    much = (
        f"its sum over the rows that leave has a rank correlation of {_said(found)} with L_v after training without "
        f"them ({100 * fraction:g} % of the rows)"
    )
    if certificate and certificate.level == "DO NOT BELIEVE":
        why = f"None: training is too rough here for a sum over rows to foretell it. {certificate}"
        return {"use": None, "instead": None, "sentence": f"{why} Of the cheap scores, {name} is best: {much}.{tail}"}
    if not found.low > 0:
        why = f"None: no cheap score tells which rows L_v needs. Of the best, {name}, {much}, which may be 0."
        return {"use": None, "instead": None, "sentence": why + tail}
    close = [line["name"] for line in rivals if line is not best and not _above(draws, name, line["name"], "fit")]
    told = f" Not told apart from it: {', '.join(close)}." if close else ""
    instead = None
    if "report" in best["lds"]:
        there = max(rivals, key=lambda line: line["lds"]["report"][0].value)
        if _above(draws, there["name"], name, "report"):
            instead = there["name"]
            told += (
                f" But on V_report, which no score has read, {there['name']} does better: "
                f"{_said(there['lds']['report'][0])} against {_said(best['lds']['report'][0])}; V_fit may be too small."
            )
    return {
        "use": name,
        "instead": instead,
        "sentence": f"Use {name}: {much}, for {best['passes']:,.0f} passes.{told}{tail}",
    }


def _above(draws: dict[str, dict[str, list[np.ndarray]]], one: str, other: str, target: str) -> bool:
    """Whether the first share's readings of `one` are above those of `other`, resample by resample."""
    return bootstrap.reading(draws[one][target][0] - draws[other][target][0]).low > 0


def _said(found: bootstrap.Reading) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
