"""The problems that the tests of core share: closed forms, and a LoRA model with every trap of a real run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax.core import streams
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.training import init_train_state, scan, train, train_step, trajectory_from_params
from bilevel_jax.core.types import PADDING, Problem, Stream, Trajectory

ROWS, WIDTH, HIDDEN, RANK, MICRO, SLOTS = 43, 6, 8, 2, 2, 5


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(float)


class Closed(NamedTuple):
    """A strongly convex problem at its minimiser, with the hypergradient in closed form."""

    name: str
    losses: Callable
    delta: float
    params: jax.Array
    weights: jax.Array
    data: tuple
    held_out: tuple

    def __str__(self):
        return self.name

    def gradient(self):
        """The implicit function theorem with dense matrices, from the flat objective alone."""

        def total(params, weights):
            return jnp.mean(weights * self.losses(params, self.data)) + self.delta / 2 * jnp.sum(params**2)

        slope = jax.grad(lambda params: self.losses(params, self.held_out).mean())(self.params)
        solution = jnp.linalg.solve(jax.hessian(total)(self.params, self.weights), slope)
        return -jax.jacobian(jax.grad(total), argnums=1)(self.params, self.weights).T @ solution

    def problem(self) -> Problem:
        return weighted(lambda p, fixed, b: self.losses(p, b["data"]), prior=proximal(self.delta, jnp.zeros_like))

    def run(self) -> Trajectory:
        return trajectory_from_params(self.params)

    def streams(self) -> tuple[Stream, Stream]:
        return streams.full_batch_stream(self.data), streams.full_batch_stream(self.held_out)


def ridge() -> Closed:
    x, xv, w = normal(0, 50, 7), normal(1, 20, 7), jax.random.uniform(jax.random.key(2), (50,), float, 0.2, 2)
    y, yv = x @ normal(3, 7) + normal(4, 50), xv @ normal(3, 7)
    params = jnp.linalg.solve(x.T @ (w[:, None] * x) / 50 + 0.1 * jnp.eye(7), x.T @ (w * y) / 50)
    return Closed("ridge", lambda p, d: 0.5 * (d[0] @ p - d[1]) ** 2, 0.1, params, w, (x, y), (xv, yv))


def logistic() -> Closed:
    x, xv, w = normal(5, 60, 5), normal(6, 30, 5), jax.random.uniform(jax.random.key(7), (60,), float, 0.2, 2)
    y, yv = jnp.sign(x @ normal(8, 5) + normal(9, 60)), jnp.sign(xv @ normal(8, 5))

    def losses(p, data):
        return jax.nn.softplus(-data[1] * (data[0] @ p))

    def total(p):
        return jnp.mean(w * losses(p, (x, y))) + 0.05 * jnp.sum(p**2)

    params = jnp.zeros(5)
    for _ in range(20):  # Newton's method, to the last bit
        params -= jnp.linalg.solve(jax.hessian(total)(params), jax.grad(total)(params))
    return Closed("logistic", losses, 0.1, params, w, (x, y), (xv, yv))


class Toy(NamedTuple):
    """LoRA over a frozen base, two micro-batches, padding, repeated epochs."""

    problem: Problem
    fixed: dict
    params: dict
    train: Stream
    validation: Stream


def lora(steps: int = 24) -> Toy:
    fixed = {"base": normal(10, WIDTH, HIDDEN) / 2, "head": normal(11, HIDDEN) / 2}
    params = {"a": normal(12, WIDTH, RANK) / 2, "b": jnp.zeros((RANK, HIDDEN))}
    x = normal(13, ROWS, WIDTH)
    y = jnp.sin(x[:, 0])

    def losses(p, fixed, batch):
        return (jnp.tanh(batch["x"] @ (fixed["base"] + p["a"] @ p["b"])) @ fixed["head"] - batch["y"]) ** 2

    def batch(step: int, micro: int = MICRO):
        epoch, place = divmod(step, -(-ROWS // (MICRO * SLOTS)))
        chosen = np.random.default_rng(epoch).permutation(ROWS)[place * MICRO * SLOTS :][: MICRO * SLOTS]
        index = np.pad(chosen, (0, MICRO * SLOTS - len(chosen)), constant_values=PADDING).reshape(micro, -1)
        at = np.minimum(index, ROWS - 1)
        return {
            "index": jnp.asarray(index),
            "x": x[at],
            "y": y[at],
            "num_examples": jnp.full((micro,), float(len(chosen))),
        }

    held_out = (normal(14, 20, WIDTH), jnp.zeros(20))
    validation = Stream(
        lambda step: {
            "index": jnp.arange(20)[None],
            "x": held_out[0][None],
            "y": held_out[1][None],
            "num_examples": jnp.full((1,), 20.0),
        },
        1,
    )
    return Toy(weighted(losses), fixed, params, Stream(batch, steps), validation)


def stacked(stream: Stream):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[stream.batch(step) for step in range(stream.steps)])


def through_scan(toy: Toy, optimizer: optax.GradientTransformation, weights: jax.Array):
    """The oracle: plain reverse mode through `lax.scan` over the same steps."""
    step = train_step(toy.problem, optimizer)

    def value(weights):
        end = scan(step, init_train_state(optimizer, toy.params), weights, toy.fixed, stacked(toy.train))
        return toy.problem.outer(end.params, toy.fixed, jax.tree.map(lambda leaf: leaf[0], toy.validation.batch(0)))

    return jax.jit(jax.value_and_grad(value))(weights)


def trained(toy: Toy, optimizer: optax.GradientTransformation, weights: jax.Array, **options):
    step = train_step(toy.problem, optimizer)
    return step, train(step, init_train_state(optimizer, toy.params), weights, toy.fixed, toy.train, **options)


def relative(one, other) -> float:
    a, b = ravel_pytree(one)[0], ravel_pytree(other)[0]
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
