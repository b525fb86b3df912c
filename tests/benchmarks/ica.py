"""In-context approximation on a model that learns in context, beside one step and exact hypergradients.

    python -m tests.benchmarks.ica FOLDER --seeds 3

The task is `builtin:scripts`: half of 256 training examples follow another key than the 32 of validation; a seed has a
key, questions and data orders of its own, and one pretrained model serves all. Prints, for responses (SFT) and pairs
(DPO), how scores rank examples by the key and how they agree with one step and with exact hypergradients; test loss and
accuracy after training with their weights; and the ablations of the paper (arXiv 2510.14459) beside ours. Draws them
into FOLDER/ica.svg. What is finished in FOLDER is read there: the command goes on after a stop.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import bilevel_jax as bj
from bilevel_jax.commands.train.run import train
from bilevel_jax.language_model.finetuning import FineTuned
from bilevel_jax.language_model.model import LanguageModel
from bilevel_jax.lm.builtin import scripts
from bilevel_jax.runs.config.load import TrainConfig, load_config
from bilevel_jax.runs.stats import auc, mean_interval, rank_correlation
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model
from bilevel_jax.scores.weights import clipped_minmax_weights, rank_weights

NUM_DEMONSTRATIONS = (1, 3, 5, 10)
REFRESHES = (1, 3, 5, 9)
CUTS = (50, 75, 90)
CHOICES = ("knn", "random", "clustered:8", "fixed")
STEPS, BATCH, LEARNING_RATE = 64, 16, 1e-3
SETS = {"one of 3": (3, 1), "three of 3": (3, 3), "one of 9": (9, 1)}
"""k, and the number of sets."""
WRONG_HOLDOUT = (0.25,)
OBJECTIVES = {"responses": "sft", "pairs": "dpo"}
PUBLISHED = {  # win rates against the default, k = 3, R = 1 and no cut, per cent
    "k = 1": 43.5, "k = 5": 48.0, "k = 10": 46.0, "R = 3": 50.7, "R = 5": 52.8, "R = 9": 51.6,
    "best 50 %": 40.8, "best 25 %": 48.7, "best 10 %": 40.1,
}  # fmt: skip
Cell = dict[str, Any]


def measure(folder: Path, *, seeds: int) -> None:
    """Run what is not there, print the tables, draw the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    began = time.process_time()
    model = bj.lm.load(pretrain(folder))
    cells: dict[str, list[Cell]] = {}
    for seed in range(seeds):
        for form in OBJECTIVES:
            cell = stored(folder / f"{form}-{seed}.json", lambda f=form, s=seed: measure_seed(folder, model, f, s))
            cells.setdefault(form, []).append(cell)
            print(f"seed {seed}, {form}: done, {time.process_time() - began:.0f} s of processor time", flush=True)
    for form, runs in cells.items():
        print(f"\n{form}, {seeds} seeds: what scores tell\n")
        print(format_scores([run["scores"] for run in runs]))
        print(f"\n{form}, {seeds} seeds: after training with weights\n")
        print(format_arms([run["arms"] for run in runs]))
    print("\nablations: the paper's win rate against its default, and our test loss minus that of the default\n")
    print(format_ablations([run["arms"] for run in cells["responses"]]))
    draw(cells["responses"], folder / "ica.svg")
    gentle = [
        stored(folder / f"gentle-{seed}.json", lambda s=seed: measure_gentle(folder, model, s)) for seed in range(seeds)
    ]
    print(f"\nexact hypergradients at a third of the learning rate, responses, {seeds} seeds\n")
    for key in gentle[0]:
        print(f"{key}: {spread([run[key] for run in gentle])}")
    print(f"\nrank correlation of the scores with those before step 0, responses, {seeds} seeds\n")
    print(format_drift(folder, seeds))
    for share in WRONG_HOLDOUT:
        runs = [
            stored(
                folder / f"robust-{share}-{seed}.json", lambda s=seed, w=share: measure_robustness(folder, model, s, w)
            )
            for seed in range(seeds)
        ]
        print(f"\nrobust scoring, responses, {share:.0%} of validation by the wrong key, {seeds} seeds\n")
        print(format_robustness(runs))


def stored(path: Path, compute: Callable[[], Cell]) -> Cell:
    """What the file holds, or what is computed and kept there."""
    if not path.exists():
        path.write_text(json.dumps(compute()))
    return json.loads(path.read_text())


