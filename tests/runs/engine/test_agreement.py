"""One device = eight = eight of which two share a model = jax.pmap = two processes."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.runs.engine.agreement import implicit_numbers, numbers


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        return numbers(1)


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def two_processes(tmp_path, *arguments: str, devices: int = 8) -> dict[str, np.ndarray]:
    """Each with half of the devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices // 2}")
    command = [sys.executable, "-m", "tests.runs.engine.agreement", f"127.0.0.1:{free_port()}"]
    running = [
        subprocess.Popen(
            [*command, str(number), str(tmp_path / "found.npz"), *arguments],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        for number in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()  # where one failed, the other would wait for it
    with np.load(tmp_path / "found.npz") as found:
        return dict(found)


WAYS = {
    "8 x 1": lambda tmp_path: numbers(8),
    "4 x 2": lambda tmp_path: numbers(4, 2),
    "pmap": lambda tmp_path: numbers(1, pmap=True),
    "4 x 2, linearised": lambda tmp_path: numbers(4, 2, linear=True),
    "pmap, linearised": lambda tmp_path: numbers(1, pmap=True, linear=True),
    "2 processes": two_processes,
}


SLOW = [  # test_select has eight devices, too
    pytest.param(way, marks=pytest.mark.slow)
    for way in ("8 x 1", "4 x 2", "pmap", "4 x 2, linearised", "pmap, linearised")
]


@pytest.mark.parametrize("way", ["2 processes", *SLOW])
def test_equals_one_device(way, one_device, tmp_path, eight_devices, x64):
    found = WAYS[way](tmp_path)
    np.testing.assert_array_equal(found["batches"], one_device["batches"])
    for name in ("gradient", "entries", "solution"):
        assert found[name].dtype == np.float64
        far = np.linalg.norm(found[name] - one_device[name]) / np.linalg.norm(one_device[name])
        assert far < 1e-9, name  # float64, other order of sums


@pytest.mark.slow
def test_implicit_with_parameters_split_over_two_processes(tmp_path, x64):
    """Each array of the parameters lies in four parts, two with each process; the solves are made three times."""
    found, wanted = two_processes(tmp_path, "4", devices=4), implicit_numbers(1, 1)
    for name, values in wanted.items():
        far = np.linalg.norm(found[name] - values) / np.linalg.norm(values)
        assert far < 1e-9, name  # float64, other order of sums
