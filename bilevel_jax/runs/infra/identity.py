"""Records of a run's environment and tokens, compared when it is resumed.

`environment.json` and `tokens.json` hold what a run's numbers come from besides its config and files. A run that is
resumed must have the same, as far as they change numbers: one half of a run by one version and one half by another is
the run of no version. What cannot change a number, or by rounding alone, is said in a line.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax.runs.config.load import COMMANDS, PROCESS_OWN_KEYS, describe_rounding_changes
from bilevel_jax.runs.config.rules import flatten_config
from bilevel_jax.runs.infra import distributed, inputs, run_dir, seals

ENVIRONMENT_FILE = seals.ENVIRONMENT_FILE
TOKENS_FILE = seals.TOKENS_FILE

NUMBER_PACKAGES = (
    "bilevel-jax", "jax", "jaxlib", "flax", "optax", "numpy", "ml-dtypes", "libtpu",
    *(
        f"jax-{kind}-{part}" for kind in ("cuda12", "cuda13", "rocm60", "rocm7", "rocm10")
        for part in ("plugin", "pjrt")
    ),
    *(
        f"nvidia-{library}{suffix}" for suffix in ("-cu12", "")
        for library in ("cublas", "cuda-nvcc", "cuda-nvrtc", "cufft", "cusolver", "cusparse", "nvjitlink")
    ),
    *(f"nvidia-{library}-cu{version}" for version in (12, 13) for library in ("cudnn", "nccl")),
    "nvidia-nvvm",
)  # fmt: skip
"""Packages whose code computes: another version sums in another order, draws other numbers or has another formula."""
TOKEN_PACKAGES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken")
"""Packages that turn text into tokens. Where all tokens of a run are compared themselves, another version is said;
where a run makes more of them as it goes (answers, demonstrations, streamed rows) it is refused."""
OTHER_PACKAGES = ("orbax-checkpoint", "tensorstore", "safetensors", "datasets", "pyarrow", "scipy", "chex", "jaxtyping")
"""Packages whose version changes no number of a run: they move bytes that are verified by hashes, read rows whose
tokens are compared, check shapes, or make the statistics of a report from numbers that are stored."""

JAX_SETTINGS = (
    "jax_enable_x64", "jax_explicit_x64_dtypes", "jax_numpy_dtype_promotion", "jax_default_matmul_precision",
    "jax_allow_f16_reductions", "jax_default_prng_impl", "jax_enable_custom_prng", "jax_threefry_partitionable",
    "jax_threefry_gpu_kernel_lowering", "jax_random_seed_offset", "jax_high_dynamic_range_gumbel",
    "jax_softmax_custom_jvp", "jax_use_direct_linearize", "jax_disable_jit", "jax_disable_most_optimizations",
    "jax_optimization_level", "jax_exec_time_optimization_effort", "jax_memory_fitting_effort",
    "jax_memory_fitting_level", "jax_enable_compiler_remat_pass", "jax_compiler_enable_remat_pass",
    "jax_use_shardy_partitioner", "jax_ragged_dot_use_ragged_dot_instruction",
    "jax_ragged_dot_use_gpu_pallas_triton_lowering",
)  # fmt: skip
"""Settings of JAX that change precision, random numbers, or the program that is compiled. The others say where JAX
runs, what it caches, prints or checks."""
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that hold flags of the compiler."""
NUMBER_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TF_CUDNN_DETERMINISTIC")
"""Other environment variables that change how kernels compute."""
HARMLESS_FLAGS = (
    "--xla_force_host_platform_device_count", "--xla_dump", "--xla_gpu_cuda_data_dir", "--xla_hlo_profile",
    "--xla_gpu_force_compilation_parallelism", "--xla_gpu_per_fusion_autotune_cache_dir",
)  # fmt: skip
"""Beginnings of compiler flags that change no number: the number of simulated devices, which is compared as such, what
is written for debugging, and where files lie. Any other flag may."""


class Change(NamedTuple):
    """One thing that is not as it was when the run began."""

    text: str
    """What it was then and is now."""
    remedy: str = ""
    """How to have again what was there then; "" where it need not be."""


# --- the environment


def describe_environment() -> dict[str, Any]:
    """Versions, devices, settings and commit: what another person needs to see the same numbers."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": list_packages(),
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "jax": _list_jax_settings(),
        "flags": list_flags(os.environ),
        "commit": find_commit(Path(__file__).parents[3]),
    }


def find_commit(source_folder: Path) -> str | None:
    """The commit of a git work tree; None for any other folder, also for one inside a work tree, and without git."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True, cwd=source_folder, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    top, _, commit = os.fsdecode(answer).strip().rpartition("\n")
    return commit if Path(top).resolve() == source_folder.resolve() else None


