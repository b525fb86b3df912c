"""What a rater learned on 400 examples is worth on thousands that it has never seen.

    python -m tests.benchmarks.raters cipher out/raters --seeds 3
    python -m tests.benchmarks.raters sweeps out/raters --seeds 3
    python -m tests.benchmarks.raters stories out/raters_stories --shared ../shared --seeds 3
    python -m tests.benchmarks.raters speed out/raters_speed --shared ../shared --sizes 1024
    python -m tests.benchmarks.raters rows out/raters_rows --rater out/raters/0/rater/rater

`cipher`: half of 400 examples wrong or random, 16 validation examples. Per-example logits and a rater, 8 outer steps at
one rate; then the rater weighs 4,000 others, without a sweep, and a model is trained on them with these weights. The
headroom is (uniform - arm) / (uniform - oracle) of test loss. `sweeps`: outer steps that each takes to one dev loss, by
the rate of these steps. `stories`: passages of TinyStories, half with their words permuted, a rater over stories-260k;
its selection trains babyllama-1m. `rows`: memory of `score`; `speed`: its processor time next to that of the forward
passes that its features take.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bilevel_jax.commands.score.chunks import write_chunk
from bilevel_jax.commands.score.scorer import load_scorer, score_examples, tokenize_chunk
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.runs.config.load import ScoreConfig, load_config
from bilevel_jax.runs.config.schema import RaterSection
from bilevel_jax.runs.engine import raters
from bilevel_jax.runs.scoring import features
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model
from tests.runs.tiny_rater import write_rater

FEATURES = ["length", "loss", "validation_loss", "hidden"]
OPTIMIZER = [
    "--optimizer.learning-rate", "2e-3", "--optimizer.warmup-steps", "20", "--optimizer.b2", "0.99",
    "--optimizer.eps-root", "1e-6",
]  # fmt: skip


WEIGHTINGS: dict[str, list[str]] = {
    "per_example": ["--outer.weighting", "softmax"],
    "rater": ["--outer.weighting", "rater", "--rater.features", *FEATURES],
}
RATES = (0.25, 0.5, 1.0, 2.0)


def run(*arguments: Any) -> float:
    """Run the command line in a process of its own; its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bilevel_jax.cli", *map(str, arguments)], check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def read(folder: Path) -> dict[str, Any]:
    """result.json of a run."""
    return json.loads((folder / "result.json").read_text())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- the cipher


def measure_cipher(folder: Path, seeds: int) -> None:
    """Print what each seed and all together gave."""
    table = [measure_cipher_seed(folder / str(seed), seed) for seed in range(seeds)]
    for key in table[0]:
        mean, half = mean_interval([row[key] for row in table])
        print(f"{key:<60} {mean:.3f} ± {half:.3f}   {[round(row[key], 3) for row in table]}", flush=True)


