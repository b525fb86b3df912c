"""The report of a run: one HTML file with the verdict, the measured comparison, the weights and their evidence."""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import yaml

from bilevel_jax.lm.data import Example
from bilevel_jax.runs import figures, files, keep
from bilevel_jax.runs.config import Keep
from bilevel_jax.runs.figures import COLOURS, Dot, Html, Series, element, join
from bilevel_jax.runs.statistics import mean_interval

SHOWN = 10
"""Examples shown from each end of the weights."""
CUT = 500
"""Characters shown of one turn of an example."""
PARTS = {"fit": "V_fit", "select": "V_select", "report": "V_report"}
NONE = "–"
UNIT = "nats per token"


class Results(NamedTuple):
    """A run's folder, read."""

    name: str
    result: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    rows: dict[str, Any]
    """Columns of weights.parquet: numbers as arrays, text as lists."""
    meanings: dict[str, str]
    """What the columns mean, and facts about the run, from the parquet file's metadata."""
    examples: dict[str, Example]
    """By id; rows without one are shown without their text."""

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml as a dict of sections."""
        return yaml.safe_load(self.config_text)

    @property
    def chosen(self) -> dict[str, Any]:
        """The record of the outer step whose weights these are."""
        return self.result["records"][self.result["best"]]

    @property
    def labelled(self) -> bool:
        """Whether any row has a label."""
        return any(label is not None for label in self.rows["label"])

    def arm(self, name: str) -> dict[str, Any] | None:
        """A row of the comparison, None where it was not made."""
        return next((row for row in self.result["compare"] if row["name"] == name), None)


class Estimate(NamedTuple):
    """A mean over seeds with the half-width of its 95 % interval; nan where there is none."""

    mean: float
    half: float


class Column(NamedTuple):
    """A column of a table: numbers are aligned at their points, the rest stands left."""

    head: str
    cells: Sequence[Any]
    unit: str = ""
    kind: str | None = None
    """Class of its cells; numbers have their own."""


def write(folder: Path, examples: Sequence[Example]) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path.

    One file that loads nothing else. `examples` are the training rows, for their text; they are joined by id. All
    text from data, config and environment is escaped: training data is hostile.
    """
    run = read(folder, examples)
    path = folder / "report.html"
    files.write_atomic(path, page(run))
    return path


def read(folder: Path, examples: Sequence[Example]) -> Results:
    """result.json, config.yaml, environment.json and weights.parquet of a run."""
    table = pq.read_table(folder / "weights.parquet")
    text = ("id", "source", "label", "file")
    return Results(
        name=folder.resolve().name,
        result=json.loads((folder / "result.json").read_text("utf-8")),
        config_text=(folder / files.RESOLVED).read_text("utf-8"),
        environment=json.loads((folder / "environment.json").read_text("utf-8")),
        rows={name: table[name].to_pylist() if name in text else table[name].to_numpy() for name in table.column_names},
        meanings={key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()},
        examples={example.id: example for example in examples},
    )


def page(run: Results) -> str:
    """The whole report as HTML."""
    sections = {
        "comparison": ("Do the weights help?", comparison(run)),
        "loop": ("How the weights were learned", loop(run)),
        "weights": ("The weights", weights(run)),
        "examples": ("The examples at both ends", ends(run)),
        "certificates": ("Why believe the gradient, or not", certificates(run)),
        "provenance": ("Data, cost, and how to see the same numbers", provenance(run)),
    }
    links = [join(element("a", title, href=f"#{key}"), " ") for key, (title, _) in sections.items()]
    body = element(
        "main",
        element(
            "header",
            element("h1", "Which training rows to trust, and how much"),
            element(
                "p",
                "bilevel_jax select, run ",
                element("b", run.name),
                f". L_v is the trained model's loss on trusted rows, in {UNIT}; "
                "lower is better. V_fit steers the weights; V_report is kept apart and only read for this report.",
            ),
            class_="top",
        ),
        lead(run),
        element("nav", *links, aria_label="sections"),
        *(element("section", element("h2", title), content, id=key) for key, (title, content) in sections.items()),
    )
    head = join(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{run.name}: {run.result['verdict']['level']}"),
        Html(f"<style>{STYLE}{figures.STYLE}</style>"),
    )
    return f"<!doctype html>\n{element('html', element('head', head), element('body', body), lang='en')}\n"


# ---- 1. the verdict and the headline


LOOKS = {"BELIEVE": ("good", "✓"), "UNDECIDED": ("fair", "?"), "DO NOT BELIEVE": ("bad", "✕")}


def lead(run: Results) -> Html:
    """What a person reads first: the verdict, what follows from it, the headline numbers, and two pictures."""
    verdict = run.result["verdict"]
    kind, icon = LOOKS[verdict["level"]]
    places = run.result["verdicts"]
    banner = element(
        "div",
        element("p", element("span", icon, class_="icon", aria_hidden="true"), verdict["level"], class_="level"),
        element("p", f"for {verdict['scope']}", class_="scope") if verdict["scope"] else None,
        paragraph(_capital(verdict["reason"])),
        paragraph(element("b", "Remedy: "), verdict["remedy"]) if verdict["remedy"] else None,
        paragraph(element("b", "For you: "), _meaning(run)),
        paragraph(element("b", "What the gradient is of: "), run.result["estimand"], "."),
        note(
            "This is the verdict on the gradient at uniform weights, where the thresholds were calibrated. At the "
            f"learned weights they would say {places['learned weights']['level']}: near its optimum a loss has little "
            "slope left, and the ratio tells less."
        )
        if "learned weights" in places and places["learned weights"]["level"] != verdict["level"]
        else None,
        class_=f"verdict {kind}",
    )
    pictures = []
    if rows := run.result["compare"]:
        part = _part(run)
        pictures.append(
            figure(
                _compared([_row for name in LEAD if (_row := run.arm(name))] or rows, part),
                f"Measured: models trained again from cold. Dot: mean; bar: 95 % interval; small dots: each of "
                f"{_seeds(run)}. Further left is better.",
            )
        )
    else:
        pictures.append(
            figure(_curves(run), "L_v while the weights were learned; models were not trained again to compare.")
        )
    key = "label" if run.labelled else "source"
    pictures.append(
        figure(
            figures.strips(_groups(run, key), _weight_axis(run), reference=1.0),
            f"Learned weights by {key}. Bar: median; dashed: weight 1, where every row began.",
        )
    )
    return join(
        element(
            "div",
            element("div", banner, element("p", headline(run), class_="headline"), class_="pictures left"),
            element("div", *pictures, class_="pictures"),
            class_="lead",
        ),
        tiles(run),
    )


