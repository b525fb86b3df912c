"""The verdict that a person reads first, and the evidence it judges."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from bilevel_jax.core.certify.finite_differences import FiniteDifferences, has_another_slope, has_kinks
from bilevel_jax.core.certify.reliability import Reliability
from bilevel_jax.core.certify.removals import SMOOTH_LARGE, Metasmoothness, RemovalPrediction
from bilevel_jax.core.solve.solution import STATUS_REMEDIES, Status
from bilevel_jax.core.types import Checks, Hyper

BELIEVE, UNDECIDED, DO_NOT_BELIEVE = "BELIEVE", "UNDECIDED", "DO NOT BELIEVE"
SMALL_CHANGES, LARGE_CHANGES = "small changes", "changes of up to half of the data"
SMALL, LARGE = 0.1, 0.5
"""How large the changes of the two scopes are: the share by which every weight moves, or of the examples that leave."""

RATIO_TOLERANCE, RATIO_LIMIT, RATIO_LARGE = 0.05, 0.1, 0.3
"""How far actual over predicted may be from 1 to BELIEVE, and from where on DO NOT BELIEVE; at steps above the one that
is judged, from where on the claim is about small changes alone."""
PRODUCT_TOLERANCE, PRODUCT_LIMIT = 0.05, 0.1
"""The share of the gradient's norm that rounded products of the steps back may change to BELIEVE, and from where on DO
NOT BELIEVE: as much as a ratio may be off, and not calibrated on retrains."""
SMOOTH_SMALL, SMOOTH_UNEVEN, SMOOTH_LIMIT = 0.8, 0.9, 0.3
"""Metasmoothness wanted for small changes, and for those at uneven weights (SMOOTH_LARGE for changes of half of the
data), and from where on down DO NOT BELIEVE."""
RANK_WANTED, RANK_LIMIT = 0.7, 0.3
"""The rank correlation of retrains that speaks for changes of their size; below the second it speaks against."""
SLOPE_RANGE = (1 / 3, 3.0)
"""Actual per predicted change of the retrains that speak for it."""
MIN_RETRAINS = 8
NEAR_SMALL = 0.25
"""Evidence at changes up to this size speaks against small ones."""
SHARE_SMALL, SHARE_LARGE = 1 / 3, 0.9
"""Effective sample size of the weights, as a share of the examples, from which on metasmoothness says enough: where few
examples have most of the weight, what an example's own leaving does to its entry spoils the prediction."""
RELIABILITY_WANTED, RELIABILITY_LIMIT = 0.7, 0.3
"""The reliability that speaks for other examples; below the second it speaks against. Where retrains have read the loss
of other examples, their rank correlation decides instead, by RANK_WANTED and RANK_LIMIT."""

PARTLY_NOISE = "A part of the entries is this validation set's noise: give more validation examples."


class Verdict(NamedTuple):
    """The two sentences that a person reads first."""

    level: str
    """BELIEVE, DO NOT BELIEVE or UNDECIDED: whether the number predicts what retraining does to this validation set."""
    scope: str
    """How large a change of the weights the level is about."""
    reason: str
    remedy: str
    others_level: str = UNDECIDED
    """Whether it also speaks for other examples than those of the validation set; never above `level`."""
    others_reason: str = "whether another validation set would say the same was not measured."

    def __str__(self) -> str:
        head = f"{self.level} {self.scope}, for this validation set" if self.scope else self.level
        sentence = " ".join(filter(None, [f"{head}:", self.reason, self.remedy]))
        return f"{sentence}\nFor other examples {self.others_level}: {self.others_reason}"


