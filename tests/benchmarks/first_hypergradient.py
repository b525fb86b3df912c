"""How long the first hypergradient of a language model takes, with nothing compiled and with everything.

    python -m tests.benchmarks.first_hypergradient --model FOLDER

Three processes, one after the other: the first finds no compiled programs, the next two find those of the first, as the
next run of the command line does. Each imports the library, loads the model, takes a hypergradient through some AdamW
steps on stories of the same words, and takes it once more, which compiles nothing.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

WORDS = "the little dog saw a big red ball and ran to get it for his friend who was sad".split()
COLUMNS = ("imports", "model", "first hypergradient", "of it compiling", "programs compiled", "second hypergradient")


def main(*, model: str, steps: int, batch: int, words: int) -> None:
    """Print the table."""
    options = ["--model", model, "--steps", str(steps), "--batch", str(batch), "--words", str(words)]
    print(f"{steps} steps of {batch} stories of {words} words; load {os.getloadavg()[0]:.1f}; seconds\n")
    print("| compiled programs | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # as the command line has it
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("none", "kept", "kept"):
            line = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.first_hypergradient", "--measure", *options],
                env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True,
            ).stdout.splitlines()[-1]  # fmt: skip
            measured = json.loads(line)
            cells = [str(measured[column]) if "programs" in column else f"{measured[column]:.1f}" for column in COLUMNS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def measure(*, model: str, steps: int, batch: int, words: int) -> dict[str, Any]:
    """The seconds of this process, by COLUMNS."""
    clock = [time.perf_counter()]
    import jax
    import optax

    import bilevel_jax as bj

    compiling: list[float] = []
    hits: list[str] = []

    def count_seconds(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiling.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(count_seconds)
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    bj.lm.load  # noqa: B018 (a lazy module, which this imports)
    clock.append(time.perf_counter())
    language_model = bj.lm.load(model)
    clock.append(time.perf_counter())
    told = itertools.cycle(WORDS)
    stories = [{"text": " ".join(next(told) for _ in range(words + row % 3))} for row in range(3 * batch)]
    optimizer = optax.adamw(1e-4, eps_root=1e-8)

    def differentiate() -> None:
        solution = language_model.finetune(
            stories[batch:], stories[:batch], optimizer, steps=steps, batch_size=batch, leaks="keep"
        )
        jax.block_until_ready(solution.hypergradients)
        clock.append(time.perf_counter())

    differentiate()
    seconds, programs = sum(compiling), len(compiling) - len(hits)
    differentiate()
    imports, loading, first, second = (end - start for start, end in itertools.pairwise(clock))
    return dict(zip(COLUMNS, (imports, loading, first, seconds, programs, second), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:cipher", help="a Hugging Face folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--measure", action="store_true", help="measure in this process, and print it as JSON")
    options = vars(parser.parse_args())
    if options.pop("measure"):
        print(json.dumps(measure(**options)))
    else:
        main(**options)
