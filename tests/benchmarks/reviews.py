"""Film reviews: what each way of choosing examples reaches, by the number of validation examples.

    python -m tests.benchmarks.reviews ../shared out/reviews.jsonl --sizes 8 32 125 --seeds 1
    python -m tests.benchmarks.reviews ../shared out/reviews.jsonl --draw .github/reviews.svg

The task is that of tests/commands/test_select_slow.py: 400 examples, 160 sentences of film reviews, 160 others whose
tokens were permuted and 80 openings of school arithmetic; validation examples are other sentences, 64 more are dev and
200 of SST-2's test part are test. All parameters of the 260-thousand-parameter model, 32 AdamW steps of 16 examples, 4
outer steps. `low_loss`, `top_alignment` and `selected` are told the share of right examples, 40 %; the others are not.

Each run of `select` is a line of the file; what stands there is not run again. --draw draws the picture and prints the
table.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.commands.select.run import select
from bilevel_jax.runs.config.load import SelectConfig, load_config
from tests.benchmarks.recommendation import read_dev_losses, read_lines
from tests.runs.problems_lm import MODEL, with_headroom

OWN = "own"
"""The model that a single-loop method trains itself, with the validation examples."""
SIMPLE = (
    "uniform", "oracle", "low_loss", "low_loss_dev", "top_alignment", "validation", "validation_early_stop",
    "validation_model",
)  # fmt: skip
ALONE = ["--outer.reliability-every", "0"]
RUNS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "learned": (ALONE, (*SIMPLE, "learned", "learned+validation", "selected")),
    "learned with folds": ([*ALONE, "--outer.validation-folds", "4"], ("learned+validation",)),
    "pooled": (["--outer.estimate", "pooled"], ("learned", "selected")),
    "rater": ([*ALONE, "--outer.weighting", "rater"], ("learned", "selected", "learned+validation")),
    "bmo": ([*ALONE, "--outer.method", "bmo"], ("learned", "selected")),
    "bmo without a floor": (
        [*ALONE, "--outer.method", "bmo", "--single-loop.min-effective-share", "0"],
        ("learned", "selected"),
    ),
}
"""Runs of `select` by name: their flags, and the arms that are retrained."""
CURVES = {
    "uniform": ("learned", "uniform"),
    "validation alone, best stop": ("learned", "validation_early_stop"),
    "least loss, share told": ("learned", "low_loss"),
    "least loss, share by dev": ("learned", "low_loss_dev"),
    "model of validation, share by dev": ("learned", "validation_model"),
    "alignment, share told": ("learned", "top_alignment"),
    "learned": ("learned", "learned"),
    "learned, share told": ("learned", "selected"),
    "learned + V": ("learned", "learned+validation"),
    "learned + V, weight learned": ("learned with folds", "learned+validation"),
    "pooled": ("pooled", "learned"),
    "rater": ("rater", "learned"),
    "rater, share told": ("rater", "selected"),
    "rater + V": ("rater", "learned+validation"),
    "oracle": ("learned", "oracle"),
    "BMO": ("bmo", "learned"),
    "BMO, share told": ("bmo", "selected"),
    "BMO without a floor": ("bmo without a floor", "learned"),
    "BMO without a floor, share told": ("bmo without a floor", "selected"),
    "BMO, its own model": ("bmo", OWN),
    "BMO without a floor, its own model": ("bmo without a floor", OWN),
}
"""Lines of the table and of the picture: (run, arm)."""


def measure(shared: Path, lines: Path, names: list[str], sizes: list[int], seeds: int) -> None:
    """Run what the file does not hold yet, and add it as it is finished."""
    held = {(line["run"], line["size"], line["seed"]) for line in read_lines(lines)}
    for seed in range(seeds):
        for name in names:
            for size in sizes:
                if (name, size, seed) not in held:
                    line = {"run": name, "size": size, "seed": seed, **_run(shared, name, size, seed)}
                    with open(lines, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print(
                        {key: value for key, value in line.items() if key not in ("records", "dev_losses")}, flush=True
                    )


def _run(shared: Path, name: str, size: int, seed: int) -> dict[str, Any]:
    flags, arms = RUNS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_data(shared, folder, size)
        settings = {
            "model.name_or_path": shared / "models" / MODEL, "lora.r": 0, "data.train": folder / "train.jsonl",
            "data.validation": folder / "fit.jsonl", "data.dev": folder / "dev.jsonl",
            "data.test": folder / "test.jsonl", "data.split": "1 0 0", "data.label-field": "label",
            "data.max-length": 96, "data.seed": seed, "data.no-packing": "", "train.seed": seed,
            "train.max_steps": 32, "optimizer.eps-root": 1e-8, "optimizer.learning-rate": 6e-4, "outer.steps": 4,
            "outer.patience": 0, "selection.top-share": 0.4, "retrain.seeds": 1, "certify.no-enabled": "",
            "output.no-progress": "", "mesh.data": 1, "out": folder / "run",
        }  # fmt: skip
        given = [text for flag, value in settings.items() for text in (f"--{flag}", *str(value).split())]
        began = time.process_time()
        result = select(load_config(SelectConfig, "configs/select.yaml", [*given, *flags, "--retrain.variants", *arms]))
        dev_losses = {name: losses.tolist() for name, losses in read_dev_losses(folder / "run", arms).items()}
    own = {OWN: result["records"][-1]["loss"]["test"]} if "bmo" in name else {}
    return {
        "test": {row["name"]: row["mean"]["test"] for row in result["compare"]} | own,
        "dev": {row["name"]: row["mean"]["dev"] for row in result["compare"]},
        "dev_losses": dev_losses,
        "meaning": {row["name"]: row["meaning"] for row in result["compare"]},
        "auc": result["auc"],
        "recommendation": result["recommendation"]["sentence"],
        "records": [{key: record[key] for key in ("loss", "ess", "auc")} for record in result["records"]],
        "cpu_seconds": time.process_time() - began,
    }


def _write_data(shared: Path, folder: Path, size: int) -> None:
    with_headroom(shared, folder)
    trusted = (folder / "validation.jsonl").read_text("utf-8").splitlines(keepends=True)
    texts = [json.loads(line)["text"] for line in (shared / "data/sst2/test.jsonl").read_text("utf-8").splitlines()]
    others = [text for text in dict.fromkeys(texts) if 20 <= len(text) <= 110][:200]
    test = [json.dumps({"text": text}) + "\n" for text in others]
    for name, rows in (("fit", trusted[:size]), ("dev", trusted[125:189]), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def draw(lines: Path, picture: Path | None) -> None:
    """Print the table, and draw a curve for each way of choosing."""
    held = {(line["run"], line["size"], line["seed"]): line for line in read_lines(lines)}
    sizes, seeds = (sorted({key[place] for key in held}) for place in (1, 2))
    table = {
        label: {
            size: [held[run, size, seed]["test"][arm] for seed in seeds if (run, size, seed) in held] for size in sizes
        }
        for label, (run, arm) in CURVES.items()
    }
    table = {label: values for label, values in table.items() if any(values.values())}
    print(
        f"| test loss, nats per token | {' | '.join(f'|V| = {size}'.replace('|', chr(92) + '|') for size in sizes)} |"
    )
    print("|---" * (len(sizes) + 1) + "|")
    for label, values in table.items():
        print(f"| {label} | {' | '.join(_cell(values[size]) for size in sizes)} |")
    if picture is not None:
        _plot(table, sizes, picture)


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _plot(table: dict[str, dict[int, list[float]]], sizes: list[int], picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    colours = iter(plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors)
    for label, values in table.items():
        there = [size for size in sizes if values[size]]
        means = [np.mean(values[size]) for size in there]
        if label in ("uniform", "oracle"):
            axes.axhline(np.mean(means), color="0.4", linestyle="--" if label == "uniform" else ":")
            axes.text(sizes[0], np.mean(means), label, va="bottom", color="0.3")
            continue
        axes.plot(there, means, marker="o", markersize=4, color=next(colours), label=label)
    axes.set(xscale="log", xlabel="validation examples", ylabel="test loss, nats per token")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 125])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--draw", nargs="?", const="", help="draw the picture into this file, and print the table")
    options = parser.parse_args()
    if options.draw is None:
        measure(options.shared, options.lines, options.runs, options.sizes, options.seeds)
    else:
        draw(options.lines, Path(options.draw) if options.draw else None)
