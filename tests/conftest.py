"""What every test stands on: eight simulated devices, a compilation cache, strict shapes, the shared data."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Set before jax starts, and in the environment, so that the processes that tests start inherit them.
# Most of the tests' time is compiling: code that is optimised less halves it.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def eight_devices() -> list[jax.Device]:
    """Eight simulated CPU devices."""
    devices = jax.devices("cpu")
    assert len(devices) == 8, f"{len(devices)} CPU devices: jax started before tests/conftest.py could ask for 8"
    return devices


@pytest.fixture
def x64():
    """float64 for the mathematics: pytestmark = pytest.mark.usefixtures('x64')."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and small real models that lies beside the repository; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("needs the real data and models of ../shared, which is not there")
    return folder
