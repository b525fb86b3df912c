"""Mixtures of data sources: a few hypergradients beside a regression over proxy runs.

    python -m tests.benchmarks.mixtures out/mixtures --tasks builtin --seeds 3
    python -m tests.benchmarks.mixtures out/mixtures --tasks stories --seeds 6 --shared ../shared

Two tasks. `builtin`: configs/compare_mixtures.yaml, seven sources of known worth. `stories`: six sources of 24 texts
(of stories 8) for the 260-thousand-parameter model, and other stories to judge, from --shared. Every method finds a
mixture from validation alone; then it is trained on twice, under other orders of the data, and read on test, which
steered nothing. Proxies, learned weights and retrains all realise a mixture as loss weights of the examples.

`trainings` are passes over those of one training: an exact hypergradient (`unrolled`) costs 5, for the training, its
replay and three for the products of the way back, `window` less, as it goes back through a part; a proxy costs 1. The
random search is the best of 64 drawn mixtures by test loss, read again under orders that did not choose it. Learning
rate, window and the forms of the fit were chosen on seed 100 of the builtin task, which is not in the table.

Said beforehand: a method is as good as the fit over 16 proxies where the upper end of the 95 % interval of the paired
difference in test loss, over seeds, is at most MARGIN of the fit's gain over the natural mixture. What is finished in
FOLDER is read there.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.commands.compare.methods import METHODS, MethodSections, train_proxies
from bilevel_jax.commands.compare.proxies import draw_mixtures, find_minimum, fit_mixing_law
from bilevel_jax.commands.compare.run import make_task_builder, sections_for_seed
from bilevel_jax.runs.budget.work import count_baseline_work
from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.engine.arms import make_variant
from bilevel_jax.runs.engine.retrain import Retrainer
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import Session, open_session
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.sources import find_sources
from tests.runs.problems_lm import MODEL

MARGIN = 0.05
"""Share of the gain of the 16-proxy fit over the natural mixture that counts as equal."""
RETRAINS = 2
REFERENCE = "fit, 16"


FITS = {"fit, 8": slice(8), REFERENCE: slice(16)}
MORE_FITS = {"fit, 16 others": slice(16, 32), "fit, 32": slice(32)}


class Plan(NamedTuple):
    """What is compared on a task."""

    sweeps: dict[str, tuple[int, ...]]
    """Methods of the outer loop, and their numbers of hypergradients."""
    fits: dict[str, slice]
    """The proxies of each fit, in the order in which they were drawn."""
    num_searched: int
    """Drawn mixtures of the random search beside the proxies; 0: none."""


PLANS = {
    "builtin": Plan({"unrolled": (1, 2), "window": (1, 2, 4, 8), "alignment": (3,)}, FITS | MORE_FITS, 32),
    "stories": Plan({"unrolled": (1,), "window": (2,), "alignment": (1,)}, FITS, 0),
}
PENALTY_TRAININGS = 4
"""Budget of `penalty`: with its second model a step costs 3, so it is one run a third longer than a training."""
JUDGED = ("window, 2", "alignment, 3", "alignment, 1", "penalty", "unrolled, 1")
"""What is compared with the fit over 16 proxies; the last one costs more than a quarter of it."""
Line = dict[str, Any]


def measure(folder: Path, tasks: list[str], seeds: int, shared: Path) -> None:
    """Run what the file does not hold, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for task_name in tasks:
        for seed in range(seeds):
            measure_seed(folder, task_name, seed, shared)
        print_table(read_lines(folder / "lines.jsonl"), task_name)


