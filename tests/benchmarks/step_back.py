"""Where the time of a step back goes, by kind of operation, next to a gradient.

    python -m tests.benchmarks.step_back

The transformer of `peers` on one core: the step of training (a gradient and Adam's update) and the step back (a Hessian
product and the update's derivative), as `train_step` compiles them. Both are timed in turns, in CPU seconds of one
thread; then one run of each is traced by JAX's profiler, and its operations are told apart by the compiled program's
text: products (with the arithmetic of their shapes), reductions, and everything else. For CPUs: the names are those of
XLA's CPU programs.

By arithmetic a step back is 8/3 of a gradient. With F for the products of a forward pass a gradient has 3 F: each
y = W x once on the way forth, and for each two on the way back, W^T dy and dy x^T. The derivative of these along a
direction (dW, dx) has two products for each of the three, and on its way reads y and the adjoint of x, which are
computed again: 6 F + 2 F. A linearization that was stored spares the 2 F and reads what it stored from memory.
"""

import argparse
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from bilevel_jax.core import tree
from bilevel_jax.core.training import init_train_state, train_step
from bilevel_jax.core.types import Adjoint
from tests.benchmarks import peers_jax, peers_problems

KINDS = ("products", "reductions", "everything else")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\S+) ([\w\-]+)\(([^)]*)\)")


class Operation(NamedTuple):
    """One instruction of a compiled program that the profiler names."""

    kind: str
    flop: int
    """Of one execution."""


def main(*, rounds: int, micro: int) -> None:
    """Print the table."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    peers_jax.MICRO = micro
    with tempfile.TemporaryDirectory() as folder:
        programs = _programs(peers_problems.transformer(Path(folder)))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (_, run) in programs.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    print(f"micro-batches of {micro} sequences; load {os.getloadavg()[0]:.1f}\n")
    print("| | s | / gradient | Gflop | " + " | ".join(f"{kind}, ms" for kind in KINDS) + " | Gflop/s of products |")
    print("|---|---|---|---|---|---|---|---|")
    base = np.array(seconds["gradient"])
    for name, (text, run) in programs.items():
        by_kind, flop = _profile(run, read_operations(text))
        ratio = np.median(np.array(seconds[name]) / base)
        cells = [f"{np.median(seconds[name]):.3f}", f"{ratio:.2f}", f"{flop / 1e9:.1f}"]
        cells += [f"{by_kind[kind] / 1e6:.0f}" for kind in KINDS] + [f"{flop / by_kind['products']:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def _programs(problem: peers_problems.Training) -> dict[str, tuple[str, Callable[[], Any]]]:
    """(compiled text, one run) of each step."""
    core, adam, params, stream, _, weights = peers_jax.ours(problem)
    step, batch = train_step(core, adam), stream.batch(0)
    state, weights = init_train_state(adam, params), step.gather(weights, batch)
    grad = step.forward(state, weights, (), batch)[1].grad
    zeros = [jnp.zeros_like(leaf) for leaf in tree.inexact_leaves(state.opt_state)]
    forth, adjoint = (state, weights, (), batch), Adjoint(grad, zeros)
    linearization = step.linearize(*forth)[2]
    calls = {
        "gradient": (step.forward, forth),
        "step back": (step.backward, (state, grad, weights, (), batch, adjoint)),
        "gradient, stored linearized": (step.linearize, forth),
        "step back from that": (step.vjp_step, (state, grad, linearization, weights, (), batch, adjoint)),
    }
    return {
        name: (
            function.lower(*given).compile().as_text(),
            lambda function=function, given=given: jax.block_until_ready(function(*given)),
        )
        for name, (function, given) in calls.items()
    }


def _profile(run: Callable[[], Any], operations: dict[str, Operation]) -> tuple[Counter[str], int]:
    """(nanoseconds of each kind, flop) of one traced run."""
    run()
    nanoseconds: Counter[str] = Counter()
    flop = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        for event in _events(ProfileData.from_file(str(trace))):
            if operation := operations.get(event.name):
                nanoseconds[operation.kind] += event.duration_ns
                flop += operation.flop
    return nanoseconds, flop


def _events(profile: ProfileData) -> Iterable[Any]:
    return (event for plane in profile.planes for line in plane.lines for event in line.events)


def read_operations(text: str) -> dict[str, Operation]:
    """The operations of a compiled program by name: those that stand by themselves, not inside a fusion."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if opening := re.match(r"^(?:ENTRY )?%([\w.\-]+) .*\{$", line):
            lines = computations.setdefault(opening[1], [])
        else:
            lines.append(line)
    found = {}
    for lines in computations.values():
        shapes: dict[str, tuple[int, ...]] = {}
        for line in lines:
            if not (parsed := INSTRUCTION.match(line)):
                continue
            name, shape, operation, arguments = parsed.groups()
            shapes[name] = _dimensions(shape)
            if operation == "fusion":
                inside = computations[re.search(r"calls=%([\w.\-]+)", line)[1]]  # type: ignore[index]
                found[name] = _summarize(inside)
            elif operation not in ("while", "call", "conditional", "tuple", "get-tuple-element", "parameter"):
                found[name] = _summarize([line], shapes)
    return found


def _summarize(lines: list[str], known: dict[str, tuple[int, ...]] | None = None) -> Operation:
    """What a fusion, or one instruction beside the shapes of its arguments, does."""
    shapes, flop, reduces = dict(known or {}), 0, False
    for line in lines:
        if not (parsed := INSTRUCTION.match(line)):
            continue
        name, shape, operation, arguments = parsed.groups()
        shapes[name] = _dimensions(shape)
        reduces |= operation == "reduce"
        if operation == "dot":
            left = shapes[re.findall(r"%([\w.\-]+)", arguments)[0]]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1]  # type: ignore[index]
            flop += 2 * math.prod(shapes[name]) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    return Operation(KINDS[0] if flop else KINDS[1] if reduces else KINDS[2], flop)


def _dimensions(shape: str) -> tuple[int, ...]:
    sizes = re.search(r"\[([\d,]*)\]", shape)
    return tuple(int(size) for size in sizes[1].split(",") if size) if sizes else ()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--micro", type=int, default=4, help="sequences of a micro-batch, of 16")
    main(**vars(parser.parse_args()))