class Certificates(NamedTuple):
    """What was checked of one estimate; None where a check was not made."""

    finite_differences: FiniteDifferences | None
    metasmoothness: Metasmoothness | None
    """How far the entries stay the same when random examples leave."""
    removal_prediction: RemovalPrediction | None
    checks: Checks
    status: Status = Status.OK
    """Of the solution."""
    is_per_example: bool = True
    """Whether the outer variable holds a number for each training example; else only the differences apply."""
    missing: str = ""
    """Why no check was made, and what helps."""
    reliability: Reliability | None = None
    """How far the entries speak for examples that are not in the validation set."""
    effective_share: float = 1.0
    """Effective sample size of the weights over the number of examples; 1 where they are uniform."""
    others_prediction: RemovalPrediction | None = None
    """The same predictions against changes of the loss of other examples than those of the validation set."""
    others_part: str = "dev"
    """What these are called."""
    is_sampled: bool = True
    """Whether the validation loss is a mean over examples, of which there are others, and not of the parameters
    alone."""

    @property
    def verdict(self) -> Verdict:
        """The sentence that a person reads first."""
        return judge_certificates(self)

    def __str__(self) -> str:
        lines = [str(self.verdict)]
        if self.finite_differences is not None:
            for size, ratio in zip(self.finite_differences.steps, self.finite_differences.ratios, strict=True):
                lines.append(f"  change by {size:<7g} actual / predicted {ratio:.4f}")
        if self.metasmoothness is not None:
            for share, cosine in zip(*self.metasmoothness, strict=True):
                lines.append(f"  without {share:.0%} of the examples the entries keep a cosine of {cosine:.4f}")
        if self.removal_prediction is not None:
            removal = self.removal_prediction
            count = len(removal.actual)
            lines.append(
                f"  {count} retrains without {removal.fraction:.0%} of the examples: rank correlation of predicted and "
                f"actual {removal.rank:.3f}, slope {removal.slope:.3f}"
            )
        if self.others_prediction is not None:
            others = self.others_prediction
            lines.append(f"  of the same predictions and {self.others_part} loss {others.rank:.3f}, {others.slope:.3f}")
        if self.reliability is not None:
            lines.append(f"  reliability for other validation examples {self.reliability}")
        measured = {
            name: value
            for name, value in self.checks._asdict().items()
            if not np.isnan(float(value)) and (name != "batches" or value)
        }
        lines.append("  " + ", ".join(f"{name} {float(value):.3g}" for name, value in measured.items()))
        return "\n".join(lines)


def judge_certificates(certificates: Certificates) -> Verdict:
    """The certificates as one level with its reason and remedy, and whether it speaks for other examples.

    Making any number worse never raises the level or widens the scope. A claim about changes of some size rests on
    evidence at that size or above:

        BELIEVE small changes    the ratio at a step of .1 (the least one from there on) lies in [.95, 1.05], with
                                 rounding below .05 / 3, every smaller step's in [.9, 1.1], and metasmoothness without
                                 a tenth or more is at least .8, or .9 at weights whose effective sample size is below
                                 .9 of the examples (below a third it says nothing); or, in place of it, 8 retrains
                                 without a tenth or more have a rank correlation of .7 and a slope between 1/3 and 3
        BELIEVE changes of up    in addition larger steps' ratios, if any, lie in [.7, 1.3], and metasmoothness
        to half of the data      without a half is at least .8 at nearly uniform weights, or 8 retrains without a half
                                 have that rank correlation and slope
        DO NOT BELIEVE           a number is not finite, the status is bad, the replay failed, the system has no
                                 positive curvature or was not solved, rounded products of the steps back change the
                                 gradient by more than .1 of its norm, that ratio leaves [.9, 1.1], metasmoothness
                                 without a quarter or less is below .3, or retrains speak against it
        UNDECIDED                in between (of rounded products from .05 on), with checks missing, and where smaller
                                 steps' ratios are off (`has_kinks`)

    For an outer variable that is not one weight for each example the ratios alone decide. It speaks for other examples
    where it is believed and 8 retrains without a tenth or more have a rank correlation of .7 with the loss of examples
    outside the validation set; below .3 it does not. Where no retrain has read such a loss, the reliability decides, by
    the same two numbers.

    The thresholds, but for those of rounded products, come from the settings of tests/benchmarks/calibration.py, whose
    table is in the README there: of those BELIEVEd none had a rank correlation below .7 over retrains without a tenth,
    or below .5 without a half. They are no theorem. Wrong where the changes that one makes are unlike those tested: the
    differences move all weights along the gradient's signs, the removals leave out random examples.

    Args:
        certificates: the checks of one estimate.

    Returns:
        The verdict; `str(verdict)` is its two sentences.

    Example:
        >>> differences = bj.certify.FiniteDifferences(steps=(0.1,), ratios=(1.01,))
        >>> smooth = bj.certify.Metasmoothness(removed=(0.2,), cosines=(0.95,))
        >>> verdict = bj.certify.judge_certificates(bj.certify.Certificates(differences, smooth, None, bj.Checks()))
        >>> verdict.level, verdict.scope, verdict.others_level
        ('BELIEVE', 'small changes', 'UNDECIDED')
    """
    against = _find_against(certificates)
    if against:
        return _finish(certificates, DO_NOT_BELIEVE, "", *against)
    doubt = _find_doubt(certificates)
    if doubt:
        return _finish(certificates, UNDECIDED, "", *doubt)
    limit = _find_limit(certificates)
    reason = f"{_describe_evidence(certificates)}{f' {limit}' if limit else ''}"
    return _finish(certificates, BELIEVE, SMALL_CHANGES if limit else LARGE_CHANGES, reason, "")


