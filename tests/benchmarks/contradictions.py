"""Validation sets of which a part is wrong: what `select` drops as contradictions, and what that changes.

    python -m tests.benchmarks.contradictions FOLDER --seeds 3

Two tasks. `builtin:scripts`: half of 256 training examples follow another key than the rest, and so does a part of
the 32 validation examples. With --shared, the film reviews of tests.benchmarks.reviews: a part of 64 validation
sentences is of permuted tokens or school arithmetic. Three arms: all of them judge; those judge that do not
contradict the others (contradictions.draws = 4); the right ones alone judge. Prints, for each share of wrong
validation examples, means and 95 % intervals over the seeds: how many right and wrong ones were kept; the correlation
of the hypergradients at equal weights with those of 200 or more test examples, all right; test loss with the learned
weights; and, on scripts, the AUC of in-context scores whose demonstrations are the examples that judge. What is
finished in FOLDER is read there.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevel_jax as bj
from bilevel_jax.commands.select.run import select
from bilevel_jax.lm.builtin import scripts
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.stats import auc
from tests.benchmarks.ica import pretrain, read_rows, spread, stored, wrong_response
from tests.runs.problems_lm import MODEL, with_headroom

WRONG = (0.0, 0.25, 0.4)
ARMS = ("all judge", "without contradictions", "the right ones judge")
COMMON = {"lora.r": 0, "train.global-batch-size": 16, "outer.steps": 4, "outer.patience": 0, "mesh.data": 1}
Cell = dict[str, Any]


class Material(NamedTuple):
    """A task of one seed: its rows, which of them are right, and what training it takes."""

    train: list[Cell]
    validation: list[Cell]
    """The first `num_wrong` are wrong."""
    num_wrong: int
    test: list[Cell]
    others: list[Cell]
    """Right rows that stand in no other part."""
    settings: dict[str, Any]


def measure(folder: Path, seeds: int, shared: Path | None) -> None:
    """Run what is not there, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    model = pretrain(folder)
    lm = bj.lm.load(model)

    def add_in_context(cell: Cell, material: Material, seed: int) -> Cell:
        right = np.array([row["label"] == "clean" for row in material.train])
        for arm in ARMS:
            scores = lm.score("ica", material.train, cell[arm].pop("judges"), k=3, seed=seed)
            cell[arm]["ICA, AUC"] = auc(scores.values, right)
        return cell

    def measure_scripts(share: float, seed: int) -> Cell:
        material = make_scripts(folder / f"data-{seed}", model, share, seed)
        return add_in_context(measure_seed(folder / f"scripts-{share}-{seed}", material, seed), material, seed)

    print_table(folder, "scripts", seeds, measure_scripts)
    if shared:

        def measure_reviews(share: float, seed: int) -> Cell:
            material = make_reviews(folder / f"reviews-{share}-{seed}", shared, share, seed)
            cell = measure_seed(folder / f"reviews-{share}-{seed}", material, seed)
            return {arm: {key: value for key, value in of.items() if key != "judges"} for arm, of in cell.items()}

        print_table(folder, "reviews", seeds, measure_reviews)


def print_table(folder: Path, task: str, seeds: int, measure_cell: Callable[[float, int], Cell]) -> None:
    """The table of a task as markdown."""
    lines = []
    for share in WRONG:
        runs = [
            stored(folder / f"{task}-{share}-{seed}.json", lambda w=share, s=seed: measure_cell(w, s))
            for seed in range(seeds)
        ]
        for arm in ARMS:
            columns = {key: spread([run[arm][key] for run in runs]) for key in runs[0][arm]}
            if not lines:
                lines = [
                    "| validation that is wrong | arm | " + " | ".join(columns) + " |",
                    "|---" * (len(columns) + 2) + "|",
                ]
            lines.append(f"| {share:.0%} | {arm} | {' | '.join(columns.values())} |")
    print(f"\n{task}, {seeds} seeds\n\n" + "\n".join(lines), flush=True)


def make_scripts(folder: Path, model: Path, share: float, seed: int) -> Material:
    """Scripts by a key; wrong validation examples follow the key of the wrong training examples."""
    made = scripts.write_scripts_data(folder, seed=seed, lessons=0)
    train, validation, dev, test = (
        read_rows(made / f"{part}.jsonl") for part in ("train", "validation", "dev", "test")
    )
    num_wrong = round(share * len(validation))
    for row in validation[:num_wrong]:
        row["response"] = wrong_response(row)
    settings = {
        "model.name-or-path": model, "optimizer.learning-rate": 1e-3, "optimizer.schedule": "constant",
        "optimizer.warmup-steps": 0, "train.max-steps": 64,
    }  # fmt: skip
    return Material(train, validation, num_wrong, test, dev, settings)


