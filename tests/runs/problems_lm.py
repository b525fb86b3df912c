"""A small real language model on real rows: what the tests of the whole pipeline and the benchmarks share."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.types import CompositeLoss, Params, Problem, Stream, TrainState
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches, tokens
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.runs.config.schema import ObjectiveSection as Chosen
from bilevel_jax.runs.config.schema import OptimizerSection
from bilevel_jax.runs.infra.placement import align_layout, cache_stream, place_stream, replicate
from bilevel_jax.runs.tasks.objective import build_objective
from bilevel_jax.runs.tasks.optimizers import build_optimizer

MODEL = "stories-260k"


class Rows(NamedTuple):
    """Tokenized training examples, and the parts of the validation examples."""

    train: Corpus
    held_out: tuple[Corpus, ...]
    length: int
    """Token places that hold the longest of all."""


class Setting(NamedTuple):
    """A bilevel problem on the language model, with its start and its streams."""

    problem: Problem
    loss: CompositeLoss
    fixed: dict[str, Any]
    params: Params
    optimizer: optax.GradientTransformation
    train: Stream
    held_out: tuple[Stream, ...]
    rows: int

    @property
    def validation(self) -> Stream:
        """The first part of the validation examples."""
        return self.held_out[0]

    def start(self) -> TrainState:
        """The state before the first step."""
        return init_train_state(self.optimizer, self.params)

    def trained(self, weights: jax.Array, **options):
        """(the transition, the finished run)."""
        step = train_step(self.problem, self.optimizer)
        return step, train(step, self.start(), weights, self.fixed, self.train, **options)


def adamw(steps: int, *, learning_rate: float, **options) -> optax.GradientTransformation:
    """The package's default with every part at work: clipped, decayed, warmed up, cosine, eps_root = 1e-12."""
    settings = {"warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 1.0, **options}
    return build_optimizer(OptimizerSection(learning_rate=learning_rate, **settings), steps)


def stories(shared: Path, count: int, *, skip: int = 0) -> list[str]:
    """The second sentence of children's stories: what the model was trained on."""
    texts = json.loads((shared / "data/tinystories/tinystories_1000.json").read_text(encoding="utf-8"))
    sentences = [parts[1].strip() + "." for text in texts if len(parts := text.split(". ")) > 2]
    return _unique(sentences)[skip : skip + count]


def reviews(shared: Path, count: int, *, skip: int = 0) -> list[str]:
    """Sentences of film reviews: far from what the model was trained on."""
    with open(shared / "data/sst2/train.jsonl", encoding="utf-8") as lines:
        return _unique([json.loads(line)["text"] for line in lines])[skip : skip + count]


def with_headroom(shared: Path, folder: Path) -> None:
    """400 training examples: 160 sentences of film reviews, 160 others whose token ids one fixed permutation maps,
    80 openings of school arithmetic; and 240 trusted sentences."""
    rng = np.random.default_rng(0)
    with open(shared / "data/sst2/train.jsonl", encoding="utf-8") as lines:
        texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
    texts = [text for text in texts if 20 <= len(text) <= 110]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    with open(shared / "data/gsm8k/train.jsonl", encoding="utf-8") as lines:
        arithmetic = [json.loads(next(lines))["question"][:100] for _ in range(80)]
    tokenizer = tokens.load_tokenizer(shared / "models" / MODEL)
    special = set(tokenizer.all_special_ids)
    plain = sorted(
        i for text, i in tokenizer.get_vocab().items() if i not in special and not re.fullmatch(r"<0x..>", text)
    )
    permuted = dict(zip(plain, rng.permutation(plain).tolist(), strict=True))

    def garbled(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode([permuted.get(i, i) for i in ids]).strip()

    labelled = {"clean": texts[:160], "garbled": map(garbled, texts[160:320]), "off-domain": arithmetic}
    rows = [{"text": text, "label": label} for label, part in labelled.items() for text in part]
    parts = {"train": [rows[i] for i in rng.permutation(len(rows))]}
    parts |= {"validation": [{"text": text} for text in texts[400:640]]}
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def tokenized(shared: Path, train: Sequence[str], *held_out: Sequence[str], max_length: int = 32) -> Rows:
    """Rows cut to `max_length` tokens."""
    tokenizer = tokens.load_tokenizer(shared / "models" / MODEL)

    def corpus(texts: Sequence[str]) -> Corpus:
        examples = [Example(f"{row}", row, (Turn("text", text),), "", None, "", row) for row, text in enumerate(texts)]
        return tokens.tokenize(examples, tokenizer, max_length=max_length, truncation="right")[0]

    corpora = corpus(train), *map(corpus, held_out)
    return Rows(corpora[0], corpora[1:], max(batches.padded_max_length(one) for one in corpora))


def setting(
    shared: Path,
    rows: Rows,
    optimizer: optax.GradientTransformation,
    *,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Setting:
    """`compose` with the small real model."""
    architecture, base = models.load_model(shared / "models" / MODEL, dtype=dtype)
    return compose(architecture, base, rows, optimizer, dtype=dtype, **options)


def compose(
    architecture: models.DecoderConfig,
    base: Params,
    rows: Rows,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch: int,
    micro: int,
    lora_rank: int = 0,
    packing: bool = False,
    prior: float = 0.0,
    dtype: Any = jnp.float32,
    seed: int = 0,
    mesh: Mesh | None = None,
    wrap_losses: Callable[[Callable], Callable] = lambda losses: losses,
) -> Setting:
    """Fine-tuning of all parameters, or of adapters of q and v, as a run composes it; on a mesh where one is given.

    `wrap_losses` makes other losses of examples of those of the objective.
    """
    lora = lora_rank > 0
    params = (
        models.init_lora(architecture, jax.random.key(1), rank=lora_rank, alpha=2 * lora_rank, dtype=dtype)
        if lora
        else base
    )
    chosen = build_objective(Chosen(), models.make_decoder(architecture), lora=lora)
    values, loss = wrap_losses(chosen.losses), chosen.composite_loss
    problem = weighted(values, prior=proximal(prior, lambda fixed: fixed["start"]) if prior else None)
    size = rows.train.num_examples
    order = batches.shuffled_order(size, batch, seed)
    shape = batches.fit_batch_shape(
        rows.train, [order], steps, num_micro_batches=micro, length=rows.length, packing=packing
    )
    flat = batches.BatchShape(1, batch // micro, batch // micro, rows.length)
    if mesh is not None:
        shape = align_layout(mesh, shape)
    one = Setting(
        problem=problem,
        loss=loss,
        fixed={"base": base if lora else None, "start": params if prior else None},
        params=params,
        optimizer=optimizer,
        train=batches.make_train_stream(rows.train, order, steps, shape),
        held_out=tuple(batches.make_evaluation_stream(corpus, flat) for corpus in rows.held_out),
        rows=size,
    )
    if mesh is None:
        return one
    return one._replace(
        fixed=replicate(mesh, one.fixed),
        params=replicate(mesh, one.params),
        train=place_stream(mesh, one.train),
        held_out=tuple(cache_stream(mesh, part) for part in one.held_out),
    )


def summed(rows: Rows, batch: int) -> Stream:
    """All training examples once: a stream that sums to their mean, as implicit estimators read it."""
    layout = batches.BatchShape(1, batch, batch, rows.length)
    steps = batches.steps_per_epoch(rows.train.num_examples, batch)
    order = batches.shuffled_order(rows.train.num_examples, batch, 0)
    return batches.make_train_stream(rows.train, order, steps, layout, total_examples=rows.train.num_examples)


def stacked(stream: Stream):
    """All batches of a stream, [steps, micro, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[stream.batch(step) for step in range(stream.steps)])


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))
