"""What is there: device, memory, and its peak rates, by a table of makers' numbers and as measured here."""

import re
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax.runs.engine.trajectory_store import PINNED_HOST

PRECISIONS = ("highest", "high", "default")
"""Of float32 products, as JAX names them."""


class Peak(NamedTuple):
    """What a maker says of dense matrix products on one device as JAX counts them, Tflop/s; 0 where it cannot."""

    bfloat16: float
    tf32: float
    float32: float


KNOWN_PEAKS: dict[str, Peak] = {
    "NVIDIA H100 PCIe": Peak(756, 378, 51),
    "NVIDIA H100 NVL": Peak(835, 418, 60),
    "NVIDIA H200 NVL": Peak(835, 418, 60),
    "NVIDIA H100": Peak(989, 494, 67),
    "NVIDIA H200": Peak(989, 494, 67),
    "NVIDIA GH200": Peak(989, 494, 67),
    "NVIDIA A100": Peak(312, 156, 19.5),
    "NVIDIA A10": Peak(125, 62.5, 31.2),
    "NVIDIA L40S": Peak(362, 183, 91.6),
    "NVIDIA L40": Peak(181, 90.5, 90.5),
    "NVIDIA L4": Peak(121, 60, 30.3),
    "Tesla V100": Peak(0, 0, 15.7),
    "Tesla T4": Peak(0, 0, 8.1),
    "TPU v4": Peak(275, 0, 0),
    "TPU v5 lite": Peak(197, 0, 0),
    "TPU v5": Peak(459, 0, 0),
    "TPU v5p": Peak(459, 0, 0),
    "TPU v6 lite": Peak(918, 0, 0),
}
"""By the first words of `device_kind`, the first that fits; from the makers' data sheets, without sparsity."""


def known_peak(device_kind: str) -> Peak | None:
    """The numbers of the table, or None for a device that it does not have."""
    names = (name for name in KNOWN_PEAKS if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", device_kind))
    return next((KNOWN_PEAKS[name] for name in names), None)


def maker_tflops(device_kind: str, platform: str, precision: str) -> float | None:
    """The maker's Tflop/s for float32 arrays at a precision of JAX; None where it is not known.

    At highest, high and default a GPU multiplies without tensor cores, as TF32 and as TF32, and a TPU in six, three
    and one passes of bfloat16.
    """
    peak = known_peak(device_kind)
    if peak is None:
        return None
    if platform == "tpu":
        return peak.bfloat16 / {"highest": 6, "high": 3, "default": 1}[precision]
    return (peak.float32 if precision == "highest" else peak.tf32) or peak.float32 or None


def describe() -> dict[str, Any]:
    """Platform, kind, memory and kinds of memory of the first device; versions."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.local_device_count(),
        "bytes_limit": stats.get("bytes_limit") or None,
        "memory_kinds": sorted(memory.kind for memory in device.addressable_memories()),
        "tells_peak": "peak_bytes_in_use" in stats,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
    }


def measure_peaks(size: int, seconds: float) -> dict[str, float]:
    """Tflop/s of one large square product: of bfloat16 arrays, and of float32 arrays at each precision."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    right = right / size**0.5  # so that product after product stays of the same size
    rates = {}
    for name in ("bfloat16", *PRECISIONS):
        dtype, precision = (jnp.bfloat16, None) if name == "bfloat16" else (jnp.float32, name)
        multiply = jax.jit(lambda a, b, precision=precision: jnp.matmul(a, b, precision=precision))
        factor = right.astype(dtype)
        best = best_seconds(
            lambda product, multiply=multiply, factor=factor: multiply(product, factor), left.astype(dtype), seconds
        )
        rates[name] = 2 * size**3 / best / 1e12
    return rates


def measure_transfers(num_bytes: int, seconds: float) -> dict[str, float]:
    """GB/s of copies between the device's memory and the host's page-locked memory; nothing for a CPU."""
    device = jax.local_devices()[0]
    if device.platform == "cpu" or PINNED_HOST not in {memory.kind for memory in device.addressable_memories()}:
        return {}
    on_device = jax.sharding.SingleDeviceSharding(device)
    pinned = on_device.with_memory_kind(PINNED_HOST)
    array = jnp.zeros(num_bytes // 4, jnp.float32)
    on_host = jax.block_until_ready(jax.device_put(array, pinned))
    return {
        "to the host": num_bytes / best_seconds(lambda _: jax.device_put(array, pinned), None, seconds) / 1e9,
        "to the device": num_bytes / best_seconds(lambda _: jax.device_put(on_host, on_device), None, seconds) / 1e9,
    }


def best_seconds(call: Callable[[Any], Any], start: Any, seconds: float) -> float:
    """The least seconds of a call, which gets the result of the one before: several are queued, and none is kept."""
    value = jax.block_until_ready(call(start))
    began = time.perf_counter()
    value = jax.block_until_ready(call(value))
    best = time.perf_counter() - began
    calls = max(1, min(50, int(seconds / 3 / max(best, 1e-6))))
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            value = call(value)
        jax.block_until_ready(value)
        best = min(best, (time.perf_counter() - began) / calls)
    return best