def measure_seed(folder: Path, task_name: str, seed: int, shared: Path) -> None:
    """Add the lines of one seed to `folder`/lines.jsonl: a mixture each, with its test losses."""
    lines, work = folder / "lines.jsonl", folder / f"{task_name}-{seed}"
    held = {(line["task"], line["seed"], line["name"]) for line in read_lines(lines)}
    config = load_task(task_name, work, seed, shared)
    work.mkdir(exist_ok=True)
    task = make_task_builder(config, work)(0)
    sections, sources = sections_for_seed(config, 0), find_sources(task)
    with open_session(work, progress=False, save_seconds=1e9) as session:
        trainer = Trainer(task, sections.outer, session)
        retrainer = Retrainer(task, trainer, session, "retrain", train_seed=sections.train.seed, data_seed=seed)

        def read_test(name: str, mixture: np.ndarray, retrain_seeds: range) -> list[float]:
            weights = np.ones(task.corpus.num_examples)
            weights[: task.num_examples] = sources.weights(mixture)
            variant = make_variant(name, "", task, task.trainable_indices(), weights)
            return [retrainer.retrain(variant, name, each)["test"] for each in retrain_seeds]

        for name, trainings, find in find_mixtures(PLANS[task_name], task, sections, session, read_test):
            if (task_name, seed, name) in held:
                continue
            began = time.process_time()
            mixture = find()
            cost = time.process_time() - began
            line = {
                "task": task_name, "seed": seed, "name": name, "trainings": trainings, "cpu_seconds": cost,
                "mixture": dict(zip(sources.names, mixture.tolist(), strict=True)),
                "test": read_test(name, mixture, range(RETRAINS)),
            }  # fmt: skip
            _append(lines, line)
            print({key: value for key, value in line.items() if key != "mixture"}, flush=True)


