"""Verdicts on all evidence: what they need, their words, and that worse evidence never raises one."""

import math
import random

import pytest

from bilevel_jax.core.certify import (
    Certificates,
    FiniteDifferences,
    Metasmoothness,
    Reliability,
    RemovalPrediction,
    Verdict,
    judge_certificates,
    verdict,
)
from bilevel_jax.core.solve.solution import Status
from bilevel_jax.core.types import Checks

NAN, INF = math.nan, math.inf
GOOD_RATIOS = FiniteDifferences((0.1, 0.03, 0.01), (1.0, 1.0, 1.0))
BOTH = Metasmoothness((0.5, 0.2), (0.95, 0.99))
SOUND = Certificates(GOOD_RATIOS, BOTH, None, Checks(), reliability=Reliability(0.9, 0.19, 100))
LARGE, SMALL = "BELIEVE changes of up to half of the data", "BELIEVE small changes"


def retrains(fraction=0.5, rank=0.9, slope=1.0, count=8):
    changes = tuple(0.1 * number for number in range(count))
    return RemovalPrediction(fraction, changes, changes, rank, slope)


def ratios(steps, values, noise=()):
    return {"finite_differences": FiniteDifferences(steps, values, noise)}


def smooth(removed, cosines):
    return {"metasmoothness": Metasmoothness(removed, cosines)}


CASES = {
    "all is well": ({}, LARGE),
    "steps in any order": (ratios((0.001, 0.1), (1.0, -0.002)), "DO NOT BELIEVE"),
    "a ratio off at a small step": (ratios((0.1, 0.03), (1.0, 1.3)), "UNDECIDED"),
    "small steps alone": (ratios((0.01, 0.003), (1.0, 1.0)), "UNDECIDED"),
    "small steps alone, off": (ratios((0.01,), (0.5,)), "DO NOT BELIEVE"),
    "a large step more": (ratios((0.3, 0.1), (1.1, 1.0)), LARGE),
    "a large step that bends": (ratios((0.3, 0.1), (0.5, 1.0)), SMALL),
    "a step twice": (ratios((0.1, 0.1), (1.0, 1.01), (1.0, 0.0)), "UNDECIDED"),
    "a ratio in between": (ratios((0.1,), (1.07,)), "UNDECIDED"),
    "a ratio beyond": (ratios((0.1,), (0.88,)), "DO NOT BELIEVE"),
    "a ratio that is none": (ratios((0.1, 0.01), (1.0, NAN)), "DO NOT BELIEVE"),
    "rounding": (ratios((0.1,), (1.0,), (0.04,)), "UNDECIDED"),
    "no ratios": (ratios((), ()), "UNDECIDED"),
    "a fifth alone": (smooth((0.2,), (0.99,)), SMALL),
    "a twentieth alone": (smooth((0.05,), (0.99,)), "UNDECIDED"),
    "a half alone": (smooth((0.5,), (0.95,)), LARGE),
    "rough at a half": (smooth((0.5, 0.2), (0.3, 0.99)), SMALL),
    "rough at a fifth": (smooth((0.5, 0.2), (0.99, 0.2)), "DO NOT BELIEVE"),
    "not quite smooth": (smooth((0.2,), (0.6,)), "UNDECIDED"),
    "no cosine": (smooth((0.5, 0.2), (0.99, NAN)), "DO NOT BELIEVE"),
    "no metasmoothness": ({"metasmoothness": None}, "UNDECIDED"),
    "retrains in its place": ({"metasmoothness": None, "removal_prediction": retrains(0.1)}, SMALL),
    "retrains of a half in its place": ({"metasmoothness": None, "removal_prediction": retrains()}, LARGE),
    "too few of them": ({"metasmoothness": None, "removal_prediction": retrains(count=7)}, "UNDECIDED"),
    "retrains that contradict": ({"removal_prediction": retrains(0.1, rank=-0.9)}, "DO NOT BELIEVE"),
    "retrains of a half that contradict": ({"removal_prediction": retrains(rank=-0.9)}, "DO NOT BELIEVE"),
    "retrains of a half that do not agree": ({"removal_prediction": retrains(rank=0.4)}, SMALL),
    "retrains of a tenth that hardly agree": ({"removal_prediction": retrains(0.1, rank=0.5)}, "UNDECIDED"),
    "another slope": ({"removal_prediction": retrains(slope=5.0)}, SMALL),
    "uneven weights": ({"effective_share": 0.4}, SMALL),
    "uneven weights, not quite smooth": (smooth((0.2,), (0.85,)) | {"effective_share": 0.6}, "UNDECIDED"),
    "few heavy weights": ({"effective_share": 0.2}, "UNDECIDED"),
    "few heavy weights, shown": ({"effective_share": 0.2, "removal_prediction": retrains(0.1)}, SMALL),
    "uneven weights, shown": ({"effective_share": 0.4, "removal_prediction": retrains()}, LARGE),
    "a bad status": ({"status": Status.NOT_SOLVED}, "DO NOT BELIEVE"),
    "replayed elsewhere": ({"checks": Checks(replayed=False)}, "DO NOT BELIEVE"),
    "no minimum": ({"checks": Checks(curvature=-0.1)}, "DO NOT BELIEVE"),
    "not solved": ({"checks": Checks(residual=0.5)}, "DO NOT BELIEVE"),
    "rounding alone": ({"checks": Checks(resolution=0.5)}, "DO NOT BELIEVE"),
    "products hardly rounded": ({"checks": Checks(product_error=0.05)}, LARGE),
    "rounded products": ({"checks": Checks(product_error=0.06)}, "UNDECIDED"),
    "coarse products": ({"checks": Checks(product_error=0.2)}, "DO NOT BELIEVE"),
    "nothing was checked": ({"missing": "why. Do this."}, "UNDECIDED"),
    "another outer variable": ({"is_per_example": False, "metasmoothness": None}, SMALL),
}


