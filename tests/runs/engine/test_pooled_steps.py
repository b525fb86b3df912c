"""Pooled steps of the outer loop: what they are made of, when they are refused, and resuming."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.compare.run import make_task_builder
from bilevel_jax.core.weightings import rank_curves
from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.config.schema import OuterSection, RaterSection, ScoresSection
from bilevel_jax.runs.engine.outer_loop import OuterLoop
from bilevel_jax.runs.engine.trainer import EXTRA_LOSS_WORK, Trainer
from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.placement import make_mesh, place_table, replicate
from bilevel_jax.runs.infra.session import Interrupted, open_session
from bilevel_jax.runs.scoring.pooling import (
    ValidationModelLosses,
    count_validation_models_work,
    empty_pooling_state,
    make_pooling_features,
    measure_part_reliability,
    split_halves,
    why_not_pooled,
)
from bilevel_jax.runs.scoring.scores import example_losses
from tests.runs import blobs

STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "c.yaml").write_text(blobs.CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    return folder / "c.yaml"


@pytest.fixture(scope="module")
def task(config):
    return make_task_builder(load_config(CompareConfig, config), config.parent)(0)


def make_loop(task, config, session, estimate, **outer):
    section = replace(load_config(CompareConfig, config).outer, estimate=estimate, steps=STEPS, **outer)
    data = load_config(CompareConfig, config).data
    trainer = Trainer(task, section, session)
    return OuterLoop(task, trainer, session, data=data, train_seed=0, scores=ScoresSection(), rater=RaterSection())


def run_loop(task, config, folder, estimate, **outer):
    """The loop after its last step."""
    folder.mkdir(exist_ok=True)
    with open_session(folder, progress=False, save_seconds=600) as session:
        loop = make_loop(task, config, session, estimate, **outer)
        while not loop.stop_reason():
            loop.take_step()
        return loop


def train_on_validation(task, trainer, rows):
    """The training examples' losses after training on some validation examples."""
    start = trainer.init_state(task.init_params(0))
    stream = task.training_stream(0, task.num_examples + rows, packed=False)
    run = trainer.run(jnp.ones(task.corpus.num_examples), start, stream)
    return example_losses(task, run.end.params)


def project(columns, values):
    return np.linalg.lstsq(columns, values, rcond=1e-6)[0]


def test_the_first_two_steps_are_what_the_formulas_say(task, config, tmp_path):
    """Against numpy: side models trained apart, two sweeps on halves of V, least squares."""
    with open_session(tmp_path, progress=False, save_seconds=600) as session:
        loop = make_loop(task, config, session, "auto", reliability_every=1)
        trainer, rate = loop.trainer, loop.outer.learning_rate
        halves = trainer.draw_halves("validation", loop.data.seed)
        rows = [np.flatnonzero(halves > 0), np.flatnonzero(halves < 0), np.flatnonzero(halves)]
        losses_of_v = [train_on_validation(task, trainer, given) for given in rows]
        earlier = None
        for step in range(2):
            weights = np.asarray(loop._weights_of(loop.state.hyper))[: task.num_examples]
            stream = task.training_stream(loop.data.seed + step)
            run = trainer.run(jnp.asarray(weights), trainer.init_state(task.init_params(0)), stream, for_backward=True)
            estimate = trainer.estimate(run, jnp.asarray(weights), stream, halves_seed=loop.data.seed)
            if step == 0:
                uniform = rank_curves(example_losses(task, run.end.params))
                columns = [np.concatenate([uniform, rank_curves(losses)], 1) for losses in losses_of_v]
            slope = weights * (1 - weights / 2)  # of 2 sigmoid(h)
            grad, difference = (np.asarray(g, float) for g in (estimate.grad, estimate.half_difference))
            contributions = [slope * (grad + difference), slope * (grad - difference)]  # 12 examples in each half
            judged_by = [columns[1], columns[0]]  # the model of the other half
            coefficients = [project(x, c) for x, c in zip(judged_by, contributions, strict=True)]
            shared = [x @ b for x, b in zip(judged_by, coefficients, strict=True)]
            own = [c - s for c, s in zip(contributions, shared, strict=True)]
            reliability = []
            for (a, b), before in zip((shared, own), earlier or (shared, own), strict=True):
                norms = np.linalg.norm((a + b) / 2) * np.linalg.norm((before[0] + before[1]) / 2)
                reliability.append(np.clip((a @ before[1] + b @ before[0]) / 2 / norms, 0, 1))
            if step == 0:
                reliability[1] = 0.0
            pooled = columns[2] @ (sum(coefficients) / 2)
            direction = reliability[0] * pooled + reliability[1] * (own[0] + own[1]) / 2
            earlier = (shared, own)
            before = np.asarray(loop.state.hyper)
            loop.take_step()
            moved = np.asarray(loop.state.hyper) - before
            rate = loop.records[-1]["rate"]
            expected = -rate * direction / np.sqrt(np.mean(direction[direction != 0] ** 2))
            np.testing.assert_allclose(moved, np.clip(expected, -2, 2), atol=2e-3)  # float32 all the way
            measured = loop.records[-1]["pooling"]
            assert [measured["shared"], measured["own"]] == pytest.approx(reliability, abs=2e-3)


