"""The JAX contestants of `peers`: each takes a problem and returns the function that is timed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core import checkpointing, solvers
from bilevel_jax.core.curvature import hessian
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.training import forward_only_step, init_train_state, train, train_step, trajectory_from_params
from bilevel_jax.core.types import Problem, Stream
from bilevel_jax.core.unrolled import unrolled_estimator
from bilevel_jax.lm import models
from bilevel_jax.lm.losses import sft
from bilevel_jax.lm.models.config import rope_frequencies
from tests.benchmarks.peers_problems import ORDER_SEED, Adam, Regression, Training

Rows = dict[str, Any]


KEEPS = {
    "everything": checkpointing.store_all_plan,
    "square root": checkpointing.square_root_plan,
    "square root, linear": lambda steps: checkpointing.square_root_plan(steps)._replace(linearize=True),
    "half": lambda steps: checkpointing.plan_within_budget(
        steps, 1, 1, checkpointing.square_root_plan(steps).stored_steps
    ),
}
MICRO = 4
"""Sequences of a micro-batch of this package's steps: whole batches of 16 are no faster, and take more memory."""


class Plain(NamedTuple):
    """A training problem without this package."""

    losses: Callable[[Any, Rows], jax.Array]
    """(params, rows) -> the loss of each row, nats."""
    params: Any
    adam: optax.GradientTransformation
    rows: Rows
    held_out: Rows
    order: np.ndarray
    weights: jax.Array


def plain(problem: Training) -> Callable[[], None]:
    """Training alone: a jitted step, batches made before."""
    one = _plain(problem, jnp.float32)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt, rows, weights):
        grad = jax.grad(lambda params: jnp.mean(weights * one.losses(params, rows)))(params)
        updates, opt = one.adam.update(grad, opt, params)
        return optax.apply_updates(params, updates), opt

    batches = [(jax.tree.map(lambda leaf, at=at: leaf[at], one.rows), one.weights[at]) for at in one.order]

    def run() -> None:
        params = jax.tree.map(jnp.copy, one.params)
        opt = one.adam.init(params)
        for rows, weights in batches:
            params, opt = step(params, opt, rows, weights)
        jax.block_until_ready(params)

    return run


def _loss_after_training(one: Plain, *, checkpoint: bool) -> Callable[..., jax.Array]:
    """(weights, params, rows, held-out rows, order) -> the held-out loss after all of training, as one scan."""

    def after(weights, params, rows, held_out, order):
        def step(state, at):
            params, opt = state
            batch, parts = jax.tree.map(lambda leaf: leaf[at], rows), weights[at]
            grad = jax.grad(lambda params: jnp.mean(parts * one.losses(params, batch)))(params)
            updates, opt = one.adam.update(grad, opt, params)
            return (optax.apply_updates(params, updates), opt), None

        body = jax.checkpoint(step, prevent_cse=False) if checkpoint else step
        (params, _), _ = jax.lax.scan(body, (params, one.adam.init(params)), order)
        return jnp.mean(one.losses(params, held_out))

    return after


def scanned(problem: Training, *, checkpoint: bool, dtype: Any = jnp.float32) -> Callable[[], np.ndarray]:
    """jax.grad of all of training as one scan; `checkpoint`: only the states are kept, each step is computed twice."""
    one = _plain(problem, dtype)
    slope = jax.jit(jax.grad(_loss_after_training(one, checkpoint=checkpoint)))
    return lambda: np.asarray(slope(one.weights, one.params, one.rows, one.held_out, one.order))


def oracle(problem: Training) -> Callable[[], np.ndarray]:
    """What all are compared with: the same in float64."""
    jax.config.update("jax_enable_x64", True)
    return scanned(problem, checkpoint=True, dtype=jnp.float64)


