"""Tokens per second of weighted training, against an unweighted loop of plain optax and a PyTorch loop.

    python -m tests.benchmarks.throughput ../shared

Minutes on two CPU cores; prints one markdown table. `../shared` is the folder of real data and models that
tests/conftest.py describes.

All parameters of stories-260k (or --model babyllama-1m), AdamW, float32, 16 rows of about 64 tokens, no packing. The
three loops take turns in one process and read the same rows; medians over the rounds. What each does: `train` as
`bilevel-jax train` calls it, from making the batch to the loss; plain optax a jitted step of the mean loss of the same
batches, made by the same code; PyTorch `transformers` with its own loss, torch.optim.AdamW and the same padded tokens,
on all cores. Target: at least .97 of plain optax.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import forward_only_step, init_train_state
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches, tokens
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.config.schema import OptimizerSection
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from tests.runs.problems_lm import stories


def measure(shared: Path, *, model: str, steps: int, batch: int, length: int, rounds: int, parts: bool) -> None:
    """Print the table."""
    folder = shared / "models" / model
    texts = stories(shared, 800)
    texts = [" ".join(texts[i : i + 4]) for i in range(0, len(texts) - 3, 4)]
    rows = [Example(f"{i}", i, (Turn("text", text),), "", None, "", i) for i, text in enumerate(texts)]
    corpus, _ = tokens.tokenize(rows, tokens.load_tokenizer(folder), max_length=length + 1, truncation="right")
    order = batches.shuffled_order(corpus.num_examples, batch, 0)
    stream = batches.make_train_stream(
        corpus, order, steps, batches.BatchShape(1, batch, batch, batches.padded_max_length(corpus))
    )
    config, params = models.load_model(folder)
    adamw = build_optimizer(OptimizerSection(learning_rate=1e-4, warmup_steps=2), steps)
    per_example = sft.sft_losses(models.make_decoder(config, remat="none"))

    loops = {
        "weighted `train`": _weighted(per_example, adamw, params, stream, corpus.num_examples),
        "plain optax, no weights": _plain(per_example, adamw, params, stream),
    }
    torch_loop = _torch(folder, stream)
    if torch_loop is not None:
        loops["PyTorch `transformers`"] = torch_loop
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):  # the first compiles
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    targets = sum(int(stream.batch(step)["targeted"][0]) for step in range(steps))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ours = medians["weighted `train`"]
    print(f"\n{jax.devices()[0].device_kind}, {model}, {steps} steps of {batch} rows, {targets} supervised tokens;")
    print(f"{rounds} rounds\n\n| loop | median, s | tokens/s | speed of `train` over it |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {targets / median:.0f} | {median / ours:.2f} |")
    if parts:
        began = time.perf_counter()
        for step in range(steps):
            stream.batch(step)
        print(f"\nmaking the batches alone: {time.perf_counter() - began:.2f} s", flush=True)


def _weighted(per_example, adamw, params, stream, rows: int) -> Callable[[], None]:
    step = forward_only_step(weighted(lambda params, fixed, batch: per_example(params, batch)), adamw)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, rows), jnp.float32)

    def loop() -> None:
        state = init_train_state(adamw, jax.tree.map(jnp.copy, params))
        for index in range(stream.steps):
            state, loss = step(state, weights, None, jax.device_put(stream.batch(index)))
        loss.block_until_ready()

    return loop


def _plain(per_example, adamw, params, stream) -> Callable[[], None]:
    @jax.jit
    def step(params, opt, batch):
        loss, grad = jax.value_and_grad(lambda params: per_example(params, batch).mean())(params)
        updates, opt = adamw.update(grad, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    def loop() -> None:
        now, opt = params, adamw.init(params)
        for index in range(stream.steps):
            batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(index))
            now, opt, loss = step(now, opt, jax.device_put(batch))
        loss.block_until_ready()

    return loop


def _torch(folder: Path, stream) -> Callable[[], None] | None:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("PyTorch is not installed: its row is left out.")
        return None

    def loop() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for index in range(stream.steps):
            batch = stream.batch(index)
            ids, seen = torch.tensor(batch["tokens"][0]).long(), torch.tensor(batch["segments"][0] > 0)
            wanted = torch.tensor(batch["slot"][0] < batch["supervised"].shape[1])
            labels = torch.where(wanted, torch.tensor(batch["targets"][0]).long(), -100)
            logits = model(input_ids=ids, attention_mask=seen.long()).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            adamw.step()
            adamw.zero_grad()

    return loop


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--model", default="stories-260k")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", action="store_true", help="also time the making of batches")
    measure(**vars(parser.parse_args()))
