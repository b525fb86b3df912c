import html
import json
import math
import re
import xml.etree.ElementTree as xml
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape

from bilevel_jax.commands.select import report
from bilevel_jax.core.certify import Verdict
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.runs.config.load import SelectConfig, config_to_yaml
from bilevel_jax.runs.config.schema import DataSection, OuterSection
from bilevel_jax.runs.engine.recommendation import NO_DEV, recommend, recommend_nothing
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report.numbers import format_number
from bilevel_jax.runs.terminal import show_control_characters

HOSTILE = "<script>alert('x')</script>\"'&\x00\u202e مرحبا 🙂 $x^2$ \ud800"
VERDICTS = {
    "BELIEVE": Verdict("BELIEVE", "small changes", "a reason.", "")._asdict(),
    "UNDECIDED": Verdict("UNDECIDED", "", "a reason.", "Compute them.")._asdict(),
    "DO NOT BELIEVE": Verdict("DO NOT BELIEVE", "", "a reason.", "Do this.")._asdict(),
}
GOOD = {"uniform": 1.8, "learned": 1.4, "selected": 1.6, "validation": 3.7, "oracle": 1.1}
SMOOTH = {"removed": [0.5, 0.2], "cosines": [0.71234, 0.81234]}


def checks(**changes):
    names = ("residual", "curvature", "gap", "growth", "sample")
    return {name: None for name in names} | {"replayed": True, "steps": 128, "batches": 0} | changes


def compared(seeds=3, values=None):
    rows = []
    for arm, value in (GOOD | (values or {})).items():
        runs = [
            {"validation": value - 0.1 + seed / 97, "dev": None, "test": value + seed / 89, "accuracy": 0.4 + seed / 83}
            for seed in range(seeds)
        ]
        half = None if seeds == 1 else 0.123
        rows.append(
            {
                "name": arm,
                "meaning": f"meaning of {arm}",
                "rows": 40,
                "steps": 128,
                "epochs": 10.65,
                "runs": runs,
                "mean": {key: float(np.mean([run[key] for run in runs])) for key in ("validation", "test", "accuracy")},
                "interval": dict.fromkeys(("validation", "test", "accuracy"), half),
            }
        )
    return rows


def result(level="BELIEVE", **changes):
    exact = {"steps": [0.1, 0.03], "ratios": [1.0123, 0.98765]}
    predictive = {"fraction": 0.5, "predicted": [0.1, 0.2], "actual": [0.1, 0.3], "rank": 0.8765, "slope": 1.2345}
    one = {"exact": exact, "smooth": SMOOTH, "predictive": predictive, "checks": checks(growth=3.1969)}
    one |= {"effective_share": 0.8123, "reliability": {"value": 0.7234}}
    records = [
        {
            "step": step,
            "loss": {"validation": 1.5551 - step / 7, "dev": 1.6661 - step / 9, "test": 1.7771 - step / 11},
            "ess": 40.0 - 3.3 * step,
            "entropy": 3.6789 - step / 10,
            "largest": 1.0 + 4.321 * step,
            "auc": 0.5 + step / 13,
            "checks": checks(growth=3.19 + step),
            "work": 664.0 + step,
        }
        for step in range(3)
    ]
    return {
        "verdict": VERDICTS[level] | {"sentence": level},
        "estimand": "L_v(theta_T(w)), the training run itself (T = 128 steps): exact",
        "unit": "nats per token",
        "right": "token accuracy",
        "certificates": {"uniform weights": one, "learned weights": one},
        "verdicts": {"uniform weights": VERDICTS[level], "learned weights": VERDICTS["BELIEVE"]},
        "records": records,
        "best": 2,
        "validation_weight": None,
        "ended": "all 2 outer steps were made",
        "auc": {"weights": 0.9123, "first_hypergradient": 0.8345, "alignment": 0.7456, "low_loss": 0.6567},
        "difficulty": {"length": 0.1234, "loss": 0.9234, "sentence": "The weights order the examples nearly by loss."},
        "rater": None,
        "compare": compared(),
        "absent_arms": [],
        "recommendation": recommend_nothing(NO_DEV).to_json(),
        "notes": [f"a note {HOSTILE}"],
        "rows": {"train": 40, "validation": 16, "dev": 8, "test": 32},
        "selected": 13,
        "work": {"outer": 3224.0, "certify": 3328.0, "compare": 3456.0},
        "seconds": {"certify": 12.34, "compare": 56.78},
        "config_hash": "0f55d845",
    } | changes


def examples(count=40, *, labels=True, sources=3, texts=HOSTILE):
    return [
        Example(
            id=f"{row}{HOSTILE}",
            row=row,
            turns=(Turn("user", f"question {row}"), Turn("assistant", texts)),
            source=f"source {row % sources} {HOSTILE}",
            label=("clean" if row % 2 else HOSTILE) if labels else None,
            file="rows.jsonl",
            line=row + 1,
        )
        for row in range(count)
    ]


