"""Tokens per second of the sampler, next to `generate` of transformers.

    python -m tests.benchmarks.generate ../shared

Minutes on two CPU cores; needs torch; prints one markdown table. `../shared` is the folder of real data and models that
tests/conftest.py describes.

Prompts are the first tokens of TinyStories, all of one length; every response has the same number of tokens, so that
both do the same work. The sampler and transformers, with one thread and with all, take turns in one process; medians
over the rounds, the first of which compiles and does not count. The ratio is to the faster of the two. Greedy responses
are compared, too. Target: at least 1.5 at batch 8.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from bilevel_jax.core.types import Params
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.inference.generate import Prompt, Sampler, SamplingParams, make_detokenizer, make_sampler
from tests.runs.problems_lm import stories

WAYS = {"greedy": 0.0, "sampled": 1.0}
"""How -> temperature."""


def measure(
    shared: Path, *, models: list[str], batches: list[int], prompt: int, new: int, rounds: int, threads: list[int]
) -> None:
    """Print the table."""
    print(f"{jax.devices()[0].device_kind}, prompts of {prompt} tokens, responses of {new}, {rounds} rounds\n")
    heads = [f"transformers, {count} thread{'s' if count > 1 else ''}" for count in threads]
    print(f"| model | batch | | {' | '.join(heads)} | sampler, tokens/s | ratio | same tokens |")
    print("|---|---|---|" + "---|" * (len(threads) + 3))
    for name in models:
        config, params = models.load_model(shared / "models" / name)
        tokenizer = load_tokenizer(shared / "models" / name)
        reference = transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / name).eval()
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in stories(shared, 1000)]
        ids = [[config.bos, *text][:prompt] for text in texts if len(text) >= prompt]
        for batch in batches:
            for how, temperature in WAYS.items():
                sampling = SamplingParams(temperature, max_new_tokens=new)
                ours = make_sampler(
                    models.make_decoder(config), sampling, make_detokenizer(tokenizer), end_tokens=(),
                    max_batch_tokens=batch * (prompt + new), bucket_lengths=(prompt,),
                )  # fmt: skip
                asked = [Prompt(str(row), tuple(ids[row])) for row in range(batch)]
                turns = [partial(_reference, reference, ids[:batch], sampling, count) for count in threads]
                seconds, outs = _in_turns([*turns, partial(_ours, ours, params, asked)], rounds)
                speeds = batch * new / np.median(seconds, 0)
                same = "" if temperature else sum(a == b for a, b in zip(outs[0], outs[-1], strict=True))
                cells = name, batch, how, *(f"{speed:,.0f}" for speed in speeds)
                ratio = speeds[-1] / speeds[:-1].max()
                print("| " + " | ".join(map(str, cells)) + f" | {ratio:.1f} | {same} |", flush=True)


def _in_turns(turns: Sequence[Callable[[], list]], rounds: int) -> tuple[np.ndarray, list[list]]:
    """(seconds [rounds, turns], what each gave at last), after one round that does not count."""
    seconds, outs = np.zeros((rounds + 1, len(turns))), [[] for _ in turns]
    for turn in range(rounds + 1):
        for at, make in enumerate(turns):
            began = time.perf_counter()
            outs[at] = make()
            seconds[turn, at] = time.perf_counter() - began
    return seconds[1:], outs


def _ours(ours: Sampler, params: Params, prompts: list[Prompt]) -> list[tuple[int, ...]]:
    return [row[0].tokens for row in ours.sample(params, prompts, (0,))]


def _reference(
    model: torch.nn.Module, ids: list[list[int]], sampling: SamplingParams, threads: int
) -> list[tuple[int, ...]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    tokens = torch.tensor(ids)
    options = {"do_sample": sampling.temperature > 0} | ({"top_k": 0} if sampling.temperature else {})
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.max_new_tokens, pad_token_id=0, eos_token_id=None, **options,
        )  # fmt: skip
    torch.set_num_threads(before)
    return [tuple(row) for row in out[:, tokens.shape[1] :].tolist()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--models", nargs="+", default=["stories-260k", "babyllama-1m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    measure(**vars(parser.parse_args()))