LEAD = ("oracle", "uniform", "learned weights", "selected subset", "random subset")


def headline(run: Results) -> Html:
    """The one number: learned against uniform weights on V_report, paired by seed."""
    if not run.result["compare"]:
        return join(
            element("b", "There is no headline number: "),
            "the comparison was skipped (--fast or compare.enabled: false). Whether these weights give a better model "
            "was not measured.",
        )
    part = _part(run)
    if not (gain := _difference(run, "learned weights", part)):
        return join(
            element("b", "There is no headline number: "),
            "the comparison lacks “uniform” or “learned weights” (compare.rows).",
        )
    where = (
        ""
        if part == "report"
        else f" There is no V_report, so this is read on {PARTS[part]}, which the weights have seen."
    )
    amount = f"{_pair(Estimate(abs(gain.mean), gain.half)).removeprefix('+')} {UNIT}"
    if math.isnan(gain.half):
        words = (
            f"Learned weights {_moved(gain.mean)} L_v on {PARTS[part]} by {number(abs(gain.mean))} {UNIT} against "
            f"uniform "
            f"weights, with one seed: no interval, so this may be chance."
        )
    elif abs(gain.mean) <= gain.half:
        words = (
            f"Learned and uniform weights cannot be told apart on {PARTS[part]}: learned less uniform is "
            f"{_pair(gain)} {UNIT} over "
            f"{_seeds(run)}."
        )
    else:
        words = (
            f"Learned weights {_moved(gain.mean)} L_v on {PARTS[part]} by {amount} against uniform weights, "
            f"over {_seeds(run)}."
        )
    return join(element("b", words), where)


def tiles(run: Results) -> Html:
    """The headline numbers in boxes."""
    part, total = _part(run), run.result["rows"]["train"]
    ess = float(run.chosen["ess"])
    shown = []
    for name in ("learned weights", "uniform"):
        if row := run.arm(name):
            shown.append((f"L_v on {PARTS[part]}, {name}", _pair(_mean(row, part)).removeprefix("+"), UNIT))
    if gain := _difference(run, "learned weights", part):
        shown.append(("learned − uniform, paired", _pair(gain), f"{UNIT}; below 0 is better"))
    shown += [
        ("rows", f"{total:,}", f"{run.result['selected']:,} kept: {_rule(run)}"),
        ("effective sample size", number(ess), f"rows, {_percent(ess / total)} of all"),
        ("trusted rows", f"{run.result['rows'].get('fit', 0):,}", "in V_fit, which steer the weights"),
    ]
    return element(
        "div",
        *(
            element("div", element("span", head), _big(value), element("span", unit, class_="unit"), class_="tile")
            for head, value, unit in shown
        ),
        class_="tiles",
    )


def _big(value: str) -> Html:
    mean, sign, half = value.partition(" ± ")
    return element("b", mean, element("small", f" ± {half}") if sign else None)


def _meaning(run: Results) -> str:
    level, measured = run.result["verdict"]["level"], bool(run.result["compare"])
    then = "the comparison below, which trained again and measured" if measured else "a comparison (run without --fast)"
    if level == "BELIEVE":
        return (
            "the gradient says what retraining really does, and does not hang on a few rows. A row's weight can be "
            "read "
            f"as what V_fit rewards. Whether the weights make a better model is for {then}."
        )
    if level == "DO NOT BELIEVE":
        return (
            "read no meaning into the weight of single rows: the gradient that led to them does not foretell what "
            f"training does when weights change this much. To use the weights, rely on {then}, not on the gradient."
        )
    if not any(one["exact"] for one in run.result["certificates"].values()):
        return (
            f"nothing speaks for or against the weights yet. Before acting on them, run the certificates, and {then}."
        )
    return f"the gradient passes some bars and misses others. Before acting on single rows, look at {then}."


# ---- 2. the comparison


def comparison(run: Results) -> Html:
    """Every arm, trained from cold under every seed."""
    rows = run.result["compare"]
    if not rows:
        return note(
            "Skipped: this run compared nothing (--fast, or compare.enabled: false), so it holds no headline number "
            "and no "
            "evidence that the weights help. Run again without --fast to get one.",
            "warning",
        )
    rows = sorted(
        rows, key=lambda row: row["name"] != "oracle"
    )  # the oracle first: does knowing the truth help at all?
    part = _part(run)
    parts = [one for one in PARTS if any(one in row["mean"] for row in rows)]
    differences = [_difference(run, row["name"], part) for row in rows]
    names = [
        join(
            element("b", row["name"]),
            element("span", "knows the labels", class_="tag") if row["name"] == "oracle" else None,
            element("span", row["meaning"], class_="sub"),
        )
        for row in rows
    ]
    main = table(
        Column("trained on", names),
        *(Column(PARTS[one], [_mean(row, one) for row in rows], f"L_v, {UNIT}") for one in reversed(parts)),
        Column(
            f"{PARTS[part]} less uniform's", [_against(one) for one in differences], f"paired by seed, {UNIT}", "tight"
        ),
        Column("accuracy", [_mean(row, "accuracy") for row in rows], f"share of target tokens, {PARTS[part]}"),
        Column("rows", [row["rows"] for row in rows]),
        Column("steps", [row["steps"] for row in rows]),
        Column("epochs", [row["epochs"] for row in rows]),
        marks={
            index: {"learned weights": "strong", "oracle": "oracle"}[row["name"]]
            for index, row in enumerate(rows)
            if row["name"] in ("learned weights", "oracle")
        },
    )
    trainings = [one for row in rows for one in row["runs"]]
    seeds = table(
        Column("trained on", [row["name"] for row in rows for _ in row["runs"]]),
        Column("seed", [seed for row in rows for seed, _ in enumerate(row["runs"])]),
        *(Column(PARTS[one], [each[one] for each in trainings], f"L_v, {UNIT}") for one in reversed(parts)),
        Column("accuracy", [each["accuracy"] for each in trainings], "share of target tokens"),
    )
    second = "fit" if part != "fit" else ""
    caption = (
        f"Filled: {PARTS[part]}, mean and 95 % interval; small dots below: single seeds. Dashed line: uniform weights."
    )
    if second:
        caption += " Hollow: V_fit; a hollow dot far to the left of its filled one is over-fitting to V_fit."
    return join(
        paragraph(
            f"Cold retrains from fresh parameters and data orders that the weights have not seen, {_seeds(run)}, "
            f"95\u00a0% "
            "interval by Student's t over the seeds. All make the same number of steps, so fewer rows means more "
            "epochs. " + " ".join([_oracle(run, part), _headroom(run, part)])
        ),
        main,
        figure(_compared(rows, part, second), caption, wide=True),
        note(
            "▼ below and ▲ above uniform by more than the interval; ≈ not told apart. The intervals are for one row "
            "each: "
            "with many rows, one in twenty strays by chance. “validation only” and “train + validation” train on "
            "V_fit, "
            f"so their V_fit loss is a training loss. {NONE}: no such number (an interval needs two seeds)."
        ),
        details(f"Each of the {len(trainings)} trainings", seeds),
    )


