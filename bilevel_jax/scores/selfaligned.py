"""Self-aligned perplexity (SPPL) under the model's own answers."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from bilevel_jax.scores.incontext import split_template
from bilevel_jax.scores.perplexity import perplexity_score
from bilevel_jax.scores.requests import ScorePlan, TokenizedExamples

SPPL_TEMPLATE = (
    "{question}\n\nWhen you answer, follow the style of inference of these examples.\n\n{examples}"
    "Now answer the question, in that style of inference."
)
EXAMPLE_TEMPLATE = "Inference example:\n{answer}\n\n"
FINAL_ANSWER_TEXT = "\n\nFinal Answer: "
"""Stands between an answer of the model and the right result, where that is known."""


def sppl_score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
    """s_i = -exp(-(1/|y_i|) Σ_t log p(y_it | P_i, y_i<t)), where the prompt P_i shows answers of the model's own.

    SPPL is -s_i, and the least wins. The questions of the candidates come from `prompt_writer`, and their responses
    have no end token (`trim_responses`); all strategies of a question have one prompt, which the scorer reads once.
    Source: arXiv 2502.11779. Wrong where the model does not take on a style from examples, as models that were not
        tuned to follow instructions.

    Args:
        candidates: examples to score.
        holdout: not read.

    Returns:
        A plan with one score for each candidate; nan for one without any target.
    """
    return perplexity_score(candidates, holdout)


def prompt_writer(
    template: str = SPPL_TEMPLATE, example_template: str = EXAMPLE_TEMPLATE
) -> Callable[[str, Sequence[str]], str]:
    """(question, the model's answers to other questions) -> what the model is asked; only answers are shown.

    The order is the published one: the question, to follow a style, the examples, to solve it. The words are ours.
    A template may have it the other way round, as suits models that were never taught to follow instructions.
    """
    question_last = 0 <= template.find("{examples}") < template.find("{question}")
    placeholders = ("{examples}", "{question}") if question_last else ("{question}", "{examples}")
    start, between, end = split_template(template, placeholders, SPPL_TEMPLATE)
    before, after = split_template(example_template, ("{answer}",), EXAMPLE_TEMPLATE)

    def write(question: str, answers: Sequence[str]) -> str:
        examples_text = "".join(before + answer + after for answer in answers)
        return (
            start + (examples_text + between + question if question_last else question + between + examples_text) + end
        )

    return write


def choose_shown_answers(is_kept: Bool[np.ndarray, "questions"], k: int) -> Int[np.ndarray, "questions k"]:
    """The questions whose answers are shown before each: of the M kept answers, number (p + j) mod (M - 1), j = 1 .. k.

    p is how many kept answers stand before the question's own: its number, where all are kept. As published the
    modulus is M - 1, not M, so the last answer is shown to nobody; and no question is shown its own. (Counting
    questions rather than kept answers would do that, once a checker has removed some.) Raises ValueError for fewer
    than k + 2 kept answers, as one question would then see an answer twice, or its own.
    """
    kept_indices = np.flatnonzero(is_kept)
    if k < 1 or len(kept_indices) < k + 2:
        raise ValueError(
            f"{len(kept_indices)} of {len(is_kept)} answers of the model can be shown, {k} to a question; that takes "
            f"at least 1 to a question and {max(k, 1) + 2} in all. Take larger blocks, or a verifier that accepts more "
            "answers."
        )
    kept_before = np.cumsum(is_kept) - is_kept
    return kept_indices[(kept_before[:, None] + np.arange(1, k + 1)[None]) % (len(kept_indices) - 1)]


def append_result(answer: str, result: str | None, final_answer: str = FINAL_ANSWER_TEXT) -> str:
    """The answer with the right result after it, where there is one; an empty `final_answer` leaves it out."""
    return answer if result is None or not final_answer else f"{answer}{final_answer}{result}"
