"""Pooled steps in `refine`: those of `select` on the same rows, laws of multiplicity, resuming, what is refused."""

import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.commands.refine import report
from bilevel_jax.commands.refine.candidates import make_candidate_trainers
from bilevel_jax.commands.refine.rollouts import build_round_task, collect_rollouts
from bilevel_jax.commands.refine.run import count_rounds_work, prepare_refine_task, refine
from bilevel_jax.core.weightings import PartReliability
from bilevel_jax.runs.config.load import RefineConfig, load_config
from bilevel_jax.runs.config.schema import ScoresSection
from bilevel_jax.runs.engine.outer_loop import OuterLoop
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import Interrupted, open_session
from bilevel_jax.runs.report.numbers import format_number
from bilevel_jax.runs.scoring.pooling import PoolingState, StepPooling, ValidationModelLosses, empty_pooling_state
from tests.commands.test_refine import same
from tests.tiny_task import count_traces_by_round

AUTO = ("--outer.estimate", "auto", "--outer.reliability-every", "1", "--refine.methods", "unrolled")
NO_RESPONSES = ("--refine.questions", "none", "--refine.ratio", "none")


@pytest.fixture(scope="module")
def config(made):
    return made / "refine.yaml"


def run(config, out, *flags):
    return refine(load_config(RefineConfig, config, [*AUTO, "--outer.steps", "2", *flags, "--out", str(out)]))


