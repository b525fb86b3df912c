"""Optimizers whose settings are in their state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.runs.config.schema import OptimizerSection
from bilevel_jax.runs.tasks.optimizers import build_adjustable_optimizer, build_optimizer

STEPS = 6
SETTINGS = [
    {"learning_rate": 0.1, "warmup_steps": 0},
    {"learning_rate": 0.03, "warmup_ratio": 0.5, "max_grad_norm": 0.5},
    {"learning_rate": 0.3, "warmup_steps": 2, "eps_root": 1e-2, "weight_decay": 0.1},
]


@pytest.mark.parametrize("name, schedule", [("sgd", "linear"), ("momentum", "constant"), ("adamw", "cosine")])
def test_one_compiled_step_is_that_of_every_setting(name, schedule):
    """The update of the first setting, compiled once, with the state of each: up to rounding the optimizer's own."""
    decay = SETTINGS[-1]["weight_decay"]  # which is not in the state
    sections = [
        OptimizerSection(name=name, schedule=schedule, **{"weight_decay": decay} | values) for values in SETTINGS
    ]
    adjustable = [build_adjustable_optimizer(section, STEPS) for section in sections]
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = adjustable[0].update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    def gradient(params):
        return jax.grad(lambda p: jnp.sum(jnp.cos(p["a"]) ** 2) + jnp.sum(p["b"] ** 2))(params)

    for section, optimizer in zip(sections, adjustable, strict=True):
        own = build_optimizer(section, STEPS)
        params = expected = {"a": jnp.array([0.3, 1.0]), "b": jnp.array([2.0])}
        state, own_state = optimizer.init(params), own.init(expected)
        for _ in range(STEPS):
            params, state = step(params, state)
            updates, own_state = own.update(gradient(expected), own_state, expected)
            expected = optax.apply_updates(expected, updates)
        for key in params:
            np.testing.assert_allclose(params[key], expected[key], rtol=2e-5)
    assert len(traces) == 1
