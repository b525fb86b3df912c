"""Where the states of a training are kept for its sweep."""

import errno
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import checkpointing
from bilevel_jax.core.types import CheckpointPlan, TrainState
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine import trajectory_store
from bilevel_jax.runs.infra import checkpoint

SIZE = 1000


def state(step: int) -> TrainState:
    return TrainState({"w": jnp.arange(SIZE) + 0.5 * step}, (jnp.full(SIZE, step, jnp.float32),), jnp.int32(step))


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_store_gives_back_what_it_got(tmp_path, where):
    store = trajectory_store.make_state_store(OuterSection(offload=where), tmp_path / "states", state(0))
    for step in (0, 3, 7, 12):
        store[step] = state(step)
    del store[7]
    assert sorted(store) == [0, 3, 12] and len(store) == 3 and 7 not in store
    for step in (12, 3, 0, 3):
        jax.tree.map(np.testing.assert_array_equal, store[step], state(step))
        assert store[step].params["w"].sharding == state(step).params["w"].sharding
    with pytest.raises(KeyError):
        store[7]
    if where == "disk":
        store.wait_until_written()
        again = trajectory_store.make_state_store(
            OuterSection(offload=where), tmp_path / "states", state(0), resume=True
        )
        assert sorted(again) == [0, 3, 12]
        jax.tree.map(np.testing.assert_array_equal, again[12], state(12))
        assert not trajectory_store.make_state_store(
            OuterSection(offload=where), tmp_path / "states", state(0)
        )  # a new run begins with nothing
        again.clear()
        assert not (tmp_path / "states").exists()


def test_a_damaged_state_is_an_error_and_a_full_disk_is_told(tmp_path, monkeypatch):
    store = trajectory_store.DiskStore(tmp_path / "states", state(0))
    store[0] = state(0)
    store.wait_until_written()
    largest = max((p for p in (tmp_path / "states").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(ValueError, match="refused.*bytes, .* were written"):
        store[0]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    store[1] = state(1)
    with pytest.raises(OSError, match="disk"):
        store.wait_until_written()


class Accelerator:
    """A device that is not here, as far as it is asked."""

    platform, device_kind = "gpu", "NVIDIA H200"

    def __init__(self, stats=None, kinds=("device",)):
        self.stats, self.kinds = stats, kinds

    def memory_stats(self):
        return self.stats

    def addressable_memories(self):
        return [SimpleNamespace(kind=kind) for kind in self.kinds]


def test_an_accelerator_has_its_own_memory_and_not_the_hosts(monkeypatch):
    shapes = jax.eval_shape(lambda: state(0))
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator({"bytes_limit": 4000 + 2 * 48_100})])
    assert trajectory_store.device_memory_bytes() == 4000 + 2 * 48_100
    assert trajectory_store.plan_checkpoints(OuterSection(), 50, shapes, None) == CheckpointPlan(3, 2)
    for stats in (None, {}, {"bytes_limit": 0}):
        monkeypatch.setattr(jax, "local_devices", lambda stats=stats: [Accelerator(stats)])
        assert trajectory_store.device_memory_bytes() == 0
        with pytest.raises(ValueError, match="NVIDIA H200 does not tell its memory.*set outer.memory_gib"):
            trajectory_store.plan_checkpoints(OuterSection(), 50, shapes, None)
        given = OuterSection(memory_gib=200_000 / trajectory_store.GIB)
        assert trajectory_store.plan_checkpoints(given, 50, shapes, None) == CheckpointPlan(3, 14)


def test_offload_to_a_host_without_pinned_memory_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator(kinds=("device", "unpinned_host"))])
    with pytest.raises(ValueError, match="outer.offload = host: .*only device, unpinned_host.*to disk or device"):
        trajectory_store.make_state_store(OuterSection(offload="host"), tmp_path, state(0))


def test_what_is_planned_fits_the_budget():
    shapes = jax.eval_shape(lambda: state(0))  # a snapshot takes 8,004 bytes and a step on the tape 12,004
    gib = lambda amount: amount / trajectory_store.GIB  # noqa: E731
    assert trajectory_store.plan_checkpoints(OuterSection(), 50, shapes, None) == checkpointing.store_all_plan(50)
    assert trajectory_store.plan_checkpoints(
        OuterSection(), 50, shapes, None, device_bytes=4000 + 2 * 48_100
    ) == CheckpointPlan(3, 2)
    assert trajectory_store.plan_checkpoints(OuterSection(memory_gib=gib(200_000)), 50, shapes, None) == CheckpointPlan(
        3, 14
    )
    assert trajectory_store.plan_checkpoints(
        OuterSection(memory_gib=gib(200_000), offload="disk"), 50, shapes, None
    ) == CheckpointPlan(3, 16)
    assert trajectory_store.plan_checkpoints(
        OuterSection(memory_gib=gib(200_000), method="window"), 50, shapes, None
    ) == CheckpointPlan(1, 15)
    linear = OuterSection(memory_gib=gib(200_000), linearize=True)
    assert trajectory_store.plan_checkpoints(
        linear, 50, shapes, None, linearization_size=lambda: 8000
    ) == CheckpointPlan(7, 7, linearize=True)
    assert (
        trajectory_store.plan_checkpoints(OuterSection(method="alignment"), 50, shapes, None)
        == checkpointing.NO_CHECKPOINTS
    )
    with pytest.raises(ValueError, match="outer.memory_gib.*at least one state.*mesh.fsdp"):
        trajectory_store.plan_checkpoints(OuterSection(memory_gib=gib(20_000)), 50, shapes, None)
    with pytest.raises(ValueError, match="outer.memory_gib.*set outer.linearize to false"):
        trajectory_store.plan_checkpoints(
            OuterSection(memory_gib=gib(20_000), linearize=True), 50, shapes, None, linearization_size=lambda: 8000
        )