def opened(folder):
    folder.mkdir(exist_ok=True)
    return open_session(folder, progress=False, save_seconds=1e9)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run: (its folder, its result, how often the model had been traced after each round)."""
    out = tmp_path_factory.mktemp("pooled") / "run"
    result, counts = count_traces_by_round(lambda: run(config, out))
    return out, result, counts


@pytest.mark.parametrize(
    "weighting, estimate, steps",
    [pytest.param("softmax", "pooled", 1, marks=pytest.mark.slow), ("sigmoid", "auto", 3)],
)
def test_the_steps_are_those_of_select(config, tmp_path, weighting, estimate, steps):
    """Without responses and at multiplicity 1: the weights, the reliability of the parts and the passes."""
    flags = [
        *AUTO,
        *NO_RESPONSES,
        "--outer.weighting",
        weighting,
        "--outer.steps",
        str(steps),
        "--outer.estimate",
        estimate,
    ]
    settings = load_config(RefineConfig, config, flags)
    task = prepare_refine_task(settings, tmp_path)
    with opened(tmp_path / "select") as session:
        trainer = Trainer(task, settings.outer, session)
        loop = OuterLoop(task, trainer, session, data=settings.data, train_seed=0, scores=ScoresSection())
        for _ in range(steps):
            loop.take_step()
        expected = np.asarray(loop._weights_of(loop.state.hyper))
    empty = collect_rollouts(settings, task, np.zeros(0, int), 0, tmp_path / "none.parquet", lambda *_: [], "x", None)
    with opened(tmp_path / "refine") as session:
        train = make_candidate_trainers(settings, task)["unrolled"]
        found = train(build_round_task(settings, task, empty, 0), task.init_params(0), session, 0)
    assert expected.std() > 0.1
    # a softmax is two formulas here and there, and what rounds differently in a step grows in the trainings after it
    np.testing.assert_allclose(found.weights, expected, rtol=1e-5)
    logged = [json.loads(line) for line in (tmp_path / "refine" / "log.jsonl").read_text().splitlines()]
    parts = [line["pooling"] for line in logged if line["event"] == "outer"]
    for part, record in zip(parts, loop.records, strict=True):
        assert part == pytest.approx(record["pooling"], abs=1e-4)
    assert found.reliability["pooling"] == {"first": parts[0], "last": parts[-1]}


@pytest.fixture(scope="module")
def pooling_of(config, tmp_path_factory):
    """multiplicity, columns of numbers -> (the direction of a second step, its reliability)."""
    folder = tmp_path_factory.mktemp("laws")
    task = prepare_refine_task(load_config(RefineConfig, config, [*AUTO]), folder)

    def pool(multiplicity, rows):
        with opened(folder) as session:
            halves = np.tile([1.0, -1.0], 4)
            pooling = StepPooling(task, session, halves, estimate="auto", train_seed=0, multiplicity=multiplicity)
            losses, steps = ValidationModelLosses(*rows[:3]), jnp.asarray(rows[4:], jnp.float32)
            state = empty_pooling_state(task.mesh, len(multiplicity), jnp.zeros(len(multiplicity)))
            state = PoolingState(losses, state.earlier)
            last = PartReliability(1.0, 1.0)
            _, _, state = pooling.take(state, steps[0], steps[1], rows[3], last)
            direction, reliability, _ = pooling.take(state, steps[2], steps[3], rows[3], last)
        return np.asarray(direction), reliability

    return pool


def numbers(count):
    """Losses under three models and at the end of training, and two steps with their differences of halves."""
    random = np.random.default_rng(3)
    rows = random.normal(size=(8, count))
    rows[4:] += rows[2]  # what is shared
    rows[6:] += rows[4:6]  # what is found again
    return rows


def test_responses_are_pooled_as_the_row_that_they_share(pooling_of):
    """Rows in three parts of a third each: every part has the direction of its whole row."""
    rows, parts = numbers(12), np.array([0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9, 10, 11])
    direction, reliability = pooling_of(np.ones(12), rows)
    split, same_reliability = pooling_of(1 / np.bincount(parts)[parts], rows[:, parts])
    assert 0.1 < reliability.shared < 1 and 0.1 < reliability.own < 1 and direction.std() > 0.1
    np.testing.assert_allclose(split, direction[parts], atol=1e-5)
    assert [*same_reliability] == pytest.approx([*reliability], abs=1e-5)


def test_what_counts_nothing_is_not_pooled(pooling_of):
    """Rows of multiplicity 0, with any losses and contributions, change nothing and do not move."""
    rows = numbers(12)
    direction, reliability = pooling_of(np.ones(12), rows)
    more, same_reliability = pooling_of(np.r_[np.ones(12), 0, 0], np.c_[rows, np.full((8, 2), 1e3)])
    np.testing.assert_allclose(more, [*direction, 0, 0], atol=1e-5)
    assert [*same_reliability] == pytest.approx([*reliability], abs=1e-5)


def test_rows_in_another_order_have_the_same_directions(pooling_of):
    rows, order = numbers(12), np.random.default_rng(5).permutation(12)
    multiplicity = np.random.default_rng(6).uniform(0.5, 2, 12)
    direction, _ = pooling_of(multiplicity, rows)
    permuted, _ = pooling_of(multiplicity[order], rows[:, order])
    np.testing.assert_allclose(permuted, direction[order], atol=1e-5)


def test_a_run_compiles_in_its_first_round_and_takes_the_passes_that_were_planned(whole, config, tmp_path):
    """Two measured steps, halves in both and dev in the last; the losses of the rows, three models of validation."""
    _, result, counts = whole
    assert counts[0] == counts[1] > 0
    epochs = math.ceil((36 - 9 + 2 * 9) / 8)
    steps = 6 * (1 + 2 * 5 + 2 * (1 + 3)) + epochs / 3 + 3 * (6 + epochs / 3)
    assert [record["work"] for record in result["records"]] == pytest.approx([steps, steps])
    settings = load_config(RefineConfig, config, [*AUTO, "--outer.steps", "2"])
    assert count_rounds_work(settings, prepare_refine_task(settings, tmp_path)) == pytest.approx(2 * steps)


def test_log_result_and_report_tell_how_reliable_the_parts_were(whole):
    out, result, _ = whole
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line["pooling"] for line in log if line["event"] == "outer"]
    assert len(steps) == 4 and all(0 <= value <= 1 for step in steps for value in step.values())
    stored = [record["candidates"][0]["reliability"]["pooling"] for record in result["records"]]
    assert stored == [{"first": steps[0], "last": steps[1]}, {"first": steps[2], "last": steps[3]}]
    page = " ".join((out / "report.html").read_text().split())
    assert page.count("The steps are pooled: of what examples of like losses share") == 2
    lines = report.describe_reliability(result)["lines"]
    assert f"{format_number(steps[1]['shared'], 2)} in the last" in lines[0]


@pytest.mark.parametrize(
    "count", [pytest.param(count, marks=[pytest.mark.slow] * (count != 25)) for count in (4, 18, 25, 40, 56, 70)]
)
def test_stopped_anywhere_and_resumed_changes_no_bit(config, whole, tmp_path, stop_at, count):
    stop_at(count)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run")
    run(config, tmp_path / "run", "--resume")
    same(whole[0], tmp_path / "run")


def test_the_floor_reads_the_better_part(config, tmp_path):
    """The square root of the larger share of energy, in two steps in a row."""
    flags = ("--outer.steps", "4", "--outer.reliability-floor", "0.999", "--refine.rounds", "1")
    stored = run(config, tmp_path / "run", *flags)["records"][0]["candidates"][0]["reliability"]
    values = [math.sqrt(max(stored["pooling"][place].values())) for place in ("first", "last")]
    assert max(values) <= 0.999 and stored["is_used_up"] and stored["steps"] == 2


def test_auto_makes_per_example_steps_where_pooling_cannot_be_and_says_so(config, tmp_path, capsys):
    flags = ("--refine.rounds", "1", "--outer.reliability-every", "0")
    auto = run(config, tmp_path / "auto", *flags)
    assert "outer.estimate = auto makes per-example steps: pooling compares two halves" in capsys.readouterr().err
    run(config, tmp_path / "plain", *flags, "--outer.estimate", "per_example")
    assert (tmp_path / "auto/model/model.safetensors").read_bytes() == (
        tmp_path / "plain/model/model.safetensors"
    ).read_bytes()
    assert "pooling" not in auto["records"][0]["candidates"][0]["reliability"]


def test_what_cannot_be_pooled_is_refused_before_any_work(config, made, tmp_path):
    rows = (made / "validation.jsonl").read_text().splitlines()[:3]
    (tmp_path / "three.jsonl").write_text("\n".join(rows) + "\n")
    few = ("--outer.estimate", "pooled", "--data.validation", str(tmp_path / "three.jsonl"))
    with pytest.raises(ValueError, match="it has 3 examples; 4 or more are needed. Set outer.estimate to per_example"):
        run(config, tmp_path / "run", *few)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="how unrolled steps its weights, which refine.methods does not name"):
        load_config(RefineConfig, config, [*AUTO[:2], "--refine.methods", "uniform", "--refine.questions", "fixed"])


def test_a_later_round_steps_by_models_and_halves_of_its_own(config, tmp_path):
    """Of a round that accepted nothing the next has the same start, and yet other halves and other orders."""
    settings = load_config(RefineConfig, config, [*AUTO, *NO_RESPONSES])
    settings = replace(settings, outer=replace(settings.outer, steps=1))
    task = prepare_refine_task(settings, tmp_path)
    empty = collect_rollouts(settings, task, np.zeros(0, int), 0, tmp_path / "none.parquet", lambda *_: [], "x", None)
    made = build_round_task(settings, task, empty, 0)
    found = []
    for number in range(2):
        with opened(tmp_path / str(number)) as session:
            found.append(make_candidate_trainers(settings, task)["unrolled"](made, None, session, number).weights)
    assert np.abs(found[0] - found[1]).max() > 1e-3
