"""What an exact hypergradient costs: time over plain training, and memory.

    python -m tests.benchmarks.cost ../shared

Minutes on two CPU cores (more on busy ones: try --steps 32); prints two markdown tables. `../shared` is the folder of
real data and models that tests/conftest.py describes.

All parameters of a model of 260 thousand, 64 AdamW steps of 16 rows of about 64 tokens, float32. In one process the
variants take turns, so that a busy machine slows all of them, and the medians over the rounds are compared. What is
kept: every state and gradient; what fits half and a quarter of that memory; sqrt(steps) snapshots, also with the
linearisations of the steps on the tape; and half of those. Targets: 4.2 times plain training with every state, 5.5
times with sqrt(steps) snapshots (by count of products, with F a forward pass: a gradient is 3F, a Hessian product with
its primal 9F, a replayed step 3F, so 4 and 5 - 1/sqrt(steps); a linearisation spares 3F of the product).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core import checkpointing, tree
from bilevel_jax.core.training import train
from bilevel_jax.core.types import Adjoint
from bilevel_jax.core.unrolled import unrolled_estimator
from bilevel_jax.runs.engine.trajectory_store import linearization_bytes
from tests.runs.problems_lm import adamw, reviews, setting, stories, tokenized

MB = 1e6


def measure(shared: Path, *, steps: int, batch: int, micro: int, lora_rank: int, rounds: int) -> None:
    """Print both tables."""
    sentences = stories(shared, 800)
    paragraphs = [" ".join(sentences[i : i + 4]) for i in range(0, len(sentences) - 3, 4)]
    rows = tokenized(shared, paragraphs[:160], reviews(shared, 16), max_length=65)
    optimizer = adamw(steps, learning_rate=3e-4)
    one = setting(shared, rows, optimizer, steps=steps, batch=batch, micro=micro, lora_rank=lora_rank)
    weights = jnp.ones(one.rows)
    step, run = one.trained(weights)
    estimator = unrolled_estimator(one.problem, step)

    def trained(**options):
        return train(step, one.start(), weights, one.fixed, one.train, **options)

    def estimated(**options):
        out = estimator(trained(**options), weights, one.fixed, one.train, one.validation)
        assert out.checks.replayed
        return out.grad

    state, first = run.start, one.train.batch(0)
    snapshot, visit = size(state), size(state) + size(state.params)
    part, adjoint = step.take(weights, first), Adjoint(state.params, tree.inexact_leaves(state.opt))
    linear = linearization_bytes(step, state, part, one.fixed, first)
    whole = steps * visit
    root = checkpointing.square_root_plan(steps)
    keeps = {
        "every state": checkpointing.store_all_plan(steps),
        "half of that": checkpointing.plan_within_budget(steps, snapshot, visit, whole / 2),
        "a quarter of it": checkpointing.plan_within_budget(steps, snapshot, visit, whole / 4),
        "sqrt(steps) snapshots": root,
        "the same, linearised": root._replace(linearize=True),
        "half of those": checkpointing.plan_within_budget(
            steps, snapshot, visit, (root.snapshots * snapshot + root.stored_steps * visit) / 2
        ),
    }
    variants = {"plain training": lambda: trained(keep=checkpointing.NO_CHECKPOINTS).end.params}
    variants |= {name: partial(estimated, keep=keep) for name, keep in keeps.items()}
    seconds = {name: [] for name in variants}
    for turn in range(rounds + 1):  # the first compiles
        for name, variant in variants.items():
            seconds[name].append(timed(variant))
            if turn == 0:
                seconds[name].clear()

    programs = {
        "forward step": (step.forward, (state, part, one.fixed, first)),
        "backward step": (step.backward, (state, state.params, part, one.fixed, first, adjoint)),
        "forward step, linearised": (step.linearize, (state, part, one.fixed, first)),
        "backward step by a linearisation": (
            step.pull,
            (state, state.params, step.linearize(state, part, one.fixed, first)[2], part, one.fixed, first, adjoint),
        ),
    }
    calls = {**programs, "making a batch": (one.train.batch, (3,)), "comparing two states": (same, (state, run.end))}
    pieces = {name: [timed(partial(function, *args)) for _ in range(20)] for name, (function, args) in calls.items()}

    places = int(np.prod(first["tokens"].shape))
    print(f"\n{jax.devices()[0].device_kind}, {steps} steps of {batch} rows in {micro} micro-batches, {places} tokens;")
    print(f"LoRA rank {lora_rank}; {rounds} rounds\n" if lora_rank else f"all parameters; {rounds} rounds\n")
    print("| kept for the sweep | snapshots | tape | MB | by count | median, s | over plain training |")
    print("|---|---|---|---|---|---|---|")
    plain = np.median(seconds["plain training"])
    print(f"| plain training | | | | 1 | {plain:.2f} | 1 |")
    for name, keep in keeps.items():
        megabytes = (keep.snapshots * snapshot + keep.stored_steps * (visit + keep.linearize * linear)) / MB
        count, median = (
            4 - keep.linearize + checkpointing.count_replayed_steps(steps, keep) / steps,
            np.median(seconds[name]),
        )
        print(f"| {name} | {keep.snapshots} | {keep.stored_steps} | {megabytes:.0f} | {count:.2f} ", end="")
        print(f"| {median:.2f} | {median / plain:.2f} |")

    print("\n| piece | median, s | x steps, over plain training |\n|---|---|---|")
    for name, values in pieces.items():
        print(f"| {name} | {np.median(values):.4f} | {np.median(values) / plain * steps:.2f} |")

    print("\n| memory | MB |\n|---|---|")
    for name, (function, args) in programs.items():
        temporary = function.lower(*args).compile().memory_analysis().temp_size_in_bytes
        print(f"| {name}, temporary | {temporary / MB:.1f} |", flush=True)


same = jax.jit(tree.bitwise_equal)


def timed(function: Callable) -> float:
    """Seconds until the result is there."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def size(some) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(some))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    measure(**vars(parser.parse_args()))