def effective_share(weights: Hyper, multiplicity: Float[ArrayLike, "examples"] | None = None) -> float:
    """The effective sample size of the weights over the number of examples.

        (sum_i m_i w_i)^2 / (sum_i m_i  sum_i m_i w_i^2)

    1 where all weights are equal, 1/n where one of n examples has all. Wrong as a measure of how many examples matter
    where some of them are never trained on: give these the multiplicity 0.

    Args:
        weights: float[examples], or a tree with this as its only leaf.
        multiplicity: m, how often each example counts; None: once.

    Returns:
        Between 1/n and 1; nan where all weights are 0.

    Example:
        >>> bj.certify.effective_share(jnp.array([1.0, 1.0, 0.0, 0.0]))
        0.5
    """
    table = np.asarray(jax.tree.leaves(weights)[0], np.float64)
    counts = np.ones_like(table) if multiplicity is None else np.asarray(multiplicity, np.float64)
    energy = float(counts.sum()) * float((counts * table**2).sum())
    return float((counts * table).sum()) ** 2 / energy if energy > 0 else math.nan


def shares_to_remove(removed: Sequence[float], share: float) -> tuple[float, ...]:
    """The shares whose metasmoothness can widen a verdict: at uneven weights, that of a half cannot."""
    smaller = tuple(one for one in removed if one < LARGE)
    return smaller if smaller and share < SHARE_LARGE else tuple(removed)


def _finish(certificates: Certificates, level: str, scope: str, reason: str, remedy: str) -> Verdict:
    return Verdict(level, scope, reason, remedy, *_judge_for_others(certificates, level))


def _judge_for_others(certificates: Certificates, level: str) -> tuple[str, str]:
    """(level, reason): whether the number speaks for other examples than those of the validation set."""
    reliability, others = certificates.reliability, certificates.others_prediction
    if not certificates.is_sampled:
        return level, "the validation loss reads no examples, so there are no others that could disagree."
    if others and others.actual:
        return _judge_others_prediction(certificates, others, level)
    value = math.nan if reliability is None or reliability.value == math.inf else reliability.value
    measured = not math.isnan(value)
    number = (
        "whether another validation set agrees was not measured."
        if reliability is None
        else f"its reliability is {reliability}."
    )
    if value < RELIABILITY_LIMIT:
        seen = "Even of these the halves hardly agree: the" if reliability and reliability.is_fitted else "The"
        return DO_NOT_BELIEVE, f"{number} {seen} entries are mostly this validation set's noise."
    if level != BELIEVE:
        return level, f"what holds for this validation set comes first; {number}"
    if reliability is None:
        return UNDECIDED, f"{number} Compute the reliability, or read the loss of a dev set."
    if not measured:
        remedy = "Give more of them" if reliability.num_validation < 2 else "Give a dev set with more examples"
        return UNDECIDED, f"{number} {remedy}."
    if reliability.is_fitted:
        return UNDECIDED, f"{number} Give a dev set."
    if value >= RELIABILITY_WANTED:
        return BELIEVE, number
    return UNDECIDED, f"{number} {PARTLY_NOISE}"