@pytest.mark.parametrize("changes, start", CASES.values(), ids=list(CASES))
def test_what_a_level_needs(changes, start):
    judged = judge_certificates(SOUND._replace(**changes))
    assert str(judged).startswith(start + (", for this validation set: " if judged.scope else ": "))
    assert judged.level == "BELIEVE" or judged.remedy or "status" in changes or "checks" in changes or judged.reason
    assert "nan" not in str(judged) or "NaN" in str(judged) or judged.level != "BELIEVE"


OTHERS_RETRAINS = {
    "they agree": (retrains(rank=0.85), "BELIEVE"),
    "they agree in part, which no reliability outdoes": (retrains(rank=0.57), "UNDECIDED"),
    "they hardly agree": (retrains(rank=0.2), "DO NOT BELIEVE"),
    "no rank": (retrains(rank=NAN), "DO NOT BELIEVE"),
    "too few": (retrains(count=7), "UNDECIDED"),
    "without too few examples": (retrains(0.05), "UNDECIDED"),
    "none": (None, "BELIEVE"),
}


@pytest.mark.parametrize("others, level", OTHERS_RETRAINS.values(), ids=list(OTHERS_RETRAINS))
def test_retrains_that_read_other_examples_say_whether_it_speaks_for_them(others, level):
    shown = SOUND._replace(removal_prediction=retrains(rank=0.93), others_prediction=others, others_part="test")
    judged = judge_certificates(shown)
    assert (judged.level, judged.others_level) == ("BELIEVE", level)
    if others:
        both = f"correlation of {others.rank:.2f} with those of test loss, of 0.93 with those of L_v."
        assert both in judged.others_reason and "test loss" in str(shown)
    worse = judge_certificates(shown._replace(checks=Checks(replayed=False)))
    assert worse.others_level == "DO NOT BELIEVE"
    unreliable = shown._replace(reliability=Reliability(0.1, 0.99, 10))
    assert judge_certificates(unreliable).others_level == (level if others else "DO NOT BELIEVE")


def test_shares_that_cannot_widen_a_verdict_are_not_measured():
    assert verdict.shares_to_remove((0.5, 0.2), 1.0) == (0.5, 0.2)
    assert verdict.shares_to_remove((0.5, 0.2), 0.4) == (0.2,)
    assert verdict.shares_to_remove((0.5,), 0.4) == (0.5,)


