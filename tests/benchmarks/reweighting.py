"""Noisy fine-tuning on real text with uniform, score-based and learned weights.

    python -m tests.benchmarks.reweighting ../shared

Prints one markdown table; `../shared` is the folder of real data and models that tests/conftest.py describes. The task
is that of tests/commands/test_select_slow.py: 160 sentences of film reviews, 160 others whose tokens were permuted, 80
openings of school arithmetic; of 240 other sentences 120 are validation, the holdout of all scores and of the learned
weights, and the rest test, which nothing but the table reads. Every arm trains all parameters of the 260-thousand-
parameter model for as many steps, from cold, under the same data orders; the oracle has the 160 rows alone. Scores give
weights by min-max over each step's rows; AUC is of the weights that rows got against the labels.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq

from bilevel_jax.commands.select.run import select
from bilevel_jax.commands.train.run import train
from bilevel_jax.runs.config.load import SelectConfig, TrainConfig, load_config
from bilevel_jax.runs.stats import auc, mean_interval
from tests.runs.problems_lm import MODEL, with_headroom

SCORED = (("ica", 1), ("ica", 5), ("alignment", 1), ("alignment", 5), ("perplexity", 1), ("random", 1))


def measure(shared: Path, folder: Path, *, seeds: int, steps: int) -> None:
    """Print the table."""
    began = time.perf_counter()
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    with_headroom(shared, folder)
    trusted = (folder / "validation.jsonl").read_text("utf-8").splitlines(keepends=True)
    for name, rows in (("validation", trusted[:120]), ("test", trusted[120:])):
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    common = {
        "model.name_or_path": shared / "models" / MODEL, "lora.r": 0, "data.train": folder / "train.jsonl",
        "data.validation": folder / "fit.jsonl", "data.test": folder / "test.jsonl", "data.label-field": "label",
        "data.max-length": 96, "data.truncation": "right", "optimizer.learning-rate": 3e-4,
        "optimizer.warmup_steps": 10, "optimizer.eps-root": 1e-8, "train.max_steps": steps,
        "train.global_batch_size": 16, "mesh.data": 1,
    }  # fmt: skip
    given = [text for flag, value in common.items() for text in (f"--{flag}", str(value))]
    given += ["--data.split", "1", "0", "0", "--output.no-progress"]

    def learned() -> list[str]:
        flags = ["--outer.weighting", "sigmoid", "--outer.learning-rate", "1", "--outer.steps", "4", "--fast"]
        select(load_config(SelectConfig, None, [*given, *flags, "--out", str(folder / "dev")]))
        return ["--weights.file", str(folder / "dev" / "weights.parquet")]

    clean = folder / "clean.jsonl"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]
    clean.write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"] == "clean"), encoding="utf-8")
    arms: dict[str, Callable[[], list[str]]] = {
        "uniform": list,
        "oracle": lambda: ["--data.train", str(clean)],
        "learned (unrolled)": learned,
    }
    for name, count in SCORED:
        arms[f"{name}, R = {count}"] = partial(_scored, name, count)

    print("| weights | test loss, nats per token | token accuracy | AUC | scoring / training, steps |")
    print("|---|---|---|---|---|", flush=True)
    for name, flags_of in arms.items():
        flags, runs = flags_of(), []
        for seed in range(seeds):
            out = folder / f"{name} {seed}".replace(" ", "_")
            drawn = ["--train.seed", str(seed), "--data.seed", str(seed), "--train.eval-steps", str(steps)]
            result = train(load_config(TrainConfig, None, [*given, *flags, *drawn, "--out", str(out)]))
            runs.append(_told(result, out))
        print(_line(name, runs), flush=True)
    print(f"\n{seeds} seeds of {steps} steps, means and 95 % intervals; {time.perf_counter() - began:.0f} s")


def _scored(name: str, count: int) -> list[str]:
    return ["--weights.score", name, "--weights.refresh", str(count)]


def _told(result: dict[str, Any], out: Path) -> dict[str, float]:
    table = pq.read_table(out / "weights.parquet")
    good = np.array([label == "clean" for label in table["label"].to_pylist()])
    after = result["parts"]["test"]["after"]
    scoring = result["scoring"]
    return {
        "loss": after["loss"],
        "accuracy": after["accuracy"],
        "auc": auc(table["weight"].to_numpy(), good),
        "cost": scoring["passes"] / result["steps"] if scoring else 0.0,
    }


def _line(name: str, runs: list[dict[str, float]]) -> str:
    mean = {key: mean_interval([run[key] for run in runs]) for key in runs[0]}
    loss, half = mean["loss"]
    return (
        f"| {name} | {loss:.3f} ± {half:.3f} | {mean['accuracy'][0]:.3f} | {mean['auc'][0]:.3f} | "
        f"{mean['cost'][0]:.2f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(options.shared, Path(temporary), seeds=options.seeds, steps=options.steps)
