import html
import json
import math
import re
import xml.etree.ElementTree as xml
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape

from bilevel_jax.commands.train import report
from bilevel_jax.runs.config.load import TrainConfig, config_to_yaml
from bilevel_jax.runs.config.schema import (
    FineTuneSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    TrainOutputSection,
    WeightsSection,
)
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.journal import Journal
from bilevel_jax.runs.report import curves
from bilevel_jax.runs.terminal import show_control_characters
from tests.commands.test_select_report import (
    HOSTILE,
    PAIRS,
    Balance,
    examples,
    numbers,
    pairs,
    words,
)

CLEAN = show_control_characters(HOSTILE)  # neither a parquet file nor a YAML file can hold half a surrogate pair


def record(step, *, ends=False, **losses):
    accuracy = {part: 0.3123 + step / 1300 + at / 37 for at, part in enumerate(losses)}
    return {"step": step, "loss": losses, "accuracy": accuracy if ends else None}


def readings(last=2.0123, steps=96):
    """Three readings of validation, dev and test; dev is lowest in the middle."""
    return [
        record(0, validation=3.1234, dev=3.2345, test=3.3456, ends=True),
        record(steps // 2, validation=2.2234, dev=1.9345, test=2.2456),
        record(steps, validation=1.8765, dev=2.1456, test=last, ends=True),
    ]


def result(records=None, **changes):
    records = readings() if records is None else records
    parts = records[0]["loss"] if records else {}
    ends = {"before": records[0], "after": records[-1]} if records else {}
    return {
        "steps": 96,
        "epochs": 3.84,
        "batch": 5,
        "rows": {"train": 40, "validation": 16, "dev": 8, "test": 32} if records else {"train": 40},
        "objective": "sft",
        "unit": "nats per token",
        "right": "token accuracy",
        "parts": {
            part: {when: {key: one[key][part] for key in ("loss", "accuracy")} for when, one in ends.items()}
            for part in parts
        },
        "best": None,
        "kept": "last",
        "tokens": 123_456,
        "seconds": 4321.0,
        "tokens_per_second": 28.57,
        "weights": {"source": f"weight of {HOSTILE}", "ess": 17.65, "mean": 1.0432, "zero": 3, "missing": 2},
        "records": records,
        "notes": [f"a note {HOSTILE}"],
        "resumed": 0,
        "config_hash": "0f55d845",
    } | changes


def events(steps=96, loss=lambda step: 3 / (1 + step / 30), read=10):
    return [
        {
            "event": "steps",
            "step": min(first + read, steps),
            "first": first,
            "losses": [loss(step) for step in range(first, min(first + read, steps))],
            "rates": [1e-4 * (1 - step / steps) for step in range(first, min(first + read, steps))],
        }
        for first in range(0, steps, read)
    ]


CONFIG = TrainConfig(
    model=ModelSection(name_or_path=f"base {CLEAN}"),
    weights=WeightsSection(file=f"out/{CLEAN}/weights.parquet", missing="drop"),
    train=FineTuneSection(global_batch_size=5),
    output=TrainOutputSection(dir=f"out/{CLEAN}"),
)


def written(folder, told=None, rows=None, *, weights=None, log=None, config=CONFIG) -> str:
    """The page of a finished run's folder, with as little in it as a report reads."""
    told, rows = told or result(), rows or examples()
    rows = [row._replace(id=show_control_characters(row.id)) for row in rows]
    weights = np.exp(np.random.default_rng(0).normal(0, 2, len(rows))) if weights is None else weights
    table = pa.table(
        {
            "id": [row.id for row in rows],
            "row": np.arange(len(rows)),
            "source": [show_control_characters(row.source) for row in rows],
            "label": pa.array([row.label and show_control_characters(row.label) for row in rows], pa.string()),
            "weight": np.asarray(weights, np.float32),
            "file": [row.file for row in rows],
            "line": [row.line for row in rows],
        }
    )
    pq.write_table(table.replace_schema_metadata({"weight": "factor of the loss"}), folder / "weights.parquet")
    (folder / "result.json").write_text(json.dumps(told))
    log = events() if log is None else log
    for event in log:
        Journal(folder / "log.jsonl", fsync=False).append(event)
    (folder / run_dir.CONFIG_FILE).write_text(config_to_yaml(config), "utf-8")
    environment = {
        "command": ["/somewhere/bin/bilevel-jax", "train", "my config.yaml", HOSTILE],
        "python": "3.11.7",
        "platform": "Linux",
        "packages": {"jax": "0.10.2", "bilevel-jax": None},
        "devices": ["TPU v5", "TPU v5"],
        "backend": "tpu",
        "processes": 1,
        "commit": None,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    path = report.write_train_report(folder, rows)
    assert path == folder / "report.html" and path.stat().st_size < 1.5e6
    return path.read_text("utf-8")


ROSE = result(readings(last=3.9))
BEST = result(best={"step": 48, "part": "dev"}, kept="best")
ONE_STEP = [record(0, validation=3.0, ends=True), record(1, validation=2.9, ends=True)]
NAN = [record(0, test=math.nan, ends=True), record(96, test=math.nan, ends=True)]
CASES = {
    "whole": {},
    "rose": {"told": ROSE},
    "best kept": {"told": BEST},
    "no validation": {"told": result([])},
    "only validation": {"told": result(ONE_STEP)},
    "pairs": {
        "told": result(**PAIRS),
        "rows": pairs(),
        "config": replace(CONFIG, objective=ObjectiveSection(name="dpo")),
    },
    "no labels": {"rows": examples(labels=False)},
    "one source": {"rows": examples(sources=1)},
    "equal weights": {"weights": np.ones(40)},
    "equal weights of 2": {"weights": np.full(40, 2.0)},
    "zero weights": {"weights": np.r_[np.zeros(39), 40.0]},
    "one row": {"rows": examples(1), "told": result(rows={"train": 1}), "weights": np.ones(1)},
    "two rows": {"rows": examples(2), "weights": np.array([0.5, 1.5])},
    "one step": {"told": result(ONE_STEP, steps=1), "log": events(1)},
    "three steps": {"log": events(3)},
    "no log": {"log": []},
    "many steps": {"told": result(readings(steps=4_000), steps=4_000), "log": events(4_000)},
    "losses that are not finite": {"log": events(loss=lambda step: None if step % 2 else step / 7)},
    "no finite loss": {"log": events(loss=lambda step: None)},
    "validation that is not finite": {"told": result(NAN)},
    "a loss that is null": {
        "told": result([record(0, validation=None, ends=True), record(96, validation=None, ends=True)])
    },
    "nothing measured": {"told": result(tokens_per_second=None, tokens=0, seconds=0.0)},
    "resumed": {"told": result(resumed=40)},
    "all parameters": {
        "config": replace(CONFIG, model=ModelSection(name_or_path="base", from_scratch=True), lora=LoraSection(r=0))
    },
    "adapter alone": {"config": replace(CONFIG, output=TrainOutputSection(dir="out/x", model="adapter"))},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_kind_of_run_makes_a_whole_page(case, tmp_path):
    page = written(tmp_path, **case)
    seen = Balance(page)
    assert not {"script", "img", "link", "iframe", "object", "base"} & seen.tags
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    assert "<script" not in page.lower() and "\x00" not in page
    shown = re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b|\binf\b|None", html.unescape(shown))
    for picture in re.findall(r"<svg.*?</svg>", page):
        xml.fromstring(picture)


def test_hostile_text_is_shown_and_never_markup(tmp_path):
    page = written(tmp_path)
    assert page.count(str(escape("<script>alert('x')</script>"))) > 20
    assert "weight of <script>" in words(page) and "base <script>" in words(page)


@pytest.mark.parametrize(
    "case, level, says",
    [
        ("whole", "Validation loss fell", "The loss on test (32 examples) fell from 3.346 to 2.012 nats per token"),
        ("rose", "Validation loss rose", "The loss on test (32 examples) rose from 3.346 to 3.900 nats per token"),
        ("no validation", "Not validated", "nothing here says whether the model became better"),
        ("only validation", "Validation loss fell", "make its loss fall by design"),
        ("pairs", "Validation loss fell", "2.012 nats per pair"),
        ("validation that is not finite", "Validation loss is not finite", "Do not use this model"),
    ],
)
def test_the_page_begins_with_what_the_validation_loss_did(case, level, says, tmp_path):
    text = words(written(tmp_path, **CASES[case]))
    assert text.index(level) < text.index("What the validation examples say") and says in text


def test_every_number_of_the_result_appears(tmp_path):
    told = result()
    text = words(written(tmp_path, told))
    missing = []
    for value in numbers(told):
        forms = {f"{value:,}", f"{value:,.0f}"} if float(value).is_integer() else set()
        forms |= {f"{value:#.4g}", f"{value:g}"}
        if not any(re.search(rf"(?<![\d.]){re.escape(form.rstrip('.'))}(?!\d)", text) for form in forms):
            missing.append(value)
    assert missing in ([], [0])  # resumed: 0 is silence


def test_a_kept_step_is_the_one_that_is_told(tmp_path):
    text = words(written(tmp_path, **CASES["best kept"]))
    assert "fell from 3.346 to 2.246 nats per token" in text  # of step 48, not of the last
    assert "the parameters of step 48 of 96, where dev was lowest" in text
    assert "No accuracy was read at step 48" in text and "written: step 48" in text


def test_a_rise_after_the_least_loss_is_told(tmp_path):
    text = words(written(tmp_path, result(readings(last=2.5))))
    assert "Test loss was lowest at step 48: 2.246 against 2.500 nats per token at the end" in text
    assert "was lowest" not in words(written(tmp_path))


@pytest.mark.parametrize(
    "case, says",
    [
        ("whole", "2 examples that the weights file lacks: left out"),
        ("whole", "3 examples with weight 0 taught nothing"),
        ("equal weights", "Every example counts the same: plain fine-tuning"),
        ("equal weights", "no example stands out"),
        ("equal weights of 2", "Every example counts the same, 2.000 times"),
        ("resumed", "went on at step 40"),
        ("whole", "4,321 seconds of training (1 h 12 min 1 s)"),
        ("losses that are not finite", "Not drawn: 48 steps without a finite loss."),
        ("pairs", "log 2 = 0.6931"),
        ("pairs", "chosen better"),
    ],
)
def test_says(case, says, tmp_path):
    assert says in words(written(tmp_path, **CASES[case]))


@pytest.mark.parametrize(
    "case, full, adapter", [("whole", True, True), ("all parameters", True, False), ("adapter alone", False, True)]
)
def test_only_what_was_written_is_loaded(case, full, adapter, tmp_path):
    text = words(written(tmp_path, **CASES[case]))
    assert ("/model'" in text) == full and ("/model-adapter'" in text) == adapter == ("PeftModel" in text)


def test_a_repeated_step_counts_once_and_a_torn_last_line_is_passed_over(tmp_path):
    first, again = events(20, loss=lambda step: 1.0), events(20, loss=lambda step: 2.0)
    for event in (first[0], first[1], again[1]):
        Journal(tmp_path / "log.jsonl", fsync=False).append(event)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps(first[1])[:30])
    log = curves.read_training_log(tmp_path / "log.jsonl")
    assert log.steps == list(range(20)) and log.losses == [1.0] * 10 + [2.0] * 10


def test_running_mean():
    mean = curves.running_mean([1.0, 2.0, 6.0, math.nan, 4.0], 3)
    assert mean == [1.5, 3.0, 4.0, 5.0, 4.0]
    assert np.isnan(curves.running_mean([math.nan], 1)).all()


def test_a_spike_does_not_flatten_the_picture(tmp_path):
    page = written(tmp_path, log=events(loss=lambda step: 1e6 if step == 50 else 2 + step % 3))
    assert "Drawn at the edge: 1 step beyond the axis." in words(page)
