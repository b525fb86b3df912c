"""What optimizer.eps_root does to training and to hypergradients of real models, and why no default fits all.

    python -m tests.benchmarks.eps_root SHARED --steps 32
    python -m tests.benchmarks.eps_root SHARED --gradients

The first: stories-260k, all parameters and LoRA, on sentences of its own kind and on film reviews, AdamW, batches of
16. For each eps_root the least validation loss over learning rates, with its rate; there the metasmoothness of the
hypergradients without a fifth of the examples, and their error in float32 against float64. The second: the root mean
squares of single entries of gradients, by size of model; eps_root changes training where it is not small beside their
squares.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core import certify
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.unrolled import unrolled_estimator, validation_loss_fn
from bilevel_jax.lm import models
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.models.config import DecoderConfig
from tests.runs import problems_lm

EPS_ROOTS = (1e-12, 1e-10, 1e-8, 1e-6)
LEARNING_RATES = {"all parameters": (3e-4, 1e-3, 3e-3), "LoRA": (1e-3, 3e-3, 1e-2)}
BATCH, HELD_OUT, REMOVED = 16, 64, 0.2
SIZES = {"random, 17 M": (256, 12, 8), "random, 145 M": (768, 14, 12)}
"""Width, layers and heads."""
THRESHOLD = 1e-4
"""The root of 1e-8."""


def measure_training(shared: Path, steps: int, num_rows: int, eps_roots: list[float]) -> None:
    """Print the table of losses, smoothness and errors."""
    print("| parameters | data | eps_root | least L_v | at rate | metasmoothness | error in float32 |")
    print("|---|---|---|---|---|---|---|")
    for data, read in (("stories", problems_lm.stories), ("film reviews", problems_lm.reviews)):
        texts = read(shared, num_rows + HELD_OUT)
        rows = problems_lm.tokenized(shared, texts[:num_rows], texts[num_rows:])
        for kind, rates in LEARNING_RATES.items():
            for eps_root in eps_roots:
                runs = {rate: Run(shared, rows, steps, kind, rate, eps_root) for rate in rates}
                rate = min(runs, key=lambda rate: runs[rate].validation_loss())
                best, ones = runs[rate], jnp.ones(num_rows)
                own = best.hypergradient(ones)
                smooth = certify.metasmoothness(best.hypergradient, jax.random.key(0), ones, own, (REMOVED,), draws=2)
                with jax.enable_x64(True):
                    exact = Run(shared, rows, steps, kind, rate, eps_root, jnp.float64).hypergradient(
                        jnp.ones(num_rows, jnp.float64)
                    )
                error = np.linalg.norm(np.asarray(own, float) - exact) / np.linalg.norm(exact)
                print(
                    f"| {kind} | {data} | {eps_root:g} | {best.validation_loss():.4f} | {rate:g} "
                    f"| {smooth.cosines[0]:.3f} | {error:.3%} |",
                    flush=True,
                )


class Run:
    """A training run and its hypergradients."""

    def __init__(self, shared, rows, steps, kind, rate, eps_root, dtype=jnp.float32):
        self.optimizer = problems_lm.adamw(steps, learning_rate=rate, eps_root=eps_root)
        self.given = problems_lm.setting(
            shared, rows, self.optimizer, steps=steps, batch=BATCH, micro=1, lora_rank=8 if kind == "LoRA" else 0,
            dtype=dtype,
        )  # fmt: skip
        self.step, self.dtype = train_step(self.given.problem, self.optimizer), dtype

    def train(self, weights):
        """The trajectory."""
        start = init_train_state(self.optimizer, self.given.params)
        return train(self.step, start, weights, self.given.fixed, self.given.train)

    def validation_loss(self) -> float:
        """L_v at weight 1 for each example."""
        end = self.train(jnp.ones(self.given.rows, self.dtype)).end.params
        return float(validation_loss_fn(self.given.problem)(end, self.given.fixed, self.given.validation))

    def hypergradient(self, weights):
        """Of all examples."""
        given, run = self.given, self.train(weights)
        estimator = unrolled_estimator(given.problem, self.step)
        return estimator(run, weights, given.fixed, given.train, given.validation).grad


def measure_gradients(shared: Path) -> None:
    """Print the table of gradients' entries, those of layers alone: rows of embeddings wait for their token."""
    print("| model | parameters | median | share below 1e-4 |")
    print("|---|---|---|---|")
    for name, architecture, params, batches in gradient_cases(shared):
        loss_grad = jax.jit(jax.grad(models_loss(architecture)))
        squares = [jax.tree.map(jnp.square, loss_grad(params, tokens)) for tokens in batches]
        means = jax.tree.map(lambda *some: sum(some) / len(some), *squares)
        layers = [
            np.sqrt(np.ravel(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(means)
            if "layers" in jax.tree_util.keystr(path)
        ]
        entries = np.concatenate(layers)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"| {name} | {size:,} | {np.median(entries):.1e} | {(entries < THRESHOLD).mean():.1%} |", flush=True)


def gradient_cases(shared: Path) -> Iterator[tuple]:
    """(name, architecture, parameters, batches of token ids [rows, length])."""
    texts = problems_lm.stories(shared, 128)
    for name in ("stories-260k", "babyllama-1m"):
        folder = shared / "models" / name
        architecture, params = models.load_model(folder)
        encode = load_tokenizer(folder).encode
        ids = np.concatenate([encode(text) for text in texts])
        yield name, architecture, params, ids[: len(ids) // 2048 * 2048][: 4 * 2048].reshape(-1, 16, 128)
    for name, (width, layers, heads) in SIZES.items():
        architecture = DecoderConfig(
            vocab_size=8192, width=width, mlp_width=4 * width, layers=layers, heads=heads, kv_heads=heads,
            head_dim=width // heads, max_length=128,
        )  # fmt: skip
        ids = np.random.default_rng(0).integers(0, 8192, (2, 16, 128))
        yield name, architecture, models.init_params(architecture, jax.random.key(0)), ids


def models_loss(architecture):
    """(parameters, token ids) -> mean cross-entropy of the next token, nats."""
    decoder = models.make_decoder(architecture)

    def loss(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = decoder.hidden(params, ids, positions, jnp.ones_like(ids))
        log_probs = jax.nn.log_softmax((hidden @ decoder.head(params))[:, :-1])
        return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).mean()

    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--eps-roots", type=float, nargs="+", default=EPS_ROOTS)
    parser.add_argument("--gradients", action="store_true", help="the table of gradients' entries instead")
    options = parser.parse_args()
    if options.gradients:
        measure_gradients(options.shared)
    else:
        measure_training(options.shared, options.steps, options.rows, options.eps_roots)
