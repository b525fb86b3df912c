"""Candidate strategies: their responses to the same questions, read from one table or from a file for each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_jax.lm import files
from bilevel_jax.lm.data import Example, content_hash
from bilevel_jax.lm.files import show
from bilevel_jax.lm.turns import Turn, check_row, field, string
from bilevel_jax.runs.config import RankConfig
from bilevel_jax.runs.read import nearest
from bilevel_jax.scores.random import number

MORE = 3
"""Names that an error shows of many."""


class Question(NamedTuple):
    """A question with the response of every strategy."""

    id: str
    """Of its text: what it is drawn by."""
    text: str
    responses: tuple[str, ...]
    result: str | None
    """The right result, where verifier.answer_field names one."""
    rewards: tuple[float, ...]
    """One for each strategy, or none at all."""
    file: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`; of several files, in the first."""
        return f"{self.file}:{self.line}"

    def answered(self, response: str) -> Example:
        """The question as a row with this response."""
        turns = Turn("user", self.text), Turn("assistant", response)
        return Example(f"{content_hash(turns)}#0", 0, turns, "", None, self.file, self.line, format="prompt")


class Candidates(NamedTuple):
    """All questions of all files, in order."""

    strategies: tuple[str, ...]
    questions: list[Question]
    notes: list[str]


def load(config: RankConfig) -> Candidates:
    """Read data.train: one table whose rows map strategies to responses, or a file of responses for each strategy.

    A table has `rank.responses_field`; in the files of strategies, which are called after them, rows are joined by
    `rank.id_field`, or by the question itself. Every strategy answers every question. Raises ValueError, with file and
    line, for a response that is missing or empty (with data.empty = drop the question is left out), a question that
    stands twice, a strategy that is not there, and fewer than two of them.
    """
    first = next(files.read_rows(config.data.train[0]), (0, None))[1]
    table = isinstance(first, dict) and config.rank.responses_field in first
    names, rows = _table(config) if table else _joined(config)
    chosen = _chosen(names, config, table)
    dropped: list[str] = []
    seen: dict[str, str] = {}
    questions = []
    for row in rows:
        where = f"{row.file}:{row.line}"
        if (other := seen.setdefault(row.text, where)) != where:
            raise ValueError(f"{where}: the question stands at {other}, too. Remove one of the two rows.")
        responses = []
        for name in chosen:
            if name not in row.responses:
                raise ValueError(
                    f"{where}: no response of '{name}'; there are those of {_some(row.responses)}. Every strategy must "
                    "answer every question: add it, remove the row, or name in rank.strategies those that do."
                )
            text, place = row.responses[name]
            text = string(text, name, place)
            if not text.strip() and config.data.empty == "error":
                raise ValueError(f"{place}: the response of '{name}' is empty. Fill it, or set data.empty to drop.")
            responses.append(text)
        if not all(text.strip() for text in responses):
            dropped.append(where)
            continue
        rewards = tuple(_reward(row, name, where) for name in chosen) if config.rank.reward_field else ()
        key = content_hash([Turn("user", row.text)])
        questions.append(Question(key, row.text, tuple(responses), row.result, rewards, row.file, row.line))
    notes = [f"{len(questions):,} questions, each answered by {len(chosen)} strategies: {', '.join(chosen)}"]
    if dropped:
        notes.append(f"{len(dropped):,} questions with an empty response were left out, the first: {dropped[0]}")
    return Candidates(chosen, questions, notes)


def drawn(questions: Sequence[Question], block: int, blocks: int, seed: int) -> list[list[Question]]:
    """Disjoint blocks of questions, drawn by their ids: neither their order nor other questions move one.

    As many whole blocks as there are questions for, `blocks` at most. Raises ValueError for less than one.
    """
    count = min(blocks, len(questions) // block)
    if count < 1:
        raise ValueError(
            f"{len(questions)} questions can be asked, and a block has rank.block_size = {block} of them. Give more "
            "questions, lower rank.block_size, or raise rank.max_question_tokens."
        )
    ordered = sorted(questions, key=lambda one: (number(one.id, seed), one.id))
    return [ordered[first : first + block] for first in range(0, count * block, block)]


def own_answers(path: str, config: RankConfig) -> dict[str, list[str]]:
    """question -> the model's own answers, in the order of the file: predictions that were made elsewhere."""
    found: dict[str, list[str]] = {}
    for line, row in files.read_rows(path):
        where = f"{path}:{line}"
        check_row(row, where)
        question, answer = (
            string(field(row, name, f"Set data.{key} to one of them.", where), name, where)
            for key, name in (
                ("prompt_field", config.data.prompt_field), ("response_field", config.data.response_field),
            )
        )  # fmt: skip
        if not answer.strip():
            raise ValueError(f"{where}: the answer is empty. Remove the row, or fill it.")
        found.setdefault(question, []).append(answer)
    return found


def accuracies(given: Sequence[str], strategies: Sequence[str]) -> dict[str, float]:
    """strategy -> the accuracy that a model reached with it, from `name=number` pairs or a JSON file of them.

    Raises ValueError for a strategy that is not there, one without a number, and what is no number.
    """
    if len(given) == 1 and given[0].endswith(".json"):
        told = json.loads(Path(given[0]).read_text("utf-8"))
        pairs: list[tuple[str, Any]] = list(told.items()) if isinstance(told, dict) else [(given[0], told)]
    else:
        pairs = [(name, value) for name, _, value in (one.rpartition("=") for one in given)]
    found: dict[str, float] = {}
    for name, value in pairs:
        if name not in strategies:
            raise ValueError(
                f"rank.accuracies names {name!r}, which is no strategy; {nearest(name, strategies)}they are "
                f"{_some(strategies)}. Write name=number, or a .json file of {{name: number}}."
            )
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"rank.accuracies has {show(value)} for {name!r}; a number is wanted.") from None
    if given and (missing := [name for name in strategies if name not in found]):
        raise ValueError(f"rank.accuracies has no number for {_some(missing)}. Give one for each strategy.")
    return found