def _oracle(run: Results, part: str) -> str:
    """Whether labels mean anything for this loss: AUCs do not unless the oracle beats uniform."""
    gap = _difference(run, "oracle", part)
    if not gap:
        return ""
    amount = f"{_pair(gap)} {UNIT} on {PARTS[part]}"
    if gap.mean + gap.half < 0:
        return (
            f"The oracle, which trains on the good rows alone, beats uniform ({amount}), so an AUC against the labels "
            "means something here."
        )
    if math.isnan(gap.half):
        return f"Oracle less uniform: {amount}; with one seed this decides nothing, so do not read the AUCs."
    return (
        f"The oracle, which trains on the good rows alone, does not clearly beat uniform ({amount}), so an AUC "
        f"against the "
        "labels means nothing here: rows called bad may help this model."
    )


def _headroom(run: Results, part: str) -> str:
    gap, gain = _difference(run, "oracle", part), _difference(run, "learned weights", part)
    if not gap or not gain or not gap.mean + gap.half < 0:
        return ""
    closed = gain.mean / gap.mean
    share = f"{100 * closed:.0f} %" if closed > 0 else "nothing"
    return f"Of that headroom the learned weights close {share} on average."


def _compared(rows: Sequence[dict[str, Any]], part: str, second: str = "") -> Html:
    uniform = next((row for row in rows if row["name"] == "uniform"), None)
    return figures.dots(
        [
            Dot(
                row["name"],
                *_mean(row, part),
                [_float(one[part]) for one in row["runs"]],
                _mean(row, second).mean if second else math.nan,
                row["name"] == "learned weights",
            )
            for row in rows
        ],
        f"L_v, {UNIT}" if second else f"L_v on {PARTS[part]}, {UNIT}",
        names=(f"L_v on {PARTS[part]}", "L_v on V_fit") if second else ("", ""),
        width=780 if second else 520,
        reference=_mean(uniform, part).mean if uniform else math.nan,
    )


def _against(gain: Estimate | None) -> str:
    if gain is None or (gain.mean == 0 and not gain.half > 0):
        return NONE
    sign = "" if math.isnan(gain.half) else "≈ " if abs(gain.mean) <= gain.half else "▼ " if gain.mean < 0 else "▲ "
    return f"{sign}{_pair(gain)}"


# ---- 3. the outer loop


def loop(run: Results) -> Html:
    """L_v and the effective sample size over the outer steps, and how far V_fit and V_report have parted."""
    records, best = run.result["records"], run.result["best"]
    steps = [record["step"] for record in records]
    parts = [part for part in PARTS if records[0]["loss"].get(part) is not None]
    rows = run.result["rows"]["train"]
    sizes = [Series("ESS", steps, [_float(record["ess"]) for record in records])]
    words = [f"Step 0 trains with weight 1 for every row. The loop ended because {run.result['ended']}."]
    if "select" in parts:
        words.append(f"Step {best} has the least L_v on V_select, so its weights are the ones written.")
    else:
        words.append("There is no V_select, so the weights of the last step are the ones written.")
        values = [_float(record["loss"].get("report")) for record in records]
        if "report" in parts and int(np.argmin(values)) != best:
            words.append(
                f"V_report was lowest at step {int(np.argmin(values))} ({number(min(values))} against "
                f"{number(values[best])} "
                f"{UNIT}); only a V_select may choose such a step (data.split or data.select)."
            )
    columns = [
        Column("step", steps),
        *(Column(PARTS[part], [record["loss"][part] for record in records], f"L_v, {UNIT}") for part in parts),
        Column("ESS", [record["ess"] for record in records], "rows"),
        Column("entropy", [record["entropy"] for record in records], "nats"),
        Column("largest", [record["largest"] for record in records], "weight"),
        *([Column("AUC", [record["auc"] for record in records], "weights, labels")] if run.result["auc"] else []),
        Column("growth", [record["checks"]["growth"] for record in records], "of the adjoint"),
        Column("residual", [record["checks"]["residual"] for record in records], "relative"),
        Column("cost", [record["work"] for record in records], "training steps"),
    ]
    columns = [column for column in columns if any(cell is not None for cell in column.cells)]
    return join(
        paragraph(" ".join(words)),
        _gap(run),
        element(
            "div",
            figure(
                _curves(run),
                "V_fit steers the weights."
                + (" V_report never influenced them, nor the choice of the step." if "report" in parts else ""),
            ),
            figure(
                figures.lines(sizes, "outer step", "effective sample size, rows", mark=_mark(run), include=[0, rows]),
                f"ESS = (Σw)²/Σw²: how many equally weighted rows the weights amount to, of {rows:,}. Near 0 a few "
                f"rows win all.",
            ),
            class_="pair",
        ),
        details("Each outer step in numbers", table(*columns, marks={best: "strong"})),
    )


def _curves(run: Results) -> Html:
    """L_v over the outer steps; V_report has the colour that it has in the comparison."""
    records = run.result["records"]
    steps = [record["step"] for record in records]
    curves = [
        Series(PARTS[part], steps, [_float(record["loss"][part]) for record in records], colour)
        for part, colour in (("fit", 1), ("select", 2), ("report", 0))
        if records[0]["loss"].get(part) is not None
    ]
    return figures.lines(curves, "outer step", f"L_v, {UNIT}", mark=_mark(run))


def _mark(run: Results) -> tuple[float, str]:
    return run.result["best"], f"chosen: step {run.result['best']}"


