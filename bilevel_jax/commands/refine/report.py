"""The report page of a `refine` run."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bilevel_jax.core.certify import Reliability
from bilevel_jax.core.certify.reliability import NEEDED_FOR
from bilevel_jax.core.certify.verdict import PRODUCT_TOLERANCE
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.engine.reliability import known_reliability, reliability_from_json
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.evaluation import describe_run_evaluation
from bilevel_jax.runs.report.figures import Point, Series
from bilevel_jax.runs.report.html import Cell, Column, Table, bold_cell, isolated_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import MISSING, SignedNumber, format_number, format_percent
from bilevel_jax.runs.report.results import write_report

JsonObject = dict[str, Any]


def write_refine_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, partial(render_refine_report, folder))


def summarize_refinement(result: JsonObject) -> str:
    """Rounds accepted, and loss and right answers on test before and after."""
    num_rounds, test_result = len(result["records"]), result["test"]
    words = f"{result['accepted']} of {format_count('round', num_rounds)} accepted"
    if test_result and not result["rows"]["dev"]:  # one number, without examples and so without sampling error
        return (
            f"{words}; the target, a function of the parameters, went from {test_result['first']:.4f} to "
            f"{test_result['last']:.4f} {result['unit']}."
        )
    if test_result is None:
        return f"{words}; there is no test, so nothing that decided no round says whether the model became better."
    if not result["accepted"]:
        return f"{words}: the model is the one that was given (test loss {test_result['first']:.4f} {result['unit']})."
    gain, words = test_result["gain"], f"{words}; test loss"
    if gain["low"] <= 0 <= gain["high"]:
        words += (
            f" went from {test_result['first']:.4f} to {test_result['last']:.4f} {result['unit']}, no clear difference"
        )
    else:
        words += (
            f" {'fell' if gain['value'] > 0 else 'ROSE'} from {test_result['first']:.4f} to {test_result['last']:.4f}"
        )
        words += f" {result['unit']}"
    words += f" (gain {gain['value']:+.4f}, 95 % interval {gain['low']:+.4f} to {gain['high']:+.4f})"
    if right := test_result["right"]:
        low, high = right["gain"]["low"], right["gain"]["high"]
        words += f"; right answers {right['first']:.1%} → {right['last']:.1%} ({low:+.1%} to {high:+.1%})"
    return f"{words}."


def render_refine_report(folder: Path, name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
    """The whole report as HTML."""
    test_result = result["test"]
    return render_page(
        "refine.html",
        evaluations=describe_run_evaluation(folder, result),
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        better=bool(test_result) and result["accepted"] and test_result["gain"]["low"] > 0,
        first=result["records"][0],
        picture=plot_rounds(result),
        test_numbers=list_test_numbers(result),
        rounds=rounds_table(result),
        reliability=describe_reliability(result),
        refused_steps=describe_refused_steps(result),
        product_errors=describe_product_errors(result),
        validation_weights=describe_validation_weights(result),
        responses=responses_table(result) if result["examples"] else None,
        mean_weights=mean_weights_table(result),
        drift=drift_table(result) if any(record.get("scores") for record in result["records"]) else None,
        generator=result.get("generator"),  # runs of earlier versions have none
        generator_rounds=generator_table(result) if result.get("generator") else None,
        generator_picture=plot_generator(result) if result.get("generator") else None,
    )


def list_test_numbers(result: JsonObject) -> list[tuple[str, str, str]]:
    """The numbers on test: (what, number, unit); none where there is no test."""
    test_result = result["test"]
    if test_result is None:
        return []
    gain = test_result["gain"]
    numbers = [
        ("test loss, before", format_number(test_result["first"]), result["unit"]),
        ("after", format_number(test_result["last"]), result["unit"]),
        ("gain", format_number(gain["value"]), f"{format_number(gain['low'])} to {format_number(gain['high'])}"),
    ]
    if readings := test_result["targets"]:
        for before, after in zip(readings["first"], readings["last"], strict=True):
            change = f"{format_number(before['loss'])} → {format_number(after['loss'])}"
            numbers.append((f"test loss of {before['name']}", change, "before → after, in its own unit"))
    if right := test_result["right"]:
        low, high = right["gain"]["low"], right["gain"]["high"]
        numbers += [
            ("right answers, before", format_percent(right["first"]), "greedy, by the verifier"),
            ("after", format_percent(right["last"]), f"{format_percent(low)} to {format_percent(high)} more"),
        ]
    return numbers


# ---- tables


def rounds_table(result: JsonObject) -> Table:
    """A line per candidate; the gain, its bound and the decision stand with the best candidate of each round."""
    lines = [
        (record, candidate, candidate["name"] == record["best"])
        for record in result["records"]
        for candidate in record["candidates"]
    ]
    return make_table(
        Column("round", [record["step"] for record, _, _ in lines]),
        Column("candidate", [bold_cell(candidate["name"]) for _, candidate, _ in lines]),
        Column("present loss", [record["present"] for record, _, _ in lines], "dev"),
        Column("its loss", [candidate["dev"] for _, candidate, _ in lines], "dev"),
        Column(
            "gain",
            [format_gain(record["gain"]) if is_best else MISSING for record, _, is_best in lines],
            "95 % interval",
            "tight",
        ),
        Column(
            "bound",
            [SignedNumber(record["bound"]) if is_best else None for record, _, is_best in lines],
            "one-sided, per look",
        ),
        Column(
            "",
            [("accepted" if record["accepted"] else "kept") if is_best else "" for record, _, is_best in lines],
            "",
            "tight",
        ),
        Column("responses right", [record["right"] for record, _, _ in lines], "share, by the verifier"),
        Column("ended", [record["ended"] for record, _, _ in lines], "share of responses"),
        Column("ESS", [record["ess"] for record, _, _ in lines], "examples, of the best that weights them"),
        *_reliability_columns([candidate for _, candidate, _ in lines]),
        Column("passes", [round(candidate["work"]) for _, candidate, _ in lines], "training steps"),
        Column("seconds", [round(candidate["seconds"]) for _, candidate, _ in lines], "with compilation"),
        row_classes={at: "strong" for at, (record, _, is_best) in enumerate(lines) if record["accepted"] and is_best},
    )


def _reliability_columns(candidates: list[JsonObject]) -> list[Column]:
    """The reliability of hypergradients, by what it was measured; columns without a number are left out."""
    draws = [read_reliability(candidate) for candidate in candidates]
    by_halves = [known_reliability(first) if _is_by_halves(first) else None for first, _ in draws]
    by_dev = [None if _is_by_halves(last) else known_reliability(last) for _, last in draws]
    columns = [
        Column("reliability", by_halves, "first step, by halves of validation"),
        Column("reliability", by_dev, "last step, by dev"),
        Column("product error", [read_product_error(one) for one in candidates], "share of the first hypergradient"),
    ]
    return [column for column in columns if any(cell is not None for cell in column.cells)]


def generator_table(result: JsonObject) -> Table:
    """A line per round: what its responses did, and what became of the generator."""
    rounds = [record["generator"] for record in result["records"]]

    def values(key: str) -> list[Any]:
        return [entry[key] for entry in rounds]

    return make_table(
        Column("round", [record["step"] for record in result["records"]]),
        Column("student's loss", values("target_loss"), "validation"),
        Column("student's loss", values("dev_loss"), "dev"),
        Column("reward", [SignedNumber(value) for value in values("reward")], "mean"),
        Column("spread", values("reward_spread"), "standard deviation"),
        Column("KL from the start", values("kl"), "nats per token"),
        Column("KL after", values("kl_after"), "the policy steps"),
        Column("entropy", values("entropy"), "nats per token"),
        Column("clipped", [format_percent(value) for value in values("clipped")], "of the tokens, after the steps"),
        Column("length", values("length"), "tokens"),
        Column("repeated", [format_percent(value) for value in values("repeated")], "4-grams of a response"),
        Column("duplicates", [format_percent(value) for value in values("duplicates")], "of the responses"),
        Column("equal rewards", values("equal_groups"), "groups"),
    )


def responses_table(result: JsonObject) -> Table:
    """Responses at both ends of the weights, or of the rewards of a generator that is trained."""
    responses = result["examples"]
    rewards = [response.get("reward") for response in responses]  # runs of earlier versions have none
    is_rewarded = any(reward is not None for reward in rewards)
    columns = [
        Column("reward", [SignedNumber(reward) for reward in rewards])
        if is_rewarded
        else Column("weight", [response["weight"] for response in responses]),
        Column("question", [isolated_cell(response["question"]) for response in responses]),
        Column("response", [isolated_cell(response["text"] or "(nothing)") for response in responses]),
        Column("offline example says", [isolated_cell(response["offline"]) for response in responses]),
    ]
    if any(response["label"] for response in responses):
        columns.append(Column("its label", [response["label"] or MISSING for response in responses]))
    if any(response["checker"] is not None for response in responses):
        columns.append(Column("verifier", [response["checker"] for response in responses]))
    return make_table(
        *columns,
        Column("log-probability", [response["log_prob"] for response in responses], "nats, when written"),
        Column("ended", ["yes" if response["ended"] else "cut" for response in responses]),
        Column("id", [Cell(response["id"], "code") for response in responses], "question / round / draw"),
    )


def mean_weights_table(result: JsonObject) -> Table:
    """Mean weights by kind of example and round."""
    kinds = list(dict.fromkeys(item["kind"] for item in result["moved"]))
    rounds = range(len(result["records"]))
    means = {(item["round"], item["kind"]): item for item in result["moved"]}
    return make_table(
        Column("examples", [bold_cell(kind) for kind in kinds]),
        Column("how many", [means.get((rounds[-1], kind), {}).get("rows") for kind in kinds], "in the last round"),
        *(
            Column(
                f"round {at}",
                [means.get((at, kind), {}).get("weight") for kind in kinds],
                "mean reward" if result.get("moved_by") == "reward" else "mean weight",
            )
            for at in rounds
        ),
    )


def format_gain(gain: JsonObject) -> str:
    """A gain with its interval."""
    return f"{gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]".replace("-", "−")


def format_generator(record: JsonObject) -> str:
    """The student's loss and the generator's divergence, for the line of a round; "" where none is trained."""
    generator = record.get("generator")
    if not generator:
        return ""
    return (
        f"   student {generator['target_loss']:.4f}  KL {generator['kl']:.3f}  entropy {generator['entropy']:.2f}  "
        f"repeated {generator['repeated']:.0%}"
    )


def drift_table(result: JsonObject) -> Table:
    """A line per round: the scores that refine.methods = ica weighs by, and how far they order rows as earlier ones."""
    records = [record for record in result["records"] if record.get("scores")]
    scores = [record["scores"] for record in records]

    def correlations(key: str) -> list[Any]:
        return [format_correlation(one[key]) + f" ({one[key]['rows']:,})" if one[key] else MISSING for one in scores]

    unit = "nats per token" if all(one["per_token"] for one in scores) else "nats"
    columns = [
        Column("round", [record["step"] for record in records]),
        Column("scored", [one["rows"] for one in scores], "rows"),
        Column("median", [SignedNumber(one["median"]) for one in scores], unit),
        Column("lower", [SignedNumber(one["lower"]) for one in scores], "quartile"),
        Column("upper", [SignedNumber(one["upper"]) for one in scores], "quartile"),
        Column("with the first round", correlations("first"), "Spearman (rows)", "tight"),
        Column("with the round before", correlations("previous"), "Spearman (rows)", "tight"),
        Column("responses, by the next model", correlations("responses"), "Spearman (rows)", "tight"),
        Column("passes", [round(one["work"]) for one in scores], "training steps"),
    ]
    if any(one["auc"] is not None for one in scores):
        columns.insert(5, Column("AUC", [one["auc"] for one in scores], "against the labels"))
    return make_table(*columns)


def format_correlation(drift: JsonObject) -> str:
    """A rank correlation with two digits."""
    return "none" if drift["spearman"] is None else f"{drift['spearman']:.2f}".replace("-", "−")


def format_drift(record: JsonObject) -> str:
    """How far the scores of a round order rows as those before, for the line of a round; "" without any."""
    previous = (record.get("scores") or {}).get("previous")
    return f"   scores agree with those before {format_correlation(previous)}" if previous else ""


# ---- reliability


def read_reliability(candidate: JsonObject) -> tuple[Reliability | None, Reliability | None]:
    """The reliability of the first and of the last hypergradient of a candidate; None where it was not measured."""
    stored = candidate.get("reliability") or {}  # runs of earlier versions have none
    first, last = (stored.get(place) for place in ("first", "last"))
    return (first and reliability_from_json(first)), (last and reliability_from_json(last))


def read_product_error(candidate: JsonObject) -> float | None:
    """What outer.product_precision changes in the first hypergradient of a candidate, or of a generator's rewards, as a
    share of its norm; None at the highest."""
    error = (candidate.get("reliability") or {}).get("product_error")
    return None if error is None else float(error)  # infinity is text in JSON


def describe_product_errors(result: JsonObject) -> list[str]:
    """A line for each round whose hypergradients products of lower precision change."""
    lines = []
    for record in result["records"]:
        sources = [("the rewards", record.get("generator") or {})]
        sources += [(f"the weights of {one['name']}", one) for one in record["candidates"]]
        for name, source in sources:
            if (error := read_product_error(source)) is not None:
                much = ", too much to believe them: raise it, or lower optimizer.learning_rate"
                lines.append(
                    f"Round {record['step']}: outer.product_precision changes the hypergradients behind {name} by "
                    f"{error:.1%} of their norm{much if error > PRODUCT_TOLERANCE else ''}."
                )
    return lines


def describe_reliability(result: JsonObject) -> JsonObject:
    """What the report says of how far weights and rewards speak for other examples: a line for those of each round, or
    why there is none."""
    sources: list[tuple[str, JsonObject]] = []
    for record in result["records"]:
        if generator := record.get("generator"):
            sources.append((f"Round {record['step']}, rewards", generator))
        sources += [(f"Round {record['step']}", one) for one in record["candidates"] if one["name"] == "unrolled"]
    measured = [(name, source) for name, source in sources if any(read_reliability(source))]
    missing = ""
    if not sources:
        missing = "no candidate has hypergradients, and of these alone it is measured (refine.methods: unrolled)"
    elif not any("reliability" in source for _, source in sources):
        missing = "this run is of a version that did not measure it"
    elif not measured:
        reasons = [(source.get("reliability") or {}).get("why_not") for _, source in sources]
        missing = next(filter(None, reasons), "outer.reliability_every is 0")
    lines = [f"{name}: {_describe_candidate(source)}" for name, source in measured]
    counts = [draw.num_validation for _, source in measured for draw in read_reliability(source) if draw]
    return {"missing": missing, "lines": lines, "num_validation": max(counts, default=0)}


def describe_refused_steps(result: JsonObject) -> list[str]:
    """A line for each candidate of which a step was not made, as it would have left the weights on few examples."""
    return [
        f"Round {record['step']}: the weights of {candidate['name']} are those of "
        f"{format_count('step', candidate['reliability']['steps'] - 1)}: another would have brought their effective "
        "sample size below outer.ess_floor."
        for record in result["records"]
        for candidate in record["candidates"]
        if _has_refused_step(candidate)
    ]


def describe_validation_weights(result: JsonObject) -> list[str]:
    """A line for each candidate that validation examples trained, too."""
    return [
        f"Round {record['step']}: {candidate['name']} is trained on the validation examples, too, each with weight "
        f"{format_number(candidate['validation_weight'])}; in every step one fold judged and the others trained, "
        "so the number of validation examples named here is that of a fold."
        for record in result["records"]
        for candidate in record["candidates"]
        if candidate.get("validation_weight") is not None
    ]


def _has_refused_step(candidate: JsonObject) -> bool:
    return bool((candidate.get("reliability") or {}).get("is_concentrated"))  # not in results of earlier versions


def format_reliability(candidate: JsonObject) -> str:
    """The reliability of a candidate's hypergradients, first → last, what products of lower precision change in the
    first, and whether a step was refused, for the line of a
    round; "" without any."""
    refused = f"weights of {candidate['reliability']['steps'] - 1} steps" if _has_refused_step(candidate) else ""
    error = read_product_error(candidate)
    rounded = f"product error {error:.1%}{' (!)' if error > PRODUCT_TOLERANCE else ''}" if error is not None else ""
    refused = "   ".join(filter(None, [rounded, refused]))
    first, last = read_reliability(candidate)
    if first is None and last is None:
        return refused
    draws = [first, last] if _is_worth_telling(candidate, first) else [last]
    values = [known_reliability(draw) for draw in draws]
    numbers = " → ".join("unknown" if value is None else f"{value:.2f}" for value in values)
    stored = candidate["reliability"]
    used_up = f" (used up after {stored['steps']} steps)" if stored["is_used_up"] else ""
    return "   ".join(filter(None, [f"reliability {numbers}{used_up}", refused]))


def _is_worth_telling(candidate: JsonObject, first: Reliability | None) -> bool:
    """Whether the first step says something beside the last."""
    return candidate["reliability"]["steps"] > 1 and known_reliability(first) is not None


def _describe_candidate(candidate: JsonObject) -> str:
    first, last = read_reliability(candidate)
    stored = candidate["reliability"]
    if stored["steps"] == 1:
        words = f"in the one step, where all weights are equal, {_describe_draw(last)}."
    elif _is_worth_telling(candidate, first):
        words = f"in the first step, where all weights are equal, {_describe_draw(first)}; "
        words += f"in the last, at learned weights, {_describe_draw(last)}."
    else:
        words = f"in the last step, at learned weights, {_describe_draw(last)}."
    words += _describe_need(first)
    if stored["is_used_up"]:
        words += (
            f" The weights stopped after {stored['steps']} steps: by halves of validation the reliability was at most "
            "outer.reliability_floor twice in a row, so validation is used up."
        )
    return words + _describe_pooling(stored.get("pooling"))


def _describe_pooling(pooling: JsonObject | None) -> str:
    """How reliable the parts of pooled steps were; "" where steps are those of single examples."""
    if not pooling:
        return ""
    places = ("first", "last")
    shared, own = ([format_number(pooling[place][part], 2) for place in places] for part in ("shared", "own"))
    return (
        " The steps are pooled: of what examples of like losses share, other halves of validation and another order of "
        f"the data would give {shared[0]} again in the first step and {shared[1]} in the last; of the examples' own "
        f"parts {own[0]} and {own[1]} (1: all of it). In the first step no other order is known, so own parts do not "
        "count yet; once an earlier round was accepted, the model follows both halves, which then agree too readily."
    )


def _describe_draw(draw: Reliability | None) -> str:
    """The number, or why nobody knows it."""
    value = known_reliability(draw)
    if value is not None:
        return f"{format_number(value, 2)} by {'halves of validation' if _is_by_halves(draw) else 'dev'}"
    if draw is None:
        return "nobody knows"
    if draw.num_validation < 2 and _is_by_halves(draw):
        return "nobody knows (one validation example has no halves, and dev was not read)"
    if draw.is_fitted:
        return "nobody knows (halves of what the weights follow do not tell, and dev was not read)"
    return f"nobody knows (halves of {'validation' if _is_by_halves(draw) else 'dev'} agree on nothing)"


def _describe_need(draw: Reliability | None) -> str:
    """About how many validation examples would be enough, where their noise was measured and they are not."""
    if draw is None or known_reliability(draw) is None or draw.value >= NEEDED_FOR or math.isnan(draw.noise):
        return ""
    needed = draw.validation_examples_for(NEEDED_FOR)
    if math.isinf(needed):
        return " Nothing but noise is seen there, so no number of validation examples can be told."
    return f" For {NEEDED_FOR:g} about {format_count('validation example', round(needed))} would be needed."


def _is_by_halves(draw: Reliability | None) -> bool:
    return draw is not None and math.isnan(draw.agreement)


# ---- the picture


def plot_rounds(result: JsonObject) -> Markup:
    """dev loss: the present model as a line of steps, candidates as points with paired intervals."""
    steps: list[tuple[float, float]] = []
    points: list[Point] = []
    ticks: dict[float, str] = {}
    for at, record in enumerate(result["records"]):
        losses = {candidate["name"]: candidate["dev"] for candidate in record["candidates"]}
        after = losses[record["best"]] if record["accepted"] else record["present"]
        steps += [(at - 0.5, record["present"]), (at + 0.2, record["present"]), (at + 0.5, after)]
        ticks[at] = f"{record['step']}\n{'accepted' if record['accepted'] else 'kept'}"
        for place, (name, loss) in enumerate(losses.items()):
            point = Point(at + 0.2 + 0.12 * (place - (len(losses) - 1) / 2), loss, title=f"{name} {loss:.4f}")
            if name != record["best"]:
                points.append(point._replace(colour=5, kind="faint"))
                continue
            low, high = _candidate_interval(record)
            point = point._replace(low=low, high=high)
            points.append(point._replace(colour=3) if record["accepted"] else point._replace(colour=1, kind="hollow"))
    present = Series("present model", [x for x, _ in steps], [y for _, y in steps], kind="plain")
    return figures.plot_lines(
        [present], "round", f"dev loss, {result['unit']}", points=points, x_ticks=ticks, height=300
    )


def plot_generator(result: JsonObject) -> Markup:
    """The target's loss of the student that each round's responses trained."""
    rounds = [record["step"] for record in result["records"]]
    parts = {"validation, which rewards": "target_loss", "dev": "dev_loss"}
    if all(record["generator"]["target_loss"] == record["generator"]["dev_loss"] for record in result["records"]):
        del parts["dev"]  # of a target that reads the parameters alone
    series = [
        Series(name, [float(at) for at in rounds], [record["generator"][key] for record in result["records"]], colour)
        for colour, (name, key) in enumerate(parts.items())
    ]
    return figures.plot_lines(series, "round", f"student's loss, {result['unit']}", height=260)


def _candidate_interval(record: JsonObject) -> tuple[float, float]:
    """The interval of the best candidate's loss, as the present one's minus the interval of the gain."""
    return record["present"] - record["gain"]["high"], record["present"] - record["gain"]["low"]