def _judge_others_prediction(certificates: Certificates, others: RemovalPrediction, level: str) -> tuple[str, str]:
    """The same by the retrains that have read the loss of other examples."""
    own = certificates.removal_prediction
    number = (
        f"over {len(others.actual)} retrains without {others.fraction:.0%} of the examples predicted changes have a "
        f"rank correlation of {others.rank:.2f} with those of {certificates.others_part} loss"
        f"{f', of {own.rank:.2f} with those of L_v' if own else ''}."
    )
    if not others.rank >= RANK_LIMIT:
        return DO_NOT_BELIEVE, f"{number} What the entries say of this validation set hardly holds outside of it."
    if level != BELIEVE:
        return level, f"what holds for this validation set comes first; {number}"
    if others.rank < RANK_WANTED:
        return (
            UNDECIDED,
            f"{number} A part of the entries is this validation set's noise: give more validation examples.",
        )
    if len(others.actual) < MIN_RETRAINS or others.fraction < SMALL:
        return UNDECIDED, f"{number} Retrain {MIN_RETRAINS} times without {SMALL:.0%} or more."
    return BELIEVE, number


# ---- what speaks against, what leaves doubt, and what limits the scope: (reason, remedy), or nothing

REPEAT_BITS = (
    "Run again on one kind of device; on a GPU, which adds to an embedding's gradient in no fixed order, with "
    "XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true."
)
LOWER_RATE = "Lower the learning rate, lengthen the warm-up, raise eps_root, or use a window."


class _Ratio(NamedTuple):
    step: float
    error: float
    """|actual / predicted - 1|."""
    noise: float
    value: float


def _find_against(certificates: Certificates) -> tuple[str, str] | None:
    checks, smooth, removal = certificates.checks, certificates.metasmoothness, certificates.removal_prediction
    if not checks.replayed:
        return "replaying the training run did not end where training did.", REPEAT_BITS
    if checks.curvature <= 0:
        reason = f"the curvature is not positive definite ({checks.curvature:.2g})."
        return reason, "Raise the prior, or use Gauss-Newton curvature, or unrolled."
    if checks.residual > 0.1:
        reason = f"the linear system was not solved (relative residual {checks.residual:.2g})."
        return reason, "Raise the number of iterations or the prior."
    if certificates.status != Status.OK:
        return STATUS_REMEDIES[certificates.status], ""
    if checks.resolution <= 1:
        return STATUS_REMEDIES[Status.UNRESOLVED], ""
    if checks.product_error > PRODUCT_LIMIT:
        return _explain_products(checks)
    if name := _find_nonfinite(certificates):
        return f"{name} is not finite.", "Look for a loss that is not finite, or weights and entries that are all 0."
    judged = _judged_ratio(_ratios(certificates))
    if judged and judged.error > RATIO_LIMIT:
        return _explain_ratios(certificates)
    for share, cosine in zip(*smooth, strict=True) if smooth else ():
        if share <= NEAR_SMALL and cosine < SMOOTH_LIMIT:
            return _describe_evidence(certificates), LOWER_RATE
    if removal and removal.actual:
        near = removal.fraction <= NEAR_SMALL
        if removal.rank < (RANK_LIMIT if near else -RANK_LIMIT) or (near and removal.slope <= 0):
            return f"{_describe_removal(removal)}.", LOWER_RATE
    return None


