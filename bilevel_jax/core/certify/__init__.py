"""Certificates of a hypergradient: is it exact, does it predict retraining, and what does a person read first."""

from bilevel_jax.core.certify.all_checks import check
from bilevel_jax.core.certify.finite_differences import (
    STEP_SIZES,
    FiniteDifferences,
    RetrainFn,
    check_finite_differences,
    has_kinks,
)
from bilevel_jax.core.certify.removals import (
    RemovalPrediction,
    drop_random_examples,
    metasmoothness,
    predict_removals,
    spearman,
)
from bilevel_jax.core.certify.verdict import Certificates, Verdict, judge_certificates

__all__ = [
    "STEP_SIZES",
    "Certificates",
    "FiniteDifferences",
    "RemovalPrediction",
    "RetrainFn",
    "Verdict",
    "check",
    "check_finite_differences",
    "drop_random_examples",
    "has_kinks",
    "judge_certificates",
    "metasmoothness",
    "predict_removals",
    "spearman",
]
