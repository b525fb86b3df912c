"""Responses of several generation strategies to the same questions."""

import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_jax.lm.checkpoint.files import read_json_object
from bilevel_jax.lm.data import files
from bilevel_jax.lm.data.examples import Example, hash_content, read_name
from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.lm.data.turns import Turn, check_row, read_field, require_string
from bilevel_jax.runs.config.load import RankConfig
from bilevel_jax.runs.config.yaml_reader import suggest_nearest
from bilevel_jax.scores.random import hash_to_int

MAX_NAMES_SHOWN = 3
"""Names that an error shows of many."""


class Question(NamedTuple):
    """A question with the response of every strategy."""

    id: str
    """Of its text: what it is drawn by."""
    text: str
    responses: tuple[str, ...]
    reference_answer: str | None
    """The right result, where verifier.answer_field names one."""
    rewards: tuple[float, ...]
    """One for each strategy, or none at all."""
    file: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`; of several files, in the first."""
        return f"{self.file}:{self.line}"

    def with_response(self, response: str) -> Example:
        """The question as a row with this response."""
        turns = Turn("user", self.text), Turn("assistant", response)
        return Example(f"{hash_content(turns)}#0", 0, turns, "", None, self.file, self.line, format="prompt")


class StrategyResponses(NamedTuple):
    """All questions of all files, in order."""

    strategies: tuple[str, ...]
    questions: list[Question]
    notes: list[str]


def load_strategy_responses(config: RankConfig) -> StrategyResponses:
    """Read data.train: one table whose rows map strategies to responses, or a file of responses for each strategy.

    A table has `rank.responses_field`; in the files of strategies, which are called after them, rows are joined by
    `rank.id_field`, or by the question itself. Every strategy answers every question. Raises ValueError, with file and
    line, for a response that is missing or empty (with data.empty = drop the question is left out), a question that
    stands twice, a strategy that is not there, and fewer than two of them.
    """
    first_row = next(files.read_rows(config.data.train[0]), (0, None))[1]
    is_table = isinstance(first_row, dict) and config.rank.responses_field in first_row
    names, rows = _read_strategy_table(config) if is_table else _join_strategy_files(config)
    strategies = _choose_strategies(names, config, is_table)
    dropped: list[str] = []
    places_by_question: dict[str, str] = {}
    questions = []
    for row in rows:
        where = f"{row.file}:{row.line}"
        if (other := places_by_question.setdefault(row.text, where)) != where:
            raise ValueError(f"{where}: the question stands at {other}, too. Remove one of the two rows.")
        responses = []
        for name in strategies:
            if name not in row.responses:
                raise ValueError(
                    f"{where}: no response of '{name}'; there are those of {_format_names(row.responses)}. Every "
                    "strategy must answer every question: add it, remove the row, or name in rank.strategies those "
                    "that do."
                )
            text, place = row.responses[name]
            text = require_string(text, name, place)
            if not text.strip() and config.data.empty == "error":
                raise ValueError(f"{place}: the response of '{name}' is empty. Fill it, or set data.empty to drop.")
            responses.append(text)
        if not all(text.strip() for text in responses):
            dropped.append(where)
            continue
        rewards = tuple(_read_reward(row, name, where) for name in strategies) if config.rank.reward_field else ()
        key = hash_content([Turn("user", row.text)])
        questions.append(Question(key, row.text, tuple(responses), row.reference_answer, rewards, row.file, row.line))
    notes = [f"{len(questions):,} questions, each answered by {len(strategies)} strategies: {', '.join(strategies)}"]
    if dropped:
        notes.append(f"{len(dropped):,} questions with an empty response were left out, the first: {dropped[0]}")
    return StrategyResponses(strategies, questions, notes)


def load_written_questions(config: RankConfig) -> tuple[list[Question], list[str]]:
    """The questions of data.train, to which candidates.strategies write responses, and notes on rows left out.

    A question that stands twice counts once. `responses` has the response of the row, where a strategy reads it. Raises
    ValueError, with file and line, for a question without a response that one of them reads (with data.empty = drop one
    with an empty response is left out).
    """
    needs_gold = bool({"gold", "rephrase", "own_style"} & set(config.candidates.strategies))
    seen: set[str] = set()
    dropped: list[str] = []
    questions, num_repeated = [], 0
    for path in config.data.train:
        for line, row in files.read_rows(path):
            where = f"{path}:{line}"
            check_row(row, where)
            text = _read_question(row, config, where)
            if text in seen:
                num_repeated += 1
                continue
            gold: tuple[str, ...] = ()
            if needs_gold:
                name, remedy = config.data.response_field, "Set data.response_field to one of them."
                gold = (require_string(read_field(row, name, remedy, where), name, where),)
                if not gold[0].strip():
                    if config.data.empty == "drop":
                        dropped.append(where)
                        continue
                    raise ValueError(
                        f"{where}: '{name}' is empty, and gold, rephrase and own_style of candidates.strategies read "
                        "it. Fill it, or set data.empty to drop."
                    )
            seen.add(text)
            key, reference = hash_content([Turn("user", text)]), _read_reference_answer(row, config, where)
            questions.append(Question(key, text, gold, reference, (), path, line))
    notes = [f"{num_repeated:,} rows ask what an earlier row asks, and were left out"] if num_repeated else []
    if dropped:
        notes.append(f"{len(dropped):,} questions with an empty response were left out, the first: {dropped[0]}")
    return questions, notes


def draw_blocks(questions: Sequence[Question], block_size: int, max_blocks: int, seed: int) -> list[list[Question]]:
    """Disjoint blocks of questions, drawn by their ids: neither their order nor other questions move one.

    As many whole blocks as there are questions for, `blocks` at most. Raises ValueError for less than one.
    """
    count = min(max_blocks, len(questions) // block_size)
    if count < 1:
        raise ValueError(
            f"{len(questions)} questions can be asked, and a block has rank.block_size = {block_size} of them. Give "
            "more questions, lower rank.block_size, or raise rank.max_question_tokens."
        )
    ordered = order_questions(questions, seed)
    return [ordered[start : start + block_size] for start in range(0, count * block_size, block_size)]


def order_questions(questions: Sequence[Question], seed: int) -> list[Question]:
    """The order in which questions are drawn."""
    return sorted(questions, key=lambda question: (hash_to_int(question.id, seed), question.id))


def read_own_answers(path: str, config: RankConfig) -> dict[str, list[str]]:
    """question -> the model's own answers, in the order of the file: predictions that were made elsewhere."""
    answers: dict[str, list[str]] = {}
    for line, row in files.read_rows(path):
        where = f"{path}:{line}"
        check_row(row, where)
        question, answer = (
            require_string(read_field(row, name, f"Set data.{key} to one of them.", where), name, where)
            for key, name in (
                ("prompt_field", config.data.prompt_field), ("response_field", config.data.response_field),
            )
        )  # fmt: skip
        if not answer.strip():
            raise ValueError(f"{where}: the answer is empty. Remove the row, or fill it.")
        answers.setdefault(question, []).append(answer)
    return answers


def parse_accuracies(specs: Sequence[str], strategies: Sequence[str]) -> dict[str, float]:
    """strategy -> the accuracy that a model reached with it, from `name=number` pairs or a JSON file of them.

    Raises ValueError for a strategy that is not there, one without a number, and what is no number.
    """
    if len(specs) == 1 and specs[0].endswith(".json"):
        pairs: list[tuple[str, Any]] = list(read_json_object(Path(specs[0])).items())
    else:
        pairs = [(name, value) for name, _, value in (spec.rpartition("=") for spec in specs)]
    parsed: dict[str, float] = {}
    for name, value in pairs:
        if name not in strategies:
            raise ValueError(
                f"rank.accuracies names {name!r}, which is no strategy; {suggest_nearest(name, strategies)}they are "
                f"{_format_names(strategies)}. Write name=number, or a .json file of {{name: number}}."
            )
        try:
            parsed[name] = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            parsed[name] = math.nan
        if not math.isfinite(parsed[name]):
            raise ValueError(f"rank.accuracies has {describe_value(value)} for {name!r}; a finite number is wanted.")
    if specs and (missing := [name for name in strategies if name not in parsed]):
        raise ValueError(f"rank.accuracies has no number for {_format_names(missing)}. Give one for each strategy.")
    return parsed


# ---- the two forms


class _QuestionRow(NamedTuple):
    text: str
    responses: dict[str, tuple[Any, str]]
    """strategy -> (its response, where it stands)."""
    rewards: Any
    reference_answer: str | None
    file: str
    line: int


def _read_strategy_table(config: RankConfig) -> tuple[list[str], list[_QuestionRow]]:
    names: dict[str, None] = {}
    rows = []
    for path in config.data.train:
        for line, row in files.read_rows(path):
            where = f"{path}:{line}"
            check_row(row, where)
            responses_field = config.rank.responses_field
            responses = read_field(row, responses_field, "Set rank.responses_field to one of them.", where)
            if not isinstance(responses, dict):
                raise ValueError(
                    f"{where}: '{responses_field}' is {describe_value(responses)}; a map from strategies to responses "
                    "is wanted."
                )
            # of a parquet table, a map has null for strategies that other rows have
            answers = {str(name): (text, where) for name, text in responses.items() if text is not None}
            names |= dict.fromkeys(answers)
            rewards = row.get(config.rank.reward_field) if config.rank.reward_field else None
            rows.append(
                _QuestionRow(
                    _read_question(row, config, where),
                    answers,
                    rewards,
                    _read_reference_answer(row, config, where),
                    path,
                    line,
                )
            )
    return list(names), rows


def _join_strategy_files(config: RankConfig) -> tuple[list[str], list[_QuestionRow]]:
    names = [files.source_name(path) for path in config.data.train]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data.train has files of one name, {_format_names(names)}; a strategy is called after its file."
        )
    joined: dict[str, _QuestionRow] = {}
    for name, path in zip(names, config.data.train, strict=True):
        for line, row in files.read_rows(path):
            where = f"{path}:{line}"
            check_row(row, where)
            text = _read_question(row, config, where)
            remedy = "Set data.response_field to one of them; a table of strategies has rank.responses_field."
            response = read_field(row, config.data.response_field, remedy, where)
            key = text
            if config.rank.id_field:
                read_field(row, config.rank.id_field, "Set rank.id_field to one of them.", where)
                if (named := read_name(row, config.rank.id_field, where, is_id=True)) is None:
                    raise ValueError(f"{where}: '{config.rank.id_field}' is empty. Fill it, or remove the row.")
                key = named  # 1 in one file and 1.0 in another are one question
            joined_row = joined.setdefault(
                key, _QuestionRow(text, {}, {}, _read_reference_answer(row, config, where), path, line)
            )
            if name in joined_row.responses:
                raise ValueError(
                    f"{where}: the question stands at {joined_row.responses[name][1]}, too. Remove one row."
                )
            if joined_row.text != text:
                raise ValueError(
                    f"{where}: {config.rank.id_field} {key} asks {describe_value(text)}, and at "
                    f"{joined_row.file}:{joined_row.line} {describe_value(joined_row.text)}. One id must be one "
                    "question."
                )
            joined_row.responses[name] = response, where
            if config.rank.reward_field:
                joined_row.rewards[name] = row.get(config.rank.reward_field)
    return names, list(joined.values())


def _choose_strategies(names: Sequence[str], config: RankConfig, is_table: bool) -> tuple[str, ...]:
    for name in config.rank.strategies:
        if name not in names:
            raise ValueError(
                f"rank.strategies names {name!r}, which has no response; {suggest_nearest(name, names)}there are "
                f"those of {', '.join(names)}."
            )
    strategies = tuple(dict.fromkeys(config.rank.strategies or names))
    if len(strategies) < 2:
        hint = "" if is_table else (
            f" Its rows have no '{config.rank.responses_field}' (rank.responses_field), so every file of data.train is "
            "taken for one strategy."
        )  # fmt: skip
        raise ValueError(f"{config.data.train[0]}: {len(strategies)} strategy; ranking takes at least 2.{hint}")
    return strategies


def _read_question(row: dict[str, Any], config: RankConfig, where: str) -> str:
    name = config.data.prompt_field
    text = require_string(read_field(row, name, "Set data.prompt_field to one of them.", where), name, where)
    if not text.strip():
        raise ValueError(f"{where}: '{name}' is empty. Fill it, or remove the row.")
    return text


def _read_reference_answer(row: dict[str, Any], config: RankConfig, where: str) -> str | None:
    name = config.verifier.answer_field
    if not name:
        return None
    value = read_field(row, name, "Set verifier.answer_field to one of them, or to nothing.", where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: '{name}' is {describe_value(value)}; a string or a number is wanted.")
    return str(value)


def _read_reward(row: _QuestionRow, name: str, where: str) -> float:
    value = row.rewards.get(name) if isinstance(row.rewards, dict) else None
    if (number := finite_number(value)) is None:
        raise ValueError(
            f"{where}: the reward of '{name}' is {describe_value(value)}; a finite number is wanted for each strategy."
        )
    return number


def finite_number(value: Any) -> float | None:
    """The value as a float; None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more digits than a float holds
        return None
    return number if math.isfinite(number) else None


def _format_names(names: Any) -> str:
    texts = [str(name) for name in names]
    return ", ".join(texts[:MAX_NAMES_SHOWN]) + (
        f" and {len(texts) - MAX_NAMES_SHOWN} more" if len(texts) > MAX_NAMES_SHOWN else ""
    )
