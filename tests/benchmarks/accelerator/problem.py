"""The problem of a cell: a Llama of random weights that learns a random Markov chain."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from bilevel_jax.lm import models
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.models.families import config_to_dict
from bilevel_jax.runs.config.schema import OptimizerSection
from bilevel_jax.runs.infra.placement import make_mesh
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from tests.runs import problems_lm
from tests.runs.problems_lm import Rows, Setting

LORA_RANK = 16
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-4, "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 1.0,
}  # fmt: skip
SUCCESSORS = 4
"""Of each token in the chain: a model that has learned it has a loss of log 4 nats."""


class Size(NamedTuple):
    """A model and the batches that it is trained on."""

    config: models.DecoderConfig
    batch: int
    """Examples of a step."""
    micro: int
    """Micro-batches of a step."""
    length: int
    """Tokens of an example that the model reads."""
    steps: int
    """Of a training run."""

    @property
    def tokens(self) -> int:
        """That a step reads."""
        return self.batch * self.length

    @property
    def matrix_params(self) -> int:
        """Parameters that every token is multiplied by: all but norms and the embedding, which is looked up."""
        one = self.config
        attention = one.width * one.head_dim * 2 * (one.heads + one.kv_heads)
        return one.layers * (attention + 3 * one.width * one.mlp_width) + one.width * one.vocab_size

    @property
    def adapter_params(self) -> int:
        """Of LoRA, of the projections of queries and values."""
        one = self.config
        sinks = 2 * one.width + one.head_dim * (one.heads + one.kv_heads)
        return one.layers * LORA_RANK * sinks


def _size(
    vocabulary: int, width: int, layers: int, mlp: int, head: int, *, batch: int, micro: int, length: int, steps: int
) -> Size:
    config = models.DecoderConfig(
        vocab_size=vocabulary, width=width, mlp_width=mlp, layers=layers, heads=width // head, kv_heads=width // head,
        head_dim=head, max_length=length + 1,
    )  # fmt: skip
    return Size(config, batch, micro, length, steps)


SIZES = {
    "25k": _size(64, 32, 2, 80, 16, batch=8, micro=1, length=16, steps=6),
    "100k": _size(256, 64, 2, 176, 16, batch=8, micro=1, length=32, steps=6),
    "1M": _size(512, 128, 4, 352, 32, batch=16, micro=1, length=64, steps=16),
    "10M": _size(8192, 256, 8, 704, 64, batch=32, micro=1, length=256, steps=16),
    "100M": _size(32000, 640, 12, 1728, 64, batch=16, micro=1, length=512, steps=16),
    "1000M": _size(32000, 2048, 17, 5632, 128, batch=8, micro=2, length=512, steps=8),
}
"""By the number of parameters."""


def training_flops(size: Size, lora: bool) -> float:
    """Operations of the matrix products of a training step, by formula, P parameters in matrices and T tokens.

    All parameters: 2 P T forwards, 4 P T backwards. With adapters nothing is multiplied for the gradient of the base:
    4 P T, and 6 for each of the adapters. Attention and what is recomputed to save memory are left out, as usual.
    """
    if lora:
        return size.tokens * (4.0 * size.matrix_params + 6.0 * size.adapter_params)
    return size.tokens * 6.0 * size.matrix_params


def step_back_flops(size: Size, lora: bool) -> float:
    """As `training_flops`, of a step back: the gradient and its tangent. Three times as many for all parameters: the
    tangent of a product is two. With adapters twice for the base, whose tangent is zero."""
    if lora:
        return size.tokens * (8.0 * size.matrix_params + 18.0 * size.adapter_params)
    return 3 * training_flops(size, lora)


def make_rows(size: Size) -> Rows:
    """Four batches of training examples, and one of validation examples."""
    rng = np.random.default_rng(0)
    vocabulary = size.config.vocab_size
    successors = rng.integers(vocabulary, size=(vocabulary, SUCCESSORS), dtype=np.int32)

    def corpus(count: int) -> Corpus:
        tokens = np.empty((count, size.length + 1), np.int32)
        tokens[:, 0] = rng.integers(vocabulary, size=count)
        for place in range(size.length):
            tokens[:, place + 1] = successors[tokens[:, place], rng.integers(SUCCESSORS, size=count)]
        return Corpus(tokens.ravel(), np.ones(tokens.size, bool), np.arange(count + 1) * (size.length + 1))

    return Rows(corpus(num_examples(size)), (corpus(size.batch),), size.length)


def num_examples(size: Size) -> int:
    """Training examples: each is seen steps / 4 times."""
    return 4 * size.batch


@partial(jax.jit, static_argnames="config")
def random_params(config: models.DecoderConfig, key: jax.Array) -> Any:
    """As `models.init_params` draws them, which takes twice their memory, and so would hide the peak of a run."""
    shapes = jax.eval_shape(lambda key: models.init_params(config, key), key)
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(paths))
    drawn = [
        jnp.ones(leaf.shape) if path[-1].key == "scale" else config.init_scale * jax.random.normal(one, leaf.shape)
        for (path, leaf), one in zip(paths, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def optimizer_of(size: Size) -> optax.GradientTransformation:
    """AdamW with every part at work."""
    return build_optimizer(OptimizerSection(**OPTIMIZER), size.steps)


def make_setting(
    size: Size, lora: bool, *, params: Any = None, dtype: Any = jnp.float32, precision: str = "highest"
) -> Setting:
    """The bilevel problem; at another `precision` what the library multiplies at the highest is multiplied at that."""
    if params is None:
        params = random_params(size.config, jax.random.key(0))
    return problems_lm.compose(
        size.config,
        params,
        make_rows(size),
        optimizer_of(size),
        steps=size.steps,
        batch=size.batch,
        micro=size.micro,
        lora_rank=LORA_RANK if lora else 0,
        dtype=dtype,
        mesh=make_mesh(1),
        wrap_losses=lambda losses: train_at(precision, losses),
    )


def train_at(precision: str, losses: Callable) -> Callable:
    """The losses, with products at `precision` where they would be at the highest: of training, and of its step back.

    Other precisions, those of a step back by `product_precision`, stay as they are.
    """

    def at_precision(*arguments: Any) -> jax.Array:
        asked = jax.config.jax_default_matmul_precision
        with jax.default_matmul_precision(precision if asked == "highest" else asked):
            return losses(*arguments)

    return losses if precision == "highest" else at_precision


def estimate(size: Size, lora: bool, *, offload: str = "device", linearize: bool = False) -> dict[str, Any]:
    """What `bilevel-jax estimate` says of the run: its result as estimate.json has it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        raw = config_to_dict(size.config, "float32")
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        for name in ("train", "validation"):
            (Path(folder) / f"{name}.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
        return bj.commands.estimate(
            {
                "model": {"name_or_path": folder},
                "lora": {"r": LORA_RANK if lora else 0, "alpha": 2.0 * LORA_RANK},
                "data": {
                    "train": [f"{folder}/train.jsonl"],
                    "validation": [f"{folder}/validation.jsonl"],
                    "split": [1.0, 0.0, 0.0],
                    "max_length": size.length + 1,
                },
                "optimizer": OPTIMIZER,
                "train": {
                    "max_steps": size.steps,
                    "global_batch_size": size.batch,
                    "gradient_accumulation_steps": size.micro,
                },
                "outer": {"reliability_every": 0, "offload": offload, "linearize": linearize},
                "certify": {"enabled": False},
                "retrain": {"enabled": False},
                "mesh": {"data": 1},
            },
            estimate={
                "command": "select",
                "train_examples": num_examples(size),
                "validation_examples": size.batch,
                "measure": False,
            },
        ).result