def retrained(problem: Training, *, count: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """The held-out losses of trainings without a random half of the rows, whose weights are 0."""
    one = _plain(problem, jnp.float32)
    loss = jax.jit(_loss_after_training(one, checkpoint=False))
    rng = np.random.default_rng(3)
    size = len(problem.weights)
    removed = np.stack([rng.permutation(size) < size // 2 for _ in range(count)])

    def run() -> tuple[np.ndarray, np.ndarray]:
        kept = jnp.where(removed, 0, one.weights[None])
        losses = [float(loss(weights, one.params, one.rows, one.held_out, one.order)) for weights in kept]
        return removed, np.array(losses)

    return run


def alone(problem: Training) -> Callable[[], None]:
    """This package's training without a sweep."""
    core, adam, params, train_stream, _, weights = ours(problem)
    step = forward_only_step(core, adam)

    def run() -> None:
        state = init_train_state(adam, jax.tree.map(jnp.copy, params))
        for index in range(train_stream.steps):
            state, _ = step(state, weights, None, train_stream.batch(index))
        jax.block_until_ready(state)

    return run


def swept(problem: Training, *, kept: str) -> Callable[[], np.ndarray]:
    """This package's training and sweep; `kept` is one of `KEEPS`."""
    core, adam, params, train_stream, held_out, weights = ours(problem)
    step = train_step(core, adam)
    estimate = unrolled_estimator(core, step)

    def run() -> np.ndarray:
        keep = KEEPS[kept](train_stream.steps)
        trained = train(step, init_train_state(adam, params), weights, None, train_stream, plan=keep)
        out = estimate(trained, weights, None, train_stream, held_out)
        if not out.checks.replayed:
            raise RuntimeError("a replayed segment missed the state that training reached.")
        return np.asarray(out.grad)

    return run


def compiled(problem: Training, *, memory: str) -> Callable[[], np.ndarray]:
    """This package's solver on arrays, one compiled program; its key draws the problem's batches."""
    steps, size = problem.order.shape
    core = weighted(lambda params, frozen, batch: _mlp_losses(params, batch["data"]))
    solver = unroll(core, _adam(problem.adam), steps=steps, batch_size=size, memory=memory)
    params, rows, held_out = (jax.tree.map(_array, part) for part in (problem.start, problem.rows, problem.held_out))
    weights, key = _array(problem.weights), jax.random.key(ORDER_SEED)
    return lambda: np.asarray(solver.run(params, weights, rows, held_out, key=key).grad)


def solved(problem: Regression) -> Callable[[], np.ndarray]:
    """This package's implicit estimate: CG on Hessian products, and the hypergradients of all examples."""
    batch = {
        "x": _array(problem.x)[None],
        "y": jnp.asarray(problem.y)[None],
        "index": jnp.arange(len(problem.y))[None],
        "num_examples": jnp.full(1, len(problem.y), jnp.float32),
    }
    held_out = {
        "x": _array(problem.held_out_x)[None],
        "y": jnp.asarray(problem.held_out_y)[None],
        "index": jnp.arange(len(problem.held_out_y))[None],
        "num_examples": jnp.full(1, len(problem.held_out_y), jnp.float32),
    }
    core = weighted(
        lambda theta, fixed, batch: _cross_entropy(batch["x"] @ theta, batch["y"]),
        prior=proximal(problem.delta, lambda fixed: fixed),
    )
    estimate = implicit_estimator(core, hessian(core), solvers.cg(tolerance=problem.tolerance, max_steps=1000))
    theta, weights = _array(problem.solution), _array(problem.weights)
    train_stream, validation = Stream(lambda step: batch, 1), Stream(lambda step: held_out, 1)
    centre = jnp.zeros_like(theta)
    return lambda: np.asarray(estimate(trajectory_from_params(theta), weights, centre, train_stream, validation).grad)


def closed(problem: Regression) -> Callable[[], np.ndarray]:
    """Plain JAX: jax.scipy's CG on jvp-of-grad products, all in one compiled program."""
    rows = problem.x, problem.y, problem.held_out_x, problem.held_out_y, problem.weights, problem.solution
    x, y, held_out_x, held_out_y, weights, theta = map(_array, rows)

    @jax.jit
    def entries(theta, weights, x, y, held_out_x, held_out_y):
        def inner(theta, weights):
            return jnp.mean(weights * _cross_entropy(x @ theta, y)) + problem.delta / 2 * jnp.sum(theta**2)

        slope = jax.grad(lambda theta: jnp.mean(_cross_entropy(held_out_x @ theta, held_out_y)))(theta)
        product = jax.linearize(lambda theta: jax.grad(inner)(theta, weights), theta)[1]
        v, _ = jax.scipy.sparse.linalg.cg(product, slope, tol=problem.tolerance, maxiter=1000)
        return -jax.grad(lambda weights: jax.jvp(lambda theta: inner(theta, weights), (theta,), (v,))[1])(weights)

    return lambda: np.asarray(entries(theta, weights, x, y, held_out_x, held_out_y))


def _plain(problem: Training, dtype: Any) -> Plain:
    if isinstance(problem.start, list):
        params, per_row = problem.start, _mlp_losses
    else:
        config, stacked = models.load_model(problem.start, dtype=dtype)
        layers = [jax.tree.map(lambda leaf, at=at: leaf[at], stacked["layers"]) for at in range(config.layers)]
        params, per_row = {**stacked, "layers": layers}, partial(_llama_losses, config)
    cast = partial(_array, dtype=dtype)
    return Plain(
        per_row,
        jax.tree.map(cast, params),
        _adam(problem.adam),
        jax.tree.map(cast, problem.rows),
        jax.tree.map(cast, problem.held_out),
        problem.order,
        cast(problem.weights),
    )


def ours(problem: Training) -> tuple[Problem, optax.GradientTransformation, Any, Stream, Stream, jax.Array]:
    if isinstance(problem.start, list):
        params = jax.tree.map(jnp.asarray, problem.start)
        core = weighted(lambda params, fixed, batch: _mlp_losses(params, batch))
        made = dict
    else:
        config, params = models.load_model(problem.start)
        per_row = sft.sft_losses(models.make_decoder(config))
        core = weighted(lambda params, fixed, batch: per_row(params, batch))
        made = _sequences

    def batch(rows: Rows, index: np.ndarray) -> Rows:
        """[micro, rows of a micro-batch, ...]."""
        parts = len(index) // MICRO if made is _sequences else 1
        micro = {name: leaf.reshape(parts, -1, *leaf.shape[1:]) for name, leaf in {**rows, "index": index}.items()}
        whole = [made({name: leaf[part] for name, leaf in micro.items()}) for part in range(parts)]
        stacked = {name: np.stack([one[name] for one in whole]) for name in whole[0]}
        return jax.tree.map(_array, {**stacked, "num_examples": np.full(parts, len(index), np.float32)})

    steps = [batch({name: leaf[at] for name, leaf in problem.rows.items()}, at) for at in problem.order]
    held_out = batch(problem.held_out, np.arange(len(next(iter(problem.held_out.values())))))
    streams = Stream(steps.__getitem__, len(steps)), Stream(lambda step: held_out, 1)
    return core, _adam(problem.adam), params, *streams, jnp.asarray(problem.weights)


def _sequences(rows: Rows) -> Rows:
    count, length = rows["tokens"][:, 1:].shape
    place = np.broadcast_to(np.arange(length), (count, length))
    return {
        "tokens": rows["tokens"][:, :-1],
        "targets": rows["tokens"][:, 1:],
        "positions": place,
        "segments": np.ones_like(place),
        "slot": np.broadcast_to(np.arange(count)[:, None], (count, length)),
        "supervised": np.full(count, length, np.float32),
        "index": rows["index"],
    }


def _mlp_losses(params: Any, rows: Rows) -> jax.Array:
    x = rows["x"]
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = params[-1]
    return _cross_entropy(x @ kernel + bias, rows["y"])


def _llama_losses(config: models.DecoderConfig, params: Any, rows: Rows) -> jax.Array:
    """A Llama as one would write it for this benchmark: tokens flat, layers a Python loop, nothing recomputed."""
    tokens, targets = rows["tokens"][:, :-1], rows["tokens"][:, 1:]
    (count, length), heads, dim = tokens.shape, config.heads, config.head_dim
    x = params["embed"][tokens.reshape(-1)]
    angles = jnp.arange(length, dtype=x.dtype)[:, None] * jnp.asarray(rope_frequencies(config.rope, dim), x.dtype)[None]
    cos, sin = (turn(angles)[None, None] for turn in (jnp.cos, jnp.sin))
    causal = jnp.tril(jnp.ones((length, length), bool))

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.eps) * scale

    def split(x):
        return x.reshape(count, length, heads, dim).transpose(0, 2, 1, 3)

    def rotated(x):
        low, high = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    for layer in params["layers"]:
        kernel = {name: part["kernel"] for name, part in layer.items() if name.endswith("proj")}
        h = norm(x, layer["input_norm"]["scale"])
        q, k, v = (split(h @ kernel[name]) for name in ("q_proj", "k_proj", "v_proj"))
        scores = jnp.einsum("bhqd,bhkd->bhqk", rotated(q), rotated(k)) / np.sqrt(dim)
        shares = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
        x = x + jnp.einsum("bhqk,bhkd->bqhd", shares, v).reshape(x.shape) @ kernel["o_proj"]
        h = norm(x, layer["post_norm"]["scale"])
        x = x + (jax.nn.silu(h @ kernel["gate_proj"]) * (h @ kernel["up_proj"])) @ kernel["down_proj"]
    logits = norm(x, params["norm"]["scale"]) @ params["head"]
    return _cross_entropy(logits, targets.reshape(-1)).reshape(count, length).mean(axis=1)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _adam(adam: Adam) -> optax.GradientTransformation:
    return optax.adam(adam.rate, adam.b1, adam.b2, adam.eps, adam.eps_root)


def _array(leaf: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Numbers as `dtype`, whole numbers as int32."""
    leaf = np.asarray(leaf)
    return jnp.asarray(leaf, dtype if leaf.dtype.kind == "f" else jnp.int32)
