"""Quality of data scores against leave-k-out retrains, and the verdict."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.commands.audit import retrains
from bilevel_jax.commands.audit.retrains import LeaveOutRetrains
from bilevel_jax.core import certify
from bilevel_jax.core.certify import verdict
from bilevel_jax.runs import stats
from bilevel_jax.runs.config.schema import EXACT_ESTIMATOR, DataSection
from bilevel_jax.runs.tasks.evaluation import count_examples, read_labels
from bilevel_jax.runs.tasks.protocol import Task


class DataScore(NamedTuple):
    """The scores of all rows by one method, before they are judged."""

    name: str
    checkpoint: str
    """The model that it reads: at the `start` or the `end` of training, `through` all of it, or none."""
    values: Float[np.ndarray, "examples"]
    """Larger is better: of an estimate, -dL_v/dw."""
    query_values: Float[np.ndarray, "queries rows"] | None
    """The same for each query, where the method tells queries apart."""
    passes: float
    """Forward and backward passes over one batch, the training that it reads included."""
    seconds: float
    notes: tuple[str, ...] = ()


def judge_scores(
    task: Task,
    scores: list[DataScore],
    retrain_losses: LeaveOutRetrains,
    certificate_verdict: certify.Verdict | None,
    difficulty: dict[str, dict[str, Any]],
    *,
    data: DataSection,
    train_seed: int,
) -> dict[str, Any]:
    """What result.json holds: each score's readings, and the verdict."""
    trainable, seed = task.trainable_indices(), data.seed
    labels = read_labels(task, data)
    exact = next((score.values for score in scores if score.name == EXACT_ESTIMATOR), None)
    counts = stats.resample_counts(len(trainable), (seed, 4))
    draws = {
        score.name: retrains.compute_lds(retrain_losses, score.values, score.query_values, seed) for score in scores
    }
    lines = []
    for score in scores:
        line = {
            "name": score.name,
            "at": score.checkpoint,
            "passes": score.passes,
            "seconds": score.seconds,
            "notes": score.notes,
            "own_queries": score.query_values is not None,
            "lds": {
                target: [stats.percentile_interval(some) for some in by_fraction]
                for target, by_fraction in draws[score.name].items()
            },
            "auc": None if labels is None else labels.auc(score.values),
            "difficulty": difficulty[score.name],
        }
        if exact is not None and score.name != EXACT_ESTIMATOR:
            correlations = stats.bootstrap_rank_correlations(
                score.values[None, trainable], exact[None, trainable], counts
            )[:, 0]
            line["rank"] = stats.percentile_interval(correlations)
        lines.append(line)
    return {
        "rows": lines,
        "verdict": choose_score(lines, draws, certificate_verdict, retrain_losses.fractions[0]),
        "certificate": {**certificate_verdict._asdict(), "sentence": str(certificate_verdict)}
        if certificate_verdict
        else None,
        "removed": retrain_losses.fractions,
        "subsets": retrain_losses.left_out.shape[1],
        "labels": labels.to_counts() if labels is not None else None,
        "unit": task.outer_objective.unit,
        "steps": task.num_steps,
        "batch": task.batch_size,
        "seeds": {"data": data.seed, "start": train_seed},
        "counts": {"train": len(trainable)}
        | count_examples(task)
        | ({"queries": retrain_losses.losses["queries"].shape[2]} if "queries" in retrain_losses.losses else {}),
    }