def _gap(run: Results) -> Html:
    """How far the model does better on the rows that steer the weights than on those that nobody looked at."""
    first, now = (
        _float(record["loss"].get("report")) - _float(record["loss"].get("fit"))
        for record in (run.result["records"][0], run.chosen)
    )
    if math.isnan(now):
        return note("There is no V_report, so over-fitting to V_fit cannot be seen.", "warning")
    count = run.result["rows"].get("fit", 0)
    if run.result["best"] == 0:
        return paragraph(
            element("b", f"Gap between V_fit and V_report: {signed(now)} {UNIT}"),
            " at step 0, where V_fit has steered nothing yet: the two sets differ by that much on their own.",
        )
    return paragraph(
        element("b", f"Gap between V_fit and V_report: {signed(now)} {UNIT}"),
        f" at step {run.result['best']} (V_report less V_fit), against {signed(first)} at step 0, before V_fit "
        f"steered anything. ",
        f"The growth, {signed(now - first)}, is the mark of over-fitting to the {count:,} rows of V_fit; more trusted "
        f"rows usually make it smaller."
        if now > first
        else "It did not grow: no sign of over-fitting to V_fit.",
    )


# ---- 4. the weights


AUCS = {
    "weights": ("learned weights", "what this run found"),
    "first_entries": ("first hypergradient", "minus the entries at weight 1: one estimate, no loop"),
    "alignment": ("alignment", "<grad loss_i, grad L_v> at the end of uniform training: the cheap way"),
    "low_loss": ("low loss", "rows that the model finds easy after uniform training: the cheapest"),
}


def weights(run: Results) -> Html:
    """How the weights spread, over all rows, by source and by label."""
    values, chosen, total = run.rows["weight"].astype(float), run.chosen, run.result["rows"]["train"]
    keys = ["label", "source"] if run.labelled else ["source"]
    several = [key for key in keys if len(set(run.rows[key])) > 1]
    by = several[0] if several else keys[0]
    pictures = [
        figure(
            figures.histogram(_groups(run, by), _weight_axis(run), reference=1.0),
            f"Rows by weight{f', coloured by {by}' if several else ''}. Dashed: weight 1, where every row began.",
        ),
        figure(
            _held(values),
            "How much of all weight the rows with the largest weights hold. Dashed orange: equal weights; the higher "
            "the curve, the fewer "
            "rows count.",
        ),
    ]
    if "source" in several and run.labelled:  # without labels the first picture of the page shows the sources
        pictures.append(
            figure(
                figures.strips(_groups(run, "source"), _weight_axis(run), reference=1.0),
                "Weights by source. Bar: median.",
            )
        )
    spread = (
        "A weight multiplies its row's loss; 1 is plain training. Together the weights amount to "
        f"{number(chosen['ess'])} equally weighted rows of {total:,} (ESS); their entropy is "
        f"{number(chosen['entropy'])} nats, of at "
        f"most log {total:,} = {number(math.log(total))}; the largest is {number(chosen['largest'])}, the least "
        f"{number(float(values.min()))}, the median {number(float(np.median(values)))}."
    )
    same = bool(np.ptp(values) <= 1e-6 * max(abs(float(values.max())), 1e-30))
    return join(
        paragraph(spread),
        note("All weights are equal: this run tells no row from another.", "warning") if same else None,
        element("div", *pictures, class_="pair"),
        *(join(element("h3", f"By {key}"), _by(run, key)) for key in keys),
        _aucs(run),
    )


def _held(values: np.ndarray) -> Html:
    share = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])]) / (values.sum() or math.nan)
    at = [0.0, 1, 2, 5, *range(10, 101, 10)]
    held = [100 * float(np.interp(percent / 100 * len(values), np.arange(len(share)), share)) for percent in at]
    curves = [Series("learned", at, held), Series("equal", [0, 100], [0, 100], 1)]
    return figures.lines(curves, "rows with the largest weights, % of all rows", "share of all weight, %")


def _by(run: Results, key: str) -> Html:
    values, kept = run.rows["weight"].astype(float), run.rows["selected"]
    masks = _masks(run, key, 20)
    total = values.sum() or math.nan
    return table(
        Column(key, [bounded(name) for name, _ in masks]),
        Column("rows", [int(mask.sum()) for _, mask in masks]),
        Column("share", [100 * float(mask.mean()) for _, mask in masks], "% of rows"),
        Column("share", [100 * float(values[mask].sum() / total) for _, mask in masks], "% of weight"),
        Column("mean", [float(values[mask].mean()) for _, mask in masks], "weight"),
        Column("median", [float(np.median(values[mask])) for _, mask in masks], "weight"),
        Column("least", [float(values[mask].min()) for _, mask in masks], "weight"),
        Column("largest", [float(values[mask].max()) for _, mask in masks], "weight"),
        Column("kept", [int(kept[mask].sum()) for _, mask in masks], "rows"),
    )


def _aucs(run: Results) -> Html | None:
    found = run.result["auc"]
    if not found:
        return None
    good = run.config["data"]["good_label"]
    return join(
        element("h3", "Do the weights find the labels?"),
        paragraph(
            f"AUC: the chance that a row labelled “{good}” stands above a row with another label; .5 is guessing, 1 "
            "is perfect. The labels were never seen in training. ",
            _oracle(run, _part(run))
            or "No oracle was trained, so it is not known whether these labels matter for L_v.",
        ),
        table(
            Column(
                "ranking rows by",
                [join(element("b", name), element("span", words, class_="sub")) for name, words in AUCS.values()],
            ),
            Column("AUC", [found.get(key) for key in AUCS]),
        ),
        note(f"{NONE}: all rows carry one kind of label.") if any(found.get(key) is None for key in AUCS) else None,
    )


# ---- 5. examples


