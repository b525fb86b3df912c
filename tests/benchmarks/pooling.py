"""Per-example, pooled and automatic steps of the weights on digits with wrong labels, next to simple choices.

    python -m tests.benchmarks.pooling SHARED/data/mnist/mnist_70k.npz --model linear
    python -m tests.benchmarks.pooling SHARED/data/mnist/mnist_70k.npz --model mlp

The task of configs/compare_mnist.yaml with 2,000 training examples: 50 steps of momentum on batches of 200, weights
2 sigmoid(h), 12 steps of the weights with a rate that falls from 1 to 0, then one training from cold on another order
of the data. Everything is one compiled program here, a hundred times smaller than the command's; the steps are made of
the same functions of `bj.weightings`. `compare` with `--compare.methods unrolled pooled auto` runs the same on files.

Prints the test loss in nats, its 95 % interval over the seeds, and how far `auto` is from the best arm that is not told
the share of wrong labels, paired by seed. The arms of least loss are told it; validation alone is told its best step.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from bilevel_jax.core.weightings import PartReliability, PoolingFeatures
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks.arrays import add_label_noise

EXAMPLES, TEST, STEPS, BATCH, RATE, OUTER_STEPS, HALVES_EVERY = 2000, 10_000, 50, 200, 0.1, 12, 2
NOISE = {"forced": 0.5, "redrawn": 0.9, "shifted": 0.6}
VALIDATION = (16, 100, 500)
TOLD = ("low_loss", "validation_model", "oracle")
"""Arms that know the share of wrong labels, or the labels."""


def init(model, seed):
    """Softmax regression, or one hidden layer of 64 units."""
    first, second = jax.random.split(jax.random.key(seed))
    if model == "linear":
        return [(jnp.zeros((784, 10)), jnp.zeros(10))]
    hidden = (jax.random.normal(first, (784, 64)) / 28, jnp.zeros(64))
    return [hidden, (jax.random.normal(second, (64, 10)) / 8, jnp.zeros(10))]


def losses(params, x, y):
    for matrix, bias in params[:-1]:
        x = jax.nn.gelu(x @ matrix + bias)
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ params[-1][0] + params[-1][1]), y[:, None], 1)[:, 0]


def train_all(params, weights, data, order):
    """(the end, the parameters after each step)."""

    def step(state, index):
        params, velocity = state
        x, y, w = data[0][index], data[1][index], weights[index]
        grad = jax.grad(lambda params: jnp.mean(w * losses(params, x, y)))(params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grad)
        params = jax.tree.map(lambda p, v: p - RATE * v, params, velocity)
        return (params, velocity), params

    (end, _), path = jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), order)
    return end, path


train = jax.jit(lambda *given: train_all(*given)[0])
compiled_losses = jax.jit(losses)


@jax.jit
def hypergradients(params, weights, data, order, validation, factors):
    """The end of training, and d/dweights of sum_i factors_ki loss_i / |V| for each k."""
    end, pull_back = jax.vjp(lambda weights: train(params, weights, data, order), weights)

    def pull(factor):
        return pull_back(jax.grad(lambda params: jnp.mean(factor * losses(params, *validation)))(end))[0]

    return end, jax.lax.map(pull, factors) if len(factors) == 1 else jax.vmap(pull)(factors)


@jax.jit
def best_stop(params, data, order, test):
    """The least test loss after any step of a training on `data`."""
    path = train_all(params, jnp.ones(len(data[1])), data, order)[1]
    return jax.lax.map(lambda params: losses(params, *test).mean(), path).min()


def epochs(rows, seed, batch=BATCH):
    """Batches for STEPS steps: `rows` in a new order in each epoch."""
    random, batch = np.random.default_rng((seed, len(rows))), min(batch, len(rows))
    rounds = -(-STEPS * batch // len(rows))
    return np.concatenate([random.permutation(rows) for _ in range(rounds)])[: STEPS * batch].reshape(STEPS, batch)


class Setting:
    """The data of one cell and seed, and the arms on it."""

    def __init__(self, file, model, kind, num_validation, seed):
        random = np.random.default_rng(seed)
        rows = random.permutation(len(file["y_train"]))[: EXAMPLES + num_validation]
        test = random.permutation(len(file["y_test"]))[:TEST]

        def take(part, rows):
            x = file[f"x_{part}"][rows].reshape(len(rows), -1).astype(np.float32) / 255
            return x, file[f"y_{part}"][rows].astype(np.int32)

        (x, y), self.test = take("train", rows), take("test", test)
        noisy = add_label_noise(y[:EXAMPLES], kind, NOISE[kind], 10, random)
        self.data, self.validation = (x[:EXAMPLES], noisy), (x[EXAMPLES:], y[EXAMPLES:])
        self.good, self.start, self.seed = noisy == y[:EXAMPLES], init(model, seed), seed
        self.rows, self.halves = np.arange(EXAMPLES), bj.certify.validation_halves(num_validation, seed)

    def test_loss(self, weights, *, with_validation=False):
        """After training from cold on an order of the data that no weights have seen."""
        data = self.data
        if with_validation:
            data = tuple(np.concatenate(pair) for pair in zip(self.data, self.validation, strict=True))
            weights = np.concatenate([weights, np.ones(len(self.halves))])
        end = train(
            self.start, jnp.asarray(weights, jnp.float32), data, epochs(np.flatnonzero(weights), 10_000 + self.seed)
        )
        return float(compiled_losses(end, *self.test).mean())

    def validation_model_losses(self, rows):
        size = max(1, len(self.halves) // 2)  # one shape for halves and the whole
        end = train(self.start, jnp.ones(len(self.halves)), self.validation, epochs(rows, self.seed, min(size, BATCH)))
        return np.asarray(compiled_losses(end, *self.data))

    def features(self, uniform):
        """As runs/scoring/pooling.py makes them."""
        sets = (self.halves < 0, self.halves > 0, self.halves != 0)
        columns = [
            np.concatenate(
                [bj.weightings.rank_curves(given) for given in (uniform, self.validation_model_losses(rows))], 1
            )
            for rows in (np.flatnonzero(chosen) for chosen in sets)
        ]
        return PoolingFeatures(jnp.asarray(np.stack(columns[:2]), jnp.float32), jnp.asarray(columns[2], jnp.float32))

    def learn(self, estimate):
        """The weights after OUTER_STEPS steps."""
        weighting = bj.weightings.sigmoid(EXAMPLES)
        h, earlier, reliability = weighting.init(), None, PartReliability(0.0, 0.0)
        for step in range(OUTER_STEPS):
            weights = weighting.weights(h)
            has_halves = estimate != "unrolled" and step % HALVES_EVERY == 0
            factors = np.stack([np.ones_like(self.halves), self.halves] if has_halves else [np.ones_like(self.halves)])
            order = epochs(self.rows, 100 * self.seed + step)
            end, grads = hypergradients(
                self.start, weights, self.data, order, self.validation, jnp.asarray(factors, jnp.float32)
            )
            slopes = [bj.weightings.weighting_vjp(weighting, h, grad) for grad in grads]
            direction = slopes[0]
            if estimate != "unrolled":
                if step == 0:
                    features = self.features(np.asarray(compiled_losses(end, *self.data)))
                difference = slopes[1] if has_halves else jnp.zeros(EXAMPLES)
                ends = (self.halves.max(), self.halves.min())
                parts = bj.weightings.split_contributions(
                    features, jnp.stack([direction + factor * difference for factor in ends])
                )
                if has_halves:
                    reliability = bj.weightings.measure_part_reliability(parts, earlier or parts)
                    reliability = reliability if earlier else reliability._replace(own=0.0)
                    earlier = parts
                relied_on = PartReliability(1.0, 0.0) if estimate == "pooled" else reliability
                direction = bj.weightings.pool_contributions(parts, relied_on)
            h = weighting.step(h, direction, 1 - step / OUTER_STEPS, 2.0)
        return np.asarray(weighting.weights(h))

    def arms(self):
        """The test loss of each arm."""
        uniform = np.asarray(compiled_losses(train(self.start, jnp.ones(EXAMPLES), self.data, epochs(self.rows, 7)),
                                             *self.data))  # fmt: skip
        of_validation = self.validation_model_losses(np.arange(len(self.halves)))
        order = epochs(np.arange(len(self.halves)), self.seed)
        lowest = {
            name: np.argsort(np.argsort(values)) < self.good.sum()
            for name, values in (("low_loss", uniform), ("validation_model", of_validation))
        }
        learned = {name: self.learn(name) for name in ("unrolled", "pooled", "auto")}
        return {
            "uniform": self.test_loss(np.ones(EXAMPLES)),
            "validation, best stop": float(best_stop(self.start, self.validation, order, self.test)),
            **{name: self.test_loss(chosen) for name, chosen in lowest.items()},
            **{name: self.test_loss(weights) for name, weights in learned.items()},
            "auto, with validation": self.test_loss(learned["auto"], with_validation=True),
            "oracle": self.test_loss(self.good),
        }


def measure(path, model, seeds):
    """Print the table of a model."""
    file = np.load(path)
    file = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    wins = []
    for kind in NOISE:
        for num_validation in VALIDATION:
            found = [Setting(file, model, kind, num_validation, seed).arms() for seed in range(seeds)]
            values = {name: [one[name] for one in found] for name in found[0]}
            cells = [f"{name} {mean:.3f} ± {half:.3f}" for name, (mean, half) in map_intervals(values)]
            behind = {
                name: [auto - other for auto, other in zip(values["auto"], values[name], strict=True)]
                for name in values
                if name not in (*TOLD, "auto", "auto, with validation")
            }
            worst, (mean, half) = max(map_intervals(behind), key=lambda item: item[1][0])
            wins.append(mean <= (half if seeds > 1 else 0))
            print(f"{model} {kind}, |V| = {num_validation}: " + "; ".join(cells))
            print(
                f"    auto minus the best arm that is not told the share ({worst}): {mean:+.3f} ± {half:.3f}",
                flush=True,
            )
    print(
        f"{model}: auto is at least as good as every arm that is not told the share in {sum(wins)} of {len(wins)} cells"
    )


def map_intervals(values):
    return [(name, mean_interval(numbers)) for name, numbers in values.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--model", choices=("linear", "mlp"), default="linear")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    measure(given.path, given.model, given.seeds)