def measure_cipher_seed(folder: Path, seed: int) -> dict[str, float]:
    """One seed: both kinds of weights learned, and the rater's applied."""
    prepare_cipher(folder, seed)
    common = [
        *cipher_flags(folder, seed), "--outer.learning-rate", 1.5, "--certify.no-enabled", "--retrain.variants",
        "uniform", "learned", "oracle", "--retrain.seeds", 1,
    ]  # fmt: skip
    for name, flags in WEIGHTINGS.items():
        if not (folder / name / "result.json").exists():
            run("select", *common, *flags, "--out", folder / name)
    results = {name: read(folder / name) for name in WEIGHTINGS}
    dev = {name: [record["loss"]["dev"] for record in result["records"]] for name, result in results.items()}
    best = min(dev["per_example"])
    reached = [step for step, loss in enumerate(dev["rater"]) if loss <= best]
    out = {
        "sweeps of per-example logits to their best dev loss": float(int(np.argmin(dev["per_example"]))),
        "sweeps of the rater to that loss (nan: never)": float(reached[0]) if reached else float("nan"),
        "dev loss, per-example": best,
        "dev loss, rater": min(dev["rater"]),
        "AUC on own examples, per-example": results["per_example"]["auc"]["weights"],
        "AUC on own examples, rater": results["rater"]["auc"]["weights"],
    }
    for name, result in results.items():
        mean = {row["name"]: row["mean"]["test"] for row in result["compare"]}
        out[f"headroom on own examples, {name}"] = headroom(mean["uniform"], mean["learned"], mean["oracle"])
    scored = folder / "scored"
    if not (scored / "result.json").exists():
        run("score", "--rater", folder / "rater" / "rater", "--data", folder / "unseen.jsonl", "--selection.top-share",
            0.5, "--data.label-field", "label", "--output.no-progress", "--out", scored)  # fmt: skip
    out["AUC on 4,000 unseen"] = read(scored)["auc"]
    good = folder / "unseen_clean.jsonl"
    write(good, [row for row in rows_of(folder / "unseen.jsonl") if row["label"] == "clean"])
    trained = {
        "uniform": [folder / "unseen.jsonl"],
        "rater's weights": [folder / "unseen.jsonl", "--weights.file", scored / "scores.parquet", "--weights.mean-one"],
        "rater's half": [scored / "selected.jsonl"],
        "oracle": [good],
    }
    losses = {}
    for name, (train, *flags) in trained.items():
        target = folder / f"trained {name}"
        if not (target / "result.json").exists():
            run("train", "--model", folder / "model", "--lora.r", 0, "--train", train, *flags, "--validation",
                folder / "validation.jsonl", "--data.test", folder / "test.jsonl", "--data.split", 1, 0, 0,
                "--data.max-length", 32, *OPTIMIZER, "--train.max-steps", 128, "--train.global-batch-size", 32,
                "--train.seed", 10_000, "--data.seed", 10_000 + seed, "--output.no-progress",
                "--out", target)  # fmt: skip
        losses[name] = read(target)["parts"]["test"]["after"]["loss"]
        out[f"test loss on unseen, {name}"] = losses[name]
    for name in ("rater's weights", "rater's half"):
        out[f"headroom on unseen, {name}"] = headroom(losses["uniform"], losses[name], losses["oracle"])
    return out


def cipher_flags(folder: Path, seed: int) -> list[Any]:
    """What all runs of `select` on the cipher share."""
    return [
        "--model", folder / "model", "--lora.r", 0, "--train", folder / "train.jsonl", "--validation",
        folder / "validation.jsonl", "--data.dev", folder / "dev.jsonl", "--data.test", folder / "test.jsonl",
        "--data.split", 1, 0, 0, "--data.label-field", "label", "--data.max-length", 32, *OPTIMIZER,
        "--train.max-steps", 128, "--train.global-batch-size", 32, "--train.seed", seed, "--data.seed", seed,
        "--outer.steps", 8, "--outer.ess-floor", 0.05, "--outer.patience", 0, "--output.no-progress",
    ]  # fmt: skip


def measure_sweeps(folder: Path, seeds: int) -> None:
    """Print the outer steps that a rater takes to the dev loss of per-example logits after 1, 2, ... of theirs.

    Of each the least dev loss after so many steps, at the rate that is best for this number.
    """
    for seed in range(seeds):
        place = folder / str(seed)
        prepare_cipher(place, seed)
        dev: dict[str, list[np.ndarray]] = {name: [] for name in WEIGHTINGS}
        for name, flags in WEIGHTINGS.items():
            for rate in RATES:
                out = place / f"{name} {rate:g}"
                if not (out / "result.json").exists():
                    run("select", *cipher_flags(place, seed), *flags, "--outer.learning-rate", rate,
                        "--outer.reliability-every", 0, "--fast", "--out", out)  # fmt: skip
                losses = np.full(9, np.inf)
                records = read(out)["records"]
                losses[: len(records)] = [record["loss"]["dev"] for record in records]
                dev[name].append(np.minimum.accumulate(losses))
        least = {name: np.min(curves, axis=0) for name, curves in dev.items()}
        steps = [int(np.argmax(least["rater"] <= loss)) or None for loss in least["per_example"][1:]]
        for name, curve in least.items():
            print(f"seed {seed}, {name:<12} least dev loss after 0, 1, ... steps: {curve.round(3).tolist()}")
        print(f"seed {seed}, the rater's steps to the loss of per-example logits after 1, 2, ...: {steps}", flush=True)