@pytest.mark.parametrize("estimate", ["pooled", "auto"])
def test_a_pooled_step_is_a_function_of_the_features_or_of_what_is_reliable(task, config, tmp_path, estimate):
    loop = run_loop(task, config, tmp_path, estimate, max_step=100.0)  # a cut step is no function of them
    assert [set(record["pooling"]) for record in loop.records] == [{"shared", "own"}] * (STEPS + 1)
    columns = np.asarray(loop._step_pooling._features.whole)
    logits = np.asarray(loop.state.hyper)
    rest = logits - columns @ project(columns, logits)
    if estimate == "pooled":
        assert np.abs(rest).max() < 1e-3
    else:
        assert np.abs(rest).max() > 1e-2
    steps = task.num_steps
    works = [record["work"] for record in loop.records]
    baselines = 2 * 3
    assert works[0] == pytest.approx(steps * (5 + EXTRA_LOSS_WORK) + baselines + count_validation_models_work(steps, 3))
    assert works[1:] == [steps * 5, steps * (5 + EXTRA_LOSS_WORK), steps * (5 + EXTRA_LOSS_WORK)]  # halves in 0, 2, 3


@pytest.mark.parametrize("at", [20, *(pytest.param(at, marks=pytest.mark.slow) for at in (5, 40, 60))])
def test_stopped_anywhere_and_resumed_changes_no_bit(task, config, tmp_path, stop_at, at):
    """In a model of validation, in the first training, in later outer steps."""
    whole = run_loop(task, config, tmp_path / "whole", "auto")
    stop_at(at)
    with pytest.raises(Interrupted):
        run_loop(task, config, tmp_path / "run", "auto")
    resumed = run_loop(task, config, tmp_path / "run", "auto")
    for left, right in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    assert [record["pooling"] for record in whole.records] == [record["pooling"] for record in resumed.records]


def test_auto_makes_per_example_steps_where_pooling_cannot_be_and_says_so(task, config, tmp_path, capsys):
    plain = run_loop(task, config, tmp_path / "plain", "per_example", reliability_every=0)
    capsys.readouterr()
    auto = run_loop(task, config, tmp_path / "auto", "auto", reliability_every=0)
    assert "auto makes per-example steps: pooling compares two halves" in capsys.readouterr().err
    np.testing.assert_array_equal(np.asarray(plain.state.hyper), np.asarray(auto.state.hyper))
    assert all(record["pooling"] is None for record in auto.records)


@pytest.mark.parametrize(
    "outer, num_validation, reason",
    [
        (OuterSection(weighting="per_source"), 16, "outer.weighting is per_source"),
        (OuterSection(), 3, "it has 3 examples; 4 or more are needed"),
        (OuterSection(reliability_every=0), 16, "outer.reliability_every = 0 never measures"),
        (OuterSection(validation_folds=2), 16, "with outer.validation_folds they also train"),
        (OuterSection(), 4, ""),
    ],
)
def test_the_reason_says_what_is_missing(outer, num_validation, reason):
    found = why_not_pooled(outer, num_validation)
    assert reason in found and bool(found) == bool(reason)


def test_pooled_with_too_few_validation_examples_is_refused(config, tmp_path, capsys):
    flags = ["--compare.methods", "pooled", "--arrays.validation-examples", "3", "--out", str(tmp_path / "run")]
    assert main(["compare", str(config), *flags]) == 1
    assert "it has 3 examples; 4 or more are needed. Set outer.estimate to per_example" in capsys.readouterr().err


def test_what_is_restored_lies_where_the_steps_are(tmp_path, eight_devices):
    """A run on several devices goes on: the halves of before are compared with new ones on the same devices."""
    mesh = make_mesh(8, 1)
    table = place_table(mesh, np.arange(6.0, dtype=np.float32))
    state = empty_pooling_state(mesh, 6, table)
    checkpoint.save_checkpoint(tmp_path / "state", 0, state, {})
    restored = checkpoint.restore_checkpoint(tmp_path / "state", empty_pooling_state(mesh, 6, table)).tree
    features = replicate(mesh, make_pooling_features(np.arange(6.0), ValidationModelLosses(*np.ones((3, 6))), 6))
    parts = split_halves(features, np.array([1.0, -1.0], np.float32), table, table)
    shared, own = measure_part_reliability(parts, restored.earlier)
    assert np.isfinite([float(shared), float(own)]).all()