def pretrain(folder: Path) -> Path:
    """The task's model, taught once."""
    if not (folder / "model").exists():
        scripts.write_scripts_data(folder, train=1)
        pretrain_builtin_model(folder, BUILTIN_TASKS["scripts"])
    return folder / "model"


def measure_seed(folder: Path, model: LanguageModel, form: str, seed: int) -> Cell:
    """Scores and trainings of a seed."""
    made = scripts.write_scripts_data(folder / f"data-{form}-{seed}", seed=seed, format=form, lessons=0)
    parts = {part: read_rows(made / f"{part}.jsonl") for part in ("train", "validation", "test")}
    right = np.array([row["label"] == "clean" for row in parts["train"]])
    objective = OBJECTIVES[form]

    def fine_tune(rows: list[Cell], judge: str, solver: str | None, weights: np.ndarray | None = None) -> FineTuned:
        optimizer = optax.adamw(LEARNING_RATE, eps_root=1e-12)
        return model.finetune(
            rows, parts[judge], optimizer, steps=STEPS, batch_size=BATCH, objective=objective, solver=solver,
            weights=weights, seed=seed,
        )  # fmt: skip

    def score(name: str, **options: Any) -> np.ndarray:
        return model.score(name, parts["train"], parts["validation"], **options).values

    values = {f"ICA, k = {k}, knn": score("ica", k=k, seed=seed) for k in NUM_DEMONSTRATIONS}
    values |= {f"ICA, k = 3, {name}": score("ica", k=3, demonstrations=name, seed=seed) for name in CHOICES[1:]}
    values["ICA, k = 3, knn by hidden states"] = score("ica", k=3, embedding="hidden", seed=seed)
    values["one step (alignment)"] = score("alignment", objective=objective)
    values["exact hypergradients"] = -fine_tune(parts["train"], "validation", "unroll").grad
    scores = {
        name: {
            "auc": auc(value, right),
            "one step": rank_correlation(value, values["one step (alignment)"]),
            "exact": rank_correlation(value, values["exact hypergradients"]),
        }
        for name, value in values.items()
    }
    weights = {
        "uniform": np.ones(len(right)),
        "ICA, over all examples": minmax(values["ICA, k = 3, knn"]),
        "one step (alignment)": minmax(values["one step (alignment)"]),
        "exact hypergradients": minmax(values["exact hypergradients"]),
        "right examples alone (oracle)": right.astype(float),
    }
    arms = {name: judge(fine_tune(parts["train"], "test", None, one), parts["test"]) for name, one in weights.items()}
    ranked = np.argsort(-values["ICA, k = 3, knn"], kind="stable")
    for cut in CUTS:
        best = [parts["train"][i] for i in ranked[: round(len(ranked) * (1 - cut / 100))]]
        arms[f"ICA, best {100 - cut} %"] = judge(fine_tune(best, "test", None), parts["test"])
    if form == "responses":
        settings = {f"ICA, k = {k}, R = 1": (k, 1) for k in NUM_DEMONSTRATIONS}
        settings |= {f"ICA, k = 3, R = {count}": (3, count) for count in REFRESHES}
        for name, (k, count) in settings.items():
            arms[name] = train_online(folder / f"{form}-{seed}-{k}-{count}", folder / "model", made, seed, k, count)
    return {"scores": scores, "arms": arms}


def measure_gentle(folder: Path, model: LanguageModel, seed: int) -> Cell:
    """Exact hypergradients of a training that is not at its end yet, beside the scores."""
    made = scripts.write_scripts_data(folder / f"data-responses-{seed}", seed=seed, lessons=0)
    rows, validation = (read_rows(made / f"{part}.jsonl") for part in ("train", "validation"))
    optimizer = optax.adamw(LEARNING_RATE / 3, eps_root=1e-12)
    exact = -model.finetune(rows, validation, optimizer, steps=STEPS, batch_size=BATCH, seed=seed).grad
    return {
        "AUC": auc(exact, np.array([row["label"] == "clean" for row in rows])),
        "Spearman with ICA, k = 3, knn": rank_correlation(
            exact, model.score("ica", rows, validation, seed=seed).values
        ),
        "Spearman with one step": rank_correlation(exact, model.score("alignment", rows, validation).values),
    }