def prepare_cipher(folder: Path, seed: int) -> None:
    """400 training examples, 4,000 unseen ones and the model of the built-in task."""
    if (folder / "model").exists():
        return
    cipher.write_cipher_data(folder, seed=seed, clean=2200, wrong=1100, noise=1100, validation=16, dev=64, test=256)
    rows, counts = rows_of(folder / "train.jsonl"), {"clean": 200, "wrong": 100, "noise": 100}
    train: list[dict[str, Any]] = []
    unseen: list[dict[str, Any]] = []
    for row in rows:
        is_own = sum(other["label"] == row["label"] for other in train) < counts[row["label"]]
        (train if is_own else unseen).append(row)
    write(folder / "train.jsonl", train)
    write(folder / "unseen.jsonl", unseen)
    pretrain_builtin_model(folder, BUILTIN_TASKS["cipher"], progress=False)


def headroom(uniform: float, arm: float, oracle: float) -> float:
    """The share of what the oracle gains over uniform weights that an arm gains."""
    return (uniform - arm) / (uniform - oracle)


# ---- stories


def measure_stories(folder: Path, shared: Path, seeds: int) -> None:
    """Learn a rater over stories-260k, select of 4,000 other passages, and train babyllama-1m on them."""
    prepare_stories(folder, shared)
    rater = folder / "rater"
    if not (rater / "result.json").exists():
        run("select", "--model", shared / "models" / "stories-260k", "--lora.r", 0, "--train", folder / "train.jsonl",
            "--validation", folder / "validation.jsonl", "--data.dev", folder / "dev.jsonl", "--data.test",
            folder / "test.jsonl", "--data.split", 1, 0, 0, "--data.label-field", "label", "--data.max-length", 128,
            "--optimizer.learning-rate", 3e-4, "--optimizer.warmup-steps", 5, "--optimizer.eps-root", 1e-8,
            "--train.max-steps", 16, "--outer.steps", 3, "--outer.learning-rate", 1, "--outer.weighting", "rater",
            "--rater.features", *FEATURES, "--fast", "--output.no-progress", "--out", rater)  # fmt: skip
    scored = folder / "scored"
    if not (scored / "result.json").exists():
        run("score", "--rater", rater / "rater", "--data", folder / "unseen.jsonl", "--selection.top-share", 0.5,
            "--data.label-field", "label", "--output.no-progress", "--out", scored)  # fmt: skip
    print(f"AUC on own {read(rater)['auc']['weights']:.3f}, on 4,000 unseen {read(scored)['auc']:.3f}", flush=True)
    write(folder / "unseen_clean.jsonl", [r for r in rows_of(folder / "unseen.jsonl") if r["label"] == "clean"])
    arms = {"uniform": folder / "unseen.jsonl", "rater's half": scored / "selected.jsonl",
            "oracle": folder / "unseen_clean.jsonl"}  # fmt: skip
    losses: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, train in arms.items():
            target = folder / f"babyllama {name} {seed}"
            if not (target / "result.json").exists():
                run("train", "--model", shared / "models" / "babyllama-1m", "--lora.r", 0, "--train", train,
                    "--validation", folder / "validation.jsonl", "--data.test", folder / "test.jsonl", "--data.split",
                    1, 0, 0, "--data.max-length", 256, "--data.truncation", "right", "--optimizer.learning-rate", 3e-4,
                    "--optimizer.warmup-steps", 2, "--train.max-steps", 20, "--train.global-batch-size", 8,
                    "--data.seed", seed, "--output.no-progress", "--out", target)  # fmt: skip
            losses[name].append(read(target)["parts"]["test"]["after"]["loss"])
    for name, values in losses.items():
        mean, half = mean_interval(values)
        print(f"babyllama-1m, {name:<14} test loss {mean:.4f} ± {half:.4f}   {values}", flush=True)
    gains = [headroom(*triple) for triple in zip(*losses.values(), strict=True)]
    mean, half = mean_interval(gains)
    print(f"share of the oracle's gain that is left: {mean:.3f} ± {half:.3f}", flush=True)


