"""The verdict that a person reads first, and the evidence it judges."""

from typing import NamedTuple

import numpy as np

from bilevel_jax.core.certify.finite_differences import FiniteDifferences, has_another_slope, has_kinks
from bilevel_jax.core.certify.reliability import Reliability
from bilevel_jax.core.certify.removals import RemovalPrediction
from bilevel_jax.core.solve.solution import STATUS_REMEDIES, Status
from bilevel_jax.core.types import Checks


class Verdict(NamedTuple):
    """The sentence that a person reads first."""

    level: str
    """BELIEVE, DO NOT BELIEVE or UNDECIDED."""
    scope: str
    """How large a change of the weights the level is about."""
    reason: str
    remedy: str

    def __str__(self) -> str:
        head = f"{self.level} {self.scope}".strip()
        return " ".join(filter(None, [f"{head}:", self.reason, self.remedy]))


class Certificates(NamedTuple):
    """What was checked of one estimate; None where a check was not made."""

    finite_differences: FiniteDifferences | None
    metasmoothness: float | None
    """cos(grad(w), grad(w without a fifth of the examples)), over the examples that stay."""
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
            lines.append(f"  cosine without a fifth of the examples {self.metasmoothness:.4f}")
        if self.removal_prediction is not None:
            removal = self.removal_prediction
            count = len(removal.actual)
            lines.append(
                f"  {count} retrains without {removal.fraction:.0%} of the examples: rank correlation of predicted and "
                f"actual {removal.rank:.3f}, slope {removal.slope:.3f}"
            )
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
    """The certificates as one level with its reason and remedy.

    BELIEVE for small changes where the ratio at step .1 lies in [.95, 1.05] and the metasmoothness is at least .7, for
    changes of half of the data where it is at least .9; DO NOT BELIEVE where that ratio leaves [.9, 1.1],
    metasmoothness is below .5, a number is not finite or the solution's status is bad; in between, with checks missing,
    or where the ratios do not tend to 1 as the step falls (`has_kinks`), UNDECIDED. For an outer variable that is not
    one weight for each example the ratio alone decides. The thresholds come from ten calibrated settings of small
    language models, not from a theorem.

    Args:
        certificates: the checks of one estimate.

    Returns:
        The verdict; `str(verdict)` is its sentence.

    Example:
        >>> differences = bj.certify.FiniteDifferences(steps=(0.1,), ratios=(1.01,))
        >>> verdict = bj.certify.judge_certificates(bj.certify.Certificates(differences, 0.95, None, bj.Checks()))
        >>> verdict.level
        'BELIEVE'
    """
    checks = certificates.checks
    if not checks.replayed:
        reason = "replaying the training run did not end where training did."
        return Verdict("DO NOT BELIEVE", "", reason, "Run again on one kind of device.")
    if checks.curvature <= 0:
        reason = f"the curvature is not positive definite ({checks.curvature:.2g})."
        return Verdict("DO NOT BELIEVE", "", reason, "Raise the prior, or use Gauss-Newton curvature, or unrolled.")
    if checks.residual > 0.1:
        reason = f"the linear system was not solved (relative residual {checks.residual:.2g})."
        return Verdict("DO NOT BELIEVE", "", reason, "Raise the number of iterations or the prior.")
    if certificates.status != Status.OK:
        return Verdict("DO NOT BELIEVE", "", STATUS_REMEDIES[certificates.status], "")
    if certificates.missing:
        return Verdict("UNDECIDED", "", certificates.missing, "")
    differences, cosine = certificates.finite_differences, certificates.metasmoothness
    if differences is None or (cosine is None and certificates.is_per_example):
        return Verdict("UNDECIDED", "", "the certificates were not computed.", "Compute them (run without --fast).")
    step_size, ratio = differences.steps[0], differences.ratios[0]
    if certificates.is_per_example:
        reason = (
            f"a change of every weight by {step_size:.0%} moves L_v by {ratio:.3f} of what the gradient predicts, and "
            f"without a fifth of the examples the gradient keeps a cosine of {cosine:.3f}."
        )
    else:
        reason = f"a change of every entry by {step_size:g} moves L_v by {ratio:.3f} of what the gradient predicts."
        cosine = 0.7  # no such check applies
    remedy = "Lower the learning rate, lengthen the warm-up, raise eps_root, or use a window."
    is_kinked = has_kinks(differences)
    if is_kinked:
        smallest = max(zip(differences.steps, differences.ratios, strict=True), key=lambda pair: abs(pair[1] - 1))
        reason += (
            f" The ratio does not tend to 1 as the change falls ({smallest[1]:.3g} at {smallest[0]:g}): L_v jumps, as "
            "it does where a network has kinks (ReLU, max, abs, clipping)."
        )
        remedy = "Take a smooth activation (GELU, SiLU, tanh) in place of ReLU."
    elif has_another_slope(differences):
        reason += (
            f" The ratio tends to {differences.ratios[-1]:.3g} as the change falls: L_v is smooth, and the number is "
            "not its derivative, as with a window shorter than training, a small gamma, or a truncated solve."
        )
        remedy = "Lengthen the window, raise gamma, or take unroll without a window."
    if not 0.9 <= ratio <= 1.1 or not (cosine is not None and cosine >= 0.5):
        return Verdict("DO NOT BELIEVE", "", reason, remedy)
    if is_kinked:
        return Verdict("UNDECIDED", "", reason, remedy)
    if 0.95 <= ratio <= 1.05 and cosine >= 0.9:
        return Verdict("BELIEVE", "changes up to half of the data", reason, "")
    if 0.95 <= ratio <= 1.05 and cosine >= 0.7:
        return Verdict("BELIEVE", "small changes", reason, "")
    return Verdict("UNDECIDED", "", reason, remedy)