def measure_robustness(folder: Path, model: LanguageModel, seed: int, wrong_share: float) -> Cell:
    """Sets of demonstrations and maps to weights, where some of validation follow the wrong key."""
    made = scripts.write_scripts_data(folder / f"data-responses-{seed}", seed=seed, lessons=0)
    train_rows, validation, test = (read_rows(made / f"{part}.jsonl") for part in ("train", "validation", "test"))
    for row in validation[: round(wrong_share * len(validation))]:
        row["response"] = wrong_response(row)
    right = np.array([row["label"] == "clean" for row in train_rows])
    cell: Cell = {}
    for described, (k, num_sets) in SETS.items():
        scores = [
            model.score(
                "ica", train_rows, validation, k=k, demonstration_sets=num_sets, demonstrations=name, seed=other
            )
            for name, other in (("knn", seed), ("random", seed), ("random", seed + 100))
        ]
        errors = [score.standard_errors for score in scores]
        weights = {
            "min-max": minmax(scores[0].values),
            "quantiles": clipped_minmax_weights(scores[0].values),
            "ranks": rank_weights(scores[0].values),
        }
        differences = np.abs(scores[1].values - scores[2].values)
        cell[described] = {
            "auc": auc(scores[0].values, right),
            "auc, random": auc(scores[1].values, right),
            "repeats": rank_correlation(scores[1].values, scores[2].values),
            "covered": None if errors[1] is None else float(
                (differences <= 2 * np.hypot(errors[1], errors[2])).mean()
            ),
            "arms": {
                name: judge(
                    model.finetune(
                        train_rows, test, optax.adamw(LEARNING_RATE, eps_root=1e-12), steps=STEPS, batch_size=BATCH,
                        solver=None, weights=one / one.mean(), seed=seed,
                    ),
                    test,
                )
                for name, one in weights.items()
            },
        }  # fmt: skip
    return cell


def format_robustness(runs: list[Cell]) -> str:
    """The table of robust scoring as markdown."""
    lines = [
        "| sets of demonstrations | AUC, knn | AUC, random | Spearman of two random draws "
        "| differences within 2 standard errors | test loss: min-max | quantiles | ranks |",
        "|---" * 8 + "|",
    ]
    for num_sets in SETS:
        columns = [spread([run[num_sets][key] for run in runs]) for key in ("auc", "auc, random", "repeats")]
        covered = [run[num_sets]["covered"] for run in runs]
        columns.append("" if covered[0] is None else spread(covered))
        columns += [spread([run[num_sets]["arms"][name]["loss"] for run in runs]) for name in runs[0][num_sets]["arms"]]
        lines.append(f"| {num_sets} | {' | '.join(columns)} |")
    return "\n".join(lines)


def format_drift(folder: Path, seeds: int) -> str:
    """How far scores that were made anew during training agree with the first."""
    records = [
        json.loads((folder / f"responses-{seed}-3-{REFRESHES[-1]}" / "result.json").read_text())["scoring"]["records"]
        for seed in range(seeds)
    ]
    lines = ["| before step | with the first | with the one before |", "|---|---|---|"]
    for at in range(1, len(records[0])):
        columns = [spread([run[at][key] for run in records]) for key in ("with_first", "with_previous")]
        lines.append(f"| {records[0][at]['step']} | {' | '.join(columns)} |")
    return "\n".join(lines)


