"""What every test stands on: eight simulated devices, a compilation cache, strict shapes, the shared data."""

import gc
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Set before jax starts, and in the environment, so that the processes that tests start inherit them.
# Most of the tests' time is compiling: code that is optimised less halves it. XLA's older emitters of fused operations
# (--xla_cpu_use_fusion_emitters=false) would save a sixth more, but round otherwise than what users run.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where there is a GPU, too
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["BILEVEL_JAX_DEBUG"] = "1"  # the command line hides no error that it does not know
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; those of its names have a server of their own
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.s3_server import s3, s3_server  # noqa: E402, F401

jax.config.update("jax_numpy_rank_promotion", "raise")

FAST = (
    "test_layers.py",
    "test_repository.py",
    "core/test_certify.py",
    "core/test_checkpointing.py",
    "core/test_reliability.py",
    "lm/builtin",
    "lm/checkpoint/test_files.py",
    "lm/data",
    "lm/inference/test_prompts.py",
    "lm/inference/test_openai.py",
    "runs/config",
    "runs/infra/test_identity.py",
    "runs/infra/test_inputs.py",
    "runs/infra/test_run_dir.py",
    "runs/engine/test_nonfinite.py",
    "runs/engine/test_outer_loop.py",
    "runs/engine/test_selection.py",
    "runs/engine/test_trajectory_store.py",
    "commands/test_inspect.py",
)
"""Files and folders of tests that compile little: `pytest -m fast`, for the inner loop of work."""

THOROUGH = (
    "benchmarks/accelerator",
    "commands/test_compare_answers.py",
    "commands/test_contradictions.py",
    "commands/test_evaluate_own_models.py",
    "commands/test_export_weights.py",
    "commands/test_hub.py",
    "commands/test_killed.py",
    "commands/test_language_model.py",
    "commands/test_object_storage.py",
    "commands/test_refine_folds.py",
    "commands/test_refine_generator.py",
    "commands/test_refine_ica.py",
    "commands/test_refine_pooled.py",
    "commands/test_starts.py",
    "commands/test_targets.py",
    "runs/engine/test_agreement.py",
    "runs/scoring/test_token_hypergradients.py",
    "runs/tasks/test_targets.py",
)
"""Files and folders of end-to-end runs that take most of the time of all tests: `pytest -m thorough`, which CI runs
after the test command. What they share with other commands and options is tested there, too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is fast and what is thorough; a test that is marked slow is neither."""
    here = Path(__file__).parent
    for item in items:
        name = str(item.path.relative_to(here))
        for mark, entries in (("fast", FAST), ("thorough", THOROUGH)):
            in_entries = any(name == entry or name.startswith(f"{entry}/") for entry in entries)
            if in_entries and not item.get_closest_marker("slow"):
                item.add_marker(mark)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """A file's compiled programs go with it: a process that kept those of all files would grow to 5 GB."""
    yield
    jax.clear_caches()
    gc.collect()


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