def ends(run: Results) -> Html:
    """The rows with the largest and the least weights, with their text."""
    values = run.rows["weight"].astype(float)
    order = np.argsort(-values, kind="stable")
    count = min(SHOWN, (len(order) + 1) // 2)
    top, bottom = order[:count], order[::-1][: min(SHOWN, len(order) // 2)]
    shown = np.abs(run.rows["entry"][np.concatenate([top, bottom])].astype(float))
    power = _power(float(np.nanmax(shown, initial=0.0)))
    return join(
        paragraph(
            "The entry is d L_v / d weight: what one more unit of weight on this row would do to L_v on V_fit, at "
            "these weights. ",
            element("b", "A negative entry means that more weight on the row lowers L_v."),
            " The weight adds up many steps, so a row with a large weight may have an entry of either sign by now. "
            "Text is shown as "
            f"it stands in the data, up to {CUT} characters of a turn.",
        ),
        element("h3", f"The {len(top)} largest weights"),
        _cards(run, top, power),
        element("h3", f"The {len(bottom)} least weights"),
        _cards(run, bottom, power),
    )


def _cards(run: Results, rows: Iterable[int], power: int) -> Html:
    rows = [int(row) for row in rows]
    unit = f"{_tens(power)}{UNIT} per unit of weight"
    about = [
        join(
            element("span", "source ", element("b", bounded(run.rows["source"][row])), " ", class_="line"),
            element("span", "label ", element("b", bounded(run.rows["label"][row])), class_="line")
            if run.rows["label"][row] is not None
            else None,
            element("span", bounded(f"{run.rows['file'][row]}:{run.rows['line'][row]}", end=True), class_="sub"),
            element("span", bounded(run.rows["id"][row]), class_="sub"),
        )
        for row in rows
    ]
    return table(
        Column("weight", [float(run.rows["weight"][row]) for row in rows]),
        Column("entry", [_Signed(float(run.rows["entry"][row]) / 10.0**power) for row in rows], unit),
        Column("row", about),
        Column("text", [_text(run.examples.get(run.rows["id"][row])) for row in rows]),
        name="examples",
    )


def _text(example: Example | None) -> Html:
    if example is None:
        return element("span", "its text was not given to the report", class_="sub")
    turns = [
        element(
            "div",
            element("span", cut(turn.role, 20), class_="role"),
            element("div", cut(turn.content, CUT), dir="auto", class_="content"),
            class_="turn",
        )
        for turn in example.turns[:6]
    ]
    more = len(example.turns) - len(turns)
    return join(*turns, element("span", f"… ({more} more turns)", class_="sub") if more else None)


# ---- 6. certificates


class Check(NamedTuple):
    """One line of the table of certificates."""

    name: str
    values: list[Any]
    """A number, text or None for each place."""
    wanted: str
    words: str
    states: list[str]
    """good, fair or bad for each place, or nothing."""


def certificates(run: Results) -> Html:
    """What was checked at each place, against which threshold, in plain words."""
    places = run.result["certificates"]
    other = (
        ""
        if run.config["outer"]["method"] == "unrolled"
        else " The retrains measure the training run that really happens, so a ratio off 1 also tells how far this "
        "method's estimate is from it."
    )
    computed = any(one["exact"] or one["smooth"] is not None for one in places.values())
    every = _checks(run)
    checks = [check for check in every if any(value is not None for value in check.values)]
    absent = [check.name for check in every if check not in checks]
    cells = [[_cell(check.values[index], check.states[index]) for check in checks] for index in range(len(places))]
    verdicts = [run.result["verdicts"][name] for name in places]
    heads = [join(element("b", "verdict")), *(join(element("b", check.name)) for check in checks)]
    columns = [
        Column("check", heads),
        *(
            Column(f"at {name}", [_badge(verdict), *cells[index]])
            for index, (name, verdict) in enumerate(zip(places, verdicts, strict=True))
        ),
        Column("wanted", ["BELIEVE", *(check.wanted for check in checks)]),
        Column(
            "in plain words",
            ["by the thresholds; the run's verdict is that at uniform weights", *(check.words for check in checks)],
        ),
    ]
    curves = [
        Series(name, one["exact"]["steps"], [_float(ratio) for ratio in one["exact"]["ratios"]], index)
        for index, (name, one) in enumerate(places.items())
        if one["exact"] and any(ratio is not None for ratio in one["exact"]["ratios"])
    ]
    picture = None
    if curves:
        picture = figure(
            figures.lines(
                curves,
                "change of every weight",
                "actual / predicted change of L_v",
                bands=[(0.95, 1.05), (0.9, 1.1)],
                log=True,
                include=[0.88, 1.12],
            ),
            "Shaded: [.95, 1.05], and lighter [.9, 1.1]. On the right the changes are large and training may bend "
            "away from its slope; "
            "on the left they are small, and a ratio off 1 there is rounding or an estimate of something else.",
        )
    return join(
        paragraph(
            "An exact gradient can still be useless where training is chaotic. So it was checked by training again "
            "with changed "
            "weights, and by estimating it again without some rows. The thresholds come from ten calibrated settings "
            "of small "
            "language models, not from a theorem." + other
        ),
        note(
            "The certificates were not computed (--fast, or certify.enabled: false); below: the estimate's own.",
            "warning",
        )
        if not computed
        else None,
        note(_one_place(run)) if computed and len(places) == 1 else None,
        table(*columns, name="checks"),
        note(
            "✓ in the wanted range, ~ between the bars, ✕ beyond the outer one. "
            + (f"Without a number in this run: {', '.join(absent)}. " if absent else "")
            + "Residual, curvature, gap, sample, and batches belong to a linear solve (outer.method: implicit), growth "
            "and replayed to a reverse sweep (unrolled, window), predictive to runs with certify.retrains above 0. "
            f"{NONE}: does not apply at this place, or was not finite."
        ),
        picture,
    )


ANY = (-math.inf, math.inf)
OWN_CHECKS = (
    (
        "growth",
        "any; not judged",
        "largest norm of the adjoint over its norm at the end: how strongly early steps matter",
    ),
    ("residual", "at most .1", "what the linear solve left unsolved, relative to its right-hand side"),
    ("curvature", "above 0", "least curvature that the solve met; at or below 0 there is no minimum to differentiate"),
    (
        "gap",
        "near 0; not judged",
        f"{UNIT} of L_v that finishing the inner training would still change, to first order",
    ),
    ("sample", "above .95; not judged", "cosine of the solutions on half and on all of the curvature batches"),
    ("steps", "", "training steps swept, or products of the linear solve"),
    ("batches", "", "curvature batches of the linear solve"),
)
"""The checks that every estimate makes of itself: (field, what is wanted, in plain words)."""


def _checks(run: Results) -> list[Check]:
    places = list(run.result["certificates"].values())
    exact, predicted = [one["exact"] for one in places], [one["predictive"] for one in places]
    own = [one["checks"] for one in places]
    swept = run.config["outer"]["method"] in ("unrolled", "window")
    checks = []
    for index, size in enumerate(next((one["steps"] for one in exact if one), [])):
        ratios = [one["ratios"][index] if one else None for one in exact]
        words = f"actual over predicted change of L_v when each weight moves by {size:g} along sign(gradient)"
        if index == 0:  # the step that verdicts are made of
            wanted, good, fair = ".95 to 1.05; outside .9 to 1.1: do not believe", (0.95, 1.05), (0.9, 1.1)
            checks.append(_judged(f"exact, step {size:g}", ratios, wanted, words, good, fair))
        else:
            checks.append(_judged(f"exact, step {size:g}", ratios, "near 1; not judged", words))
    checks.append(
        _judged(
            "smooth",
            [one["smooth"] for one in places],
            ".7 or more, .9 for changes of half the data; below .5: do not believe",
            "cosine between the gradient and the gradient without a random fifth of the rows",
            (0.7, math.inf),
            (0.5, math.inf),
        )
    )
    told = next((f" when a random {one['fraction']:.0%} of the rows is left out" for one in predicted if one), "")
    for key, words in (("rank", "rank correlation of predicted and actual"), ("slope", "actual per predicted")):
        values = [one[key] if one else None for one in predicted]
        words = f"{words} changes of L_v{told}" + ("; with 8 trainings its error is about .35" if key == "rank" else "")
        checks.append(_judged(f"predictive {key}", values, "near 1; not judged", words))
    replayed = [("yes" if one["replayed"] else "no") if swept else None for one in own]
    states = [{"yes": "good", "no": "bad"}.get(value or "", "") for value in replayed]
    words = "every replayed piece of training ended bit for bit where training did"
    checks.append(Check("replayed", replayed, "yes", words, states))
    bars = {"residual": (-math.inf, 0.1), "curvature": (math.ulp(0.0), math.inf)}
    for key, wanted, words in OWN_CHECKS:
        checks.append(_judged(key, [one[key] for one in own], wanted, words, bars.get(key, ANY), bars.get(key, ANY)))
    return checks


def _judged(
    name: str,
    values: list[float | None],
    wanted: str,
    words: str,
    good: tuple[float, float] = ANY,
    fair: tuple[float, float] = ANY,
) -> Check:
    """A check with its state at each place; one that is wanted anyhow has none."""

    def state(value: float | None) -> str:
        if value is None or good == ANY:
            return ""
        return "good" if good[0] <= value <= good[1] else "fair" if fair[0] <= value <= fair[1] else "bad"

    return Check(name, values, wanted, words, [state(value) for value in values])


def _cell(value: Any, state: str) -> Html:
    text = value if isinstance(value, str) else number(value)
    words = {"good": "✓", "fair": "~", "bad": "✕"}
    return element("span", text, f" {words[state]}" if state else None, class_=f"figure {state}".strip())


def _badge(verdict: dict[str, Any]) -> Html:
    kind, icon = LOOKS[verdict["level"]]
    scope = f", {verdict['scope']}" if verdict["scope"] else ""
    return element("span", f"{icon} {verdict['level']}{scope}", class_=f"badge {kind}")


def _one_place(run: Results) -> str:
    if run.config["outer"]["restart"] != "cold":
        return "Only the gradient at uniform weights was checked: a later warm restart cannot be repeated alone."
    return "Only the gradient at uniform weights was checked: the weights written are the uniform ones, of step 0."


# ---- 7. provenance


def provenance(run: Results) -> Html:
    """Rows, notes, cost, and what another person needs to see the same numbers."""
    rows, environment = run.result["rows"], run.environment
    uses = {
        "train": "get weights",
        "fit": "steer the weights",
        "select": "choose the outer step",
        "report": "are read for this report alone",
    }
    data = table(
        Column("set", [{"train": "training", **PARTS}[part] for part in uses]),
        Column("rows", [rows.get(part, 0) for part in uses]),
        Column("which", [words if rows.get(part, 0) else "none" for part, words in uses.items()]),
    )
    seconds = run.result.get("seconds", {})
    work = run.result["work"]
    words = {
        "outer": "learning: training and sweeping, once per outer step",
        "certify": "certificates",
        "compare": "the comparison",
    }
    costs = table(
        Column("what", [words.get(name, name) for name in work]),
        Column("cost", list(work.values()), "training-step equivalents"),
        Column("share", [100 * value / (sum(work.values()) or math.nan) for value in work.values()], "%"),
        Column("time", [seconds.get(name) for name in work], "seconds"),
    )
    arguments = environment["command"]
    packages, kinds = environment["packages"], environment["devices"]
    devices = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    facts = {
        "commit": environment["commit"] or f"{NONE} (not a git checkout)",
        "config hash": run.result["config_hash"],
        "device": f"{devices} ({environment['backend']}), processes: {environment['processes']}",
        "precision": run.meanings.get("precision", NONE),
        "platform": f"Python {environment['python']}, {environment['platform']}",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    }
    columns = {name: meaning for name, meaning in run.meanings.items() if name in run.rows}
    return join(
        element("h3", "Data"),
        data,
        element("ul", *(element("li", one) for one in run.result["notes"])),
        element("h3", "Cost"),
        costs,
        note(
            f"One training step is a forward and a backward pass over one batch. {NONE}: not timed."
            + (f" Total: {number(float(sum(work.values())))} training steps.")
        ),
        element("h3", "Run it again"),
        paragraph("As it was started:"),
        element("pre", shlex.join(["bilevel-jax" if _console(arguments[0]) else arguments[0], *arguments[1:]])),
        paragraph("From this folder alone, with every setting written out:"),
        element("pre", f"bilevel-jax select {files.RESOLVED} --out ANOTHER_FOLDER"),
        table(Column("", [element("b", key) for key in facts]), Column("", list(facts.values())), name="facts"),
        details(
            "Columns of weights.parquet, joined by id",
            table(Column("column", list(columns)), Column("meaning", list(columns.values())), name="facts"),
        ),
        details(f"{files.RESOLVED}, all settings", element("pre", run.config_text)),
    )


def _console(program: str) -> bool:
    return Path(program).name in ("bilevel-jax", "cli.py", "__main__.py")


# ---- numbers and words


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits, whole numbers in full, a true minus; – for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return NONE
    if isinstance(value, int | np.integer) or abs(value) >= 10 ** (digits - 1) - 0.5:
        text = f"{value:,.0f}"
    elif value == 0:
        text = "0"
    else:
        text = f"{value:#.{digits if abs(value) >= 1e-3 else 3}g}".removesuffix(".")
    return text.replace("-", "−")


def signed(value: float) -> str:
    """The number with its sign."""
    return number(value) if value <= 0 or not math.isfinite(value) else f"+{number(value)}"


def cut(text: str, count: int) -> str:
    """The text, or its beginning and how long it is."""
    return text if len(text) <= count else f"{text[:count]}… ({len(text):,} characters)"


def bounded(text: str, *, end: bool = False) -> Html:
    """A short piece of foreign text, set apart so that its direction cannot spill; `end` keeps the end of a path."""
    if end and len(text) > 120:
        return element("bdi", f"…{text[-120:]}", title=text[:1000])
    return element("bdi", cut(text, 80))


def paragraph(*children: str | None) -> Html:
    """A paragraph."""
    return element("p", *children)


def note(text: str, kind: str = "") -> Html:
    """A remark in small print, or a warning."""
    return element("p", text, class_=f"note {kind}".strip())


def details(summary: str, content: Html) -> Html:
    """Content that is folded away until it is asked for."""
    return element("details", element("summary", summary), content)


def figure(picture: Html, caption: str, *, wide: bool = False) -> Html:
    """A picture with its caption."""
    return element("figure", picture, element("figcaption", caption), class_="wide" if wide else None)


class _Signed(float):
    """A number that is shown with its sign."""


def table(*columns: Column, marks: dict[int, str] | None = None, name: str = "") -> Html:
    """Columns side by side; a row's mark is its class."""
    marks = marks or {}
    numeric = [
        all(cell is None or isinstance(cell, int | float | np.number | Estimate) for cell in one.cells)
        for one in columns
    ]
    kinds = ["n" if number else one.kind for one, number in zip(columns, numeric, strict=True)]
    cells = [_aligned(one.cells) if number else one.cells for one, number in zip(columns, numeric, strict=True)]
    heads = [
        element(
            "th", one.head, element("span", one.unit, class_="unit") if one.unit else None, class_=kind, scope="col"
        )
        for one, kind in zip(columns, kinds, strict=True)
    ]
    body = [
        element(
            "tr",
            *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)),
            class_=marks.get(index),
        )
        for index, row in enumerate(zip(*cells, strict=True))
    ]
    head = element("thead", element("tr", *heads)) if any(one.head for one in columns) else None
    return element("div", element("table", head, element("tbody", *body), class_=name or None), class_="scroll")


def _aligned(cells: Sequence[Any]) -> list[str]:
    """Numbers of one column, padded after the point so that their points stand below each other."""
    means = _padded([cell.mean if isinstance(cell, Estimate) else cell for cell in cells])
    if not any(isinstance(cell, Estimate) for cell in cells):
        return means
    halves = _padded([cell.half if isinstance(cell, Estimate) else None for cell in cells], 3)
    return [f"{mean} ± {half}" for mean, half in zip(means, halves, strict=True)]


def _padded(values: Sequence[Any], digits: int = 4) -> list[str]:
    texts = [signed(value) if isinstance(value, _Signed) else number(value, digits) for value in values]
    after = [len(text.partition(".")[2]) for text in texts]
    longest = max(after, default=0)
    figure_space, point_space = "\u2007", "\u2008"
    return [
        text + (point_space if longest and not size else "") + figure_space * (longest - size)
        for text, size in zip(texts, after, strict=True)
    ]


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _half(half: float) -> str:
    return "" if math.isnan(half) else f" ± {number(half, 3)}"


def _pair(one: Estimate) -> str:
    """The signed mean and its half-width, both to the same place after the point."""
    if math.isnan(one.half) or not 1e-3 <= one.half < 100:
        return signed(one.mean) + _half(one.half)
    half = number(one.half, 3)
    return f"{one.mean:+.{len(half.partition('.')[2])}f} ± {half}".replace("-", "−")


def _mean(row: dict[str, Any], part: str) -> Estimate:
    return Estimate(_float(row["mean"].get(part)), _float(row["interval"].get(part)))


def _difference(run: Results, name: str, part: str) -> Estimate | None:
    """Mean and interval of an arm's loss less that of uniform weights, seed by seed; None without both."""
    one, uniform = run.arm(name), run.arm("uniform")
    if one is None or uniform is None:
        return None
    return Estimate(
        *mean_interval([_float(a[part]) - _float(b[part]) for a, b in zip(one["runs"], uniform["runs"], strict=True)])
    )


def _part(run: Results) -> str:
    """The most independent trusted set that was read: V_report, or what there is."""
    return next((part for part in ("report", "select") if run.result["rows"].get(part)), "fit")


def _seeds(run: Results) -> str:
    count = len(run.result["compare"][0]["runs"])
    return f"{count} seed{'s' if count != 1 else ''}"


def _rule(run: Results) -> str:
    return keep.rule(Keep(**run.config["keep"]))


def _moved(change: float) -> str:
    return "lower" if change < 0 else "raise"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.1f}\u00a0%"