def _find_doubt(certificates: Certificates) -> tuple[str, str] | None:
    if certificates.missing:
        return certificates.missing, ""
    ratios = _ratios(certificates)
    judged = _judged_ratio(ratios)
    if judged is None:
        return "the finite differences were not computed.", "Compute them (run without --fast)."
    if judged.step < SMALL:
        reason = f"the largest change that was tried is one by {judged.step:g}, and it says nothing of larger ones."
        return reason, f"Compute the ratio at a step of {SMALL:g} or more."
    if 3 * judged.noise > RATIO_TOLERANCE:
        reason = f"rounding may change the ratio at a change by {judged.step:g} by {judged.noise:.2g}."
        return reason, "Use float64, or a larger step."
    if certificates.checks.product_error > PRODUCT_TOLERANCE:
        return _explain_products(certificates.checks)
    if judged.error > RATIO_TOLERANCE or any(one.error > RATIO_LIMIT for one in ratios if one.step < judged.step):
        return _explain_ratios(certificates)
    if not certificates.is_per_example:
        return None
    smooth, removal = certificates.metasmoothness, certificates.removal_prediction
    if removal and removal.actual and removal.fraction <= NEAR_SMALL and not _is_predicted(removal):
        return _describe_evidence(certificates), LOWER_RATE
    if removal and _supports(removal, SMALL):
        return None
    cosine = _smallest_share_from(smooth, SMALL)
    if cosine is None:
        reason = f"metasmoothness was not computed without {SMALL:.0%} of the examples or more."
        return f"{_describe_evidence(certificates)} {reason[0].upper()}{reason[1:]}", "Compute it (run without --fast)."
    if cosine < (SMOOTH_SMALL if certificates.effective_share >= SHARE_LARGE else SMOOTH_UNEVEN):
        return _describe_evidence(certificates), LOWER_RATE
    if not certificates.effective_share >= SHARE_SMALL:
        reason = (
            f"the effective sample size of the weights is {certificates.effective_share:.0%} of the examples, and what"
        )
        reason += " the leaving of such heavy ones does was not tried."
        return (
            f"{_describe_evidence(certificates)} {reason[0].upper()}{reason[1:]}",
            "Compute 8 retrains without a tenth.",
        )
    return None


def _find_limit(certificates: Certificates) -> str:
    """Why the claim is about small changes alone; empty where it is not."""
    smooth, removal = certificates.metasmoothness, certificates.removal_prediction
    if not certificates.is_per_example:
        return "Larger changes were not tried."
    ratios = _ratios(certificates)
    judged = _judged_ratio(ratios)
    bent = next((one for one in ratios if judged and one.step > judged.step and one.error > RATIO_LARGE), None)
    if bent:
        return f"That speaks for small changes alone: at a change by {bent.step:g} the ratio is {bent.value:.3g}."
    if removal and removal.actual and not _is_predicted(removal):
        return f"That speaks for small changes alone: larger ones need a rank correlation of {RANK_WANTED:g}."
    if removal and _supports(removal, LARGE):
        return ""
    cosine = _smallest_share_from(smooth, LARGE)
    if cosine is None:
        return "Larger changes were not tried: compute metasmoothness without a half of the examples, or 8 retrains."
    if cosine < SMOOTH_LARGE:
        return f"Larger changes need {SMOOTH_LARGE:g} without a half."
    if not certificates.effective_share >= SHARE_LARGE:
        return "At weights this uneven, larger changes need retrains without a half of the examples."
    return ""


def _ratios(certificates: Certificates) -> list[_Ratio]:
    """The ratios, largest step first; of a step that is there twice, the worse one first."""
    differences = certificates.finite_differences
    if differences is None:
        return []
    noises = differences.noise or (0.0,) * len(differences.steps)
    some = [
        _Ratio(step, abs(ratio - 1), noise, ratio)
        for step, ratio, noise in zip(differences.steps, differences.ratios, noises, strict=True)
    ]
    return sorted(some, key=lambda one: (-one.step, -one.error))


def _judged_ratio(ratios: list[_Ratio]) -> _Ratio | None:
    """The ratio that a claim about small changes rests on: of the least step from .1 on, else of the largest."""
    from_small = [one for one in ratios if one.step >= SMALL]
    if not ratios:
        return None
    step = from_small[-1].step if from_small else ratios[0].step
    same = [one for one in ratios if one.step == step]
    return same[0]._replace(noise=max(one.noise for one in same))


def _smallest_share_from(smooth: Metasmoothness | None, size: float) -> float | None:
    """The cosine at the least share that is not below `size`."""
    some = [(share, cosine) for share, cosine in zip(*smooth, strict=True) if share >= size] if smooth else []
    return min(some)[1] if some else None


def _is_predicted(removal: RemovalPrediction) -> bool:
    return removal.rank >= RANK_WANTED and SLOPE_RANGE[0] <= removal.slope <= SLOPE_RANGE[1]


def _supports(removal: RemovalPrediction, size: float) -> bool:
    """Whether enough retrains that leave out `size` or more of the examples speak for the prediction."""
    return removal.fraction >= size and len(removal.actual) >= MIN_RETRAINS and _is_predicted(removal)