OTHERS = [
    (0.95, "BELIEVE"),
    (0.69, "UNDECIDED"),
    (0.2, "DO NOT BELIEVE"),
    (0.0, "DO NOT BELIEVE"),
    (NAN, "UNDECIDED"),
    (None, "UNDECIDED"),
]


@pytest.mark.parametrize("value, level", OTHERS)
def test_the_second_sentence_speaks_of_other_examples(value, level):
    reliability = None if value is None else Reliability(value, 1 - value**2, 100)
    judged = judge_certificates(SOUND._replace(reliability=reliability))
    first, second = str(judged).splitlines()
    assert judged.others_level == level and second.startswith(f"For other examples {level}: ")
    assert first.startswith(f"{LARGE}, for this validation set: ")
    assert judge_certificates(SOUND._replace(reliability=reliability, missing="m.")).others_level != "BELIEVE"


# ---- worse evidence never raises a verdict


def height(judged: Verdict) -> tuple[int, int]:
    """How much a verdict claims, of the validation set and of other examples."""
    levels = ("DO NOT BELIEVE", "UNDECIDED", "BELIEVE")
    scopes = ("", "small changes", "changes of up to half of the data")
    return levels.index(judged.level) + scopes.index(judged.scope), levels.index(judged.others_level)


def near(rng, *places):
    """A number at, about or far from some places, or none."""
    points = [place + by for place in places for by in (-0.3, -0.1, -0.02, 0.0, 0.02, 0.3)]
    return rng.choice([*points, *points, -2.0, 2.0, NAN, INF, -INF])


STEPS, SHARES = [0.5, 0.3, 0.1, 0.05, 0.01, 0.001], [0.6, 0.5, 0.3, 0.2, 0.1, 0.05]


def some_differences(rng):
    steps = rng.choice([[0.1, 0.03], [rng.choice(STEPS) for _ in range(rng.randint(0, 4))]])
    off = rng.randint(0, 4)
    values = [near(rng, 0.95, 0.9) if place == off else 1.0 for place in range(len(steps))]
    noise = [rng.choice([0.0, 0.001, 0.001, 0.016, 0.02, 1.0, NAN]) for _ in steps]
    return rng.choice([None, *3 * [FiniteDifferences(tuple(steps), tuple(values), rng.choice([(), tuple(noise)]))]])


def some_smoothness(rng):
    shares = rng.choice([[0.5, 0.2], [rng.choice(SHARES) for _ in range(rng.randint(0, 3))]])
    off = rng.randint(0, 3)
    cosines = [near(rng, 0.3, 0.8, 0.9) if place == off else 0.99 for place in range(len(shares))]
    return rng.choice([None, *3 * [Metasmoothness(tuple(shares), tuple(cosines))]])


def some_retrains(rng):
    rank, slope = rng.choice([0.9, near(rng, 0.3, 0.7, -0.3)]), rng.choice([1.0, 1.0, near(rng, 0.33, 1, 3)])
    return retrains(rng.choice(SHARES), rank, slope, rng.randint(7, 9))


def some_checks(rng):
    residual, curvature, resolution = (rng.choice([NAN, rng.uniform(-1, 5)]) for _ in range(3))
    return Checks(
        residual=residual, curvature=curvature, resolution=resolution, replayed=rng.random() < 0.8,
        product_error=rng.choice([NAN, 0.0, 0.04, 0.06, 0.2]),
    )  # fmt: skip


@pytest.mark.parametrize(("changes", "level"), [({}, "BELIEVE"), (ratios((0.1,), (0.88,)), "DO NOT BELIEVE")])
def test_a_loss_without_examples_has_no_others_to_speak_of(changes, level):
    told = judge_certificates(SOUND._replace(reliability=None, is_sampled=False, **changes))
    assert told.others_level == level and "reads no examples, so there are no others" in told.others_reason


