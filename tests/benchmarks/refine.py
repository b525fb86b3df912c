"""Gain of a model from its own responses, by every method of `refine` on sums, at equal cost.

    python -m tests.benchmarks.refine FOLDER --seeds 5 --corrupted 0.4 0.7

Prints one markdown table for each share of corrupted rows: right answers (greedy, by the checker) and L_v on 384 other
questions, rounds that were accepted, right responses, cost, mean ± standard deviation over the seeds, and how far each
arm's right answers lie above those of exact hypergradients without responses, with a 95 % interval over the seeds. A
seed has questions, labels, a pretrained model and orders of its own, the same for all arms. Arms are
configs/refine_*.yaml with the flags of ARMS. What is finished in FOLDER is read there, so the command goes on after a
stop.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel_jax.commands.refine.run import refine
from bilevel_jax.lm.builtin import sums
from bilevel_jax.runs.config.load import RefineConfig, SelectConfig, load_config
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks.builtin import resolve_builtin

TRUSTED = {"validation": 64, "dev": 128}
NONE, FIXED, DYNAMIC = (("--refine.questions", name) for name in ("none", "fixed", "dynamic"))
STEPS_ALONE = ("--outer.reliability-every", "0")  # the cost of the weights, without what measures them
EXACT, POOLED, MIXING, PENALTY, BMO, LEARNED = (("--refine.rounds", str(count)) for count in (4, 2, 10, 7, 9, 8))
PLAIN = ("--refine.rounds", "21", "--train.max-steps", "180")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "self-training": ("refine_self_training", PLAIN),
    "validation alone": ("refine_mixing", ("--single-loop.validation-shares", "1.0", *MIXING)),
    "direct mixing": ("refine_mixing", MIXING),
    "BDS, offline": ("refine_offline", PENALTY),
    "BDS + online fixed": ("refine_dynamic", (*FIXED, *PENALTY)),
    "BDS + online dynamic": ("refine_dynamic", PENALTY),
    "BMO, offline": ("refine_bmo", (*NONE, *BMO)),
    "BMO + online fixed": ("refine_bmo", BMO),
    "exact, offline": ("refine_exact", (*NONE, *STEPS_ALONE, *EXACT)),
    "exact, offline, sigmoid": ("refine_exact", (*NONE, *STEPS_ALONE, *EXACT, "--outer.weighting", "sigmoid")),
    "exact, offline, pooled": (
        "refine_exact", (*NONE, "--outer.estimate", "auto", "--outer.reliability-every", "1", *POOLED),
    ),
    "exact, offline, folds": (
        "refine_exact", (*NONE, *STEPS_ALONE, *EXACT, "--outer.validation-folds", "4"),
    ),
    "exact + online fixed": ("refine_exact", (*FIXED, *STEPS_ALONE, *EXACT)),
    "exact + online dynamic": ("refine_exact", (*DYNAMIC, *STEPS_ALONE, *EXACT)),
    "exact + online dynamic, by ratio": (
        "refine_exact", (*DYNAMIC, *STEPS_ALONE, *EXACT, "--refine.ratio", "token"),
    ),
    "trained generator": ("refine_reinforce", LEARNED),
    "right responses (oracle)": ("refine_self_training", ("--refine.verifier-use", "filter", *PLAIN)),
}  # fmt: skip
"""name -> (config, flags). All cost about as many forward and backward passes as four rounds of exact hypergradients,
3,840. "by ratio" weighs each token of a response by its probability over the one that it was drawn by, as the paper
does; "right responses" trains on what the checker lets pass, which needs the truth."""
REFERENCE = "exact, offline"
"""The arm that the others are held against."""


def measure(folder: Path, *, seeds: int, corrupted: list[float], arms: list[str]) -> None:
    """Run what is not there, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in range(seeds):
        model = pretrained(folder / f"model-{seed}", seed)
        for share in corrupted:
            made = sums.write_sums_data(folder / f"rows-{seed}-{share:g}", seed=seed, corrupted=share, **TRUSTED)
            for name in arms:
                result = arm(folder / f"{seed}-{share:g}-{name.replace(' ', '_')}", name, made, model, seed)
                cells.setdefault((name, share), []).append(result)
                print(f"seed {seed}  {share:.0%}  {name}: {result['sentence']}", flush=True)
    for share in corrupted:
        print(f"\n{share:.0%} of the rows by the wrong rule, {seeds} seeds\n")
        print(table({name: cells[name, share] for name in arms}))