def _find_nonfinite(certificates: Certificates) -> str:
    """The name of a number that is not finite; empty where all are."""
    differences, smooth, removal = certificates[:3]
    numbers: dict[str, tuple[float, ...]] = {}
    if differences is not None:
        numbers["a ratio of actual to predicted change"] = (
            *differences.steps,
            *differences.ratios,
            *differences.noise,
        )
    if smooth is not None:
        numbers["metasmoothness"] = (*smooth.removed, *smooth.cosines)
    if removal is not None and removal.actual:
        numbers["a retrain without some examples"] = (*removal[:1], *removal.predicted, *removal.actual)
        numbers["the rank correlation of the retrains"] = (removal.rank, removal.slope)
    return next((name for name, some in numbers.items() if not np.isfinite(np.asarray(some, float)).all()), "")


# ---- words


def _explain_products(checks: Checks) -> tuple[str, str]:
    """The ratios need not tell it: errors of entries that have either sign cancel in the sum along the gradient."""
    reason = "rounded matrix products of the steps back change the hypergradient by "
    reason += f"{float(checks.product_error):.1%} of its norm."
    return reason, "Raise the precision of these products (product_precision), or lower the learning rate."


def _explain_ratios(certificates: Certificates) -> tuple[str, str]:
    """What the ratios say, by their trend as the step falls, and what helps."""
    differences, reason = certificates.finite_differences, _describe_evidence(certificates)
    assert differences is not None
    ordered = _in_order(differences)
    worst = max(zip(ordered.steps, ordered.ratios, strict=True), key=lambda pair: abs(pair[1] - 1))
    if has_kinks(ordered):
        reason += (
            f" The ratio does not tend to 1 as the change falls ({worst[1]:.3g} at {worst[0]:g}): L_v jumps, as "
            "it does where a network has kinks (ReLU, max, abs, clipping)."
        )
        return reason, "Take a smooth activation (GELU, SiLU, tanh) in place of ReLU."
    if has_another_slope(ordered):
        reason += (
            f" The ratio tends to {ordered.ratios[-1]:.3g} as the change falls: L_v is smooth, and the number is "
            "not its derivative, as with a window shorter than training, a small gamma, or a truncated solve."
        )
        return reason, "Lengthen the window, raise gamma, or take unroll without a window."
    judged = _judged_ratio(_ratios(certificates))
    if abs(worst[1] - 1) > RATIO_LIMIT and judged and judged.step != worst[0]:
        reason += f" At {worst[0]:g} it is {worst[1]:.3g}."
    return reason, LOWER_RATE


def _in_order(differences: FiniteDifferences) -> FiniteDifferences:
    order = sorted(range(len(differences.steps)), key=lambda place: -differences.steps[place])
    return FiniteDifferences(
        *(tuple(part[place] for place in order) if part else () for part in differences)  # noise may be empty
    )


def _describe_evidence(certificates: Certificates) -> str:
    """The ratio that is judged and the cosines, in one sentence."""
    judged = _judged_ratio(_ratios(certificates))
    parts = []
    if judged:
        what = f"weight by {judged.step:.0%}" if certificates.is_per_example else f"entry by {judged.step:g}"
        parts.append(f"a change of every {what} moves L_v by {judged.value:.3f} of what the gradient predicts")
    if certificates.metasmoothness and certificates.metasmoothness.removed:
        shares = [
            f"{cosine:.3f} without {share:.0%}" for share, cosine in zip(*certificates.metasmoothness, strict=True)
        ]
        parts.append(f"when random examples leave, its entries keep a cosine of {' and '.join(shares)} of them")
    if certificates.removal_prediction and certificates.removal_prediction.actual:
        parts.append(_describe_removal(certificates.removal_prediction))
    return f"{'; '.join(parts)}." if parts else ""


def _describe_removal(removal: RemovalPrediction) -> str:
    return (
        f"over {len(removal.actual)} retrains without {removal.fraction:.0%} of the examples predicted and actual "
        f"changes have a rank correlation of {removal.rank:.2f} and a slope of {removal.slope:.2f}"
    )