# ---- the two forms


class _Row(NamedTuple):
    text: str
    responses: dict[str, tuple[Any, str]]
    """strategy -> (its response, where it stands)."""
    rewards: Any
    result: str | None
    file: str
    line: int


def _table(config: RankConfig) -> tuple[list[str], list[_Row]]:
    names: dict[str, None] = {}
    rows = []
    for path in config.data.train:
        for line, row in files.read_rows(path):
            where = f"{path}:{line}"
            check_row(row, where)
            wanted = config.rank.responses_field
            said = field(row, wanted, "Set rank.responses_field to one of them.", where)
            if not isinstance(said, dict):
                raise ValueError(f"{where}: '{wanted}' is {show(said)}; a map from strategies to responses is wanted.")
            # of a parquet table, a map has null for strategies that other rows have
            answers = {str(name): (text, where) for name, text in said.items() if text is not None}
            names |= dict.fromkeys(answers)
            rewards = row.get(config.rank.reward_field) if config.rank.reward_field else None
            rows.append(_Row(_question(row, config, where), answers, rewards, _result(row, config, where), path, line))
    return list(names), rows


def _joined(config: RankConfig) -> tuple[list[str], list[_Row]]:
    names = [files.stem(path) for path in config.data.train]
    if len(set(names)) < len(names):
        raise ValueError(f"data.train has files of one name, {_some(names)}; a strategy is called after its file.")
    joined: dict[str, _Row] = {}
    for name, path in zip(names, config.data.train, strict=True):
        for line, row in files.read_rows(path):
            where = f"{path}:{line}"
            check_row(row, where)
            text = _question(row, config, where)
            remedy = "Set data.response_field to one of them; a table of strategies has rank.responses_field."
            response = field(row, config.data.response_field, remedy, where)
            key = text
            if config.rank.id_field:
                key = str(field(row, config.rank.id_field, "Set rank.id_field to one of them.", where))
            found = joined.setdefault(key, _Row(text, {}, {}, _result(row, config, where), path, line))
            if name in found.responses:
                raise ValueError(f"{where}: the question stands at {found.responses[name][1]}, too. Remove one row.")
            if found.text != text:
                raise ValueError(
                    f"{where}: {config.rank.id_field} {key} asks {show(text)}, and at {found.file}:{found.line} "
                    f"{show(found.text)}. One id must be one question."
                )
            found.responses[name] = response, where
            if config.rank.reward_field:
                found.rewards[name] = row.get(config.rank.reward_field)
    return names, list(joined.values())


def _chosen(names: Sequence[str], config: RankConfig, table: bool) -> tuple[str, ...]:
    for name in config.rank.strategies:
        if name not in names:
            raise ValueError(
                f"rank.strategies names {name!r}, which has no response; {nearest(name, names)}there are those of "
                f"{', '.join(names)}."
            )
    chosen = tuple(dict.fromkeys(config.rank.strategies or names))
    if len(chosen) < 2:
        hint = "" if table else (
            f" Its rows have no '{config.rank.responses_field}' (rank.responses_field), so every file of data.train is "
            "taken for one strategy."
        )  # fmt: skip
        raise ValueError(f"{config.data.train[0]}: {len(chosen)} strategy; ranking takes at least 2.{hint}")
    return chosen


def _question(row: dict[str, Any], config: RankConfig, where: str) -> str:
    name = config.data.prompt_field
    text = string(field(row, name, "Set data.prompt_field to one of them.", where), name, where)
    if not text.strip():
        raise ValueError(f"{where}: '{name}' is empty. Fill it, or remove the row.")
    return text


def _result(row: dict[str, Any], config: RankConfig, where: str) -> str | None:
    name = config.verifier.answer_field
    if not name:
        return None
    value = field(row, name, "Set verifier.answer_field to one of them, or to nothing.", where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: '{name}' is {show(value)}; a string or a number is wanted.")
    return str(value)


def _reward(row: _Row, name: str, where: str) -> float:
    value = row.rewards.get(name) if isinstance(row.rewards, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: the reward of '{name}' is {show(value)}; a number is wanted for each strategy.")
    return float(value)


def _some(names: Any) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:MORE]) + (f" and {len(shown) - MORE} more" if len(shown) > MORE else "")
