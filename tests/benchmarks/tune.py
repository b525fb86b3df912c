"""`bilevel-jax tune` on settings that say DO NOT BELIEVE: does it find one that says BELIEVE, and at what loss?

    python -m tests.benchmarks.tune out/tune.jsonl --shared ../shared
    python -m tests.benchmarks.tune out/tune.jsonl --table

One line of JSON a setting; one whose line is there is not measured again. `mnist` is 600 digits, half of them with
wrong labels, 100 for validation, 200 for dev and 2,000 for test, softmax regression or 32 hidden units, 120 steps of
60; `cipher` and `sums` are built-in tasks, 40 steps of 16; `stories` is the model of 260 thousand parameters on stories
and film reviews, 24 steps of 8, validation, dev and test of reviews. Each has a rate (or a momentum) that is too high,
and else the defaults of `tune`. The loss that settings are chosen by is that of dev; test has chosen nothing. At the
end the proposed setting is certified again with another data.seed: other examples of `mnist`, and everywhere another
order and other draws.

Accept: of the settings that say DO NOT BELIEVE, in 8 of 10 a setting that says BELIEVE with a dev loss at most 5 %
higher. `../shared` is the folder of real data and models that tests/conftest.py describes.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_jax.commands.functions import run_command
from bilevel_jax.commands.results import TriedSetting, TuneResult
from bilevel_jax.lm.builtin import cipher, sums
from bilevel_jax.runs.config import schema
from bilevel_jax.runs.config.load import TuneConfig
from bilevel_jax.runs.tasks.builtin import BUILTIN_TASKS, pretrain_builtin_model


class Case(NamedTuple):
    """A task with an optimizer that makes training rough."""

    task: str
    model: str
    optimizer: str
    rate: float

    @property
    def name(self) -> str:
        """What its line is found by."""
        return f"{self.task} {self.model}, {self.optimizer} {self.rate:g}"


CASES = (
    Case("mnist", "tanh", "adam", 0.01), Case("mnist", "relu", "adam", 0.01), Case("cipher", "full", "adamw", 0.02),
    Case("mnist", "linear", "adam", 0.1), Case("mnist", "tanh", "momentum", 0.5), Case("sums", "full", "adamw", 0.02),
    Case("mnist", "relu", "momentum", 0.1), Case("mnist", "gelu", "adam", 0.02), Case("stories", "lora", "adamw", 0.05),
    Case("mnist", "linear", "sgd", 3.0), Case("mnist", "tanh", "sgd", 1.0), Case("stories", "full", "adamw", 0.01),
    Case("mnist", "silu", "adam", 0.03), Case("cipher", "lora", "adamw", 0.1),
)  # fmt: skip


def make_config(case: Case, shared: Path, made: Path, out: Path, *, again: bool = False) -> TuneConfig:
    """The config of a case, as a user would have it."""
    config = TuneConfig(
        output=schema.OutputSection(dir=str(out), progress=False),
        optimizer=schema.OptimizerSection(
            name=case.optimizer, learning_rate=case.rate, b2=0.99,
            schedule="constant" if case.task == "mnist" else "cosine", warmup_steps=0 if case.task == "mnist" else 4,
        ),
        data=schema.DataSection(seed=int(again)),
        mesh=schema.MeshSection(data=1),
    )  # fmt: skip
    if case.task == "mnist":
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, train=(str(shared / "data/mnist/mnist_70k.npz"),)),
            arrays=schema.ArraysSection(
                hidden_sizes=() if case.model == "linear" else (32,),
                activation="relu" if case.model == "linear" else case.model,
                train_examples=600, validation_examples=100, dev_examples=200, test_examples=2000,
            ),
            train=schema.TrainSection(max_steps=120, global_batch_size=60),
        )  # fmt: skip
    folder = made / case.task
    if not folder.exists():
        write_text(case.task, shared, folder)
    model = shared / "models/stories-260k" if case.task == "stories" else folder / "model"
    parts = {part: (str(folder / f"{part}.jsonl"),) for part in ("train", "validation", "dev", "test")}
    steps, batch = (24, 8) if case.task == "stories" else (40, 16)
    return dataclasses.replace(
        config,
        model=schema.ModelSection(name_or_path=str(model)),
        lora=schema.LoraSection(r=4 if case.model == "lora" else 0, alpha=8),
        data=dataclasses.replace(config.data, **parts, split=(1.0, 0.0, 0.0), max_length=32, truncation="right"),
        train=schema.TrainSection(max_steps=steps, global_batch_size=batch),
    )


def write_text(task: str, shared: Path, folder: Path) -> None:
    """The examples of a text task as files, and its model where the package makes it."""
    if task == "cipher":
        write, sizes = cipher.write_cipher_data, {"clean": 64, "wrong": 64, "noise": 64, "validation": 64, "dev": 64}
    elif task == "sums":
        write, sizes = sums.write_sums_data, {"train": 192, "lessons": 2048, "validation": 64, "dev": 64}
    else:
        folder.mkdir(parents=True)
        stories = json.loads((shared / "data/tinystories/tinystories_1000.json").read_text(encoding="utf-8"))
        known = [story.split(". ")[1] + "." for story in stories[:300] if story.count(". ") > 2][:80]
        with open(shared / "data/sst2/train.jsonl", encoding="utf-8") as lines:
            reviews = [json.loads(next(lines))["text"] for _ in range(400)]
        reviews = list(dict.fromkeys(reviews))
        rows = {"train": known + reviews[:80], "validation": reviews[80:130]}
        rows |= {"dev": reviews[130:210], "test": reviews[210:330]}
        for part, texts in rows.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return
    pretrain_builtin_model(write(folder, **sizes), BUILTIN_TASKS[task]._replace(num_steps=500), progress=False)


def measure(case: Case, shared: Path, made: Path, out: Path) -> dict[str, Any]:
    """One line: what `tune` finds, and what a second look at it says."""
    began, work = time.perf_counter(), time.process_time()
    config = make_config(case, shared, made, out / "tune")
    result = run_command(config)
    assert isinstance(result, TuneResult)
    line = {
        "name": case.name,
        "own": describe(result.settings[0]),
        "best_loss": min(one.losses["dev"] for one in result.settings if one.losses),
        "proposed": result.proposed and describe(result.proposed),
        "summary": result.summary,
        "rows": [describe(one) for one in result.settings],
        "trainings": result.result["trainings"],
        "optimism": result.result["optimism"],
        "cpu_seconds": time.process_time() - work,
        "seconds": time.perf_counter() - began,
    }
    if result.proposed and result.proposed.values:
        second = make_config(case, shared, made, out / "again", again=True)
        for key, value in result.proposed.values.items():
            section, name = key.split(".")
            second = dataclasses.replace(
                second, **{section: dataclasses.replace(getattr(second, section), **{name: value})}
            )
        only_own = schema.TuneSection(learning_rates=(1.0,), warmup_shares=(), eps_roots=(), clip_norms=(),
                                      batch_sizes=(), activations=())  # fmt: skip
        line["again"] = describe(run_command(dataclasses.replace(second, tune=only_own)).settings[0])
    return line


def describe(setting: TriedSetting) -> dict[str, Any]:
    """A setting as JSON."""
    verdict = setting.verdict
    return {
        "name": setting.name,
        "losses": setting.losses,
        "smoothness": setting.smoothness,
        "level": verdict.level if verdict else None,
        "scope": verdict.scope if verdict else "",
    }


# ---- the table


def print_table(lines: list[dict[str, Any]]) -> None:
    """All settings, and how many are found."""
    print("| setting | own verdict | proposed | verdict | dev loss | least | test loss | tried | seed 1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        proposed, certified = line["proposed"], sum(row["level"] is not None for row in line["rows"])
        cells = [line["name"], line["own"]["level"] or "failed", proposed["name"] if proposed else "none"]
        cells += [format_level(proposed), format_change(line, "dev"), f"{line['best_loss']:.3f}"]
        cells += [format_change(line, "test"), f"{len(line['rows'])}, {certified}", format_level(line.get("again"))]
        print(f"| {' | '.join(cells)} |")
    rough = [line for line in lines if line["own"]["level"] == "DO NOT BELIEVE"]
    found = [line for line in rough if line["proposed"]]
    within = [line for line in found if (change_of(line, "test") or 0.0) <= 0.05]
    held = [line for line in found if line.get("again", {}).get("level") == "BELIEVE"]
    print(f"\nOf {len(rough)} that say DO NOT BELIEVE, {len(found)} have a setting that says BELIEVE within 5 % of")
    print(f"the dev loss; of these {len(within)} are within 5 % of the test loss, and {len(held)} say BELIEVE again.")
    near = [line for line in found if line["proposed"]["losses"]["dev"] <= 1.05 * line["best_loss"]]
    print(f"{len(near)} are within 5 % of the least dev loss of all that were trained, whatever their certificates.")
    print(f"{sum(line['cpu_seconds'] for line in lines) / 60:.0f} minutes of processor time.")


def format_level(row: dict[str, Any] | None) -> str:
    """BELIEVE with its scope."""
    scopes = {"small changes": ", small", "": ""}
    return "" if not row or not row["level"] else row["level"] + scopes.get(row["scope"], ", half")


def change_of(line: dict[str, Any], part: str) -> float | None:
    """The rise of a loss from the config's own to the proposed setting, as a share."""
    own, proposed = line["own"]["losses"].get(part), line["proposed"] and line["proposed"]["losses"][part]
    return None if own is None or proposed is None else proposed / own - 1


def format_change(line: dict[str, Any], part: str) -> str:
    """Both losses and the change."""
    change = change_of(line, part)
    own = line["own"]["losses"].get(part)
    if change is None:
        return "" if own is None else f"{own:.3f}"
    return f"{own:.3f} → {line['proposed']['losses'][part]:.3f} ({change:+.1%})".replace("-", "−")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--only", default="", help="settings whose names hold this text")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the lines that there are")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.lines.read_text().splitlines()] if options.lines.exists() else []
    if options.table:
        print_table(lines)
        raise SystemExit
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.name in {line["name"] for line in lines} or options.only not in case.name:
                continue
            out = Path(folder) / case.name.replace(" ", "_")
            line = measure(case, options.shared, Path(folder) / "made", out)
            with options.lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(case.name, f"{line['seconds']:.0f} s", flush=True)
