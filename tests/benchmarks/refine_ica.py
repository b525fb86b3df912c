"""`refine` with in-context scores of every round beside exact hypergradients and plain training, at equal cost.

    python -m tests.benchmarks.refine_ica FOLDER --seeds 3

The task is that of `ica.py`: half of 256 training examples follow another key than the 32 of validation; a seed has a
key, questions and data orders of its own, and one pretrained model serves all. Arms are configs/refine_ica.yaml with
the flags of ARMS; a forward pass of the scores counts as a third of a training step, padding included. Prints the table
of `refine.py`, test losses paired with those of ICA offline, and the drift of scores by model. What is finished in
FOLDER is read there.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import pyarrow.parquet as pq

from bilevel_jax.lm.builtin import scripts
from bilevel_jax.runs.stats import rank_correlation
from tests.benchmarks.ica import pretrain
from tests.benchmarks.ica import spread as spread_interval
from tests.benchmarks.refine import paired, run_refine, table

Flags = tuple[str, ...]
PLAIN: Flags = ("--refine.methods", "uniform", "--refine.rounds", "32")
EXACT: Flags = (
    "--refine.methods", "unrolled", "--outer.steps", "3", "--outer.learning-rate", "1.5", "--outer.schedule", "linear",
    "--outer.reliability-every", "0", "--refine.rounds", "2",
)  # fmt: skip
NONE: Flags = ("--refine.questions", "none")
DYNAMIC: Flags = ("--refine.questions", "dynamic")
RESPONSES: Flags = ("--refine.rounds", "13")
ARMS: dict[str, Flags] = {
    "uniform, offline": (*PLAIN, *NONE),
    "uniform + responses, fixed": PLAIN,
    "ICA, offline": (*NONE, "--refine.rounds", "16"),
    "ICA + responses, fixed": RESPONSES,
    "ICA + responses, dynamic": (*DYNAMIC, *RESPONSES),
    "ICA + responses, fixed, ranks": (*RESPONSES, "--weights.scaling", "ranks"),
    "exact, offline": (*EXACT, *NONE),
    "exact + responses, fixed": EXACT,
}
"""name -> flags. All cost about 2,048 forward and backward passes: a round of 64 steps with scores of 448 rows takes
150, and 48 more where it is accepted, of 256 rows 128, with three exact hypergradients 1,024."""
REFERENCE = "ICA, offline"


def measure(folder: Path, *, seeds: int, arms: list[str]) -> None:
    """Run what is not there, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    model = pretrain(folder)
    cells: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        made = scripts.write_scripts_data(folder / f"rows-{seed}", seed=seed, lessons=0)
        for name in arms:
            flags = [*ARMS[name], "--model.name-or-path", str(model), "--data.seed", str(seed)]
            result = run_refine(arm_folder(folder, seed, name), "refine_ica", made, flags)
            cells.setdefault(name, []).append(result)
            print(f"seed {seed}  {name}: {result['sentence']}", flush=True)
    print(f"\nright answers are paired with those of {REFERENCE}, {seeds} seeds\n")
    print(table(cells, REFERENCE))
    print(f"\ntest loss above that of {REFERENCE} by paired seeds [95 %]\n")
    reference = [run["test"]["last"] for run in cells[REFERENCE]]
    for name, runs in cells.items():
        if name != REFERENCE:
            print(f"{name}: {paired([run['test']['last'] for run in runs], reference, 3)}")
    for name, runs in cells.items():
        if "ICA" in name:
            print(f"\n{name}: drift of the scores, means and 95 % intervals over {seeds} seeds\n")
            print(format_drift(runs))
            print("\nof the offline rows that both have, the first model with the second, by label")
            print(format_drift_by_label([arm_folder(folder, seed, name) for seed in range(seeds)], runs))


def arm_folder(folder: Path, seed: int, name: str) -> Path:
    """Where a run of an arm is."""
    return folder / f"{seed}-{name.replace(' ', '_')}"


def format_drift(runs: list[dict[str, Any]]) -> str:
    """By the number of rounds that were accepted before: AUC, and rank correlations of the scores with those by the
    first model, by the one before, and, of responses that led to the next one, by that; (seeds that came so far)."""
    lines = [
        "| accepted before | AUC | with the first model | with the model before | responses, by the next model |",
        "|---" * 5 + "|",
    ]
    by_model, accepted = [], []
    for run in runs:
        records = run["records"]
        by_model.append([one["scores"] for at, one in enumerate(records) if at == 0 or records[at - 1]["accepted"]])
        accepted.append([one["scores"] for one in records if one["accepted"]])
    for count in range(max(map(len, by_model))):
        made, led = ([each[count] for each in part if count < len(each)] for part in (by_model, accepted))
        columns = [format_mean([one["auc"] for one in made])]
        columns += [format_mean([one[key] and one[key]["spearman"] for one in made]) for key in ("first", "previous")]
        columns.append(format_mean([one["responses"] and one["responses"]["spearman"] for one in led]))
        lines.append(f"| {count} | {' | '.join(columns)} |")
    return "\n".join(lines)


def format_drift_by_label(folders: list[Path], runs: list[dict[str, Any]]) -> str:
    """Rank correlation of the scores by the first two models within the rows of each label, and how many these are."""
    values: dict[str, list[float]] = {"clean": [], "wrong": []}
    counts: dict[str, list[int]] = {"clean": [], "wrong": []}
    for folder, run in zip(folders, runs, strict=True):
        second = next(at for at, record in enumerate(run["records"], 1) if record["accepted"])
        table = pq.read_table(folder / "weights.parquet").to_pandas()
        offline = table[~table["generated"]].set_index("id")
        first, later = (offline[offline["round"] == number] for number in (0, second))
        both = first.join(later["score"].rename("score later"), how="inner")
        for label in values:
            rows = both[both["label"] == label]
            values[label].append(rank_correlation(*(rows[name].to_numpy() for name in ("score", "score later"))))
            counts[label].append(len(rows))
    return "; ".join(f"{label}: {format_mean(values[label])}, {min(counts[label])} to {max(counts[label])} rows"
                     for label in values)  # fmt: skip


def format_mean(values: list[float | None]) -> str:
    """Mean ± half of the 95 % interval of what there is, and of how many."""
    known = [value for value in values if value is not None]
    return f"{spread_interval(known)} ({len(known)})" if known else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    measure(options.folder, seeds=options.seeds, arms=options.arms)
