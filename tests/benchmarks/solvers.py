"""The cost of a call of `bj.unroll(...).run` on arrays, next to a scan by hand and to other libraries; of an import.

    pip install --no-deps -r tests/benchmarks/requirements.txt
    python -m tests.benchmarks.solvers

A minute on one core; prints markdown tables. The problem: linear regression with 4 parameters and 32 weighted examples,
100 steps of all examples, float32; d (validation loss after them) / d (weights). Every contestant starts from the same
numbers, takes the same steps of gradient descent (or of Adam, where it can), and agrees with jax.grad in float64; runs
take turns, and medians of the CPU seconds of one thread are compared, so that a busy machine slows all. A first call
traces and compiles, a second does not. An MLP of 199 thousand parameters is a problem of `peers.py`.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj

STEPS, SEGMENTS = 100, 10
RATE = 0.05
OPTIMIZERS = {"sgd": optax.sgd(RATE), "adam": optax.adam(RATE, eps_root=1e-12)}
BY_HAND = "jax.grad, nested scans, `jax.checkpoint` on segments and steps"
IMPORTS = {"jax, optax": "import jax, optax", "bilevel_jax": "import bilevel_jax"}


class Regression(NamedTuple):
    """Numbers of the problem."""

    start: jax.Array
    weights: jax.Array
    train: tuple[jax.Array, jax.Array]
    valid: tuple[jax.Array, jax.Array]


def main(*, rounds: int, calls: int) -> None:
    """Print the tables."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    print(f"load {os.getloadavg()[0]:.1f}, {rounds} rounds of {calls} calls")
    for name, optimizer in OPTIMIZERS.items():
        table(name, contestants(name, optimizer), rounds, calls)
    imports(rounds)


def contestants(name: str, optimizer: optax.GradientTransformation) -> dict[str, Callable[[Regression], Callable]]:
    """Each takes the numbers and returns the function that is timed, which returns the hypergradient."""
    chosen = {
        BY_HAND: lambda numbers: by_hand(numbers, optimizer, checkpoint_steps=True),
        "the same, `jax.checkpoint` on segments alone": lambda numbers: by_hand(numbers, optimizer),
        "jax.grad, one scan, everything stored": lambda numbers: by_hand(numbers, optimizer, segments=1),
        "bj.unroll, `run`": lambda numbers: ours(numbers, optimizer),
        "bj.unroll, `run` inside jit": lambda numbers: ours(numbers, optimizer, inside_jit=True),
        "bj.unroll, `run`, memory all": lambda numbers: ours(numbers, optimizer, memory="all"),
        "bj.unroll, jax.grad of `value`": lambda numbers: ours_by_value(numbers, optimizer),
        "optimistix, RecursiveCheckpointAdjoint": lambda numbers: by_optimistix(numbers, optimizer),
    }
    if name == "sgd":
        chosen["jaxopt, GradientDescent, unrolled"] = by_jaxopt
    return chosen


def table(name: str, makers: dict[str, Callable[[Regression], Callable]], rounds: int, calls: int) -> None:
    """Measure the contestants in turns, and print their rows."""
    with jax.enable_x64(True):
        exact = np.asarray(by_hand(draw(jnp.float64), OPTIMIZERS[name])())
    numbers, runs, firsts, errors = draw(jnp.float32), {}, {}, {}
    for row, make in makers.items():
        try:
            run = make(numbers)
            began = time.process_time()
            gradient = np.asarray(run())
        except ImportError as missing:
            print(f"{row}: not installed: {missing}", file=sys.stderr)
            continue
        firsts[row] = time.process_time() - began
        errors[row] = np.linalg.norm(gradient - exact) / np.linalg.norm(exact)
        runs[row] = run
    seconds: dict[str, list[float]] = {row: [] for row in runs}
    for _ in range(rounds):
        for row, run in runs.items():
            began = time.process_time()
            for _ in range(calls):
                jax.block_until_ready(run())
            seconds[row].append((time.process_time() - began) / calls)
    base = np.median(seconds[BY_HAND])
    print(f"\n| {name} | ms | / by hand | first call, s | error |\n|---|---|---|---|---|")
    for row, measured in seconds.items():
        milliseconds, ratio = 1e3 * np.median(measured), np.median(measured) / base
        print(f"| {row} | {milliseconds:.3f} | {ratio:.2f} | {firsts[row]:.2f} | {errors[row]:.0e} |", flush=True)


def draw(dtype: Any) -> Regression:
    """The problem's numbers."""
    rng = np.random.default_rng(0)

    def sample(count: int) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(rng.normal(size=(count, 4)), dtype), jnp.asarray(rng.normal(size=count), dtype)

    return Regression(jnp.zeros(4, dtype), jnp.ones(32, dtype), sample(32), sample(16))


