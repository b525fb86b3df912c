"""The `score` command, which applies a rater to new examples."""

import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bilevel_jax.commands.score import report
from bilevel_jax.commands.score.choose import Choice, choose_rows, weights_of
from bilevel_jax.commands.score.chunks import (
    ColumnMoments,
    Metadata,
    batched,
    chunk_path,
    count_rows,
    format_metadata,
    list_chunks,
    read_columns,
    read_moments,
    to_json,
    wait_for_chunks,
    write_chunk,
)
from bilevel_jax.commands.score.scorer import (
    Scorer,
    check_reading,
    load_scorer,
    read_ahead,
    score_examples,
    tokenize_chunk,
)
from bilevel_jax.lm.data.examples import Example, example_to_row, format_count, normalize_name, stream_examples
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.runs.config.load import ScoreConfig, config_hash
from bilevel_jax.runs.engine import raters, selection
from bilevel_jax.runs.engine.raters import CHUNK_EXAMPLES, Rater
from bilevel_jax.runs.infra import distributed, run_dir, seals
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.scoring.features import find_constant_columns
from bilevel_jax.runs.stats import auc
from bilevel_jax.runs.tasks.splits import make_data_options

SCORES_FILE, SELECTED_FILE = "scores.parquet", "selected.jsonl"
SHIFTED_MEAN, SHIFTED_SCALE, OUTSIDE_SHARE = 0.5, 1.5, 0.05
"""A feature has drifted where its mean is this many deviations off, its deviation differs by this factor, or this share
of the examples lies beyond the range of the training examples."""
LEAST_ROWS = 30
"""Of fewer rows the mean and the deviation are chance, and only the range is judged."""