def test_what_was_not_told_of_other_examples_is_said_with_its_reason():
    def say(reliability):
        return judge_certificates(SOUND._replace(reliability=reliability)).others_reason

    assert say(None).startswith("whether another validation set agrees was not measured. Compute")
    assert "one validation example has no halves). Give more of them." in say(Reliability(NAN, NAN, 1))
    assert "the independent set do not agree" in say(Reliability(NAN, NAN, 9, agreement=0.1, signal=-0.1))
    assert "Even of these the halves hardly agree" in say(Reliability(0.0, 1.2, 9, is_fitted=True))


def some_reliability(rng):
    reliability = Reliability(rng.choice([rng.random(), rng.random(), NAN]), 0.5, 10)
    return rng.choice([None, reliability, reliability._replace(is_fitted=True)])


FIELDS = {
    "finite_differences": some_differences,
    "metasmoothness": some_smoothness,
    "removal_prediction": some_retrains,
    "checks": some_checks,
    "status": lambda rng: rng.choice(list(Status)),
    "is_per_example": lambda rng: rng.random() < 0.5,
    "missing": lambda rng: rng.choice(["", "why."]),
    "reliability": some_reliability,
    "others_prediction": some_retrains,
    "effective_share": lambda rng: rng.choice([0.95, 0.89, 0.34, 0.3, NAN]),
}


def evidence(rng):
    """Sound certificates but for one to three fields, so that every rule decides in some of them."""
    names = rng.sample([*FIELDS, *3 * list(FIELDS)[:3]], rng.randint(1, 3))
    return SOUND._replace(**{name: FIELDS[name](rng) for name in names})


def away(value, ideal, by):
    """Farther from the ideal value on the same side, or not finite."""
    return value + math.copysign(by, value - ideal)


def with_item(values, place, value):
    return (*values[:place], value, *values[place + 1 :])


def without_item(values, place):
    return (*values[:place], *values[place + 1 :])


def speaks_for_step(differences, place):
    noise = differences.noise[place] if differences.noise else 0.0
    return abs(differences.ratios[place] - 1) <= verdict.RATIO_TOLERANCE >= 3 * noise


def speaks_for_share(_, cosine):
    return INF > cosine >= verdict.SMOOTH_UNEVEN


