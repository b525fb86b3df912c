"""The arms of a comparison on a small classification task: what they choose on dev, and what they train on."""

import numpy as np
import pytest

from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.engine import retrain
from bilevel_jax.runs.engine.arms import (
    SHARES,
    SIMPLE_ARMS,
    ArmInputs,
    build_simple_arm,
    count_trainings,
    rank_by_validation_model,
    why_absent,
)
from bilevel_jax.runs.engine.retrain import Retrainer, retrain_variants, stopping_steps
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.tasks.arrays import build_array_model, label_array_data, prepare_array_task, read_npz_dataset
from bilevel_jax.runs.tasks.evaluation import held_out_losses, read_labels
from tests.runs import blobs


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """(task with 20 dev examples, the retrainer, what the arms are made from)."""
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "compare.yaml").write_text(blobs.CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    config = load_config(CompareConfig, folder / "compare.yaml", ("--arrays.dev-examples", "20"))
    dataset = read_npz_dataset(config.data.train[0])
    model = build_array_model(dataset, config.arrays, model=config.model, optimizer=config.optimizer, max_steps=6)
    task = prepare_array_task(dataset, model, config.arrays, folder, train=config.train, mesh=config.mesh, data_seed=0)
    labels = read_labels(task, label_array_data(config.data))
    losses = np.random.default_rng(0).normal(size=60) + 2 * ~labels.good  # most wrong rows have a larger loss
    with open_session(folder, progress=False, save_seconds=1e9) as session:
        retrainer = Retrainer(task, Trainer(task, config.outer, session), session, "compare", train_seed=0, data_seed=0)
        yield task, retrainer, ArmInputs(losses, -losses, 30, 0, labels)


def test_stopping_steps_are_dense_at_the_start_and_hold_the_last():
    for steps in (1, 6, 64, 5000):
        stops = stopping_steps(steps)
        assert stops[0] == 1 and stops[-1] == steps and len(stops) <= retrain.NUM_STOPS + 1
        assert stops == sorted(set(stops))


def test_the_share_is_that_of_the_least_dev_loss_and_the_first_retrain_is_not_made_twice(comparison):
    task, retrainer, inputs = comparison
    arm = build_simple_arm("low_loss_dev", task, retrainer, inputs)
    order = np.argsort(inputs.losses, kind="stable")
    dev = {}
    for share in SHARES:
        indices = np.sort(order[: round(60 * share)])
        dev[share] = retrainer.retrain(arm.variant._replace(example_indices=indices), f"by hand {share}", 0)["dev"]
    best = min(dev, key=dev.get)
    assert arm.variant.choice == f"{best:.0%}" and arm.variant.meaning.endswith(f": {best:.0%}")
    assert np.array_equal(arm.variant.example_indices, np.sort(order[: round(60 * best)]))
    before = retrainer.session.work_done
    lines, dev_losses = retrain_variants(task, retrainer, [arm.variant], 2)
    assert retrainer.session.work_done - before == task.num_steps  # the second seed alone
    assert lines[0]["runs"][0]["dev"] == dev[best] and dev_losses["low_loss_dev"].shape == (2, 20)
    assert dev_losses["low_loss_dev"].mean(1) == pytest.approx([run["dev"] for run in lines[0]["runs"]], abs=2e-6)


def test_validation_stopped_early_is_the_best_of_its_steps(comparison):
    task, retrainer, inputs = comparison
    stopped = retrainer.retrain(
        build_simple_arm("validation_early_stop", task, retrainer, inputs).variant, "stopped", 0
    )
    whole = build_simple_arm("validation", task, retrainer, inputs).variant
    dev = []

    def read(step, params):
        dev.append(held_out_losses(task, retrainer.loss_fn, params, task.frozen(params))["dev"])

    start = retrainer.trainer.init_state(task.init_params(retrainer.train_seed))
    stream = task.training_stream(retrainer.data_seed, whole.example_indices)
    retrainer.trainer.run(np.ones(84, np.float32), start, stream, on_params=read)
    stops = stopping_steps(task.num_steps)
    assert stopped["dev"] == pytest.approx(min(dev[step - 1] for step in stops), rel=1e-6)
    assert stopped["step"] == 1 + int(np.argmin(dev))  # 6 steps: each is a stop


def test_a_model_of_validation_alone_ranks_the_examples(comparison):
    task, retrainer, inputs = comparison
    losses = rank_by_validation_model(task, retrainer)
    assert losses.shape == (60,) and inputs.labels.auc(-losses) > 0.95  # 24 right examples teach three classes
    arm = build_simple_arm("validation_model", task, retrainer, inputs)
    assert np.array_equal(arm.scores, -losses) and set(arm.variant.example_indices) <= set(range(60))


def test_without_dev_arms_say_what_they_lack_and_the_count_of_trainings_is_right(comparison):
    task, _, inputs = comparison
    without = task._replace(held_out_streams={k: v for k, v in task.held_out_streams.items() if k != "dev"})
    for name, what in (("low_loss_dev", "its share"), ("validation_early_stop", "its stopping step")):
        assert f"{name} chooses {what} on dev" in why_absent(name, without, inputs.labels)
        assert not why_absent(name, task, inputs.labels)
    assert not why_absent("validation_model", without, inputs.labels)
    assert "none is labelled so" in why_absent("oracle", task, None)
    # one a seed; four more shares for each of two arms, and the model of validation
    assert count_trainings(list(SIMPLE_ARMS), task, inputs.labels, 3) == 12 * 3 + 2 * 4 + 1
    assert count_trainings(list(SIMPLE_ARMS), without, None, 3) == 8 * 3 + 1


def test_the_test_part_chooses_nothing(comparison):
    """Another test part: the same examples, the same stopping step, the same dev losses."""
    task, retrainer, inputs = comparison
    held_out = task.held_out_streams | {"test": task.held_out_streams["validation"]}
    other = task._replace(
        held_out_streams=held_out,
        held_out_examples=task.held_out_examples | {"test": task.held_out_examples["validation"]},
    )
    again = Retrainer(other, retrainer.trainer, retrainer.session, "again", train_seed=0, data_seed=0)
    for name in ("low_loss_dev", "validation_early_stop", "validation_model"):
        one, two = (build_simple_arm(name, *given, inputs).variant for given in ((task, retrainer), (other, again)))
        assert np.array_equal(one.example_indices, two.example_indices) and one.choice == two.choice
        a, b = retrainer.retrain(one, one.key, 0), again.retrain(two, two.key, 0)
        assert a["dev_losses"] == b["dev_losses"] and a["step"] == b["step"] and a["test"] != b["test"]
