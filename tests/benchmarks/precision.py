"""What lower precision does to hypergradients: of the products in the steps back, and of training itself.

    python -m tests.benchmarks.precision SHARED --steps 32

stories-260k on sentences of its own kind, AdamW, batches of 16. The reference is float64. Errors are |h - h64| /
|h64| over all training examples: of float32 throughout; of products that are rounded as TF32 and bfloat16 do it, with
training in float32; and of training (and products) that is rounded so. Precisions are simulated on the CPU by
rounding the operands of every matrix product. Beside them the error that one step back tells (`last_step_error`), and
L_v, by eps_root.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core import tree
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.types import Adjoint, Batch, StoredStep, TrainStep
from bilevel_jax.core.unrolled import unrolled_estimator, validation_loss_and_grad_fn
from tests.runs import problems_lm
from tests.simulated_precision import simulated_precision

CASES: dict[str, tuple[dict[str, str], Any]] = {
    "float32": ({}, "highest"),
    "products as TF32": ({"high": "tf32"}, "high"),
    "products as bfloat16": ({"default": "bfloat16"}, "default"),
    "training as TF32": ({"highest": "tf32"}, "highest"),
    "training as bfloat16": ({"highest": "bfloat16"}, "highest"),
}
EPS_ROOTS = (1e-12, 1e-8, 1e-6)


def measure(shared: Path, steps: int, learning_rate: float, num_rows: int) -> None:
    """Print the table."""
    texts = problems_lm.stories(shared, num_rows + 48)
    rows = problems_lm.tokenized(shared, texts[:num_rows], texts[num_rows:])
    print("| eps_root | " + " | ".join(f"{name}, error (one step)" for name in CASES) + " | L_v |")
    print("|---" * (len(CASES) + 2) + "|")
    for eps_root in EPS_ROOTS:
        with jax.enable_x64(True):
            exact, loss, _ = hypergradients(shared, rows, steps, learning_rate, eps_root, jnp.float64, "highest")
        cells = []
        for kinds, precision in CASES.values():
            with simulated_precision(**kinds) if kinds else nullcontext():
                own, _, told = hypergradients(shared, rows, steps, learning_rate, eps_root, jnp.float32, precision)
            error = np.linalg.norm(own - exact) / np.linalg.norm(exact)
            cells.append(f"{error:.2%}" + (f" ({told:.2%})" if precision != "highest" else ""))
        print(f"| {eps_root:g} | {' | '.join(cells)} | {loss:.4f} |", flush=True)


def hypergradients(
    shared: Path,
    rows: problems_lm.Rows,
    steps: int,
    learning_rate: float,
    eps_root: float,
    dtype: Any,
    precision: Any,
) -> tuple[np.ndarray, float, float]:
    """Those of all examples, L_v, and the error that the last step tells."""
    optimizer = problems_lm.adamw(steps, learning_rate=learning_rate, eps_root=eps_root)
    given = problems_lm.setting(shared, rows, optimizer, steps=steps, batch=16, micro=1, dtype=dtype)
    step = train_step(given.problem, optimizer, product_precision=precision)
    weights = jnp.ones(given.rows, dtype)
    run = train(step, init_train_state(optimizer, given.params), weights, given.fixed, given.train)
    told = 0.0
    if precision != "highest":
        at_end = validation_loss_and_grad_fn(given.problem)(run.end.params, given.fixed, given.validation)[1]
        adjoint = Adjoint(at_end, [jnp.zeros_like(leaf) for leaf in tree.inexact_leaves(run.end.opt_state)])
        place = run.steps - 1
        told = float(
            last_step_error(
                step, train_step(given.problem, optimizer), run.stored_steps[place], weights, given.fixed,
                given.train.batch(place), adjoint,
            )
        )  # fmt: skip
    estimate = unrolled_estimator(given.problem, step)(run, weights, given.fixed, given.train, given.validation)
    return np.asarray(estimate.grad, float), float(estimate.validation_loss), told


def last_step_error(
    step: TrainStep,
    exact_step: TrainStep,
    stored: StoredStep,
    weights: jax.Array,
    frozen: Any,
    batch: Batch,
    adjoint: Adjoint,
) -> float:
    """|h - h*| / |h*| of the hypergradients of one step back, from the same adjoint."""
    given = step.gather(weights, batch)
    own, exact = (
        one.backward(stored.state, stored.grad, given, frozen, batch, adjoint)[1] for one in (step, exact_step)
    )
    return float(jnp.linalg.norm(own - exact) / jnp.linalg.norm(exact))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=128)
    options = parser.parse_args()
    measure(options.shared, options.steps, options.learning_rate, options.rows)