def worsenings(one: Certificates, by: float, place: int) -> dict[str, Certificates]:
    """The order of evidence: every way of being worse, by some amount at some place.

    Numbers: a ratio or a slope farther from 1; more rounding; a smaller cosine, rank, curvature, resolution,
    reliability, effective sample size, number or share of retrains; a larger residual, or error of products; a number
    that is not finite. A flag: not replayed, a status other than OK, a reason why nothing was checked. Evidence that is
    gone, where it spoke for the estimate: without what speaks against it, it is not worse. Evidence that speaks against
    it and was absent.
    """
    out = {}
    differences, cosines, removal = one.finite_differences, one.metasmoothness, one.removal_prediction
    if differences and differences.steps:
        at = place % len(differences.steps)
        for name, value in (("farther", away(differences.ratios[at], 1, by)), ("nan", NAN), ("infinite", -INF)):
            changed = differences._replace(ratios=with_item(differences.ratios, at, value))
            out[f"ratio {name}"] = one._replace(finite_differences=changed)
        if differences.noise:
            changed = differences._replace(noise=with_item(differences.noise, at, differences.noise[at] + by))
            out["rounding"] = one._replace(finite_differences=changed)
        if speaks_for_step(differences, at):
            fewer = FiniteDifferences(*(without_item(part, at) if part else () for part in differences))
            out["a step less"] = one._replace(finite_differences=fewer)
        if all(speaks_for_step(differences, row) for row in range(len(differences.steps))):
            out["no differences"] = one._replace(finite_differences=None)
            out["no steps"] = one._replace(finite_differences=FiniteDifferences((), ()))
    if cosines and cosines.removed:
        at = place % len(cosines.removed)
        for name, value in (("smaller", cosines.cosines[at] - by), ("nan", NAN), ("infinite", INF)):
            changed = cosines._replace(cosines=with_item(cosines.cosines, at, value))
            out[f"cosine {name}"] = one._replace(metasmoothness=changed)
        if speaks_for_share(cosines.removed[at], cosines.cosines[at]):
            out["a share less"] = one._replace(metasmoothness=Metasmoothness(*(without_item(p, at) for p in cosines)))
        if all(map(speaks_for_share, *cosines)):
            out["no metasmoothness"] = one._replace(metasmoothness=None)
    if removal and removal.actual:
        predicted = (
            INF > removal.rank >= verdict.RANK_WANTED and removal.slope == 1 and not math.isnan(removal.actual[0])
        )
        changes = {
            "rank": {"rank": removal.rank - by},
            "rank nan": {"rank": NAN},
            "slope": {"slope": away(removal.slope, 1, by)},
            "slope nan": {"slope": NAN},
            "a smaller share": {"fraction": removal.fraction / (1 + by)},
            "a change nan": {"actual": with_item(removal.actual, 0, NAN)},
        }
        if len(removal.actual) > 1:
            changes["a retrain less"] = {"predicted": removal.predicted[:-1], "actual": removal.actual[:-1]}
        out |= {name: one._replace(removal_prediction=removal._replace(**change)) for name, change in changes.items()}
        if predicted:
            out["no retrains"] = one._replace(removal_prediction=None)
    else:
        out["retrains against it"] = one._replace(removal_prediction=retrains(0.1 + by, rank=-0.9))
    checks = one.checks
    out["not replayed"] = one._replace(checks=checks._replace(replayed=False))
    for name, sign in (("residual", 1), ("curvature", -1), ("resolution", -1), ("product_error", 1)):
        value = getattr(checks, name)
        worse = sign * 10.0 if math.isnan(value) else value + sign * by
        out[name] = one._replace(checks=checks._replace(**{name: worse}))
    out["status"] = one._replace(status=Status.NOT_FINITE)
    out["missing"] = one._replace(missing="why.")
    out["uneven"] = one._replace(effective_share=one.effective_share - by)
    out["uneven nan"] = one._replace(effective_share=NAN)
    if one.reliability and not math.isnan(one.reliability.value):
        value = one.reliability.value
        out["only a bound"] = one._replace(reliability=one.reliability._replace(is_fitted=True))
        out["unreliable"] = one._replace(reliability=one.reliability._replace(value=max(0.0, value - by)))
        if value >= verdict.RELIABILITY_WANTED:
            out["reliability nan"] = one._replace(reliability=one.reliability._replace(value=NAN))
            out["no reliability"] = one._replace(reliability=None)
    else:
        out["unreliable"] = one._replace(reliability=Reliability(0.1, 0.99, 10))
    others = one.others_prediction
    if others and others.actual:
        changes = {
            "others' rank": {"rank": others.rank - by},
            "others' rank nan": {"rank": NAN},
            "others' smaller share": {"fraction": others.fraction / (1 + by)},
        }
        if len(others.actual) > 1:
            changes["others' retrain less"] = {"predicted": others.predicted[:-1], "actual": others.actual[:-1]}
        out |= {name: one._replace(others_prediction=others._replace(**change)) for name, change in changes.items()}
    else:
        out["others' retrains against it"] = one._replace(others_prediction=retrains(0.1 + by, rank=-0.9))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_worse_evidence_never_raises_a_verdict(seed):
    rng = random.Random(seed)
    for _ in range(400):
        one, by = evidence(rng), rng.choice([0.001, 0.03, 0.3, 2.0])
        before = height(judge_certificates(one))
        for place in range(3):
            for name, other in worsenings(one, by, place).items():
                after = height(judge_certificates(other))
                assert after[0] <= before[0] and after[1] <= before[1], f"{name}: {one} -> {other}"


def test_every_level_occurs_and_every_field_can_lower_the_best():
    best = SOUND._replace(
        finite_differences=FiniteDifferences((0.1,), (1.0,), (0.0,)),
        removal_prediction=retrains(),
        checks=Checks(residual=0.0, curvature=1.0, resolution=9.0, product_error=0.0),
        metasmoothness=None,
    )
    top = height(judge_certificates(best))
    assert top == (4, 2)
    lowering = {name for name, worse in worsenings(best, 20.0, 0).items() if height(judge_certificates(worse)) != top}
    assert set(worsenings(best, 20.0, 0)) - lowering == {"uneven", "uneven nan"}  # retrains have shown it
