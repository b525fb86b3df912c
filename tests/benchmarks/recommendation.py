"""How good select's recommendation is: its regret on test, over many settings.

    python -m tests.benchmarks.recommendation ../shared out/recommendation.jsonl
    python -m tests.benchmarks.recommendation ../shared out/recommendation.jsonl --print --reviews out/reviews.jsonl

A setting is a task, a kind and a share of noise and a number of validation examples. Every arm of `select` but `random`
is trained (two seeds; text: one), one is recommended from dev, and the regret is the test loss of that arm minus the
least test loss of an arm that does not know the labels. It is held against the standard error that the dev set has for
the difference of the two arms, by the bootstrap of the recommendation. Expected: a regret of at most one standard error
in 28 of 30 settings.

MNIST: 500 digits, 40 steps of 100, softmax regression or a layer of 32 units, 5,000 test digits, 6 outer steps of
`unrolled`. Cipher and sums: 192 examples, 32 steps of 32, 3 outer steps, by the command itself. Dev has half as many
examples as validation, and at least 16.

Each setting is a line of the file; what stands there is not run again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.commands.select.run import select
from bilevel_jax.lm.builtin import cipher, sums
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.config.schema import (
    ArraysSection,
    DataSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    OuterSection,
    ScoresSection,
    TrainSection,
)
from bilevel_jax.runs.engine.arms import ArmInputs, build_simple_arm, make_variant
from bilevel_jax.runs.engine.outer_loop import run_outer_loop
from bilevel_jax.runs.engine.recommendation import SIMPLICITY, recommend
from bilevel_jax.runs.engine.retrain import Retrainer, retrain_variants
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.stats import bootstrap_means, top_indices
from bilevel_jax.runs.tasks.arrays import (
    ArrayDataset,
    build_array_model,
    label_array_data,
    prepare_array_task,
    read_npz_dataset,
)
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model
from bilevel_jax.runs.tasks.evaluation import read_labels

SIMPLE = (
    "uniform", "validation", "train+validation", "validation_early_stop", "low_loss", "low_loss_dev", "top_alignment",
    "validation_model", "oracle",
)  # fmt: skip
LEARNED = ("selected", "learned", "learned+validation")
MNIST_NOISE = {"50 % forced": ("forced", 0.5), "90 % redrawn": ("redrawn", 0.9), "60 % shifted": ("shifted", 0.6)}
MNIST_MODELS: dict[str, tuple[int, ...]] = {"linear": (), "MLP": (32,)}
TEXT_NOISE = {"cipher": "67 % wrong or random", "sums": "60 % wrong or random"}
OPTIMIZER = OptimizerSection(name="momentum", learning_rate=0.1, schedule="constant", warmup_steps=0)
OUTER = OuterSection(weighting="sigmoid", steps=6, learning_rate=1.0, schedule="linear", patience=0)
TRAIN = TrainSection(max_steps=40, global_batch_size=100)
MESH = MeshSection(data=1)


def list_settings() -> list[dict[str, Any]]:
    """All settings, the cheap ones first."""
    mnist = [
        {"task": f"MNIST {model}", "noise": noise, "validation": size}
        for model, sizes in (("linear", (8, 32, 100, 500)), ("MLP", (8, 32, 100, 500)))
        for noise in MNIST_NOISE
        for size in sizes
    ]
    few = [{"task": f"MNIST {model}", "noise": "10 % forced", "validation": 32} for model in MNIST_MODELS]
    text = [{"task": task, "noise": "", "validation": size} for task in TEXT_NOISE for size in (8, 16, 64)]
    return mnist + few + text


def measure(shared: Path, lines: Path) -> None:
    """Run the settings that the file does not hold yet."""
    held = [{key: line[key] for key in ("task", "noise", "validation")} for line in read_lines(lines)]
    with tempfile.TemporaryDirectory() as temporary:
        for setting in list_settings():
            if setting in held:
                continue
            began = time.process_time()
            run = _run_mnist if setting["task"].startswith("MNIST") else _run_text
            dev_losses, test = run(shared, Path(temporary), setting)
            line = setting | judge(dev_losses, test) | {"cpu_seconds": round(time.process_time() - began, 1)}
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(
                {key: value for key, value in line.items() if key not in ("standings", "test", "dev_losses")},
                flush=True,
            )


def judge(dev_losses: Mapping[str, np.ndarray], test: Mapping[str, float]) -> dict[str, Any]:
    """The recommendation from dev, and its regret on test over the dev set's standard error for it."""
    told = recommend(dev_losses, "nats")
    names = [name for name in SIMPLICITY if name in test]
    best = min(names, key=lambda name: test[name])
    assert told.use is not None
    pair = bootstrap_means(np.stack([dev_losses[told.use], dev_losses[best]]), seed=(0,))
    error = float(np.std(pair[1:, 0] - pair[1:, 1]))
    regret = test[told.use] - test[best]
    return {
        "use": told.use,
        "best": best,
        "regret": regret,
        "standard_error": error,
        "good": bool(regret <= error),
        "uniform_regret": test["uniform"] - test[best],
        "oracle": test.get("oracle"),
        "test": dict(test),
        "standings": [list(standing) for standing in told.standings],
        "dev_losses": {name: dev_losses[name].round(4).tolist() for name in names},
    }


