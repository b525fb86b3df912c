"""How large single entries of gradients are beside optimizer.eps_root, by model.

    python -m tests.benchmarks.eps_root SHARED

Adam divides by the root of (a mean square gradient + eps_root). For each model the root mean squares of its gradients'
entries over batches of 16 x 128 tokens: two small trained models on children's stories, and two larger ones with random
weights on random tokens. Only layers count, as rows of embeddings wait for their token. What eps_root does to errors of
hypergradients is in `precision.py`.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.lm import models
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.models.config import DecoderConfig
from tests.runs import problems_lm

TRAINED = ("stories-260k", "babyllama-1m")
RANDOM = {"random, 17 M": (256, 12, 8), "random, 145 M": (768, 14, 12)}
"""Width, layers and heads."""
BATCH, LENGTH, BATCHES = 16, 128, 4
THRESHOLD = 1e-4
"""The root of 1e-8."""


class Case(NamedTuple):
    """A model and what it reads."""

    name: str
    architecture: DecoderConfig
    params: Any
    batches: np.ndarray
    """Token ids [batches, rows, length]."""


def measure(shared: Path) -> None:
    """Print the table."""
    print("| model | parameters | median | share below 1e-4 |")
    print("|---|---|---|---|")
    for case in cases(shared):
        gradient = jax.jit(jax.grad(next_token_loss(case.architecture)))
        squares = [jax.tree.map(jnp.square, gradient(case.params, ids)) for ids in case.batches]
        means = jax.tree.map(lambda *some: sum(some) / len(some), *squares)
        layers = [
            np.sqrt(np.ravel(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(means)
            if "layers" in jax.tree_util.keystr(path)
        ]
        entries, size = np.concatenate(layers), sum(leaf.size for leaf in jax.tree.leaves(case.params))
        share = (entries < THRESHOLD).mean()
        print(f"| {case.name} | {size:,} | {np.median(entries):.1e} | {share:.1%} |", flush=True)


def cases(shared: Path) -> Iterator[Case]:
    """The models, smallest first."""
    texts = problems_lm.stories(shared, 128)
    for name in TRAINED:
        architecture, params = models.load_model(shared / "models" / name)
        encode = load_tokenizer(shared / "models" / name).encode
        ids, size = np.concatenate([encode(text) for text in texts]), BATCH * LENGTH
        count = min(BATCHES, len(ids) // size)
        yield Case(name, architecture, params, ids[: count * size].reshape(count, BATCH, LENGTH))
    for name, (width, layers, heads) in RANDOM.items():
        architecture = DecoderConfig(
            vocab_size=8192, width=width, mlp_width=4 * width, layers=layers, heads=heads, kv_heads=heads,
            head_dim=width // heads, max_length=LENGTH,
        )  # fmt: skip
        ids = np.random.default_rng(0).integers(0, architecture.vocab_size, (2, BATCH, LENGTH))
        yield Case(name, architecture, models.init_params(architecture, jax.random.key(0)), ids)


def next_token_loss(architecture: DecoderConfig) -> Callable[[Any, jax.Array], jax.Array]:
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
    measure(parser.parse_args().shared)
