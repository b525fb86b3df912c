"""The command for an accelerator: its budget, its folder, a kill, and in small all that it measures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.core.types import Adjoint
from tests.benchmarks import peers
from tests.benchmarks.accelerator import __main__ as command
from tests.benchmarks.accelerator import machine, measure, problem, table
from tests.benchmarks.accelerator.cells import ROWS, Cell, Costs, count_work, list_cells
from tests.benchmarks.accelerator.problem import SIZES
from tests.benchmarks.accelerator.worker import answer
from tests.conftest import ROOT
from tests.core.test_precision import products

MACHINE = {
    "platform": "gpu", "kind": "NVIDIA H200", "devices": 1, "bytes_limit": 2**37, "memory_kinds": ["device"],
    "tells_peak": True, "jax": "0", "jaxlib": "0", "measured_tflops": {"highest": 40.0, "default": 300.0}, "side": 8192,
    "maker_tflops": {"highest": 67.0, "default": None}, "transfers": {"to the host": 50.0},
}  # fmt: skip
REPLAY = {
    "flags": "", "trainings_equal": True, "replayed": False, "hypergradients_equal": False, "difference": 1e-7,
    "seconds": {"hypergradient": 2.0},
}  # fmt: skip


class FakeWorker:
    """Answers as it is told, by the name of the cell; keeps what it was asked."""

    answers: dict = {}
    asked: list = []
    alive = made = 0

    def __init__(self, flags, platforms, log):
        FakeWorker.made += 1
        self.number = FakeWorker.made
        self.flags, self.platforms, self.is_alive = flags, platforms, True
        FakeWorker.alive += 1

    def measure(self, cell, seconds):
        FakeWorker.asked.append((cell.name, self.flags, self.number))
        given = {"status": "measured", "why": "", "values": MACHINE if cell.row == "machine" else {}}
        return FakeWorker.answers.get(cell.name, given)

    def stop(self):
        FakeWorker.alive -= self.is_alive
        self.is_alive = False


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(command, "Worker", FakeWorker)
    FakeWorker.answers, FakeWorker.asked, FakeWorker.alive = {}, [], 0
    return FakeWorker


def measured(values):
    return {"status": "measured", "why": "", "values": values}


@pytest.mark.parametrize(
    "kind, bfloat16",
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", None), ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121), ("TPU v5 lite", 197), ("TPU v5", 459), ("cpu", None),
    ],
)  # fmt: skip
def test_known_peaks_are_of_the_device_named(kind, bfloat16):
    peak = machine.known_peak(kind)
    assert (peak and peak.bfloat16) == bfloat16


def test_peaks_of_float32_by_precision():
    rate = machine.maker_tflops
    assert [rate("NVIDIA H200", "gpu", one) for one in machine.PRECISIONS] == [67, 494, 494]
    assert [rate("TPU v4", "tpu", one) for one in machine.PRECISIONS] == [275 / 6, 275 / 3, 275]
    assert rate("Tesla T4", "gpu", "default") == 8.1  # it has no TF32
    assert rate("cpu", "cpu", "highest") is None
    assert table.share_of_peaks(MACHINE, 20.0, "highest") == "30% of 67 (maker), 50% of 40 (measured)"
    assert "not known" in table.share_of_peaks(MACHINE, 20.0, "default")


def test_sizes_are_what_their_names_say():
    for name, size in SIZES.items():
        number = float(name[:-1]) * {"k": 1e3, "M": 1e6}[name[-1]]
        params = jax.eval_shape(problem.random_params, size.config, jax.random.key(0))
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert count == pytest.approx(number, rel=0.35), name
        norms = (2 * size.config.layers + 1) * size.config.width
        assert count == size.matrix_params + size.config.vocab_size * size.config.width + norms


def test_every_cell_is_of_a_row_and_has_a_cost():
    for platform, small in (("gpu", False), ("tpu", False), ("cpu", True)):
        cells = list_cells(platform, small)
        assert {cell.row for cell in cells} == set(ROWS) - {"machine"}
        assert len({cell.name for cell in cells}) == len(cells)
        assert all(count_work(cell).flops > 0 for cell in cells if cell.size)


def test_costs_are_learned():
    costs = Costs(1e12, 10.0, 5.0)
    small, large = Cell("sweep", "10M"), Cell("sweep", "100M")
    before = costs.predict(large)
    costs.learn(small, 55.0, 10.0, 5e13)  # 5 Tflop/s, and 40 s for five programs beside the start
    assert (costs.rates, costs.program_seconds) == ({"10M": 5e12}, 8.0)
    assert costs.predict(small) == pytest.approx(5 + 5 * 8 + count_work(small).flops / 5e12 + 20)
    assert costs.predict(large) == pytest.approx(5 + 5 * 8 + count_work(large).flops / 5e12 + 20)
    assert costs.predict(large) < before
    slow = Costs(1e12, 10.0, 5.0)
    slow.learn(small, 55.0, 10.0, 5e12)  # a small model says little of a large one: as before
    assert slow.predict(small) > 5 + 5 * 8 and slow.predict(large) == pytest.approx(before - 5 * 2)


def test_cells_that_do_not_fit_are_listed_and_the_rest_goes_on(fake, tmp_path):
    fake.answers = {
        "sweep 100M all": {"status": "out of memory", "why": "RESOURCE_EXHAUSTED: so much"},
        "sweep 1000M LoRA": {"status": "not run", "why": "memory (predicted 200.0 GiB, the device has 126.0)"},
        "replay 10M all": measured(REPLAY),
        "replay 10M all deterministic": measured(REPLAY | {"flags": "--xla_flag"}),
    }
    run = command.Run(tmp_path, 2.75, False, ["sweep", "replay"])
    fake.answers["sweep 10M all"] = {"status": "failed", "why": "an error | with a bar"}
    fake.answers["sweep 10M LoRA"] = {"status": "failed", "why": ""}
    fake.answers["sweep 100M LoRA"] = {"status": "failed", "why": ""}
    run.measure_all()
    run.stop_worker()
    lines = {line["name"]: line for line in run.lines}
    assert lines["sweep 1000M all"]["why"].startswith("time (predicted ")  # at a quarter of 40 Tflop/s
    asked = [name for name, _, _ in fake.asked]
    assert "sweep 1000M all" not in asked and asked[-1] == "sweep 10M LoRA" and "memory 100M all fewer" not in asked
    flags = {name: given for name, given, _ in fake.asked}
    assert flags["replay 10M all deterministic"] and not flags["replay 10M all"]
    assert len({process for _, _, process in fake.asked}) == len(asked)  # one for each on an accelerator
    assert fake.alive == 0
    text = (tmp_path / command.TABLE_FILE).read_text()
    assert "| sweep 100M all | out of memory: RESOURCE_EXHAUSTED: so much |" in text
    assert "| 10M | all | --xla_flag | yes | no | no | 1e-07 | 2 |" in text
    assert "an error / with a bar" in text and "copies to the host" in text

    fake.asked, fake.answers["sweep 100M all"] = [], {"status": "failed", "why": "again"}
    again = command.Run(tmp_path, 3.0, False, ["sweep", "replay"])  # goes on: what was measured stays
    again.measure_all()
    assert not [name for name, _, _ in fake.asked if name.startswith("replay")]
    assert "| sweep 100M all | failed: again |" in (tmp_path / command.TABLE_FILE).read_text()

    fake.answers["machine"] = measured(MACHINE | {"kind": "NVIDIA L4"})
    with pytest.raises(SystemExit, match="holds results of NVIDIA H200, and this is NVIDIA L4.*another --out"):
        command.Run(tmp_path, 3.0, False, []).measure_all()


def test_bergson_runs_beside_ours_where_it_is_installed(monkeypatch):
    def compete(chosen, problem, measured, rounds, threads, clock):
        assert [one.function for one in chosen] == ["plain", "alone", "bergson", "swept"]
        results = {one.name: peers.Result([2.0], 1.0, 1e-6 if one.plain != one.name else None) for one in chosen}
        return results | {chosen[0].name: peers.Result([], reason="not installed: torch")}

    monkeypatch.setattr(peers, "compete", compete)
    monkeypatch.setattr(peers, "exact_hypergradient", lambda problem, threads: np.zeros(2))
    monkeypatch.setitem(peers.PROBLEMS, "transformer", lambda folder: None)
    monkeypatch.setitem(sys.modules, "bergson", None)
    assert "bergson is not installed" in answer(Cell("bergson"))["why"]
    monkeypatch.setitem(sys.modules, "bergson", peers)
    line = {"row": "bergson", "name": "bergson", "size": "", "lora": False, **answer(Cell("bergson"))}
    text = table.format_tables([line])
    assert "| bilevel_jax, √T snapshots | 2 | 1.0e-06 |" in text and "| not installed: torch |" in text


def test_what_a_cell_raises_is_its_line(monkeypatch):
    def fail(error):
        def raise_it(cell):
            raise error

        monkeypatch.setitem(measure.MEASURES, "sweep", raise_it)
        found = answer(Cell("sweep", "25k"))
        return found["status"], found["why"]

    assert fail(measure.NotRun("memory (predicted so much)")) == ("not run", "memory (predicted so much)")
    exhausted = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2 bytes.")
    assert fail(exhausted)[0] == "out of memory"
    assert fail(MemoryError())[0] == "out of memory"
    assert fail(ValueError("wrong")) == ("failed", "ValueError: wrong")


@pytest.mark.parametrize("training, product", [("highest", "high"), ("high", "high"), ("default", "default")])
def test_precisions_are_those_of_training_and_of_products(training, product):
    losses = problem.train_at(training, lambda params, frozen, batch: (batch["data"] @ params) ** 2)
    step = bj.train_step(bj.weighted(losses), optax.sgd(0.1), product_precision=product)
    batch = bj.full_batch_stream(jnp.ones((3, 2))).batch(0)
    state = bj.init_train_state(optax.sgd(0.1), jnp.ones(2))
    weights = step.gather(jnp.ones(3), batch)
    adjoint = Adjoint(state.params, [])
    assert set(products(step.forward, state, weights, (), batch)) == {training.upper()}
    assert set(products(step.backward, state, state.params, weights, (), batch, adjoint)) == {product.upper()}


def start(folder: Path, *flags: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "tests.benchmarks.accelerator", "--small", "--out", str(folder), *flags]
    return subprocess.Popen(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


def results(folder: Path) -> dict:
    lines = (folder / command.RESULTS_FILE).read_text().splitlines() if (folder / command.RESULTS_FILE).exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def test_a_killed_run_keeps_its_rows_and_goes_on(tmp_path):
    process = start(tmp_path, "--only", "replay")
    while "machine" not in results(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "### Machine" in (tmp_path / command.TABLE_FILE).read_text()
    again = command.Run(tmp_path, 10.0, True, ["replay"])  # in a process of its own as above, but for the parent
    again.measure_all()
    again.stop_worker()
    values = results(tmp_path)["replay 25k all"]["values"]
    assert values["replayed"] and values["trainings_equal"] and values["difference"] == 0  # a CPU repeats its bits


@pytest.mark.slow  # compiles the steps of several problems
def test_all_rows_in_small(tmp_path):
    assert start(tmp_path, "--minutes", "60").wait(3600) == 0
    found = results(tmp_path)
    for cell in list_cells("cpu", small=True):
        line = found[cell.name]
        if cell.row == "bergson" and line["status"] == "not run":
            assert "bergson is not installed" in line["why"]
            continue
        assert line["status"] == "measured", line
    for name in ("sweep 25k all", "sweep 25k LoRA", "sweep 100k all"):
        values = found[name]["values"]
        assert values["finite"] and values["replayed"] and min(values["seconds"].values()) > 0
        for step in ("training", "step back"):  # the rest is attention, and what is computed again
            assert 1 <= values["flops"][f"{step}, counted"] / values["flops"][step] < 1.2
    precision = found["precision 25k all float64"]["values"]
    assert max(precision["error"].values()) == 0  # a CPU has one precision
    assert max(precision["error_to_float64"].values()) < 5e-3  # measured: 9e-4, by Adam with eps_root 1e-12
    assert found["linearise 25k all"]["values"]["error"] < 1e-4
    offload = found["offload 25k all"]["values"]
    assert offload["equal"] and offload["replayed"]
    on_gpu = [
        line | {"values": line["values"] | {"memory_of": "device", "measured_bytes": 2.0**30}}
        for line in found.values()
    ]
    on_gpu.append(found["machine"] | {"values": MACHINE})
    for text in ((tmp_path / command.TABLE_FILE).read_text(), table.format_tables(on_gpu)):
        assert all(f"### {title}" in text for title in ("Machine", "Speed", "Memory", "Precision", "Repeated bits"))