def run_folder(tmp_path, written, rows, *, weights=None, outer=OuterSection(), settings=DataSection(train=(HOSTILE,))):  # noqa: B008
    """A finished run's files, with as little in them as a report reads."""
    clean = show_control_characters  # a parquet file and a YAML file cannot hold half a surrogate pair
    count = len(rows)
    weights = np.exp(np.random.default_rng(0).normal(0, 2, count)) if weights is None else weights
    columns = {
        "id": [clean(row.id) for row in rows],
        "row": np.arange(count),
        "source": [clean(row.source) for row in rows],
        "label": pa.array([row.label and clean(row.label) for row in rows], pa.string()),
        "weight": weights.astype(np.float32),
        "hypergradient": np.linspace(-0.004, 0.01, count).astype(np.float32),
        "selected": np.arange(count) < 13,
        "file": [row.file for row in rows],
        "line": [row.line for row in rows],
    }
    table = pa.table(columns).replace_schema_metadata({"weight": b"factor of the loss", "precision": b"float32"})
    pq.write_table(table, tmp_path / "weights.parquet")
    (tmp_path / "result.json").write_text(json.dumps(written))
    settings = replace(settings, train=tuple(clean(path) for path in settings.train))
    (tmp_path / run_dir.CONFIG_FILE).write_text(config_to_yaml(SelectConfig(outer=outer, data=settings)), "utf-8")
    environment = {
        "command": ["/somewhere/bin/bilevel-jax", "dev", "my config.yaml", HOSTILE],
        "python": "3.11.7",
        "platform": "Linux",
        "packages": {"jax": "0.10.2", "bilevel-jax": None},
        "devices": ["TPU v5", "TPU v5"],
        "backend": "tpu",
        "processes": 1,
        "commit": None,
    }
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    return [row._replace(id=clean(row.id)) for row in rows]


def written(tmp_path: Path, told=None, rows=None, **changes) -> str:
    rows = run_folder(tmp_path, told or result(), rows or examples(), **changes)
    path = report.write_select_report(tmp_path, rows)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 1.5e6
    return path.read_text("utf-8")


