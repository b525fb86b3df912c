"""Optax optimizers and learning-rate schedules with finite derivatives."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.runs.config.schema import OptimizerSection


def build_optimizer(config: OptimizerSection, num_steps: int) -> optax.GradientTransformation:
    """The optax chain of `config` for a training run of `steps` steps: clip, direction, decay, rate."""
    is_decoupled = config.name in ("adamw", "lion")
    chain = [
        clip_global_norm(config.max_grad_norm) if config.max_grad_norm else None,
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay and not is_decoupled else None,
        UPDATE_RULES[config.name](config),
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay and is_decoupled else None,
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    ]
    return optax.chain(*(transformation for transformation in chain if transformation is not None))


NO_CLIPPING = 1e18
"""A norm that no finite gradient exceeds, whose square is finite in float32."""


def build_adjustable_optimizer(config: OptimizerSection, num_steps: int) -> optax.GradientTransformation:
    """As `build_optimizer`, with the learning rate, the warmup, eps_root and the clip norm in its state.

    A training step that was compiled with one of them trains with the states of all others. Its numbers are those of
    `build_optimizer` up to rounding.
    """

    def build(
        learning_rate: jax.Array, warmup_steps: jax.Array, eps_root: jax.Array, max_grad_norm: jax.Array
    ) -> optax.GradientTransformation:
        values: Any = {
            "learning_rate": learning_rate, "warmup_steps": warmup_steps, "eps_root": eps_root, "warmup_ratio": 0.0,
        }  # fmt: skip
        unclipped = build_optimizer(replace(config, max_grad_norm=0.0, **values), num_steps)
        return optax.chain(clip_global_norm(max_grad_norm), unclipped)

    return optax.inject_hyperparams(build)(
        learning_rate=config.learning_rate,
        warmup_steps=float(count_warmup_steps(config, num_steps)),
        eps_root=config.eps_root,
        max_grad_norm=config.max_grad_norm or NO_CLIPPING,
    )


def _adam(config: OptimizerSection) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, config.eps_root)


UPDATE_RULES = {
    "sgd": lambda config: None,
    "momentum": lambda config: optax.trace(config.momentum),
    "adam": _adam,
    "adamw": _adam,
    "lion": lambda config: optax.scale_by_lion(config.b1, config.b2),
}


def learning_rate_schedule(config: OptimizerSection, num_steps: int) -> optax.Schedule:
    """Step -> learning rate: up to the peak over the warmup, then constant, or down to 0 at `num_steps`.

    The first step already moves, at 1/(warmup + 1) of the peak: a rate of 0 would waste it and zero its rows' entries.
    """

    warmup_steps = count_warmup_steps(config, num_steps)

    def learning_rate(count):
        warmup_factor = jnp.minimum(1.0, (count + 1) / (warmup_steps + 1))
        decay_progress = jnp.clip((count - warmup_steps) / jnp.maximum(1, num_steps - warmup_steps), 0.0, 1.0)
        return config.learning_rate * warmup_factor * DECAY_SHAPES[config.schedule](decay_progress)

    return learning_rate


DECAY_SHAPES = {
    "constant": lambda done: jnp.ones_like(done),
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
}


def count_warmup_steps(config: OptimizerSection, num_steps: int) -> int:
    """The steps over which the learning rate rises."""
    return round(config.warmup_ratio * num_steps) if config.warmup_ratio > 0 else config.warmup_steps


def clip_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformation:
    """Scale the whole gradient down to norm `max_norm` where it is longer.

    optax.clip_by_global_norm is the same function, but its derivative is NaN at a zero gradient.
    """

    def update(updates, state, params=None):
        del params
        squared_norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(updates))
        exceeds_norm = squared_norm > max_norm**2
        scale = jnp.where(
            exceeds_norm, max_norm / jnp.sqrt(jnp.where(exceeds_norm, squared_norm, 1.0)), 1.0
        )  # no sqrt at 0
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