def make_reviews(folder: Path, shared: Path, share: float, seed: int) -> Material:
    """Sentences of film reviews among others; wrong validation examples are sentences of permuted tokens and school
    arithmetic, in equal parts, which stand in training else."""
    folder.mkdir(parents=True, exist_ok=True)
    with_headroom(shared, folder)
    train, trusted = (read_rows(folder / f"{part}.jsonl") for part in ("train", "validation"))
    trusted = [trusted[at] for at in np.random.default_rng(seed).permutation(len(trusted))]
    num_wrong = round(share * 64)
    wrong = [row for label in ("garbled", "off-domain") for row in train if row["label"] == label]
    wrong = [*wrong[: num_wrong // 2], *wrong[-(num_wrong - num_wrong // 2) :]] if num_wrong else []
    with open(shared / "data/sst2/test.jsonl", encoding="utf-8") as lines:
        texts = dict.fromkeys(json.loads(line)["text"] for line in lines)
    test = [{"text": text} for text in texts if 20 <= len(text) <= 110][:200]
    settings = {
        "model.name-or-path": shared / "models" / MODEL, "optimizer.learning-rate": 6e-4, "optimizer.eps-root": 1e-8,
        "train.max-steps": 32, "data.max-length": 96,
    }  # fmt: skip
    rows = [row for row in train if row not in wrong]
    validation = [{"text": row["text"]} for row in wrong] + trusted[: 64 - num_wrong]
    return Material(rows, validation, num_wrong, test, trusted[64:128], settings)


def measure_seed(folder: Path, material: Material, seed: int) -> Cell:
    """The arms of a seed."""
    folder.mkdir(parents=True, exist_ok=True)

    def run(name: str, judges: list[Cell], *flags: str, test: list[Cell] = material.test) -> Cell:
        parts = {"train": material.train, "validation": judges, "test": test}
        out = folder / name.replace(" ", "_")
        paths = {part: folder / f"{out.name}-{part}.jsonl" for part in parts}
        for part, rows in parts.items():
            paths[part].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = COMMON | material.settings | {f"data.{part}": path for part, path in paths.items()}
        settings |= {"data.seed": seed, "train.seed": seed, "out": out}
        words = [text for flag, value in settings.items() for text in (f"--{flag}", str(value))]
        words += ["--data.split", "1", "0", "0", "--fast", "--output.no-progress", *flags]
        words += ["--resume"] if (out / "config.yaml").exists() else []
        result = select(load_config(SelectConfig, None, words))
        is_kept = np.ones(len(judges), bool)
        if result["contradictions"]:
            is_kept = ~run_dir.read_parquet(out / "validation.parquet")["contradicts"].to_numpy()
        entries = run_dir.read_parquet(out / "weights.parquet")["first_hypergradient"].to_numpy()
        return {"entries": entries, "loss": result["records"][-1]["loss"]["test"], "kept": is_kept, "judges": judges}

    validation, num_wrong = material.validation, material.num_wrong
    reference = run("reference", material.test, "--outer.steps", "1", test=material.others)
    arms = {
        ARMS[0]: run(ARMS[0], validation),
        ARMS[1]: run(ARMS[1], validation, "--contradictions.draws", "4", "--contradictions.action", "drop"),
        ARMS[2]: run(ARMS[2], validation[num_wrong:]),
    }
    arms[ARMS[2]]["kept"] = np.arange(len(validation)) >= num_wrong
    return {
        name: {
            "right kept": float(arm["kept"][num_wrong:].mean()),
            "wrong kept": float(arm["kept"][:num_wrong].mean()) if num_wrong else 0.0,
            "correlation with test": float(np.corrcoef(arm["entries"], reference["entries"])[0, 1]),
            "test loss": arm["loss"],
            "judges": [row for row, kept in zip(validation, arm["kept"], strict=True) if kept],
        }
        for name, arm in arms.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shared", type=Path, help="folder of models and data; with it, film reviews too")
    options = parser.parse_args()
    measure(options.folder, options.seeds, options.shared)