def choose_score(
    lines: list[dict[str, Any]],
    draws: dict[str, dict[str, list[Float[np.ndarray, "draws"]]]],
    certificate: certify.Verdict | None,
    fraction: float,
) -> dict[str, Any]:
    """Which cheap score to use, or none; by the retrains without `fraction` of the examples.

    The best is the one with the largest linear-datamodelling score for L_v. None where the interval of that score
    includes 0, or where the certificates say that training is too rough for any sum over rows. Beside it stands the
    same for dev, or for test without a dev, which no score has read: whether the score speaks for other examples rests
    on that number alone (`others_level`), and where another score is better there, the sentence says so.
    """
    lds_by_name = {line["name"]: line["lds"]["validation"][0] for line in lines}
    finite_lines = [line for line in lines if math.isfinite(lds_by_name[line["name"]].value)]
    rivals = [line for line in finite_lines if line["name"] not in (EXACT_ESTIMATOR, "random")]
    exact = next((line for line in lines if line["name"] == EXACT_ESTIMATOR), None)
    part = retrains.independent_part(lines[0]["lds"])
    tail = (
        f" The exact hypergradient reaches {_format_readings(exact, part)} for {exact['passes']:,.0f} passes."
        if exact
        else ""
    )
    if exact and exact["difficulty"]["sentence"]:
        tail += f" {exact['difficulty']['sentence']}"
    nothing = {"use": None, "instead": None, "others_part": part, "others_level": verdict.UNDECIDED}
    if not rivals:
        return nothing | {"sentence": f"None: no cheap score was judged.{tail}"}
    best = max(rivals, key=lambda line: lds_by_name[line["name"]].value)
    name, best_reading = best["name"], lds_by_name[best["name"]]
    quality = (
        f"after training without {100 * fraction:g} % of the examples the sum of its scores over them has a rank "
        f"correlation of {_format_readings(best, part)}"
    )
    if certificate and certificate.level == verdict.DO_NOT_BELIEVE:
        first_line = str(certificate).splitlines()[0]
        why = f"None: training is too rough here for a sum over examples to predict it. {first_line}"
        nothing["others_level"] = verdict.DO_NOT_BELIEVE
        return nothing | {"sentence": f"{why} Of the cheap scores, {name} is best: {quality}.{tail}"}
    if not best_reading.low > 0:
        why = (
            f"None: no cheap score tells which examples validation loss needs. Of the best, {name}, {quality}; the "
            "first may be 0."
        )
        return nothing | {"sentence": why + tail}
    close = [
        line["name"] for line in rivals if line is not best and not _is_higher(draws, name, line["name"], "validation")
    ]
    remarks = f" Not told apart from it: {', '.join(close)}." if close else ""
    if told := best["difficulty"]["sentence"]:
        remarks += f" {told}"
    others_level, others_words = judge_for_others(best["lds"][part][0] if part else None, part)
    remarks += f" For other examples {others_level}: {others_words}"
    instead = None
    if part:
        best_there = max(rivals, key=lambda line: line["lds"][part][0].value)
        if _is_higher(draws, best_there["name"], name, part):
            instead = best_there["name"]
            remarks += (
                f" There {instead} does better: {_format_reading(best_there['lds'][part][0])} against "
                f"{_format_reading(best['lds'][part][0])}; validation may be too small."
            )
    return nothing | {
        "use": name,
        "instead": instead,
        "others_level": others_level,
        "sentence": f"Use {name}: {quality}, for {best['passes']:,.0f} passes.{remarks}{tail}",
    }


def judge_for_others(reading: stats.BootstrapInterval | None, part: str | None) -> tuple[str, str]:
    """(level, words): whether a score that predicts L_v speaks for other examples, by its correlation with their loss.

    By the thresholds of the certificates; one whose interval includes 0 does not speak for them.
    """
    if reading is None or part is None:
        return verdict.UNDECIDED, "no retrain has read the loss of any; give a dev set."
    number = f"{_format_reading(reading)} on {part}, which no score has read"
    if not (reading.value >= verdict.RANK_LIMIT and reading.low > 0):
        return verdict.DO_NOT_BELIEVE, f"{number}; what it says of this validation set hardly holds outside of it."
    if reading.value < verdict.RANK_WANTED:
        return verdict.UNDECIDED, f"{number}; a part of it is this validation set's noise."
    return verdict.BELIEVE, f"{number}."


def _is_higher(draws: dict[str, dict[str, list[np.ndarray]]], name: str, other: str, target: str) -> bool:
    """Whether the first share's readings of `name` are above those of `other`, resample by resample."""
    return stats.percentile_interval(draws[name][target][0] - draws[other][target][0]).low > 0


def _format_readings(line: dict[str, Any], part: str | None) -> str:
    """The readings for L_v and for the independent part, side by side."""
    own = f"{_format_reading(line['lds']['validation'][0])} with validation loss"
    return own + (f" and {_format_reading(line['lds'][part][0])} with {part} loss" if part else "")


def _format_reading(reading: stats.BootstrapInterval) -> str:
    return f"{reading.value:.2f} [{reading.low:.2f}, {reading.high:.2f}]"
