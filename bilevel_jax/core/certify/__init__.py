"""Certificates of a hypergradient: is it exact, does it predict retraining, and what does a person read first."""

from bilevel_jax.core.certify.all_checks import check
from bilevel_jax.core.certify.finite_differences import (
    STEP_SIZES,
    FiniteDifferences,
    RetrainFn,
    check_finite_differences,
    has_kinks,
)
from bilevel_jax.core.certify.reliability import (
    Reliability,
    average_reliability,
    measure_reliability,
    measure_reliability_against,
    validation_halves,
)
from bilevel_jax.core.certify.removals import (
    REMOVED,
    Metasmoothness,
    RemovalPrediction,
    compare_with_retrains,
    drop_random_examples,
    metasmoothness,
    predict_removals,
    spearman,
)
from bilevel_jax.core.certify.verdict import Certificates, Verdict, effective_share, judge_certificates

__all__ = [
    "REMOVED",
    "STEP_SIZES",
    "Certificates",
    "FiniteDifferences",
    "Metasmoothness",
    "Reliability",
    "RemovalPrediction",
    "RetrainFn",
    "Verdict",
    "average_reliability",
    "check",
    "check_finite_differences",
    "compare_with_retrains",
    "drop_random_examples",
    "effective_share",
    "has_kinks",
    "judge_certificates",
    "measure_reliability",
    "measure_reliability_against",
    "metasmoothness",
    "predict_removals",
    "spearman",
    "validation_halves",
]