def _power(largest: float) -> int:
    """The power of ten, a multiple of three, that brings the largest number near 1."""
    return 0 if not largest > 0 else 3 * math.floor(math.log10(largest) / 3)


def _tens(power: int) -> str:
    return "" if power == 0 else f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))} "


def _weight_axis(run: Results) -> str:
    floor = figures.floor_of(run.rows["weight"].astype(float))
    beyond = int((run.rows["weight"] < floor).sum()) if floor else 0
    return (
        "weight"
        + (" (log scale)" if floor else "")
        + (f"; {beyond:,} rows below the axis, at its edge" if beyond else "")
    )


def _masks(run: Results, key: str, most: int) -> list[tuple[str, np.ndarray]]:
    """(name, which rows) of the labels or sources, the good label first, then by size; the smallest gathered in one."""
    values = np.array([f"no {key}" if value is None else value for value in run.rows[key]], dtype=object)
    good = run.config["data"]["good_label"] if key == "label" else None
    names = sorted(set(values), key=lambda name: (name != good, -int((values == name).sum()), name))
    if len(names) > most:
        names, rest = names[: most - 1], names[most - 1 :]
        return [*((name, values == name) for name in names), (f"{len(rest)} others", np.isin(values, rest))]
    return [(name, values == name) for name in names]


