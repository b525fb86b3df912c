"""Matrix products on a CPU as accelerators make them: operands are rounded as their precision says."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir

MANTISSA_BITS = {"bfloat16": 7, "tf32": 10}


@contextmanager
def simulated_precision(default: str = "", high: str = "", highest: str = "") -> Iterator[None]:
    """Inside, what is compiled multiplies float32 at the precision `default` as this kind does, at `high` as that.

    "bfloat16" and "tf32" round both operands; "" changes nothing (three passes of bfloat16 have about the bits of
    float32). Sums are those of float32, as in hardware. `highest` is for what hardware does not do: a training run at a
    lower precision. JAX's caches of compiled programs are cleared on the way in and out, as they do not know of it, and
    the one on disk is off inside.
    """
    names = jax.lax.Precision
    kinds = {names.DEFAULT: default, names.HIGH: high, names.HIGHEST: highest}
    rule = (
        mlir._platform_specific_lowerings["cpu"].get(jax.lax.dot_general_p) or mlir._lowerings[jax.lax.dot_general_p]
    ).rule

    def lower(context, lhs, rhs, **params):
        kind = kinds[(params["precision"] or (names.DEFAULT,))[0]]
        if not kind or context.avals_in[0].dtype != jnp.float32:
            return rule(context, lhs, rhs, **params)

        def rounded(operand):
            return jax.lax.reduce_precision(operand, 8, MANTISSA_BITS[kind])

        rounding = mlir.lower_fun(rounded, multiple_results=False)
        lhs, rhs = (
            rounding(context.replace(avals_in=[aval], avals_out=[aval]), operand)[0]
            for aval, operand in zip(context.avals_in, (lhs, rhs), strict=True)
        )
        return rule(context, lhs, rhs, **params)

    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    mlir.register_lowering(jax.lax.dot_general_p, lower, platform="cpu")
    try:
        yield
    finally:
        mlir.register_lowering(jax.lax.dot_general_p, rule, platform="cpu")
        jax.clear_caches()
        jax.config.update("jax_enable_compilation_cache", cache)