def list_packages() -> dict[str, str]:
    """name -> version of the packages above that are installed."""
    versions = {name: _package_version(name) for name in (*NUMBER_PACKAGES, *TOKEN_PACKAGES, *OTHER_PACKAGES)}
    return {name: version for name, version in versions.items() if version is not None}


def list_flags(variables: Mapping[str, str]) -> dict[str, str]:
    """flag -> value of the compiler's flags and the variables that change numbers."""
    flags = {}
    for variable in FLAG_VARIABLES:
        for word in shlex.split(variables.get(variable, "")):
            name, _, value = word.partition("=")
            flags[f"{variable} {name}"] = value or "set"
    return flags | {name: variables[name] for name in NUMBER_VARIABLES if variables.get(name)}


def compare_environments(
    recorded: Mapping[str, Any], current: Mapping[str, Any], *, makes_tokens: bool
) -> tuple[list[Change], list[Change]]:
    """(the changes that change numbers, those that do not or by rounding alone) since a run began.

    `makes_tokens` says whether the run makes tokens that are not compared (see `makes_tokens_later`). What an older
    record lacks is not compared.
    """
    refused: list[Change] = []
    told: list[Change] = []
    for name, then, now in _list_differences(recorded.get("packages"), current["packages"]):
        is_refused = name in NUMBER_PACKAGES or (name in TOKEN_PACKAGES and makes_tokens)
        remedy = f"pip install {name}=={then}" if then else f"pip uninstall {name}"
        change = Change(f"{name} {then or 'was not installed'} then, {now or 'not installed'} now", remedy)
        (refused if is_refused else told).append(change)
    kinds_then, kinds_now = _list_device_kinds(recorded), _list_device_kinds(current)
    if kinds_then and kinds_then != kinds_now:
        refused.append(
            Change(f"devices of kind {kinds_then} then, {kinds_now} now", f"resume it where there is {kinds_then}")
        )
    for name, then, now in _list_differences(recorded.get("jax"), current["jax"]):
        refused.append(Change(f"{name} = {then} then, {now} now", f"set {name.upper()}={then}"))
    for name, then, now in _list_differences(recorded.get("flags"), current["flags"]):
        if not _is_harmless(name):
            remedy = f"set {name}={then}" if then else f"leave out {name}"
            refused.append(Change(f"{name} {then or 'not set'} then, {now or 'not set'} now", remedy))
    count_then, count_now = len(recorded.get("devices", current["devices"])), len(current["devices"])
    if count_then != count_now:
        told.append(Change(f"{count_then} devices then, {count_now} now (equal up to rounding)"))
    for key, words in (("processes", "processes"), ("python", "Python"), ("commit", "the source's commit")):
        if recorded.get(key, current[key]) != current[key]:
            told.append(Change(f"{words} {recorded[key]} then, {current[key]} now"))
    return refused, told


def makes_tokens_later(config: Any) -> bool:
    """Whether a run tokenizes more than the examples that it begins with: answers, demonstrations, streamed rows."""
    values = dict(flatten_config(config))
    scores = {values.get("weights.score"), values.get("outer.warm_start"), *values.get("retrain.variants", ())}
    return (
        COMMANDS[type(config)] in ("rank", "refine", "audit", "score", "evaluate")
        or not scores.isdisjoint({"ica", "oneshot"})
        or bool(values.get("data.streaming"))
    )


def check_environment(config: Any, folder: Path) -> list[str]:
    """What differs, without changing numbers, from the environment and the mesh that the run in `folder` began in.

    Raises ValueError where what changes numbers differs.
    """
    path = folder / ENVIRONMENT_FILE
    if not path.exists():
        return []  # stopped before it was written
    recorded = run_dir.read_json(path)
    refused, told = compare_environments(recorded, describe_environment(), makes_tokens=makes_tokens_later(config))
    if refused:
        remedies = "; ".join(dict.fromkeys(change.remedy for change in refused))
        raise ValueError(
            f"{folder} was started with what gives other numbers, so it cannot be resumed: "
            f"{'; '.join(change.text for change in refused)}. Have what it was started with ({remedies}), or start a "
            "new run with --out."
        )
    mesh_changes = describe_rounding_changes(config, folder / run_dir.CONFIG_FILE)
    return [*(change.text for change in told), *mesh_changes]