def _append(path: Path, line: Line) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[Line]:
    """What is finished."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def find_mixtures(
    plan: Plan,
    task: Task,
    sections: MethodSections,
    session: Session,
    read_test: Callable[[str, np.ndarray, range], list[float]],
) -> Iterator[tuple[str, float, Callable[[], np.ndarray]]]:
    """(name, its trainings, what finds the mixture) of everything that is compared."""
    sources = find_sources(task)
    yield "natural", 0.0, lambda: sources.natural
    yield "stratified", 0.0, sources.stratified

    def learn(name: str, method: str, budget: float) -> np.ndarray:
        spec, part = METHODS[method], session.part_session(name)
        return sources.mixture(spec.run(task, spec.configure(sections), part, budget).weights)

    for method, counts in plan.sweeps.items():
        once = count_baseline_work(task)
        step = METHODS[method].min_budget(task, METHODS[method].configure(sections)) - once
        for count in counts:
            budget, name = count * step + once, f"{method}, {count}"
            yield name, budget / task.num_steps, partial(learn, name, method, budget)
    yield "penalty", PENALTY_TRAININGS, partial(learn, "penalty", "penalty", PENALTY_TRAININGS * task.num_steps)

    num_proxies = max(chosen.stop for chosen in plan.fits.values())

    def run_proxies() -> list[dict[str, Any]]:
        most = replace(sections.compare, proxy_runs=num_proxies)
        return train_proxies(task, sections._replace(compare=most), session.part_session("proxies"))

    def fit(chosen: slice) -> np.ndarray:
        records = [record for record in run_proxies()[chosen] if record["judged"] is not None]
        mixtures, losses = (np.array([record[key] for record in records]) for key in ("mixture", "judged"))
        law = fit_mixing_law(mixtures, losses)
        if not law.predicts:  # its minimum is taken all the same, to do the fit no wrong
            print(f"no law predicts these {len(losses)} proxies: compare takes the natural mixture")
        return find_minimum(law, sources.natural, mixtures, (sections.data.seed, 6))

    for name, chosen in plan.fits.items():
        yield name, float(chosen.stop - (chosen.start or 0)), partial(fit, chosen)

    def search() -> np.ndarray:
        finite = [record for record in run_proxies() if record["judged"] is not None]
        tried = [(record["loss"]["test"], np.array(record["mixture"])) for record in finite]
        for place, mixture in enumerate(draw_mixtures(sources.natural, plan.num_searched, (sections.data.seed, 7))):
            tried.append((read_test(f"search {place}", mixture, range(100, 101))[0], mixture))
        return min(tried, key=lambda pair: pair[0])[1]

    if plan.num_searched:
        yield "random search", float(plan.num_searched + num_proxies), search


# ---- the tasks


def load_task(name: str, folder: Path, seed: int, shared: Path) -> CompareConfig:
    """The config of a task under one seed."""
    flags = ["--data.seed", str(seed), "--train.seed", str(seed), "--output.no-progress", "--mesh.data", "1"]
    if name == "stories":
        write_stories(shared, folder, seed)
        flags += [
            "--model.name-or-path", str(shared / "models" / MODEL), "--data.train", str(folder / "train.jsonl"),
            "--data.validation", str(folder / "validation.jsonl"), "--data.test", str(folder / "test.jsonl"),
            "--data.max-length", "48", "--data.truncation", "right", "--train.max-steps", "48",
            "--train.global-batch-size", "8", "--optimizer.learning-rate", "1e-3", "--optimizer.warmup-steps", "4",
            "--outer.window", "8",
        ]  # fmt: skip
    return load_config(CompareConfig, "configs/compare_mixtures.yaml", [*flags, "--out", str(folder)])


def write_stories(shared: Path, folder: Path, seed: int) -> None:
    """Six sources of 24 texts (of stories 8), 32 stories to judge and 100 to test."""
    random, data = np.random.default_rng(seed), shared / "data"
    stories = [
        story.strip()[:160] for story in json.loads((data / "tinystories/tinystories_1000.json").read_text("utf-8"))
    ]
    stories = [stories[i] for i in random.permutation(len(stories))]

    def read(path: str) -> list[Line]:
        return [json.loads(line) for line in (data / path).read_text("utf-8").splitlines()]

    pairs = json.loads((data / "preference/instruction_preference.json").read_text("utf-8"))
    arithmetic = read("gsm8k/train.jsonl")

    def shuffle(text: str) -> str:
        return " ".join(random.permutation(text.split()))

    sources = {
        "stories": stories[:8],
        "shuffled_stories": [shuffle(text) for text in stories[8:32]],
        "reviews": [row["text"] for row in read("sst2/train.jsonl")],
        "questions": [row["question"] for row in arithmetic],
        "solutions": [row["answer"] for row in arithmetic[1000:]],
        "instructions": [f"{row['instruction']} {row['output']}" for row in pairs],
    }
    rows = [
        {"text": text[:160], "source": source}
        for source, texts in sources.items()
        for text in (texts if "stories" in source else [texts[i] for i in random.permutation(len(texts))[:24]])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows, "validation": stories[32:64], "test": stories[64:164]}
    for name, part in parts.items():
        lines = [json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


# ---- the tables


def print_table(lines: list[Line], task_name: str) -> None:
    """Test loss by method, what it cost, its difference to the fit over 16 proxies, and its mixture."""
    mine = [line for line in lines if line["task"] == task_name]
    losses = {(line["name"], line["seed"]): float(np.mean(line["test"])) for line in mine}
    seeds = sorted({line["seed"] for line in mine if (REFERENCE, line["seed"]) in losses})
    noise = np.sqrt(np.mean([np.var(line["test"], ddof=1) for line in mine]))
    sources = sorted({source for line in mine for source in line["mixture"]})

    def subtract(name: str, other: str) -> list[float]:
        return [losses[name, seed] - losses[other, seed] for seed in seeds if (name, seed) in losses]

    print(f"\n{task_name}, seeds {seeds}; the test loss of a retrain has a standard deviation of {noise:.3f}\n")
    print(f"| mixture by | trainings | test loss | minus {REFERENCE} | {' | '.join(sources)} |")
    print("|---" * (4 + len(sources)) + "|")
    for name in dict.fromkeys(line["name"] for line in mine):
        of = [line for line in mine if line["name"] == name]
        values = [losses[name, line["seed"]] for line in of]
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        gap, half = mean_interval(subtract(name, REFERENCE))
        shares = [f"{100 * np.mean([line['mixture'][source] for line in of]):.0f}" for source in sources]
        cells = [name, f"{of[0]['trainings']:.1f}", f"{np.mean(values):.3f} ± {error:.3f}", f"{gap:+.3f} ± {half:.3f}"]
        print(f"| {' | '.join([*cells, *shares])} |")
    margin = MARGIN * -np.mean(subtract(REFERENCE, "natural"))
    for name in JUDGED:
        if len(gaps := subtract(name, REFERENCE)) > 1:
            gap, half = mean_interval(gaps)
            verdict = "as good" if gap + half <= max(margin, 0.0) else "not shown to be as good"
            print(
                f"{name}: {gap:+.3f} ± {half:.3f}, margin {margin:.3f}: {verdict}; by seed {np.round(gaps, 3).tolist()}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    given = parser.parse_args()
    measure(given.folder, given.tasks, given.seeds, given.shared)