@cache
def _mnist(shared: Path) -> ArrayDataset:
    return read_npz_dataset(str(shared / "data/mnist/mnist_70k.npz"))


def _arrays(setting: Mapping[str, Any]) -> ArraysSection:
    kind, share = {**MNIST_NOISE, "10 % forced": ("forced", 0.1)}[setting["noise"]]
    return ArraysSection(
        hidden_sizes=MNIST_MODELS[setting["task"].removeprefix("MNIST ")],
        activation="tanh",
        train_examples=500,
        validation_examples=setting["validation"],
        dev_examples=max(16, setting["validation"] // 2),
        test_examples=5000,
        label_noise=kind,
        noise_share=share,
    )


@cache
def _mnist_model(shared: Path, hidden_sizes: tuple[int, ...]) -> Any:
    arrays = ArraysSection(hidden_sizes=hidden_sizes, activation="tanh")
    return build_array_model(
        _mnist(shared), arrays, model=ModelSection(), optimizer=OPTIMIZER, max_steps=TRAIN.max_steps
    )


def _run_mnist(
    shared: Path, folder: Path, setting: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    arrays, data = _arrays(setting), label_array_data(DataSection())
    folder = folder / "-".join(str(value) for value in setting.values()).replace(" ", "_").replace("%", "")
    folder.mkdir()
    model = _mnist_model(shared, arrays.hidden_sizes)
    task = prepare_array_task(_mnist(shared), model, arrays, folder, train=TRAIN, mesh=MESH, data_seed=0)
    with open_session(folder, progress=False, save_seconds=1e9) as session:
        trainer = Trainer(task, OUTER, session)
        learned = run_outer_loop(task, trainer, session, data=data, train_seed=0, scores=ScoresSection())
        retrainer = Retrainer(task, trainer, session, "compare", train_seed=0, data_seed=0)
        labels = read_labels(task, data)
        inputs = ArmInputs(learned.losses, learned.alignment, task.num_examples // 2, 0, labels)
        variants = [build_simple_arm(name, task, retrainer, inputs).variant for name in SIMPLE]
        weights, trainable = learned.corpus_weights(task), task.trainable_indices()
        everything = np.concatenate([trainable, task.validation_indices()])
        top = top_indices(learned.weights, inputs.subset_size, trainable)
        variants += [
            make_variant("selected", "", task, top),
            make_variant("learned", "", task, trainable, weights),
            make_variant("learned+validation", "", task, everything, weights),
        ]
        table, dev_losses = retrain_variants(task, retrainer, variants, 2)
    return dev_losses, {line["name"]: line["mean"]["test"] for line in table}


@cache
def _builtin_model(name: str, folder: Path) -> Path:
    target = folder / name
    task = BUILTIN_TASKS[name]
    task.write_files(target)
    pretrain_builtin_model(target, task, progress=False)
    return target / "model"


def _run_text(shared: Path, folder: Path, setting: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    name, size = setting["task"], setting["validation"]
    model = _builtin_model(name, folder)
    target = folder / f"{name}-{size}"
    counts = {"validation": size, "dev": max(16, size // 2), "test": 384, "seed": 1}
    write: dict[str, Callable[[], Any]] = {
        "cipher": lambda: cipher.write_cipher_data(target, clean=64, wrong=64, noise=64, copies=0, **counts),
        "sums": lambda: sums.write_sums_data(target, corrupted=0.5, noise=0.1, train=192, lessons=0, **counts),
    }
    write[name]()
    settings = {
        "model.name_or_path": model, "lora.r": 0, "data.train": target / "train.jsonl",
        "data.validation": target / "validation.jsonl", "data.dev": target / "dev.jsonl",
        "data.test": target / "test.jsonl", "data.split": "1 0 0", "data.label-field": "label", "data.max-length": 32,
        "optimizer.learning-rate": 2e-3, "optimizer.warmup-steps": 5, "optimizer.b2": 0.99, "optimizer.eps-root": 1e-6,
        "train.max-steps": 32, "train.global-batch-size": 32, "outer.weighting": "sigmoid", "outer.steps": 3,
        "outer.learning-rate": 1.5, "outer.patience": 0, "outer.reliability-every": 0, "certify.no-enabled": "",
        "output.no-progress": "", "selection.top-share": 0.4, "retrain.seeds": 1, "mesh.data": 1, "out": target / "run",
    }  # fmt: skip
    given = [text for flag, value in settings.items() for text in (f"--{flag}", *str(value).split())]
    result = select(load_config(SelectConfig, None, [*given, "--retrain.variants", *SIMPLE, *LEARNED]))
    test = {row["name"]: row["mean"]["test"] for row in result["compare"]}
    return read_dev_losses(target / "run", list(test)), test


def read_dev_losses(run: Path, arms: Sequence[str]) -> dict[str, np.ndarray]:
    """The loss of each dev example by arm, of a finished run of `select` with one seed; of the best share on dev."""
    jobs = json.loads((run / "checkpoints/done.json").read_text("utf-8"))
    values = {
        arm: [
            job["value"]
            for key, job in jobs.items()
            if key == f"compare/{arm}/0" or (key.startswith(f"compare/{arm}, ") and key.endswith("%/0"))
        ]
        for arm in arms
    }
    return {arm: np.array([min(found, key=lambda value: value["dev"])["dev_losses"]]) for arm, found in values.items()}


def print_table(lines: Path, reviews: Path | None) -> None:
    """A row for each setting, and how many have a regret of at most one standard error."""
    rows = read_lines(lines) + (judge_reviews(reviews) if reviews else [])
    print("| task | noise | \\|V\\| | recommended | best on test | regret | standard error | regret of uniform |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        noise, mark = row["noise"] or TEXT_NOISE[row["task"]], "" if row["good"] else " ✕"
        print(
            f"| {row['task']} | {noise} | {row['validation']} | {row['use']} | {row['best']} | {row['regret']:.3f} | "
            f"{row['standard_error']:.3f}{mark} | {row['uniform_regret']:.3f} |"
        )
    print(f"\n{sum(row['good'] for row in rows)} of {len(rows)} within one standard error.")


def judge_reviews(lines: Path) -> list[dict[str, Any]]:
    """The settings of tests.benchmarks.reviews, by the same measure: what its runs `learned` recommended."""
    runs = [line for line in read_lines(lines) if line["run"] == "learned"]
    return [
        {"task": "film reviews", "noise": "60 %", "validation": line["size"]}
        | judge({arm: np.array(losses) for arm, losses in line["dev_losses"].items()}, line["test"])
        for line in runs
    ]


def read_lines(lines: Path) -> list[dict[str, Any]]:
    """The lines of a file that a benchmark adds to; none where there is no file."""
    return [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--reviews", type=Path, help="lines of tests.benchmarks.reviews, three more settings")
    parser.add_argument("--print", action="store_true", help="print the table of what the file holds")
    options = parser.parse_args()
    if options.print:
        print_table(options.lines, options.reviews)
    else:
        measure(options.shared, options.lines)