def score(config: ScoreConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises ValueError for input that cannot be used, another model than the rater's and a feature that is not finite,
    FileExistsError for a folder that holds a run, and `Interrupted` when asked to stop.
    """
    with open_run_dir(config) as folder:
        rater = raters.read_rater(config.score.rater)
        check_reading(config, rater)
        if bool(rater.recipe.user_columns) != bool(config.score.file):
            wanted = ", ".join(rater.recipe.user_columns)
            raise ValueError(
                f"the rater reads the columns {wanted}: give a file with them, by id, as --score.file."
                if wanted
                else "the rater reads no columns of a file: leave score.file empty."
            )
        scorer = load_scorer(config, rater)
        with start_session(config, folder) as session:
            return _run_scoring(config, scorer, session)


def _run_scoring(config: ScoreConfig, scorer: Scorer, session: Session) -> dict[str, Any]:
    folder = session.folder
    chunk_path(folder, 0).parent.mkdir(parents=True, exist_ok=True)  # in every process, as each writes there
    paths = [folder / SCORES_FILE]
    if not distributed.is_there(folder / SCORES_FILE):
        num_chunks = _score_chunks(config, scorer, session)
        paths = [chunk_path(folder, number) for number in range(num_chunks)]
    return distributed.run_on_first_process(lambda: _finish(config, scorer.rater, session, paths)) or {}


def _score_chunks(config: ScoreConfig, scorer: Scorer, session: Session) -> int:
    """Score the chunks of this process, each once; how many there are of all processes."""
    session.set_phase("scoring", total=count_rows(config.data.train))
    processes, own = distributed.num_processes(), distributed.process_number()
    recipe = scorer.rater.recipe
    began, num_scored, num_chunks = time.monotonic(), 0, 0

    def tokenized_chunks() -> Iterator[tuple[int, list[Example], Corpus | None]]:
        for number, examples in batched(_read_examples(config), CHUNK_EXAMPLES):
            is_due = number % processes == own and not chunk_path(session.folder, number).exists()
            yield number, examples, tokenize_chunk(scorer, examples) if is_due else None

    for number, examples, corpus in read_ahead(tokenized_chunks()):
        if corpus is not None:
            path = chunk_path(session.folder, number)
            scored = score_examples(scorer, examples, corpus)
            columns = recipe.columns if config.score.features else ()
            write_chunk(path, examples, scored, recipe.low, recipe.high, columns=columns)
            num_scored += len(examples)
        num_chunks = number + 1
        session.advance(float(len(examples)))
        if number % processes == processes - 1:  # where each has done one, so that none waits for another's
            session.check_signals()
    seconds = time.monotonic() - began
    rate = num_scored * processes / seconds if seconds else None
    session.run_once("timing", lambda: {"seconds": seconds, "rows_per_second": rate})
    return num_chunks


def _read_examples(config: ScoreConfig) -> Iterator[Example]:
    return stream_examples(config.data.train, make_data_options(config.data))


def _finish(config: ScoreConfig, rater: Rater, session: Session, paths: list[Path]) -> dict[str, Any]:
    """Join the chunks into scores.parquet, choose, and write what was found; `paths` are the chunks, or that file.

    Once scores.parquet is there it takes the place of the chunks, so that what is lost of the rest is made again.
    """
    folder = session.folder
    session.set_phase("writing")
    is_joined = paths == [folder / SCORES_FILE]
    if not paths:
        raise ValueError(f"{', '.join(config.data.train)}: no rows, so there is nothing to score.")
    wait_for_chunks(paths)
    moments, kinds = read_moments(paths)
    choose = cache(lambda: choose_rows(paths, rater, config.selection, seed=config.data.seed))
    session.run_once("facts", lambda: _collect_facts(config, rater, paths, moments, choose()))
    if not (folder / SELECTED_FILE).exists():
        _write_selected(config, folder, rater, paths, choose(), kinds)
    if not is_joined:
        _write_scores(folder, rater, paths, choose(), format_metadata(moments, kinds))
    for path in list_chunks(folder):
        seals.note_removal(path)
        path.unlink()
    timing = session.run_once("timing", lambda: {"seconds": 0.0, "rows_per_second": None})
    result = session.run_once("facts", dict) | timing
    result |= {"config_hash": config_hash(config), "sentence": summarize(result)}
    run_dir.write_result(folder, result)
    for line in [*result["drift_sentences"], *result["notes"]]:
        session.print_line(line)
    report.write_score_report(folder)
    return result


def summarize(result: dict[str, Any]) -> str:
    """One sentence on the scores."""
    counts = result["counts"]
    drifted = [column["name"] for column in result["drift"] if column["sentence"]]
    drift = (
        f"{len(drifted)} of {format_count('feature', len(result['drift']))} {'has' if len(drifted) == 1 else 'have'} "
        f"drifted ({', '.join(drifted[:3])}"
        f"{', ...' if len(drifted) > 3 else ''}): read the report before you use them"
        if drifted
        else "no feature has drifted"
        if result["judges_drift"]
        else f"fewer than {LEAST_ROWS} rows are too few to tell whether features have drifted"
    )
    rows = format_count("row", counts["rows"])
    return f"{counts['scored']:,} of {rows} scored, {counts['selected']:,} selected; {drift}."


def _collect_facts(
    config: ScoreConfig, rater: Rater, paths: Sequence[Path], moments: ColumnMoments, choice: Choice
) -> dict[str, Any]:
    sums = np.zeros(5)  # rows, scored, logit, weight, weight^2
    low, high, centred = np.inf, -np.inf, 0.0
    for (logits,) in read_columns(paths, "logit"):
        known = logits[~np.isnan(logits)]
        weights = rater.weights(known)
        sums += len(logits), len(known), known.sum(), weights.sum(), (weights**2).sum()
        low, high = min(low, weights.min(initial=np.inf)), max(high, weights.max(initial=-np.inf))
    rows, scored, logit, weight, square = sums.tolist()
    mean = logit / scored
    for (logits,) in read_columns(paths, "logit"):
        centred += float(((logits[~np.isnan(logits)] - mean) ** 2).sum())
    dropped = int(rows - scored)
    return {
        "counts": {"rows": int(rows), "scored": int(scored), "dropped": dropped, "selected": choice.total},
        "selection": selection.describe_selection_rule(config.selection),
        "weights": {
            "mean": weight / scored,
            "ess": weight**2 / square if square else 0.0,
            "least": low,
            "largest": high,
        },
        "logits": {"mean": mean, "deviation": float(np.sqrt(centred / scored))},
        "training": rater.document["training"],
        "coefficients": rater.document["coefficients"],
        "intervals": rater.document.get("intervals", {"over": "steps", "count": None}),
        "link": rater.link,
        "transform": rater.recipe.transform,
        "auc": _measure_auc(config, paths),
        "judges_drift": scored >= LEAST_ROWS,
        "drift": (drift := describe_drift(rater, moments)),
        "drift_sentences": [column["sentence"] for column in drift if column["sentence"]],
        "notes": [
            *(
                [f"{dropped:,} of {format_count('row', int(rows))} too long for the rater (data.truncation): no score."]
                if dropped
                else []
            ),
            *([choice.note] if choice.note else []),
        ],
    }


def describe_drift(rater: Rater, moments: ColumnMoments) -> list[dict[str, Any]]:
    """Of each feature: mean and deviation in units of the training examples', the ranges, and in words what moved.

    A column that was constant among these has no such unit: mean and deviation are None, and its range alone tells.
    """
    constant = find_constant_columns(rater.recipe)
    is_judged = ~constant & (moments.num_examples >= LEAST_ROWS)
    deviations = np.sqrt(moments.squares / max(1, moments.num_examples))
    columns = []
    for k, name in enumerate(rater.recipe.columns):
        mean, deviation, outside = (
            float(moments.mean[k]),
            float(deviations[k]),
            moments.outside[k] / moments.num_examples,
        )
        words = []
        if is_judged[k] and abs(mean) > SHIFTED_MEAN:
            words.append(f"is {abs(mean):.1f} deviations {'higher' if mean > 0 else 'lower'} than in training")
        if is_judged[k] and not 1 / SHIFTED_SCALE < deviation < SHIFTED_SCALE:
            words.append(f"has {deviation:.2g} times the spread of training")
        if outside > OUTSIDE_SHARE:
            words.append(f"lies outside the range of training in {outside:.1%} of the rows")
        columns.append(
            {
                "name": name,
                "mean": None if constant[k] else mean,
                "deviation": None if constant[k] else deviation,
                "range": [float(moments.low[k]), float(moments.high[k])],
                "training_range": [float(rater.recipe.low[k]), float(rater.recipe.high[k])],
                "outside": outside,
                "sentence": f"drift: {name} {' and '.join(words)}." if words else "",
            }
        )
    return columns


def _measure_auc(config: ScoreConfig, paths: Sequence[Path]) -> float | None:
    """P(logit of a good example > that of a labelled other one), where there are labels; these are all in memory."""
    if not config.data.label_field:
        return None
    known: list[np.ndarray] = []
    for logits, labels in read_columns(paths, "logit", "label"):
        mask = np.array([label is not None for label in labels]) & ~np.isnan(logits)
        known.append(np.stack([logits[mask], labels[mask] == normalize_name(config.data.good_label)]).astype(float))
    table = np.concatenate(known, axis=1)
    value = auc(table[0], table[1] > 0)
    return value if np.isfinite(value) else None


def _write_selected(
    config: ScoreConfig, folder: Path, rater: Rater, paths: Sequence[Path], choice: Choice, kinds: set[str]
) -> None:
    """selected.jsonl: the chosen rows, read again, with id and weight, in the one layout that holds all of them."""
    layout = "chat" if kinds == {"chat", "prompt"} else "auto"
    with run_dir.atomic_replace(folder / SELECTED_FILE) as part, open(part, "w", encoding="utf-8") as file:
        chunks = batched(_read_examples(config), CHUNK_EXAMPLES)
        tables = read_columns(paths, "id", "logit")
        for (_, examples), (ids, logits), repeats in zip(chunks, tables, choice.repeats(), strict=True):
            for example, known_id, logit, count in zip(examples, ids, logits, repeats, strict=True):
                if example.id != known_id:
                    raise ValueError(f"{example.where}: has changed since it was scored. Start a new run with --out.")
                if count:
                    row = {**example_to_row(example, layout), "id": example.id, "weight": float(rater.weights(logit))}
                    file.write(to_json(row) * int(count))


def _write_scores(folder: Path, rater: Rater, paths: Sequence[Path], choice: Choice, metadata: Metadata) -> None:
    """scores.parquet: the chunks one after the other, a row group each, with weights and what was chosen."""
    meanings = {
        "logit": "the rater's logit: the larger, the more it trusts the row; null for a row that is too long",
        "weight": "factor of the row's loss, as if it had stood among the rater's training examples; 0 without a logit",
        "selected": "whether the row stands in selected.jsonl",
    }
    with run_dir.atomic_replace(folder / SCORES_FILE) as part:
        writer = None
        for path, repeats in zip(paths, choice.repeats(), strict=True):
            table = pq.read_table(path, page_checksum_verification=True)
            logits = table["logit"].to_numpy()
            place = table.column_names.index("logit")
            logit_column = pa.array(logits, pa.float64(), from_pandas=True)  # nan is null
            table = table.set_column(place, "logit", logit_column)
            table = table.add_column(place + 1, "weight", pa.array(weights_of(rater, logits)))
            table = table.add_column(place + 2, "selected", pa.array(repeats > 0))
            table = table.replace_schema_metadata(
                metadata | {key.encode(): text.encode() for key, text in meanings.items()}
            )
            writer = writer or pq.ParquetWriter(part, table.schema, write_page_checksum=True)
            writer.write_table(table)
        assert writer is not None
        writer.close()
