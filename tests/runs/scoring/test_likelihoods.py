"""The fingerprint of a model tells its bits, and neither how they lie on devices nor in which order they are added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.runs.infra.placement import make_mesh, replicate
from bilevel_jax.runs.scoring import likelihoods
from bilevel_jax.runs.scoring.likelihoods import fingerprint_params


def model(dtype):
    random = np.random.default_rng(0)
    return {"kernel": jnp.asarray(random.normal(size=(4, 16, 8)), dtype), "scale": jnp.asarray(2.0, dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_fingerprint_is_that_of_any_layout(dtype, eight_devices):
    with jax.enable_x64(dtype == "float64"):
        params, mesh = model(dtype), make_mesh(2, 4)
        assert params["kernel"].dtype == dtype
        layouts = [P(None, None, "fsdp"), P(None, ("data", "fsdp")), P("data", "fsdp")]
        split = [params | {"kernel": jax.device_put(params["kernel"], NamedSharding(mesh, at))} for at in layouts]
        split = [one | {"scale": replicate(mesh, one["scale"])} for one in split]
        assert {fingerprint_params(one) for one in (params, replicate(mesh, params), *split)} == {
            fingerprint_params(params)
        }


def test_a_fingerprint_tells_any_other_bits():
    """An entry in its last bit, a sign of 0, two entries that change places, an axis turned around, another type."""
    params = model("float32")
    kernel = params["kernel"].at[0, 0, 0].set(0.0)
    others = [
        kernel, kernel.at[0, 0, 0].set(-0.0), kernel.at[3, 2, 1].set(jnp.nextafter(kernel[3, 2, 1], 9.0)),
        kernel.at[0, 0, 1].set(kernel[0, 0, 2]).at[0, 0, 2].set(kernel[0, 0, 1]), kernel[::-1], kernel[:, ::-1],
        kernel[:, :, ::-1], kernel.astype(jnp.bfloat16), kernel.at[0].set(kernel[1]).at[1].set(kernel[0]),
    ]  # fmt: skip
    assert len({fingerprint_params(params | {"kernel": one}) for one in others}) == len(others)


def test_a_fingerprint_takes_no_memory():
    """Not even of a copy of the largest array."""
    params = {"embed": jax.ShapeDtypeStruct((2048, 512), jnp.float32)}
    assert likelihoods._checksums.lower(params).compile().memory_analysis().temp_size_in_bytes < 2048 * 512
