"""The model that is to be trained, before it is: how it reads rows, and what it answers itself."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from bilevel_jax.core.types import Params
from bilevel_jax.lm import models as lm
from bilevel_jax.lm import tokens
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.encode import Tokenizer
from bilevel_jax.lm.generate import Prompt
from bilevel_jax.lm.prompts import ends, prompts
from bilevel_jax.runs import candidates
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.candidates import Question
from bilevel_jax.runs.checkers import checker
from bilevel_jax.runs.config import RankConfig
from bilevel_jax.runs.generation import generators
from bilevel_jax.runs.session import Session
from bilevel_jax.scores.requests import Rows, rows_of, shortened

SPARE = 4
"""Further answers that are drawn to a question whose answer cannot be used, at most."""


class Target(NamedTuple):
    """The model that will be trained, before it is."""

    decoder: lm.Decoder
    tokenizer: Tokenizer
    params: Params
    mesh: Mesh


class Answers(NamedTuple):
    """What the model says itself."""

    texts: list[list[list[str]]]
    """Of each block, each question, each draw."""
    kept: Bool[np.ndarray, "blocks block"]
    """The checker let the first one pass, or there is none."""
    notes: list[str]


def load(config: RankConfig) -> Target:
    """The model and its tokenizer, on the mesh."""
    tokenizer = tokens.load_tokenizer(config.model.name_or_path)
    architecture, params = lm.load(config.model.name_or_path, dtype=jnp.dtype(config.model.param_dtype))
    mesh = placing.make_mesh(config.mesh.data)
    return Target(lm.decoder(architecture, remat="none"), tokenizer, placing.everywhere(mesh, params), mesh)


def answers(config: RankConfig, target: Target, sample: Sequence[Sequence[Question]], work: Session) -> Answers:
    """The model's own answers: read from rank.own_answers, or generated; then judged, where there is a checker."""
    questions = [one for block in sample for one in block]
    unusable = _special(target.tokenizer)
    notes = []
    if config.rank.own_answers:
        given = candidates.own_answers(config.rank.own_answers, config)
        if missing := [one for one in questions if one.text not in given]:
            raise ValueError(
                f"{config.rank.own_answers} has no answer to {len(missing)} of {len(questions)} questions that were drawn, "
                f"the first at {missing[0].where}. Add them, or leave rank.own_answers empty: they are generated then."
            )
        texts = [given[one.text][: config.generate.num_generations] for one in questions]
    else:
        texts, again = _generated(config, target, questions, unusable, work)
        if again:
            notes.append(
                f"{again:,} answers of the model were empty or held a special token; others were drawn instead"
            )
    for one, some in zip(questions, texts, strict=True):
        if any(not text.strip() or unusable(text) for text in some) or not some:
            raise ValueError(
                f"{one.where}: the model gives no answer to this question that can be shown (empty, or with a special "
                "token). Raise generate.temperature, or give answers by rank.own_answers."
            )
    kept = np.ones(len(questions), bool)
    if config.verifier.name:
        judge = checker(config.verifier, [one.answered(one.responses[0]) for one in questions])
        pairs = zip(questions, texts, strict=True)
        kept = np.array([judge(one.answered(some[0]), some[0]) >= 0.5 for one, some in pairs])
        notes.append(f"{int(kept.sum()):,} of {len(kept):,} answers of the model are right; the others are not shown")
    size = len(sample[0])
    return Answers([texts[at : at + size] for at in range(0, len(texts), size)], kept.reshape(-1, size), notes)


def asked(config: RankConfig, target: Target, questions: Sequence[Question]) -> list[Prompt]:
    """The questions as prompts, each by the id of its text: what is drawn does not depend on the strategies."""
    same = [one.answered("yes") for one in questions]
    made = prompts(same, target.tokenizer, template=config.data.template or tokens.TEMPLATE)
    return [prompt._replace(id=one.id) for prompt, one in zip(made, questions, strict=True)]


def tokenized(config: RankConfig, target: Target, examples: list[Example]) -> tuple[Rows, int]:
    """Rows by the model's own chat template, their responses without end marks and cut at rank.max_response_tokens."""
    tokenizer = target.tokenizer
    corpus, _ = tokens.tokenize(
        examples, tokenizer, max_length=sys.maxsize, template=config.data.template or tokens.TEMPLATE
    )
    last = {*ends(tokenizer, target.decoder.config.eos), *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    corpus, cut = shortened(corpus, last, config.rank.max_response_tokens)
    return rows_of(examples, corpus), cut


# ---- parts


def _generated(
    config: RankConfig, target: Target, questions: Sequence[Question], unusable: Callable[[str], Any], work: Session
) -> tuple[list[list[str]], int]:
    """The first usable answers to each question, and how many drawn before them were not."""
    work.phase("answering")
    left = asked(config, target, questions)
    new, context = config.generate.max_new_tokens, target.decoder.config.max_length
    for prompt, one in zip(left, questions, strict=True):
        if config.generate.backend == "embedded" and len(prompt.tokens) + new > context:
            raise ValueError(
                f"{one.where}: the question has {len(prompt.tokens)} tokens and its answer up to generate.max_new_tokens = "
                f"{new}; the model's context holds {context}. Lower generate.max_new_tokens, or set rank.max_question_tokens to "
                f"{context - new} or less."
            )
    write = generators(config.generate, target.decoder, target.tokenizer, target.mesh, work)(target.params)
    count = config.generate.num_generations
    texts: dict[str, list[str]] = {}
    again = 0
    for draws in (range(count), range(count, count + SPARE)):
        for prompt, responses in zip(left, write(left, draws), strict=True):
            found = texts.setdefault(prompt.id, [])
            good = [one.text for one in responses if one.text.strip() and not unusable(one.text)]
            again += len(responses) - len(good) if draws.start == 0 else 0
            found += good[: count - len(found)]
        left = [prompt for prompt in left if len(texts[prompt.id]) < count]
        if not left or not config.generate.temperature:
            break
    return [texts[one.id] for one in questions], again


def _special(tokenizer: Tokenizer) -> Callable[[str], Any]:
    """text -> whether it holds a special token, which the tokenizer would read as one."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    names = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))).search if names else lambda text: None
