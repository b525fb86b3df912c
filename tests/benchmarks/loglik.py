"""Requests per second of the log-likelihood engine, with and without the sharing of prefixes.

    python -m tests.benchmarks.loglik ../shared

Minutes on two CPU cores; prints one markdown table. `../shared` is the folder of real data and models that
tests/conftest.py describes.

Rows are cut from TinyStories: a question and an answer, so long that k demonstrations and a row nearly fill the model's
context. `fixed` puts the same k demonstrations before every row, `clustered:8` one of 8 sets, `knn` a set of its own
(nothing to share: what looking for it costs); with `prompts` 8 answers follow each prompt of demonstrations and a
question, with `pairs` 2. The two engines take turns in one process and read the same requests; medians over the rounds,
the first of which compiles and does not count. Target: at least 2 with `fixed` and `clustered`.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from bilevel_jax.lm import models
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.inference.loglik import LogLikRequest, make_loglik_scorer
from tests.runs.problems_lm import stories

KINDS = {"fixed": (1, 1), "clustered:8": (8, 1), "knn": (0, 1), "prompts": (0, 8), "pairs": (0, 2)}
"""kind -> (sets of demonstrations, 0: one for each request; answers to a question)."""


def measure(shared: Path, *, models: list[str], rows: int, rounds: int, tokens: int, kinds: list[str]) -> None:
    """Print the table."""
    print(f"{jax.devices()[0].device_kind}, {rows} requests, {rounds} rounds, batches of {tokens} token places\n")
    print("| model | k | demonstrations | tokens each | requests/s unshared | shared | ratio | apart, nats/token |")
    print("|---|---|---|---|---|---|---|---|")
    for name in models:
        config, params = models.load_model(shared / "models" / name)
        decoder = models.make_decoder(config)
        engines = {
            share: make_loglik_scorer(decoder, share_prefixes=share, max_batch_tokens=tokens) for share in (False, True)
        }
        ids = _text(shared, name)
        for k in (3, 10):
            for kind in kinds:
                requests = _requests(ids, config, k, kind, rows)
                seconds: dict[bool, list[float]] = {False: [], True: []}
                scores = {}
                for turn in range(rounds + 1):
                    for share, one in engines.items():
                        began = time.perf_counter()
                        scores[share] = one.score(params, requests)
                        if turn:
                            seconds[share].append(time.perf_counter() - began)
                unshared, together = (rows / float(np.median(seconds[share])) for share in (False, True))
                apart = max(
                    abs(a.nats - b.nats) / a.num_tokens for a, b in zip(scores[True], scores[False], strict=True)
                )
                length = np.mean([len(prefix) + len(response) for prefix, response in requests])
                cells = name, k, kind, *(f"{x:.0f}" for x in (length, unshared, together)), f"{together / unshared:.2f}"
                print("| " + " | ".join(map(str, cells)) + f" | {apart:.0e} |", flush=True)


def _text(shared: Path, name: str) -> np.ndarray:
    tokenizer = load_tokenizer(shared / "models" / name)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in stories(shared, 1000)]
    return np.concatenate([np.asarray(text) for text in texts])


def _requests(ids: np.ndarray, config: models.DecoderConfig, k: int, kind: str, rows: int) -> list[LogLikRequest]:
    sets, answers = KINDS[kind]
    rng = np.random.default_rng(0)
    longest = (config.max_length - 1) // (k + 1)

    def piece(length: int) -> tuple[int, ...]:
        start = rng.integers(0, len(ids) - length)
        return tuple(ids[start : start + length].tolist())

    def half() -> int:
        return int(rng.integers(longest // 4, longest // 2 + 1))

    def demonstrations() -> tuple[int, ...]:
        return piece(k * 3 * longest // 4)

    if answers > 1:  # the demonstrations and the question are one prompt of its own
        questions = [demonstrations() + piece(half()) for _ in range(rows // answers)]
        return [LogLikRequest((config.bos, *question), piece(half())) for question in questions for _ in range(answers)]
    fixed = [demonstrations() for _ in range(sets)]
    return [
        LogLikRequest((config.bos, *(fixed[row % sets] if sets else demonstrations()), *piece(half())), piece(half()))
        for row in range(rows)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--models", nargs="+", default=["stories-260k", "babyllama-1m"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    measure(**vars(parser.parse_args()))
