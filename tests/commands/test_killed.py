"""Killed at any moment, a run goes on where it was: the end is the same, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT

KILLS = 12
"""For each kind of run: with four of them the runs are killed 48 times."""
FLAGS = {
    "select": ("--outer.steps", "3", "--outer.method", "unrolled"),
    "states on disk": ("--outer.steps", "3", "--outer.offload", "disk", "--outer.memory-gib", "1e-3"),
    "implicit": ("--outer.steps", "2", "--outer.method", "implicit", "--outer.proximal", "0.5"),
    "train": ("--train.num-epochs", "20"),
}
SAVE = ("--output.save-minutes", "0.002")
"""After every few steps."""


def start(command, made, out, *flags):
    config = made / ("train.yaml" if command == "train" else "select.yaml")
    arguments = [sys.executable, "-m", "bilevel_jax.cli", "train" if command == "train" else "select", str(config)]
    arguments += [*FLAGS[command], *SAVE, "--out", str(out), *flags]
    return subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", FLAGS)
def test_killed_at_random_moments_ends_with_the_same_bits(made, tmp_path, command):
    """SIGKILL and SIGTERM in turn, at moments drawn over the whole run: imports, training, sweep, solve, export."""
    draw = random.Random(command)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert start(command, made, whole).communicate()[0] is not None
    seconds = time.monotonic() - began
    assert (whole / "report.html").exists()
    died, resumed = 0, 0
    while died < KILLS:
        flags = ("--resume",) if (out / "config.yaml").exists() else ()
        resumed += bool(flags)
        run = start(command, made, out, *flags)
        try:
            run.wait(draw.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL if died % 2 else signal.SIGTERM)
        told = run.communicate()[0]
        died += run.returncode != 0
        assert run.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), told
        if run.returncode == 0:  # finished: what is compared, and then from the beginning
            same(whole, out)
            shutil.rmtree(out)
    flags = ("--resume",) if (out / "config.yaml").exists() else ()
    run = start(command, made, out, *flags)
    assert run.communicate()[0] is not None and run.returncode == 0
    same(whole, out)
    assert resumed >= KILLS // 3  # or hardly any was killed at work


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_or_all_of_it(made, tmp_path):
    """What is there is whole; where it is not there, exporting again writes it."""
    draw, run, out = random.Random(0), tmp_path / "run", tmp_path / "rows"
    assert start("dev", made, run).communicate()[0] is not None
    arguments = [sys.executable, "-m", "bilevel_jax.cli", "export", str(run), "--export.format", "axolotl"]
    arguments += ["--out", str(out)]
    began = time.monotonic()
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - began
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    for _ in range(KILLS):
        export = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            export.wait(draw.uniform(0.7, 1.05) * seconds)
        except subprocess.TimeoutExpired:
            export.kill()
        export.wait()
        if out.exists():
            assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
            shutil.rmtree(out)


def same(one, other):
    """The tables and the models, to the bit."""
    assert pq.read_table(one / "weights.parquet").equals(pq.read_table(other / "weights.parquet"))
    model = "model/model.safetensors"
    assert (one / model).read_bytes() == (other / model).read_bytes()
