"""Tokens per second of the sampler, next to `generate` of transformers and to batches that wait for the longest answer.

    python -m tests.benchmarks.generate ../shared
    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \\
        python -m tests.benchmarks.generate ../shared --filling

Minutes on two CPU cores; needs torch; prints one markdown table. `../shared` is the folder of real data and models that
tests/conftest.py describes.

Prompts are the first tokens of TinyStories, all of one length; every response has the same number of tokens, so that
both do the same work. The sampler and transformers, with one thread and with all, take turns in one process; medians
over the rounds, the first of which compiles and does not count. The ratio is to the faster of the two. Greedy responses
are compared, too. Target: at least 1.5 at batch 8.

With `--filling`: many more prompts than places, sampled at temperature 1, in one call, where a waiting prompt takes the
place of a finished response, and in calls of as many prompts as there are places, each of which waits for its longest
response. Responses end with the sentence, or all at the same length. CPU seconds. Target: at least 1.5
where lengths are mixed. Where they are equal nothing can be gained: about 1, within the noise of the machine.
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
from bilevel_jax.lm.models import load_model, make_decoder
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
        config, params = load_model(shared / "models" / name)
        tokenizer = load_tokenizer(shared / "models" / name)
        reference = transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / name).eval()
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in stories(shared, 1000)]
        ids = [[config.bos, *text][:prompt] for text in texts if len(text) >= prompt]
        for batch in batches:
            for how, temperature in WAYS.items():
                sampling = SamplingParams(temperature, max_new_tokens=new)
                ours = make_sampler(
                    make_decoder(config), sampling, make_detokenizer(tokenizer), end_tokens=(),
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


ENDS = {"a sentence": ".", "equal": None}
"""How long responses are -> the token that ends them."""


def measure_filling(
    shared: Path, *, models: list[str], places: int, prompts: int, prompt: int, new: int, rounds: int
) -> None:
    """Print the table of places that are filled again."""
    print(f"{prompt} tokens of a prompt, {places} places, responses of at most {new}, {rounds} rounds\n")
    print("| model | responses | mean, longest | waiting, tokens/s | filled again, tokens/s | ratio | same tokens |")
    print("|---|---|---|---|---|---|---|")
    for name in models:
        config, params = load_model(shared / "models" / name)
        tokenizer = load_tokenizer(shared / "models" / name)
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in stories(shared, 1000)]
        ids = [(config.bos, *text)[:prompt] for text in texts if len(text) >= prompt][:prompts]
        asked = [Prompt(f"{row:04}", tokens) for row, tokens in enumerate(ids)]
        for title, end in ENDS.items():
            sampler = make_sampler(
                make_decoder(config), SamplingParams(max_new_tokens=new), make_detokenizer(tokenizer),
                end_tokens=() if end is None else (tokenizer.convert_tokens_to_ids(end),),
                max_batch_tokens=places * (prompt + new), bucket_lengths=(prompt,),
            )  # fmt: skip
            batches = [asked[at : at + places] for at in range(0, len(asked), places)]

            def wait(sampler: Sampler = sampler, params: Params = params, batches: list = batches) -> list:
                return [tokens for batch in batches for tokens in _ours(sampler, params, batch)]

            seconds, outs = _in_turns([wait, partial(_ours, sampler, params, asked)], rounds, time.process_time)
            lengths = [len(tokens) for tokens in outs[1]]
            speeds = sum(lengths) / np.median(seconds, 0)
            same = sum(a == b for a, b in zip(*outs, strict=True))
            print(
                f"| {name} | {title} | {np.mean(lengths):.0f}, {max(lengths)} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | "
                f"{np.median(seconds[:, 0] / seconds[:, 1]):.2f} | {same} of {len(asked)} |",
                flush=True,
            )


def _in_turns(
    turns: Sequence[Callable[[], list]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[np.ndarray, list[list]]:
    """(seconds [rounds, turns], what each gave at last), after one round that does not count."""
    seconds, outs = np.zeros((rounds + 1, len(turns))), [[] for _ in turns]
    for turn in range(rounds + 1):
        for at, make in enumerate(turns):
            began = clock()
            outs[at] = make()
            seconds[turn, at] = clock() - began
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
    parser.add_argument("--filling", action="store_true")
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=256)
    options = vars(parser.parse_args())
    is_filling, places, prompts = (options.pop(name) for name in ("filling", "places", "prompts"))
    if is_filling:
        shown = {name: options[name] for name in ("shared", "models", "prompt", "new", "rounds")}
        measure_filling(**shown, places=places, prompts=prompts)
    else:
        measure(**options)
