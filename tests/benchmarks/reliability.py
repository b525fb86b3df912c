"""Does reliability foretell how hypergradients agree with those of other validation examples?

    python -m tests.benchmarks.reliability ../shared

Two minutes of one CPU core; prints three markdown tables. `../shared` is the folder of real data that
tests/conftest.py describes. MNIST, softmax regression, 2,000 training examples of which half have a wrong label, 100
steps of SGD with momentum; per-example sigmoid weights, seven outer steps from uniform ones, data orders redrawn. At
each outer step one backward pass carries the adjoints of the validation set, of four draws of its halves, of two dev
sets (as large as validation, and 500) and of their halves, and of 3,000 other validation examples. The truth is the
correlation of weight times hypergradient, centred, with that of the 3,000; "off by" is the mean absolute difference
from it, with the number of readings. Targets: within .08 by halves at uniform weights, and against 500 at learned ones.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from bilevel_jax.core import checkpointing

EXAMPLES, BATCH, STEPS, OTHERS, OUTER_STEPS, DRAWS = 2000, 100, 100, 3000, 7, 4
DEV = 500


class Measured(NamedTuple):
    """One outer step of one run."""

    size: int
    seed: int
    step: int
    halves: list[bj.certify.Reliability]
    against: bj.certify.Reliability
    against_large: bj.certify.Reliability
    truth: float
    loss: float
    """Of the others, nats per example."""


def losses(params, frozen, batch):
    """Softmax regression."""
    x, y = batch["data"]
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["kernel"] + params["bias"][None], y)


def measure_run(images: np.ndarray, labels: np.ndarray, size: int, seed: int) -> list[Measured]:
    """All outer steps of a run with `size` validation examples."""
    random = np.random.default_rng((seed, size))
    chosen = random.permutation(len(labels))[: EXAMPLES + 2 * size + DEV + OTHERS]
    x, y = jnp.asarray(images[chosen].reshape(len(chosen), -1) / 255, jnp.float32), labels[chosen].astype(np.int32)
    wrong = random.permutation(EXAMPLES)[: EXAMPLES // 2]
    y[wrong] = (y[wrong] + random.integers(1, 10, len(wrong))) % 10
    bounds = np.cumsum([EXAMPLES, size, size, DEV, OTHERS])
    train, *held_out = [
        (x[low:high], jnp.asarray(y[low:high])) for low, high in zip([0, *bounds], bounds, strict=False)
    ]
    validation, dev, large_dev, others = map(bj.full_batch_stream, held_out)

    def halve(stream, count, draw):
        return bj.halve_stream(stream, jnp.asarray(bj.certify.validation_halves(count, draw), jnp.float32))

    out, hyper = [], jnp.zeros(EXAMPLES)
    for step in range(OUTER_STEPS + 1):
        weights = 2 * jax.nn.sigmoid(hyper)
        stream = bj.shuffled_stream(train, BATCH, STEPS, 100 * seed + step)
        start = bj.init_train_state(OPTIMIZER, {"kernel": jnp.zeros((784, 10)), "bias": jnp.zeros(10)})
        run = bj.train(STEP, start, weights, (), stream, plan=checkpointing.store_all_plan(STEPS))
        streams = [
            validation, *(halve(validation, size, DRAWS * step + draw) for draw in range(DRAWS)),
            dev, halve(dev, size, step), large_dev, halve(large_dev, DEV, step), others,
        ]  # fmt: skip
        estimates = SWEEP(run, weights, (), stream, streams)
        grad, *halves, dev_grad, dev_halves, large_grad, large_halves, truth = estimates.grad
        entries = [weights * part for part in (grad, truth)]
        out.append(
            Measured(
                size,
                seed,
                step,
                [bj.certify.measure_reliability(weights, grad, half, size) for half in halves],
                bj.certify.measure_reliability_against(weights, grad, dev_grad, dev_halves, size),
                bj.certify.measure_reliability_against(weights, grad, large_grad, large_halves, size),
                float(np.corrcoef(np.asarray(entries, np.float64))[0, 1]),
                float(estimates.validation_loss[-1]),
            )
        )
        slope = grad * weights * (1 - weights / 2)
        hyper = hyper - 1.0 * slope / jnp.sqrt(jnp.mean(slope**2))
    return out


def error(pairs: list[tuple[float, float]]) -> str:
    """The mean absolute difference of two columns, where both are told."""
    told = [abs(first - second) for first, second in pairs if not np.isnan(first)]
    return f"{np.mean(told):.2f} ({len(told)})" if told else "–"


def print_tables(measured: list[Measured]) -> None:
    """At uniform weights, at learned weights, and where the loop would stop."""
    sizes = sorted({one.size for one in measured})
    title = "noise, one draw (sd) | one draw | mean of four draws | truth"
    print(f"\n| validation examples | {title} |\n|---|---|---|---|---|")
    for size in sizes:
        at = [one for one in measured if one.size == size and one.step == 0]
        noises = np.array([[draw.noise for draw in one.halves] for one in at])
        alone = error([(draw.value, one.truth) for one in at for draw in one.halves])
        means = ", ".join(f"{bj.certify.average_reliability(one.halves).value:.2f}" for one in at)
        truths, spread = ", ".join(f"{one.truth:.2f}" for one in at), noises.std(1, ddof=1).mean()
        print(f"| {size} | {noises.mean():.2f} ({spread:.2f}) | off by {alone} | {means} | {truths} |")
    title = (
        f"truth at learned weights | by halves | against as large a dev set | against {DEV} | {DEV}, mean of 3 steps"
    )
    print(f"\n| validation examples | {title} |\n|---|---|---|---|---|---|")
    for size in sizes:
        learned = [one for one in measured if one.size == size and one.step > 0]
        truths = [one.truth for one in learned]
        columns = [
            [(one.halves[0].value, one.truth) for one in learned],
            [(one.against.value, one.truth) for one in learned],
            [(one.against_large.value, one.truth) for one in learned],
            [(average_near(learned, one), one.truth) for one in learned],
        ]
        cells = " | ".join(f"off by {error(pairs)}" for pairs in columns)
        print(f"| {size} | {np.mean(truths):.2f}, {min(truths):.2f} to {max(truths):.2f} | {cells} |")
    print(
        "\n| validation examples | loss of others, step 0 | best step | last step | stop by halves | stop against 500 |"
    )
    print("|---|---|---|---|---|---|")
    for size in sizes:
        runs = [
            [one for one in measured if (one.size, one.seed) == (size, seed)]
            for seed in sorted({one.seed for one in measured})
        ]
        losses = [[one.loss for one in run] for run in runs]
        stops = [
            [run[stop_step([read(one) for one in run])] for run in runs]
            for read in (lambda one: one.halves[0].value, lambda one: one.against_large.value)
        ]
        first, best, last = [x[0] for x in losses], [min(x) for x in losses], [x[-1] for x in losses]
        cells = [f"{np.mean(values):.3f}" for values in (first, best, last)]
        cells += [f"{np.mean([x.loss for x in stop]):.3f} (step {mean_step(stop):.1f})" for stop in stops]
        print(f"| {size} | {' | '.join(cells)} |")


def average_near(run: list[Measured], one: Measured) -> float:
    """The mean over an outer step and its neighbours at learned weights."""
    same = [other for other in run if other.seed == one.seed and abs(other.step - one.step) <= 1]
    return bj.certify.average_reliability([other.against_large for other in same]).value


def stop_step(values: list[float], floor: float = 0.05) -> int:
    """The outer step at which a loop that measures every second step stops: twice in a row at the floor."""
    for step in range(2, len(values), 2):
        if values[step] <= floor and values[step - 2] <= floor:
            return step
    return len(values) - 1


def mean_step(stops: list[Measured]) -> float:
    """The mean outer step."""
    return float(np.mean([one.step for one in stops]))


PROBLEM, OPTIMIZER = bj.weighted(losses), optax.sgd(0.02, momentum=0.9)
STEP = bj.train_step(PROBLEM, OPTIMIZER)
SWEEP = bj.each(PROBLEM, STEP)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 100, 500])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = np.load(options.shared / "data" / "mnist" / "mnist_70k.npz")
    results: list[Measured] = []
    for size in options.sizes:
        for seed in range(options.seeds):
            results += measure_run(data["x_train"], data["y_train"], size, seed)
            for one in results[-OUTER_STEPS - 1 :]:
                halves = ", ".join(f"{draw.value:.2f}" for draw in one.halves)
                print(
                    f"{size:>4} seed {seed} step {one.step}: halves {halves}  against dev {one.against.value:.2f}, "
                    f"{one.against_large.value:.2f}  truth {one.truth:.2f}  loss {one.loss:.3f}",
                    flush=True,
                )
    print_tables(results)