def record_environment(folder: Path) -> None:
    """Write environment.json, once: a run that is resumed keeps the environment that it began in."""
    if not (folder / ENVIRONMENT_FILE).exists():
        run_dir.write_json(folder / ENVIRONMENT_FILE, describe_environment())


def list_shared_values(config: Any) -> dict[str, str]:
    """What all processes of a run must have alike: command, config, files, packages, settings and kind of machine."""
    flags = {name: value for name, value in list_flags(os.environ).items() if not _is_harmless(name)}
    return {
        "command": COMMANDS[type(config)],
        **{key: repr(value) for key, value in flatten_config(config) if key not in PROCESS_OWN_KEYS},
        **{f"the files of {key}": words for key, words in inputs.hash_file_ends(config).items()},
        **{f"package {name}": version for name, version in list_packages().items() if name not in OTHER_PACKAGES},
        **_list_jax_settings(),
        **{f"flag {name}": value for name, value in flags.items()},
        "machine": platform.machine(),
    }


# --- tokens


def hash_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 of the types, shapes and bytes of some arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_text(texts: Iterable[str]) -> str:
    """SHA-256 of some texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        digest.update(f"{len(content)};".encode() + content)
    return digest.hexdigest()


def check_tokens(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Record what the examples of a run are after tokenization, or compare it with what was recorded.

    All processes call this, with the same names. A record is a few numbers and hashes that describe a corpus. Raises
    ValueError, with the corpora and what differs in them, where the run in `folder` was started with others, or where
    several processes have read others.
    """
    distributed.require_agreement(
        f"the tokens of {', '.join(records)}",
        {f"tokens of {name}": _describe_record(record) for name, record in records.items()},
    )
    distributed.run_on_first_process(lambda: _check_recorded_tokens(folder / TOKENS_FILE, records))


def _check_recorded_tokens(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    recorded: dict[str, Any] = run_dir.read_json(path) if path.exists() else {}
    changes = [
        f"{name}: {'; '.join(_describe_token_changes(recorded[name], record))}"
        for name, record in records.items()
        if name in recorded and recorded[name] != record
    ]
    if changes:
        raise ValueError(
            f"{path.parent} was started with other tokens, so it cannot be resumed: {'. '.join(changes)}. The "
            "tokenizer, the chat template, the data or their order is not what it was: put it back, or start a new run "
            "with --out."
        )
    if not records.keys() <= recorded.keys():
        run_dir.write_json(path, {**recorded, **records})


def _describe_token_changes(recorded: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    counts = [
        f"{then:,} {key} then, {record[key]:,} now"
        for key, then in recorded.items()
        if isinstance(then, int) and then != record.get(key)
    ]
    others = [
        key
        for key in {**recorded, **record}  # weights of tokens are recorded where there are any
        if not isinstance(recorded.get(key), int) and recorded.get(key) != record.get(key)
    ]
    return counts + ([f"other {', '.join(others)}"] if others else [])


def _describe_record(record: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{value:,} {key}" if isinstance(value, int) else f"{key} {value[:12]}" for key, value in record.items()
    )


# --- helpers


def _list_differences(
    recorded: Mapping[str, Any] | None, current: Mapping[str, Any]
) -> list[tuple[str, str | None, str | None]]:
    """(name, value then, value now) of all that differs; nothing where nothing was recorded."""
    if recorded is None:
        return []
    names = dict.fromkeys([*recorded, *current])
    return [(name, recorded.get(name), current.get(name)) for name in names if recorded.get(name) != current.get(name)]


def _list_device_kinds(environment: Mapping[str, Any]) -> str:
    """The kinds of devices; of a CPU, which all have one name, with the machine's architecture."""
    machine = environment.get("machine", platform.machine())
    kinds = sorted(set(environment.get("devices", ())))
    return ", ".join(f"{kind} {machine}" if kind == "cpu" else kind for kind in kinds)


def _list_jax_settings() -> dict[str, str]:
    # an attribute has the value within `with jax.enable_x64(True)`, too, and not every setting is one
    values = jax.config.values
    return {name: str(getattr(jax.config, name, values[name])) for name in JAX_SETTINGS if name in values}


def _is_harmless(name: str) -> bool:
    """Whether a flag, named `VARIABLE --flag`, changes no number."""
    return name.split()[-1].startswith(HARMLESS_FLAGS)


def _package_version(name: str) -> str | None:
    if name == "bilevel-jax":
        return sys.modules["bilevel_jax"].__version__  # of the code that runs, also where it is not installed
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