class Balance(HTMLParser):
    """Every tag that opens closes, in order; the words of the page and the names of its tags are kept."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "srcset") for name, _ in attributes)
        assert all(value.startswith("#") for name, value in attributes if name == "href")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words += data + " "


def words(page: str) -> str:
    """The text of the page, its spaces made one."""
    return re.sub(r"\s+", " ", Balance(page).words)


def pairs(count=40):
    """Preference pairs: a system turn and a question, then two answers."""
    return [
        row._replace(
            turns=(Turn("system", "prompt of both"), row.turns[0], Turn("assistant", f"better {row.row} {HOSTILE}")),
            rejected=(Turn("system", "prompt of both"), row.turns[0], Turn("assistant", f"worse {row.row} {HOSTILE}")),
        )
        for row in examples(count)
    ]


PAIRS = {"unit": "nats per pair", "right": "pair accuracy"}


def pooled_records():
    """Those of `result` with the reliability of the two parts of a step."""
    records = result()["records"]
    return [
        record | {"pooling": {"shared": 0.9125 / (1 + at), "own": 0.0375 * at}} for at, record in enumerate(records)
    ]


CASES = {
    "whole": {},
    "pairs": {"told": result(**PAIRS), "rows": pairs()},
    "no labels": {"told": result(auc=None), "rows": examples(labels=False)},
    "one source": {"rows": examples(sources=1)},
    "no compare": {"told": result(compare=[])},
    "only some arms": {"told": result(compare=compared()[:1])},
    "one seed": {"told": result(compare=compared(seeds=1))},
    "no certificates": {
        "told": result(
            "UNDECIDED",
            certificates={"uniform weights": {"exact": None, "smooth": None, "predictive": None, "checks": checks()}},
            verdicts={"uniform weights": VERDICTS["UNDECIDED"]},
        )
    },
    "a gradient of zero": {
        "told": result(
            certificates={
                "uniform weights": {
                    "exact": {"steps": [0.1, 0.03], "ratios": [None, None]},
                    "smooth": None,
                    "predictive": None,
                    "checks": checks(),
                }
            },
            verdicts={"uniform weights": VERDICTS["DO NOT BELIEVE"]},
        )
    },
    "implicit": {
        "told": result(
            certificates={
                "uniform weights": {
                    "exact": {"steps": [0.1], "ratios": [0.9]},
                    "smooth": {"removed": [0.2], "cosines": [0.4]},
                    "predictive": None,
                    "checks": checks(residual=2e-5, curvature=-0.1, gap=0.012, sample=0.97),
                }
            },
            verdicts={"uniform weights": VERDICTS["DO NOT BELIEVE"]},
        ),
        "outer": OuterSection(method="implicit", proximal=0.1, restart="warm"),
    },
    "equal weights": {"weights": np.ones(40)},
    "zero weights": {"weights": np.r_[np.zeros(39), 40.0]},
    "two rows": {"rows": examples(2), "weights": np.array([0.5, 1.5])},
    "many rows": {"rows": examples(10_000, sources=200), "told": result(rows={"train": 10_000, "validation": 16})},
    "a rater": {
        "told": result(
            rater=[
                {"name": "loss", "value": -1.2345, "half_width": 0.2},
                {"name": f"source {HOSTILE}", "value": 0.5, "half_width": None},
            ]
        )
    },
    "pooled steps": {"told": result(records=pooled_records()), "outer": OuterSection(estimate="auto")},
    "one outer step": {"told": result(records=result()["records"][:1], best=0)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_kind_of_run_makes_a_whole_page(case, tmp_path):
    page = written(tmp_path, **case)
    seen = Balance(page)
    assert not {"script", "img", "link", "iframe", "object", "base"} & seen.tags
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    assert "<script" not in page.lower() and "\x00" not in page
    assert not re.search(r"\bnan\b|\binf\b|None", html.unescape(re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", page)))
    for picture in re.findall(r"<svg.*?</svg>", page):
        xml.fromstring(picture)


def test_pooled_steps_tell_how_reliable_their_parts_were(tmp_path):
    text = words(written(tmp_path, **CASES["pooled steps"]))
    assert "It was 0.9125 for the shared part and 0 for the examples' own in the first step" in text
    assert "shared part" in text and "own part" in text and "Each part counted as much as it is reliable" in text
    pooled = words(written(tmp_path, **CASES["pooled steps"] | {"outer": OuterSection(estimate="pooled")}))
    assert "The steps are the shared part alone" in pooled
    assert "relied on" not in words(written(tmp_path))


def test_hostile_text_is_shown_and_never_markup(tmp_path):
    page = written(tmp_path)
    assert escape("<script>alert('x')</script>\"'&␀⟨U+202E⟩") in page
    text = words(page)
    assert "question" in text and "⟨U+202E⟩ مرحبا 🙂 $x^2$" in text and "\u202e" not in page


def test_long_text_is_cut_and_says_how_long_it_was(tmp_path):
    page = written(tmp_path, rows=examples(texts="ab " * 100_000))
    assert "… (300,000 characters)" in page and len(page) < 200_000


@pytest.mark.parametrize(
    "told, unit, right",
    [
        ({}, "nats per token", "token accuracy share of target tokens, test"),
        ({"unit": "nats per example"}, "nats per example", "token accuracy share of target tokens, test"),
        (PAIRS, "nats per pair", "pair accuracy share of pairs, test"),
    ],
)
def test_units_are_those_of_the_objective(told, unit, right, tmp_path):
    place = {"exact": None, "smooth": None, "predictive": None, "checks": checks(gap=0.01)}
    text = words(written(tmp_path, result(**told, certificates={"uniform weights": place})))
    assert f"loss on validation examples, in {unit}; lower" in text and right in text
    assert (
        f"{unit} of validation loss that finishing the inner training" in text and f"{unit} per unit of weight" in text
    )
    assert set(re.findall(r"nats per \w+", text)) == {unit}


def test_a_pair_is_shown_as_prompt_chosen_and_rejected(tmp_path):
    page = written(tmp_path, **CASES["pairs"])
    text = words(page)
    card = re.search(r"system prompt of both user question (\d+) chosen better (\d+) (.*?) rejected worse (\d+)", text)
    assert card and card[1] == card[2] == card[4]
    assert text.count("prompt of both") == 20 and "assistant" not in text
    assert escape("<script>") in page and "<script" not in page


@pytest.mark.parametrize(
    "chosen, rejected, says",
    [
        ("b", "b", "user a chosen b rejected b"),
        ("bcd", "bce", "user a assistant b user c chosen d rejected e"),
        ("b", "bcd", "user a chosen b rejected b rejected user c rejected d"),
        ("bcdefghi", "bcdefghj", "(2 turns before) … user c"),
    ],
)
def test_the_sides_of_a_pair_begin_where_they_part(chosen, rejected, says, tmp_path):
    def turns(end):
        return tuple(Turn("assistant" if at % 2 else "user", letter) for at, letter in enumerate("a" + end))

    rows = [row._replace(turns=turns(chosen), rejected=turns(rejected)) for row in examples(2)]
    assert says in words(written(tmp_path, result(**PAIRS), rows))


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [one for item in value for one in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_of_the_result_appears(tmp_path):
    told = result()
    text = words(written(tmp_path, told))
    for place in told["certificates"].values():  # the retrains behind rank and slope stay in result.json
        place["predictive"] = {key: place["predictive"][key] for key in ("rank", "slope")}
    missing = []
    for value in numbers(told):
        forms = {f"{value:,}", f"{value:,.0f}"} if float(value).is_integer() else set()
        forms |= {f"{value:#.4g}", f"{value:#.3g}", f"{value:g}"}
        if not any(re.search(rf"(?<![\d.]){re.escape(form.rstrip('.'))}(?!\d)", text) for form in forms):
            missing.append(value)
    assert missing == []


@pytest.mark.parametrize("level", VERDICTS)
def test_the_verdict_comes_first_in_words(level, tmp_path):
    text = words(written(tmp_path, result(level)))
    assert text.index(level) < text.index("A reason.") < text.index("For you:") < text.index("Do the weights help?")


@pytest.mark.parametrize(
    "values, says",
    [
        ({}, "Learned weights lower test loss by 0.4000 ± 0.0248 nats per token"),
        ({"learned": 2.0}, "Learned weights raise test loss by 0.2000 ± 0.0248 nats per token"),
        ({"oracle": 1.9}, "does not clearly beat uniform"),
        ({"oracle": 1.0}, "beats uniform (−0.8000 ± 0.0248 nats per token on test)"),
    ],
)
def test_the_headline_follows_the_numbers(values, says, tmp_path):
    compare = compared(values=values)
    for row in compare[1:]:  # paired: the seeds' own spread is gone, .01 * 4.303 / sqrt(3) stays
        for run, uniform, shift in zip(row["runs"], compare[0]["runs"], (-0.01, 0, 0.01), strict=True):
            run["test"] = uniform["test"] + (GOOD | values)[row["name"]] - GOOD["uniform"] + shift
    assert says in words(written(tmp_path, result(compare=compare)))


def test_uniform_weights_are_not_said_to_change_the_loss(tmp_path):
    told = result(compare=compared(values={"learned": GOOD["uniform"]})) | {"best": 0}
    for row in told["compare"][1:]:
        if row["name"] == "learned":
            row["runs"] = told["compare"][0]["runs"]
    assert "the weights are the uniform ones of step 0" in words(written(tmp_path, told))


def test_a_difference_within_its_interval_is_no_difference(tmp_path):
    compare = compared()
    for seed, (learned, uniform) in enumerate(zip(compare[1]["runs"], compare[0]["runs"], strict=True)):
        learned["test"] = uniform["test"] + (0.3, -0.4, 0.2)[seed]
    assert "cannot be told apart on test" in words(written(tmp_path, result(compare=compare)))


def test_the_recommendation_stands_at_the_top_and_marks_its_arm(tmp_path):
    random = np.random.default_rng(0)
    dev = {name: value + random.normal(0, 0.1, (3, 20)) for name, value in GOOD.items()}
    told = recommend(dev, "nats per token")
    text = words(written(tmp_path, result(recommendation=told.to_json(), validation_weight=1.75)))
    assert text.index(told.sentence) < text.index("Do the weights help?") and "recommended" in text
    assert "Use learned: it gains 0." in text and "How each arm stands on dev" in text
    assert "folds took turns" in text and "1.75" in text


def test_what_was_left_out_is_said(tmp_path):
    text = words(written(tmp_path, result(compare=[])))
    assert "There is no headline number" in text and "this run compared nothing (--fast" in text
    text = words(written(tmp_path, result(compare=compared(seeds=1))))
    assert "with one seed: no interval" in text
    text = words(written(tmp_path, **CASES["no certificates"]))
    assert "The certificates were not computed" in text
    assert "Without a number in this run: smooth without 50%, smooth without 20%, predictive rank" in text


def test_rows_without_text_are_still_listed(tmp_path):
    run_folder(tmp_path, result(), examples())
    assert "its text was not given to the report" in words(report.write_select_report(tmp_path, []).read_text("utf-8"))


def test_the_ends_are_the_largest_and_the_least_weights(tmp_path):
    weights = np.random.default_rng(1).permutation(40) + 0.5
    page = written(tmp_path, weights=weights)
    order = [int(row) for row in re.findall(r"question (\d+)", page)]
    assert order == [*np.argsort(-weights)[:10], *np.argsort(weights)[:10]]


@pytest.mark.parametrize(
    "value, text",
    [
        (1.79312, "1.793"), (0.2, "0.2000"), (-0.00467, "−0.004670"), (384, "384"), (3224.0, "3,224"), (0.0, "0"),
        (9999.96, "10,000"), (40.3975, "40.40"), (4.017e-05, "4.02e−05"), (math.nan, "–"), (None, "–"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert format_number(value) == text