def read_rows(path: Path) -> list[Cell]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def minmax(values: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1."""
    return (values - values.min()) / np.ptp(values)


def judge(result: FineTuned, test: list[Cell]) -> Cell:
    """Test loss, and the share of test examples whose right response is likelier than the wrong key's."""
    prompts, right = [row["prompt"] for row in test], [row["answer"] for row in test]
    wrong = [row["rejected"] if "rejected" in row else wrong_response(row) for row in test]
    sides = [result.lm.loglik(prompts, responses).nats for responses in (right, wrong)]
    return {"loss": result.value, "accuracy": float((sides[0] > sides[1]).mean())}


def wrong_response(row: Cell) -> str:
    """The response by the key that wrong examples follow: the next script in every place."""
    places = [next((s, script.index(sign)) for s, script in enumerate(scripts.SCRIPTS) if sign in script)
              for sign in row["answer"]]  # fmt: skip
    return "".join(scripts.SCRIPTS[(s + 1) % len(scripts.SCRIPTS)][place] for s, place in places)


def train_online(out: Path, model: Path, made: Path, seed: int, k: int, refreshes: int) -> Cell:
    """`train` with the weights of the paper: min-max over each batch, made anew at equal spacing."""
    settings = {
        "model.name-or-path": model, "lora.r": 0, "data.train": made / "train.jsonl",
        "data.validation": made / "validation.jsonl", "data.test": made / "test.jsonl", "data.seed": seed,
        "optimizer.learning-rate": LEARNING_RATE, "optimizer.schedule": "constant", "optimizer.warmup-steps": 0,
        "train.max-steps": STEPS, "train.eval-steps": STEPS, "train.global-batch-size": BATCH, "train.seed": seed,
        "weights.score": "ica", "weights.refresh": refreshes, "scores.k": k, "mesh.data": 1, "out": out,
    }  # fmt: skip
    flags = [text for flag, value in settings.items() for text in (f"--{flag}", str(value))]
    flags += ["--data.split", "1", "0", "0", "--output.no-progress"]
    result = train(load_config(TrainConfig, None, [*flags, *(["--resume"] if (out / "config.yaml").exists() else [])]))
    after = result["parts"]["test"]["after"]
    return {"loss": after["loss"], "accuracy": judge_folder(out / "model", made / "test.jsonl")}


def judge_folder(model: Path, test: Path) -> float:
    """The accuracy of `judge` of a saved model."""
    rows, lm = read_rows(test), bj.lm.load(model)
    prompts = [row["prompt"] for row in rows]
    right = lm.loglik(prompts, [row["answer"] for row in rows]).nats
    return float((right > lm.loglik(prompts, [wrong_response(row) for row in rows]).nats).mean())


def format_scores(runs: list[Cell]) -> str:
    """The table of scores as markdown."""
    lines = ["| score | AUC, right against wrong key | Spearman with one step | with exact hypergradients |"]
    lines.append("|---|---|---|---|")
    for name in runs[0]:
        columns = [spread([run[name][key] for run in runs]) for key in ("auc", "one step", "exact")]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def format_arms(runs: list[Cell]) -> str:
    """The table of trainings as markdown."""
    lines = ["| weights | test loss | right likelier than wrong |", "|---|---|---|"]
    for name in runs[0]:
        loss, accuracy = (spread([run[name][key] for run in runs]) for key in ("loss", "accuracy"))
        lines.append(f"| {name} | {loss} | {accuracy} |")
    return "\n".join(lines)


def format_ablations(runs: list[Cell]) -> str:
    """The paper's win rates beside our differences of test loss, paired by seed."""
    lines = ["| instead of k = 3, R = 1, no cut | published win rate, % | our test loss, difference |", "|---|---|---|"]
    for name, rate in PUBLISHED.items():
        differences = [run[arm_of(name)]["loss"] - run[default_of(name)]["loss"] for run in runs]
        lines.append(f"| {name} | {rate} | {spread(differences, sign='+')} |")
    return "\n".join(lines)


def arm_of(change: str) -> str:
    """The arm of a row of the table of ablations."""
    if change.startswith("k"):
        return f"ICA, {change}, R = 1"
    return f"ICA, k = 3, {change}" if change.startswith("R") else f"ICA, {change}"


def default_of(change: str) -> str:
    """What it is compared with: trained by the same program."""
    return "ICA, over all examples" if change.startswith("best") else "ICA, k = 3, R = 1"


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± half of the 95 % interval over the seeds."""
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def draw(runs: list[Cell], picture: Path) -> None:
    """The published curves above ours: demonstrations, refreshes, cuts."""
    import matplotlib.pyplot as plt

    panels = {
        "demonstrations k": [("1", "k = 1"), ("3", ""), ("5", "k = 5"), ("10", "k = 10")],
        "refreshes R": [("1", ""), ("3", "R = 3"), ("5", "R = 5"), ("9", "R = 9")],
        "kept": [("all", ""), ("50 %", "best 50 %"), ("25 %", "best 25 %"), ("10 %", "best 10 %")],
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.5), layout="constrained", sharey="row")
    for column, (label, places) in enumerate(panels.items()):
        default = default_of("best" if label == "kept" else "k")
        rates = [PUBLISHED.get(change, 50.0) for _, change in places]
        losses = [mean_interval([run["arms"][arm_of(change) if change else default]["loss"] for run in runs])
                  for _, change in places]  # fmt: skip
        names = [name for name, _ in places]
        axes[0, column].plot(names, rates, "o-", color="tab:blue")
        axes[0, column].axhline(50, color="gray", linewidth=0.8, linestyle=":")
        axes[1, column].errorbar(names, *np.transpose(losses), fmt="o-", color="tab:orange", capsize=3)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("published win rate\nagainst default, %")
    axes[1, 0].set_ylabel("our test loss,\nnats per token")
    figure.savefig(picture)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    measure(options.folder, seeds=options.seeds)