def prepare_stories(folder: Path, shared: Path) -> None:
    """Passages of about 30 words, whole sentences; of every second one the words are permuted."""
    if (folder / "unseen.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    stories = json.loads((shared / "data" / "tinystories" / "tinystories_1000.json").read_text("utf-8"))
    rng = np.random.default_rng(0)
    passages: list[str] = []
    for number in rng.permutation(len(stories)):
        words: list[str] = []
        for sentence in re.split(r"(?<=[.!?])\s+", stories[number].strip()):
            words += sentence.split()
            if len(words) >= 25:
                if len(words) <= 40:
                    passages.append(" ".join(words))
                words = []
    passages = list(dict.fromkeys(passages))
    sizes = {"validation": 64, "dev": 32, "test": 64}
    for name, size in sizes.items():
        write(folder / f"{name}.jsonl", [{"text": text, "label": "clean"} for text in passages[:size]])
        passages = passages[size:]
    rows = [
        {"text": " ".join(rng.permutation(text.split())), "label": "permuted"}
        if place % 2
        else {"text": text, "label": "clean"}
        for place, text in enumerate(passages)
    ]
    write(folder / "train.jsonl", rows[:400])
    write(folder / "unseen.jsonl", rows[400:4400])
    print(f"{len(rows[400:4400])} unseen passages", flush=True)


# ---- memory and speed of `score`


def measure_rows(folder: Path, rater: Path, sizes: list[int]) -> None:
    """Peak memory and rows a second of `score`, in processes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for size in sizes:
        data = folder / f"{size}.jsonl"
        letters = np.array(list(cipher.LETTERS))
        with open(data, "w", encoding="utf-8") as file:
            for _ in range(size):
                prompt = "".join(rng.choice(letters, 4)) + ">"
                file.write(json.dumps({"prompt": prompt, "response": "".join(rng.choice(letters, 4))}) + "\n")
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        out = folder / f"scored_{size}"
        seconds = run("score", "--rater", rater, "--data", data, "--output.no-progress", "--out", out)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        rate = read(out)["rows_per_second"]
        note = "" if peak > before else " (at most)"
        print(
            f"{size:,} rows: peak {peak / 1024:,.0f} MiB{note}, {seconds:.0f} s in all, {rate:,.0f} rows/s", flush=True
        )


def measure_speed(folder: Path, shared: Path, count: int) -> None:
    """The processor's time of `score` per row, next to that of the forward passes that its features take."""
    prepare_stories(folder, shared)
    if not (folder / "model").exists():
        (folder / "model").symlink_to((shared / "models" / "stories-260k").resolve())
    settings = RaterSection(features=("length", "loss", "likeness", "hidden"))
    if not (folder / "rater").exists():
        write_rater(folder, folder, settings)
    words = ["--rater", folder / "rater", "--model", folder / "model", "--data", folder / "unseen.jsonl"]
    config = load_config(ScoreConfig, None, list(map(str, words)))
    scorer = load_scorer(config, raters.read_rater(config.score.rater))
    examples = load_examples([str(folder / "unseen.jsonl")])[:count]
    recipe = scorer.rater.recipe
    wanted = features.measures_of("start", recipe.features)
    compiled = features._compiled_measures(scorer.decoder, wanted)
    passes: list[tuple[Any, Any]] = []

    def forward() -> None:
        jax.block_until_ready([compiled(params, batch) for params, batch in passes])

    with pytest.MonkeyPatch.context() as patch:  # the batches that score makes, which compiles the shapes, too
        patch.setattr(
            features, "_compiled_measures", lambda *given: lambda *call: passes.append(call) or compiled(*call)
        )
        score_examples(scorer, examples, tokenize_chunk(scorer, examples))

    def score() -> None:
        scored = score_examples(scorer, examples, tokenize_chunk(scorer, examples))
        write_chunk(folder / "chunk.parquet", examples, scored, recipe.low, recipe.high, columns=())

    seconds = {}
    for name, work in (("forward", forward), ("score", score), ("forward again", forward)):
        began, wall = time.process_time(), time.perf_counter()
        work()
        seconds[name] = time.process_time() - began
        print(
            f"{name}: {1e3 * seconds[name] / count:.3f} ms of processor time a row, {time.perf_counter() - wall:.0f} s"
        )
    share = (seconds["forward"] + seconds["forward again"]) / 2 / seconds["score"]
    print(f"score has {share:.3f} of the throughput of its forward passes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cipher", "sweeps", "stories", "rows", "speed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--rater", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    options = parser.parse_args()
    if options.part == "cipher":
        measure_cipher(options.folder, options.seeds)
    elif options.part == "sweeps":
        measure_sweeps(options.folder, options.seeds)
    elif options.part == "stories":
        measure_stories(options.folder, options.shared, options.seeds)
    elif options.part == "speed":
        measure_speed(options.folder, options.shared, options.sizes[0])
    else:
        measure_rows(options.folder, options.rater, options.sizes)
