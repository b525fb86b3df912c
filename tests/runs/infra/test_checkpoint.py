import errno
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.checkpoint import (
    list_checkpoint_steps,
    make_snapshot_store,
    prune_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)


def state(seed=0):
    """One leaf of every kind that a run keeps."""
    rng = np.random.default_rng(seed)
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    }
    return {
        "params": params,
        "opt": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "mask": jnp.array([True, False]),
        "count": jnp.arange(4, dtype=jnp.uint8),
        "special": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "table": rng.normal(size=7),  # numpy, float64
        "narrow": np.ones(2, ml_dtypes.bfloat16),
        "empty": jnp.zeros((0, 4)),
        "step": 3,
        "rate": 0.1,
        "done": True,
        "nothing": None,
    }


def bits(leaf):
    leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and checkpoint._is_prng_key(leaf) else leaf
    return type(leaf), np.asarray(leaf).dtype, np.asarray(leaf).shape, np.asarray(leaf).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y)


def some_file(path):
    return max((file for file in (path / "arrays").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_every_leaf_returns_bit_for_bit(tmp_path):
    tree = state()
    save_checkpoint(tmp_path, 7, tree, {"outer": 2, "note": "é"})
    found = restore_checkpoint(tmp_path, jax.tree.map(lambda leaf: leaf, state(seed=1)))
    assert found is not None
    assert_same(found.tree, tree)
    assert jax.random.key_impl(found.tree["keys"]) == "rbg"
    assert found.meta == {"outer": 2, "note": "é"} and found.step == 7


def test_shapes_alone_are_enough(tmp_path):
    tree = {"key": jax.random.key(0), "w": jnp.ones((2, 3), jnp.bfloat16)}
    save_checkpoint(tmp_path, 0, tree, {})
    assert_same(restore_checkpoint(tmp_path, jax.eval_shape(lambda: tree)).tree, tree)


def test_a_tree_without_arrays(tmp_path):
    save_checkpoint(tmp_path, 0, {"n": 1}, {})
    assert restore_checkpoint(tmp_path, {"n": 0}).tree == {"n": 1}


def test_no_checkpoint_is_none(tmp_path):
    assert restore_checkpoint(tmp_path / "nowhere", {}) is None and list_checkpoint_steps(tmp_path) == []


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, step, {"w": jnp.full(3, step)}, {})
    assert list_checkpoint_steps(tmp_path) == [3, 10]
    assert restore_checkpoint(tmp_path, {"w": jnp.zeros(3, int)}).step == 10
    assert restore_checkpoint(tmp_path, {"w": jnp.zeros(3, int)}, step=3).tree["w"][0] == 3


def test_a_step_can_be_written_again(tmp_path):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, {"w": jnp.full(3, value)}, {"value": value})
    found = restore_checkpoint(tmp_path, {"w": jnp.zeros(3)})
    assert found.meta == {"value": 2.0} and found.tree["w"][0] == 2.0
    assert os.listdir(tmp_path) == ["step_0000000005"]


def truncate(path):
    os.truncate(some_file(path), 10)


DAMAGE = {
    "flipped byte": (lambda path: flip(some_file(path)), "is damaged: its SHA-256 is "),
    "flipped byte in the manifest": (lambda path: flip(path / "manifest.json"), "manifest.json is damaged"),
    "truncated": (truncate, r"has 10 bytes, \d+ were written"),
    "file gone": (lambda path: some_file(path).unlink(), "is missing"),
    "no manifest": (
        lambda path: (path / "manifest.json").unlink(),
        "manifest.json is missing, so it was never finished",
    ),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json is damaged"),
    "empty folder": (lambda path: (shutil.rmtree(path), path.mkdir()), "manifest.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_step_is_refused_and_the_one_before_is_used(tmp_path, name):
    damage, said = DAMAGE[name]
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"w": jnp.full(300, float(step))}, {})
    damage(tmp_path / "step_0000000002")
    with pytest.warns(UserWarning, match=f"step_0000000002 is refused: .*{said}"):
        found = restore_checkpoint(tmp_path, {"w": jnp.zeros(300)})
    assert found.step == 1 and found.tree["w"][0] == 1.0


