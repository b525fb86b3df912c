"""The prompts that are asked, with the references of those that have one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bilevel_jax.lm.data.encode import DEFAULT_TEMPLATE
from bilevel_jax.lm.data.examples import (
    Example,
    describe_unread_keys,
    example_kind,
    find_duplicates,
    format_count,
    load_prompts,
    summarize_examples,
)
from bilevel_jax.lm.data.turns import Turn
from bilevel_jax.lm.inference.generate import Prompt
from bilevel_jax.lm.inference.prompts import make_prompts
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.evaluation.models import Candidate, EvaluatingConfig
from bilevel_jax.runs.tasks.splits import check_fields, make_data_options
from bilevel_jax.scores.random import hash_to_int


class Question(NamedTuple):
    """A prompt, and what a right answer is where its row says so."""

    example: Example
    """Ends with an answer: the reference, or a stand-in that nothing reads."""
    reference: str | None
    """The row's own response; of a preference pair, the chosen one."""

    @property
    def id(self) -> str:
        """Of its row."""
        return self.example.id

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """What is asked."""
        return tuple({"role": turn.role, "content": turn.content} for turn in self.example.turns[:-1])

    @property
    def text(self) -> str:
        """What is asked as one text; of a dialogue with the speakers."""
        messages = self.messages
        if len(messages) == 1:
            return messages[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


class Questions(NamedTuple):
    """What is asked."""

    items: list[Question]
    notes: list[str]
    """What reading found."""


def load_questions(config: EvaluatingConfig, files: Sequence[str]) -> Questions:
    """The prompts of some files, each once, as many as evaluate.questions; drawn ones in the order of the files.

    Raises ValueError, with file and line, for a row that is no prompt.
    """
    dropped: list[str] = []
    keys: set[str] = set()
    data = replace(config.data, label_field="", source_field=DataSection.source_field)  # which nothing here reads
    examples = load_prompts(files, make_data_options(data), dropped.append, keys)
    check_fields(data, keys, keys)
    if texts := [example for example in examples if example_kind(example) == "text"]:
        raise ValueError(
            f"{texts[0].where}: a row of plain text has no prompt to answer. Give rows with a prompt, or name its key "
            "in data.prompt_field."
        )
    notes = [f"prompts: {summarize_examples(examples)}", *describe_unread_keys(examples)]
    if dropped:
        notes.append(f"{format_count('row', len(dropped), ('was', 'were'))} left out (data.empty = drop)")
    if copies := {example.id for group in find_duplicates(examples) for example in group[1:]}:
        examples = [example for example in examples if example.id not in copies]
        stand = format_count("copy", len(copies)).replace("copys", "copies")
        notes.append(f"{stand} of another row {'is' if len(copies) == 1 else 'are'} asked once")
    if config.evaluate.questions and config.evaluate.questions < len(examples):
        ordered = sorted(examples, key=lambda example: (hash_to_int(example.id, config.data.seed), example.id))
        chosen = {example.id for example in ordered[: config.evaluate.questions]}
        notes.append(f"{len(chosen):,} of {len(examples):,} prompts were drawn (evaluate.questions)")
        examples = [example for example in examples if example.id in chosen]
    questions = [_make_question(example) for example in examples]
    if without := sum(question.reference is None for question in questions):
        notes.append(f"{without:,} of {format_count('prompt', len(questions), ('has', 'have'))} no reference")
    return Questions(questions, notes)


def make_question_prompts(
    config: EvaluatingConfig, candidate: Candidate, questions: Sequence[Question]
) -> list[Prompt]:
    """The questions as a model reads them: by its own template."""
    if candidate.local is None:
        return [Prompt(question.id, (), question.messages) for question in questions]
    return make_prompts(
        [question.example for question in questions],
        candidate.local.tokenizer,
        template=config.data.template or DEFAULT_TEMPLATE,
        vocab_size=candidate.local.architecture.vocab_size,
    )


def leave_out_long(
    config: EvaluatingConfig, candidates: Sequence[Candidate], questions: Sequence[Question]
) -> tuple[list[Question], list[str]]:
    """The questions that fit the context of every model with the longest answer; notes on those that do not.

    Raises ValueError for a question that does not fit, unless data.truncation is drop, and where none is left.
    """
    too_long: dict[str, str] = {}
    for candidate in candidates:
        if candidate.local is None:
            continue
        context, new = candidate.local.architecture.max_length, config.generate.max_new_tokens
        room = context - new
        for question, prompt in zip(questions, make_question_prompts(config, candidate, questions), strict=True):
            if len(prompt.tokens) > room:
                too_long.setdefault(
                    question.id,
                    f"{question.example.where}: the prompt has {len(prompt.tokens):,} tokens for {candidate.name} and "
                    f"its answer up to generate.max_new_tokens = {new:,}; the model's context holds {context:,}",
                )
    if not too_long:
        return list(questions), []
    kept = [question for question in questions if question.id not in too_long]
    first = next(iter(too_long.values()))
    if config.data.truncation != "drop" or not kept:
        more = f" ({len(too_long) - 1:,} more are too long)" if len(too_long) > 1 else ""
        remedy = "Lower generate.max_new_tokens" + (
            ", or set data.truncation to drop: such prompts are left out for both models" if kept else ""
        )
        raise ValueError(f"{first}{more}. {remedy}.")
    return kept, [f"{format_count('prompt', len(too_long), ('is', 'are'))} too long and left out, the first at {first}"]


def _make_question(example: Example) -> Question:
    if example.turns[-1].role == "assistant":
        return Question(example, example.turns[-1].content)
    return Question(example._replace(turns=(*example.turns, Turn("assistant", "yes"))), None)
