"""The array task: its noise and its parts are what they say, and its hypergradient is that of plain autodiff."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.commands.compare.run import make_task_builder
from bilevel_jax.core.training import init_train_state, scan, train
from bilevel_jax.core.types import PADDING
from bilevel_jax.core.unrolled import unrolled_estimator
from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.tasks.arrays import add_label_noise, read_npz_dataset
from tests.runs import blobs


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    blobs.write(folder / "floats.npz", floats=True)
    file = blobs.write(folder / "blobs.npz")
    (folder / "compare.yaml").write_text(blobs.CONFIG.format(path=file))
    return folder / "compare.yaml"


def task(path, *flags, seed=0):
    folder = path.parent / hashlib.sha256(repr(flags).encode()).hexdigest()  # what was drawn is recorded in it
    folder.mkdir(exist_ok=True)
    return make_task_builder(load_config(CompareConfig, path, flags), folder)(seed)


def test_shifted_labels_are_those_of_the_next_class():
    y = np.tile(np.arange(10, dtype=np.int32), 30)
    noisy = add_label_noise(y, "shifted", 0.6, 10, np.random.default_rng(0))
    assert (noisy != y).sum() == 180 and set(((noisy - y) % 10).tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["forced", "redrawn", "none"])
def test_noise_is_exactly_what_it_says(kind):
    y = np.tile(np.arange(10, dtype=np.int32), 300)
    noisy = add_label_noise(y, kind, 0.5, 10, np.random.default_rng(0))
    changed = noisy != y
    if kind == "none":
        assert not changed.any()
        return
    share = {"forced": 0.5, "redrawn": 0.45}[kind]
    if kind == "forced":
        assert changed.sum() == 1500  # exactly half, every one of them wrong
    assert abs(changed.mean() - share) < 0.03  # 3 standard deviations are .02
    counts = np.bincount((noisy - y)[changed] % 10, minlength=10)
    assert counts[0] == 0 and counts[1:].min() > 0.7 * counts[1:].mean()  # all wrong classes alike
    assert noisy.min() >= 0 and noisy.max() <= 9
    assert np.array_equal(noisy, add_label_noise(y, kind, 0.5, 10, np.random.default_rng(0)))


def test_parts_are_disjoint_and_only_training_labels_are_changed(path):
    made = task(path, "--arrays.dev-examples", "20")
    source = read_npz_dataset(str(path.parent / "blobs.npz"))
    truth = {row.tobytes(): y for row, y in zip(source.train.x, source.train.y, strict=True)}
    seen = [row.tobytes() for row in made.corpus.x]
    assert len(set(seen)) == 84 and set(seen) <= set(truth)
    right = np.array([truth[key] == y for key, y in zip(seen, made.corpus.y, strict=True)])
    clean = np.array([example.label == "clean" for example in made.examples])
    assert clean.sum() == 30 and np.array_equal(right[:60], clean) and right[60:].all()
    assert made.corpus.x.dtype == np.uint8
    selected = {np.asarray(row).tobytes() for row in made.held_out_streams["dev"].batch(0)["x"][0]}
    assert len(selected) == 20 and not selected & set(seen)
    assert [len(made.held_out_examples[part]) for part in ("validation", "dev", "test")] == [24, 20, 30]
    tested = {row.tobytes() for row in source.test.x}
    assert all(np.asarray(row).tobytes() in tested for row in made.held_out_streams["test"].batch(0)["x"][0])
    assert [example.id for example in task(path, seed=1).examples] != [example.id for example in made.examples]


def test_streams_are_pure_and_cover_every_row_once(path):
    made = task(path, "--train.global-batch-size", "16", "--train.gradient-accumulation-steps", "2")
    stream = made.training_stream(seed=3)
    index = np.concatenate([np.asarray(stream.batch(step)["index"]).ravel() for step in range(4)])
    assert sorted(index[index != PADDING]) == list(range(60)) and (index == PADDING).sum() == 4
    batch, again = stream.batch(3), stream.batch(3)
    assert batch["x"].shape == (2, 8, 64) and batch["num_examples"].tolist() == [12.0, 12.0]
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    summed = [made.full_pass_stream(0).batch(step) for step in range(4)]
    assert sum(int((b["index"] != PADDING).sum()) for b in summed) == 60 == summed[0]["num_examples"][0]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (
                ("--train.gradient-accumulation-steps", "2"),
                ("--arrays.hidden-sizes", "5"),
                ("--arrays.hidden-sizes", "5", "--arrays.activation", "tanh"),
            )
        ),
    ],
    ids=str,
)
def test_unrolled_equals_autodiff_through_scan(path, x64, flags):
    made = task(path, "--model.param-dtype", "float64", *flags)
    weights = jnp.linspace(0.5, 1.5, made.num_examples)
    start, stream = init_train_state(made.optimizer, made.init_params(0)), made.training_stream(seed=0)
    fixed, held_out = made.frozen(start.params), made.held_out_streams["validation"]
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(stream.batch, range(stream.steps)))

    def value(weights):
        params = scan(made.train_step, start, weights, fixed, batches).params
        shares = [jax.vmap(lambda b: made.problem.outer(params, fixed, b))(held_out.batch(i)).sum() for i in range(2)]
        return sum(shares)

    assert held_out.steps == 2
    expected_value, expected = jax.value_and_grad(value)(weights)
    run = train(made.train_step, start, weights, fixed, stream)
    found = unrolled_estimator(made.problem, made.train_step)(run, weights, fixed, stream, held_out)
    assert found.grad.dtype == jnp.float64 and float(jnp.linalg.norm(expected)) > 0
    np.testing.assert_allclose(found.validation_loss, expected_value, rtol=1e-12)
    np.testing.assert_allclose(found.grad, expected, rtol=1e-9, atol=1e-12)  # sums in another order


def test_floats_are_read_as_they_are(path):
    flags = ("--data.train", str(path.parent / "floats.npz"))
    one, other = task(path), task(path, *flags)
    params = one.init_params(0)

    def losses(made):
        batch = made.held_out_streams["validation"].batch(0)
        return made.objective.losses(params, None, jax.tree.map(lambda leaf: leaf[0], batch))

    a, b = losses(one), losses(other)
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x_train": np.zeros((4, 2))}, "no y_train, x_test, y_test; it holds x_train"),
        ({"y_train": np.zeros(4)}, r"y_train is float64\[4\] beside x_train uint8"),
        ({"y_train": np.zeros(3, int)}, r"y_train is int64\[3\]"),
        ({"x_test": np.zeros((2, 9), np.uint8)}, "64 features in x_train and 9 in x_test"),
        ({"x_train": np.zeros((4, 64), int)}, "x_train is int64; wanted uint8"),
    ],
)
def test_wrong_files_are_told(tmp_path, arrays, message):
    whole = {
        "x_train": np.zeros((4, 64), np.uint8), "y_train": np.zeros(4, int),
        "x_test": np.zeros((2, 64), np.uint8), "y_test": np.zeros(2, int),
    }  # fmt: skip
    np.savez(tmp_path / "a.npz", **(arrays if len(arrays) == 1 and "no y_train" in message else whole | arrays))
    with pytest.raises(ValueError, match=message):
        read_npz_dataset(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--arrays.train-examples", "100"), "124 rows, but blobs.npz has 120"),
        (("--arrays.test-examples", "99"), "arrays.test_examples = 99, but blobs.npz has 40 test rows"),
        (("--data.train", "nowhere.npz"), "nowhere.npz: no such file"),
    ],
)
def test_too_few_rows_are_told(path, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        task(path, *flags)