def _groups(run: Results, key: str) -> list[tuple[str, np.ndarray]]:
    """(name, weights) of at most as many groups as a figure can tell apart."""
    values = run.rows["weight"].astype(float)
    return [(name, values[mask]) for name, mask in _masks(run, key, COLOURS)]


STYLE = """
:root {
  color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  --page: #ffffff; --panel: #f7f8fa; --ink: #1b2330; --muted: #586474; --rule: #dfe3e9; --link: #1f5fae;
  --good: #1a7f37; --good-soft: #e7f5ea; --fair: #8f5f00; --fair-soft: #fdf3d8; --bad: #b42318; --bad-soft: #fdebe9;
  --c0: #2166ac; --c1: #d06a12; --c2: #7a3f98; --c3: #2f8f83; --c4: #b23a6b; --c5: #6b7280;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #12161b; --panel: #1a2027; --ink: #e5e9ee; --muted: #9ca8b5; --rule: #303943; --link: #86b7f2;
    --good: #56c271; --good-soft: #14291a; --fair: #e3b341; --fair-soft: #2b2410; --bad: #ff8a80; --bad-soft: #341a18;
    --c0: #6cb0f5; --c1: #f0994b; --c2: #c79be0; --c3: #5fc7ba; --c4: #ee86b0; --c5: #a3adb8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font);
  font-variant-numeric: tabular-nums; }
main { max-width: 1140px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 25px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 20px; margin: 0 0 8px; }
h3 { font-size: 16px; margin: 24px 0 6px; }
p { margin: 8px 0; max-width: 78ch; } a { color: var(--link); } .top p { color: var(--muted); margin: 0 0 18px; }
section { margin-top: 34px; padding-top: 22px; border-top: 1px solid var(--rule); }
nav { margin-top: 20px; font-size: 14px; } nav a { margin-right: 18px; white-space: nowrap; display: inline-block; }
.lead { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 20px; align-items: stretch; }
.verdict { padding: 18px 22px; border-radius: 10px; border: 1px solid var(--v); border-left-width: 8px;
  background: var(--soft); }
.verdict .level { font-size: 27px; font-weight: 750; line-height: 1.15; color: var(--v); margin: 0 0 10px;
  letter-spacing: .01em; }
.verdict .scope { font-size: 17px; font-weight: 600; margin-top: -6px; }
.icon { display: inline-grid; place-content: center; width: 34px; height: 34px; margin-right: 12px; border-radius: 50%;
  background: var(--v); color: var(--soft); font-size: 20px; vertical-align: 2px; }
.good { --v: var(--good); --soft: var(--good-soft); } .fair { --v: var(--fair); --soft: var(--fair-soft); }
.bad { --v: var(--bad); --soft: var(--bad-soft); }
.pictures { display: grid; gap: 12px; align-content: start; } .pair { display: grid;
  grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px; background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; }
figure.wide { margin-top: 16px; } figure.wide svg { max-width: 840px; } section > figure { margin-top: 16px;
  max-width: 640px; }
section > figure.wide { max-width: none; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.4; margin-top: 6px; }
.left { display: flex; flex-direction: column; } .left .verdict { flex: 1; }
.headline { font-size: 17px; line-height: 1.4; margin: 0; padding: 14px 22px; border: 1px solid var(--rule);
  border-radius: 10px; background: var(--panel); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin-top: 16px; }
.tile { padding: 10px 14px; background: var(--panel); border: 1px solid var(--rule); border-radius: 10px;
  font-size: 13px; line-height: 1.35; }
.tile span { display: block; color: var(--muted); } .tile b { display: block; font-size: 20px; margin: 3px 0 1px;
  white-space: nowrap; }
.tile small { font-size: 13px; font-weight: 500; }
.note { color: var(--muted); font-size: 13px; } .warning { color: var(--ink); font-size: 15px; padding: 10px 14px;
  max-width: none;
  border-left: 5px solid var(--fair); background: var(--fair-soft); border-radius: 6px; }
.scroll { overflow-x: auto; margin: 10px 0; } table { border-collapse: collapse; font-size: 14px; }
th { font-weight: 600; text-align: left; vertical-align: bottom; font-size: 13px;
  border-bottom: 2px solid var(--rule); }
th, td { padding: 5px 16px 5px 0; } td { vertical-align: top; border-bottom: 1px solid var(--rule);
  overflow-wrap: anywhere; }
.n { text-align: right; } td.n, td.tight { white-space: nowrap; } .unit, .sub { display: block; }
.line { margin-right: 14px; } .unit { font-weight: 400; color: var(--muted); font-size: 12px; max-width: 20ch; }
th.n .unit { margin-left: auto; } .sub { color: var(--muted); font-size: 12px; line-height: 1.35; }
tr.strong td { background: var(--panel); } tr.oracle td { border-bottom: 2px solid var(--muted); }
td:first-child, th:first-child { padding-left: 8px; }
.tag { margin-left: 8px; padding: 0 7px; border: 1px solid var(--muted); border-radius: 9px; color: var(--muted);
  font-size: 11px; white-space: nowrap; }
.checks td:nth-last-child(-n+2) { color: var(--muted); font-size: 13px; min-width: 130px; }
.checks td { overflow-wrap: normal; }
.checks .figure { white-space: nowrap; color: var(--v, inherit); font-weight: 500; } .badge { color: var(--v);
  font-weight: 700; font-size: 13px; }
.examples { width: 100%; table-layout: fixed; } .examples th:nth-child(1) { width: 76px; }
.examples th:nth-child(2) { width: 122px; } .examples th:nth-child(3) { width: 250px; }
.turn { display: grid; grid-template-columns: 68px minmax(0, 1fr); gap: 8px; } .role { color: var(--muted);
  font-size: 12px; line-height: 21px; }
.content { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: 13px/21px var(--mono); }
pre { padding: 10px 14px; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  font: 13px/1.45 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--link); } ul { padding-left: 20px; }
li { overflow-wrap: anywhere; }
@media (max-width: 820px) { .lead, .pair { grid-template-columns: minmax(0, 1fr); } main { padding: 16px 12px 40px; }
  .examples th:nth-child(3) { width: 130px; } .turn { grid-template-columns: minmax(0, 1fr); gap: 0; } }
@media print {
  details::details-content { content-visibility: visible; block-size: auto; }
  main { max-width: none; padding: 0; } nav { display: none; } body { font-size: 12px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
  figure, tr, .tile, .verdict { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  table, th { font-size: 11px; } th, td { padding-right: 9px; } .sub, .unit, .note, figcaption { font-size: 10px; }
}
"""