def pretrained(folder: Path, seed: int) -> Path:
    """The task's model, taught once for a seed."""
    folder.mkdir(exist_ok=True)
    task = "builtin:sums?" + "&".join(f"{part}={count}" for part, count in TRUSTED.items())
    flags = ["--model.name-or-path", "builtin:sums", "--data.train", task, "--data.validation", "builtin:sums"]
    ready = resolve_builtin(
        load_config(SelectConfig, None, [*flags, "--data.seed", str(seed), "--output.no-progress"]), folder
    )
    return Path(ready.model.name_or_path)


def arm(folder: Path, name: str, made: Path, model: Path, seed: int) -> dict[str, Any]:
    """One run of an arm."""
    config, flags = ARMS[name]
    return run_refine(folder, config, made, [*flags, "--model.name-or-path", str(model), "--data.seed", str(seed)])


def run_refine(folder: Path, config: str, made: Path, flags: list[str]) -> dict[str, Any]:
    """The result of `refine` with a shipped config on the data files in `made`: finished, gone on with, or begun."""
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    files = {part: made / f"{part}.jsonl" for part in ("train", "validation", "dev", "test")}
    data = [text for part, path in files.items() for text in (f"--data.{part}", str(path))]
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    given = [*data, *flags, "--mesh.data", "1", "--output.no-progress", "--out", str(folder), *resume]
    refine(load_config(RefineConfig, f"{config}.yaml", given))
    return json.loads((folder / "result.json").read_text())


def table(cells: dict[str, list[dict[str, Any]]], reference_arm: str = REFERENCE) -> str:
    """The table as markdown, its arms paired with one of them."""
    heads = [
        "arm",
        "right answers",
        f"above {reference_arm} [95 %]",
        "test loss",
        "rounds accepted",
        "right responses",
        "training steps",
        "seconds",
    ]
    first = next(iter(cells.values()))
    given = [spread([run["test"]["right"]["first"] for run in first], 3)]
    given += ["", spread([run["test"]["first"] for run in first], 3), "", "", "", ""]
    lines = [heads, ["---"] * len(heads), ["the model as given", *given]]
    reference = list(map(right_answers, cells.get(reference_arm, [])))
    for name, runs in cells.items():
        right = [one["right"] for run in runs for one in run["records"] if one["right"] is not None]
        lines.append(
            [
                name,
                spread(list(map(right_answers, runs)), 3),
                "" if name == reference_arm else paired(list(map(right_answers, runs)), reference, 3),
                spread([run["test"]["last"] for run in runs], 3),
                f"{sum(run['accepted'] for run in runs)} of {sum(len(run['records']) for run in runs)}",
                f"{np.mean(right):.3f}" if right else "",
                f"{np.mean([sum(one['work'] for one in run['records']) for run in runs]):,.0f}",
                f"{np.mean([sum(one['seconds'] for one in run['records']) for run in runs]):,.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def right_answers(result: dict[str, Any]) -> float:
    """The share of the test questions that the last model answers right."""
    return result["test"]["right"]["last"]


def paired(values: list[float], reference: list[float], digits: int) -> str:
    """How far the values of the seeds lie above the reference's, with the 95 % interval by Student's t."""
    if len(values) != len(reference) or len(values) < 2:
        return ""
    mean, half = mean_interval([one - other for one, other in zip(values, reference, strict=True)])
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--corrupted", type=float, nargs="+", default=[0.4, 0.7])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    measure(options.folder, seeds=options.seeds, corrupted=options.corrupted, arms=options.arms)
