"""Validation examples that train, too: turns of the folds, the shared weight, and its exact hypergradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import weightings
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.engine.folds import (
    count_judges,
    judge_halves,
    take_turn,
    turn_training_stream,
    turn_validation_stream,
)
from bilevel_jax.runs.engine.outer_loop import run_outer_loop
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.tasks.arrays import build_array_model, label_array_data, prepare_array_task, read_npz_dataset
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example
from tests.runs import blobs

FOLDS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "compare.yaml").write_text(blobs.CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    flags = ("--model.param-dtype", "float64", "--outer.validation-folds", str(FOLDS), "--outer.steps", "4")
    return load_config(CompareConfig, folder / "compare.yaml", flags)


@pytest.fixture(scope="module")
def task(config, tmp_path_factory):
    dataset = read_npz_dataset(config.data.train[0])
    with jax.enable_x64(True):
        model = build_array_model(
            dataset, config.arrays, model=config.model, optimizer=config.optimizer, max_steps=6, proximal_strength=0.01
        )
        yield prepare_array_task(
            dataset,
            model,
            config.arrays,
            tmp_path_factory.mktemp("run"),
            train=config.train,
            mesh=config.mesh,
            data_seed=0,
        )


def test_every_validation_example_judges_once_in_a_round_and_trains_otherwise(task):
    turns = [take_turn(task, FOLDS, 0, step) for step in range(FOLDS)]
    assert sorted(np.concatenate([turn.judges for turn in turns]).tolist()) == list(range(24))
    for turn in turns:
        trained = turn.trained[turn.trained >= 60] - 60
        assert sorted([*trained, *turn.judges]) == list(range(24)) and count_judges(task, turn) == 8
        assert np.array_equal(turn.trained[:60], np.arange(60))
    assert all(map(np.array_equal, take_turn(task, FOLDS, 0, FOLDS), turns[0]))
    with pytest.raises(
        ValueError, match="validation_folds = 30, and each fold needs a validation example, of which there are 24"
    ):
        take_turn(task, 30, 0, 0)


def test_the_judging_stream_is_the_mean_over_the_judges(task):
    turn, params = take_turn(task, FOLDS, 0, 1), task.init_params(0)
    losses = evaluate_per_example(
        task.objective.losses, params, task.frozen(params), task.held_out_streams["validation"], 24
    )
    mean = validation_loss_fn(task.problem)(params, task.frozen(params), turn_validation_stream(task, turn))
    assert float(mean) == pytest.approx(losses[turn.judges].mean(), rel=1e-6)
    halves = judge_halves(task, 5, turn)
    assert (halves != 0).sum() == 8 and halves.sum() == 0  # two halves of four judges each


@pytest.mark.parametrize("method", ["unrolled", "alignment"])
def test_the_shared_weight_has_the_hypergradient_of_its_examples_together(config, task, tmp_path, method):
    """Central differences of L_v of the judges in the log of the weight: float64, relative 1e-7; alignment is none."""
    outer = dataclasses.replace(config.outer, method=method)
    turn, num_weights = take_turn(task, FOLDS, 0, 2), 84
    weighting = weightings.append_shared_weight(weightings.sigmoid(60), 60, 24)
    with jax.enable_x64(True), open_session(tmp_path, progress=False, save_seconds=1e9) as session:
        trainer = Trainer(task, outer, session)
        start = trainer.init_state(task.init_params(0))
        stream, validation = turn_training_stream(task, 3, turn), turn_validation_stream(task, turn)
        variable = weighting.init()._replace(log_weight=jnp.array(0.3))

        def loss(log_weight):
            weights = weighting.weights(variable._replace(log_weight=jnp.array(log_weight)))
            return trainer.validation_loss(weights, start, stream, validation, validation_loss_fn(task.problem))

        weights = weighting.weights(variable)
        assert weights.shape == (num_weights,) and np.allclose(weights[60:], np.exp(0.3))
        run = trainer.run(weights, start, stream, for_backward=True)
        grad = trainer.estimate(run, weights, stream, turn=turn).grad
        assert not np.asarray(grad)[60 + turn.judges].any()  # they did not train
        slope = float(weightings.weighting_vjp(weighting, variable, grad).log_weight)
        if method == "unrolled":
            assert slope == pytest.approx((loss(0.3 + 1e-4) - loss(0.3 - 1e-4)) / 2e-4, rel=1e-5)
        assert slope < 0  # more of the right examples lowers the loss of others


def test_the_shared_weight_settles_and_the_table_steps_as_alone():
    alone, weighting = weightings.sigmoid(3), weightings.append_shared_weight(weightings.sigmoid(3), 3, 2, 8)
    variable, table = weighting.init(), alone.init()
    for _ in range(30):  # a minimum at a = 2 of the shared weight
        weights = weighting.weights(variable)
        grad = weightings.weighting_vjp(weighting, variable, jnp.array([1.0, -2.0, 3.0, *(weights[3:5] - 2), 0, 0, 0]))
        variable = weighting.step(variable, grad, 0.7, 2.0)
        table = alone.step(table, weightings.weighting_vjp(alone, table, jnp.array([1.0, -2.0, 3.0])), 0.7, 2.0)
    weights = weighting.weights(variable)
    assert np.allclose(weights[:3], alone.weights(table)) and not weights[5:].any()
    assert np.allclose(weights[3:5], 2, rtol=1e-3)


def test_the_loop_learns_the_weight_and_records_it(config, task, tmp_path):
    with jax.enable_x64(True), open_session(tmp_path, progress=False, save_seconds=1e9) as session:
        learned = run_outer_loop(
            task,
            Trainer(task, config.outer, session),
            session,
            data=label_array_data(config.data),
            train_seed=0,
            scores=None,
        )
    path = [record["validation_weight"] for record in learned.records]
    assert path[0] == 1 and path[-1] == pytest.approx(learned.validation_weight) and len(set(path)) > 1
    assert len(learned.weights) == len(learned.hypergradient) == 60 and len(learned.validation_hypergradient) == 24
    assert np.array_equal(learned.corpus_weights(task)[60:], np.full(24, learned.validation_weight))
    assert learned.records[0]["ess"] == pytest.approx(60)  # of the training examples