def losses(theta: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The loss of each example."""
    return 0.5 * (data[0] @ theta - data[1]) ** 2


def by_hand(
    numbers: Regression,
    optimizer: optax.GradientTransformation,
    *,
    segments: int = SEGMENTS,
    checkpoint_steps: bool = False,
) -> Callable[[], jax.Array]:
    """What one writes without a library; with both checkpoints it keeps what `bj.unroll` keeps."""

    def trained_loss(weights, start, train, valid):
        def step(state, _):
            theta, opt_state = state
            grad = jax.grad(lambda theta: jnp.mean(weights * losses(theta, train)))(theta)
            updates, opt_state = optimizer.update(grad, opt_state, theta)
            return (optax.apply_updates(theta, updates), opt_state), None

        body = jax.checkpoint(step, prevent_cse=False) if checkpoint_steps else step

        def segment(state, _):
            return jax.lax.scan(body, state, length=STEPS // segments)

        segment = jax.checkpoint(segment, prevent_cse=False) if segments > 1 else segment
        (theta, _), _ = jax.lax.scan(segment, (start, optimizer.init(start)), length=segments)
        return jnp.mean(losses(theta, valid))

    both = jax.jit(jax.value_and_grad(trained_loss))
    return lambda: both(numbers.weights, numbers.start, numbers.train, numbers.valid)[1]


def ours(
    numbers: Regression, optimizer: optax.GradientTransformation, *, memory: str = "sqrt", inside_jit: bool = False
) -> Callable[[], jax.Array]:
    """This package's solver; its sqrt(T) keeps 10 segments' ends and 10 steps."""
    solver = bj.unroll(_weighted(), optimizer, steps=STEPS, memory=memory)

    def run(start, weights, train, valid):
        return solver.run(start, weights, train, valid).grad

    run = jax.jit(run) if inside_jit else run
    return lambda: run(*numbers)


def ours_by_value(numbers: Regression, optimizer: optax.GradientTransformation) -> Callable[[], jax.Array]:
    """The same through jax.grad."""
    solver = bj.unroll(_weighted(), optimizer, steps=STEPS)
    slope = jax.jit(jax.grad(solver.value, argnums=1))
    return lambda: slope(*numbers)


def by_optimistix(numbers: Regression, optimizer: optax.GradientTransformation) -> Callable[[], jax.Array]:
    """Its own loop, differentiated through, with as many checkpoints."""
    import optimistix

    minimiser = optimistix.OptaxMinimiser(optimizer, rtol=0.0, atol=0.0)
    adjoint = optimistix.RecursiveCheckpointAdjoint(checkpoints=2 * SEGMENTS)

    def trained_loss(weights, start, train, valid):
        result = optimistix.minimise(
            lambda theta, weights: jnp.mean(weights * losses(theta, train)),
            minimiser,
            start,
            weights,
            max_steps=STEPS,
            adjoint=adjoint,
            throw=False,
        )
        return jnp.mean(losses(result.value, valid))

    both = jax.jit(jax.value_and_grad(trained_loss))
    return lambda: both(numbers.weights, numbers.start, numbers.train, numbers.valid)[1]


def by_jaxopt(numbers: Regression) -> Callable[[], jax.Array]:
    """Its own gradient descent, every step stored."""
    import jaxopt

    def trained_loss(weights, start, train, valid):
        solver = jaxopt.GradientDescent(
            lambda theta, weights: jnp.mean(weights * losses(theta, train)),
            stepsize=RATE,
            maxiter=STEPS,
            tol=0.0,
            acceleration=False,
            implicit_diff=False,
            unroll=True,
        )
        return jnp.mean(losses(solver.run(start, weights).params, valid))

    both = jax.jit(jax.value_and_grad(trained_loss))
    return lambda: both(numbers.weights, numbers.start, numbers.train, numbers.valid)[1]


def imports(rounds: int) -> None:
    """CPU seconds of a fresh interpreter."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds + 1):  # the first reads files that are not in memory
        for name, code in IMPORTS.items():
            seconds[name].append(_child_seconds(code))
    medians = {name: np.median(measured[1:]) for name, measured in seconds.items()}
    base = medians["jax, optax"]
    print("\n| import | s | / jax, optax |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / base:.2f} |")


def _child_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _weighted() -> bj.Problem:
    return bj.weighted(lambda theta, frozen, batch: losses(theta, batch["data"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20, help="of a round")
    main(**vars(parser.parse_args()))