def test_every_flipped_byte_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": jnp.arange(5.0), "n": 3}, {"a": 1})
    for file in (file for file in path.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 7)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            assert checkpoint._verify(path)[0] is None, (file, place)
        file.write_bytes(whole)
    assert checkpoint._verify(path)[0] is not None


def test_unfinished_steps_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": jnp.zeros(2)}, {}, max_to_keep=None)
    (tmp_path / "step_0000000002" / "manifest.json").unlink()
    prune_checkpoints(tmp_path, 2)
    assert list_checkpoint_steps(tmp_path) == [1, 2, 3]  # two whole ones; the damaged one is older than the newest
    prune_checkpoints(tmp_path, 1)
    assert list_checkpoint_steps(tmp_path) == [3]


@pytest.mark.parametrize(
    "like, said",
    [
        ({"w": np.zeros(3), "n": 1}, r"\['w'\] float32\[4\] there, \['w'\] float64\[3\] wanted"),
        ({"w": np.zeros(4, np.float32), "n": 1.0}, r"\['n'\] int there, \['n'\] float wanted"),
        ({"w": np.zeros(4, np.float32)}, "2 leaves there, 1 wanted"),
        ({"v": np.zeros(4, np.float32), "n": 1}, r"\['w'\] float32\[4\] there, \['v'\] float32\[4\] wanted"),
    ],
)
def test_another_structure_is_an_error_and_not_a_reason_to_go_back(tmp_path, like, said):
    save_checkpoint(tmp_path, 1, {"w": jnp.zeros(4), "n": 1}, {})
    with pytest.raises(ValueError, match=f"is of another structure: .*{said}"):
        restore_checkpoint(tmp_path, like)


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"\['f'\] is a str; a checkpoint holds arrays and numbers"):
        save_checkpoint(tmp_path, 1, {"f": "x"}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 1, {"n": 1}, {"f": object()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["arrays", "manifest"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path, 1, {"w": jnp.ones(3)}, {})

    def refuse(*arguments):
        if moment == "arrays":  # the words of orbax's storage
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 272223 bytes to file 4: No space left on device")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = (checkpoint.ocp.StandardCheckpointer, "save") if moment == "arrays" else (checkpoint, "_write_manifest")
    monkeypatch.setattr(*where, refuse)
    with pytest.raises(OSError, match="the disk is full: .*step_0000000002 was not written") as caught:
        save_checkpoint(tmp_path, 2, {"w": jnp.zeros(3)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step_0000000001"]
    assert restore_checkpoint(tmp_path, {"w": jnp.zeros(3)}).tree["w"][0] == 1.0


def test_a_kill_while_saving_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": jnp.ones(3)}, {})
    part = tmp_path / ".step_0000000002.part"
    (part / "arrays").mkdir(parents=True)
    (part / "arrays" / "junk").write_text("x")
    assert restore_checkpoint(tmp_path, {"w": jnp.zeros(3)}).step == 1
    save_checkpoint(tmp_path, 2, {"w": jnp.ones(3)}, {})
    assert restore_checkpoint(tmp_path, {"w": jnp.zeros(3)}).step == 2 and not part.exists()


def test_arrays_move_between_meshes(tmp_path, eight_devices):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=eight_devices)
    spread = jax.NamedSharding(mesh, jax.P("data", "model"))
    tree = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), spread)}
    save_checkpoint(tmp_path, 1, tree, {})
    one = restore_checkpoint(tmp_path, {"w": jnp.zeros((8, 8))}).tree["w"]
    other = restore_checkpoint(tmp_path, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=spread)}).tree["w"]
    assert len(one.devices()) == 1 and other.sharding == spread
    assert np.array_equal(one, tree["w"]) and np.array_equal(other, tree["w"])


def test_snapshots(tmp_path):
    store = make_snapshot_store(tmp_path / "trajectory")
    for step in (0, 4, 8):
        store.put(step, state(step))
    for step in (8, 0):
        assert_same(store.get(step, state()), state(step))
    flip(some_file(tmp_path / "trajectory" / "step_0000000004"))
    with pytest.raises(ValueError, match="snapshot .*step_0000000004 is refused: .* is damaged: .* train again"):
        store.get(4, state())
    with pytest.raises(ValueError, match="snapshot .*step_0000000005 is refused: it is not there"):
        store.get(5, state())
