"""Optax optimizers and learning-rate schedules with finite derivatives."""

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

    warmup_steps = round(config.warmup_ratio * num_steps) if config.warmup_ratio > 0 else config.warmup_steps

    def learning_rate(count):
        warmup_factor = jnp.minimum(1.0, (count + 1) / (warmup_steps + 1))
        decay_progress = jnp.clip((count - warmup_steps) / max(1, num_steps - warmup_steps), 0.0, 1.0)
        return config.learning_rate * warmup_factor * DECAY_SHAPES[config.schedule](decay_progress)

    return learning_rate


DECAY_SHAPES = {
    "constant": lambda done: jnp.ones_like(done),
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
}


def clip_global_norm(max_norm: float) -> optax.GradientTransformation:
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
