"""The rows of a round of `refine`: which questions are answered anew, the responses, the task that they make."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from bilevel_jax.lm import tokens
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.generate import Generator, Prompt
from bilevel_jax.lm.prompts import prompts
from bilevel_jax.lm.tokens import Corpus
from bilevel_jax.lm.turns import Turn
from bilevel_jax.runs import files
from bilevel_jax.runs.checkers import Checker
from bilevel_jax.runs.config import RefineConfig
from bilevel_jax.runs.task import Task


class Answers(NamedTuple):
    """The responses of a round, question by question: response j of question q is number q * draws + j."""

    questions: Int[np.ndarray, "questions"]
    """Rows of the first task, ascending."""
    prompts: list[Prompt]
    texts: list[str]
    tokens: list[Int[np.ndarray, "length"]]
    log_probs: list[Float[np.ndarray, "length"]]
    """Of each token under the sampler, nats."""
    ended: list[bool]
    values: Float[np.ndarray, "responses"]
    """What the checker says, 0 to 1; nan without one."""
    fingerprint: str
    """Of the model that wrote them."""
    draws: int

    @property
    def owner(self) -> Int[np.ndarray, "responses"]:
        """The question of each response, a row of the first task."""
        return np.repeat(self.questions, self.draws)


class Made(NamedTuple):
    """The task of a round, and where its rows come from."""

    task: Task
    question: Int[np.ndarray, "rows"]
    """The row of the first task whose question each row answers."""
    response: Int[np.ndarray, "rows"]
    """The number of the response in `Answers`; -1 for an offline row."""
    base: Float[np.ndarray, "rows"]
    """How much each row counts before any weight; mean 1."""


def choose(
    config: RefineConfig, trainable: Int[np.ndarray, "kept"], weights: Float[np.ndarray, "questions"]
) -> Int[np.ndarray, "chosen"]:
    """The questions of a round, ascending, their number the same in every round.

    fixed: drawn once from data.seed. dynamic: those of the least weight now, ties by the same draw. all, none.
    """
    if config.refine.questions in ("all", "none"):
        return trainable if config.refine.questions == "all" else trainable[:0]
    count = max(1, round(config.refine.share * len(trainable)))
    drawn = np.random.default_rng((config.data.seed, 7)).permutation(trainable)
    if config.refine.questions == "dynamic":
        drawn = drawn[np.argsort(weights[drawn], kind="stable")]
    return np.sort(drawn[:count])


def answers(
    config: RefineConfig,
    task: Task,
    chosen: Int[np.ndarray, "chosen"],
    number: int,
    path: Path,
    generator: Generator,
    fingerprint: str,
    checker: Checker | None,
) -> Answers:
    """The responses of round `number`: written now and kept at `path`, or read from there.

    Raises ValueError where the file holds responses of another model, or to other questions.
    """
    asked = [task.examples[row] for row in chosen]
    found = prompts(asked, task.tokenizer, template=config.data.template or tokens.TEMPLATE)
    draws = config.generate.num_generations
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = range(number * draws, (number + 1) * draws)
        written = [one for some in generator(found, numbers) for one in some] if found else []
        values = [
            checker(example, response.text) if checker else np.nan
            for example, response in zip(np.repeat(np.arange(len(asked)), draws), written, strict=True)
            for example in [asked[example]]
        ]
        table = {
            "id": [f"{example.id}/{number}/{draw}" for example in asked for draw in range(draws)],
            "question": [example.id for example in asked for _ in range(draws)],
            "round": np.full(len(written), number),
            "draw": np.tile(np.arange(draws), len(asked)),
            "model": [fingerprint] * len(written),
            "text": [one.text for one in written],
            "ended": [one.ended for one in written],
            "log_prob": [float(sum(one.log_probs)) for one in written],
            "tokens": pa.array([list(one.tokens) for one in written], pa.list_(pa.int32())),
            "log_probs": pa.array([list(one.log_probs) for one in written], pa.list_(pa.float32())),
            "checker": np.array(values, float),
        }
        files.write_table(path, pa.table(table))
    stored = pq.read_table(path)
    others = sorted({*stored["model"].to_pylist()} - {fingerprint})
    if others:
        raise ValueError(
            f"{path} holds responses of the model {others[0]}, and this round's is {fingerprint}: their "
            "log-probabilities are not its own. Remove the file, or start anew in another folder."
        )
    if stored["question"].to_pylist() != [example.id for example in asked for _ in range(draws)]:
        raise ValueError(f"{path} holds responses to other questions. Start anew in another folder.")
    return Answers(
        questions=chosen,
        prompts=found,
        texts=stored["text"].to_pylist(),
        tokens=[np.array(one, np.int32) for one in stored["tokens"].to_pylist()],
        log_probs=[np.array(one, np.float32) for one in stored["log_probs"].to_pylist()],
        ended=stored["ended"].to_pylist(),
        values=stored["checker"].to_numpy(),
        fingerprint=fingerprint,
        draws=draws,
    )


def task_of(config: RefineConfig, first: Task, found: Answers, number: int) -> Made:
    """The task whose rows are the offline ones, without those of the chosen questions or beside them, and responses.

    A question counts once: each of its G responses has the base 1/G, or, where wrong ones are filtered out, a share of
    what the checker says; a question without a right response counts nothing. All rounds have tasks of one shape.
    """
    kept = first.trainable()
    if not config.refine.keep_offline:
        kept = np.setdiff1d(kept, found.questions)
    count = len(found.texts)
    credit = np.ones(count) if config.refine.verifier_use == "report" else np.nan_to_num(found.values)
    credit = credit.reshape(-1, found.draws)
    total = credit.sum(1, keepdims=True)
    shares = np.divide(credit, total, out=np.zeros_like(credit), where=total > 0).ravel()
    base = np.concatenate([np.ones(len(kept)), shares])
    base = base * len(base) / base.sum()
    fit = np.arange(first.rows, first.corpus.rows)
    corpus = _corpus(first.corpus, kept, found, fit)
    table = np.concatenate([base, np.ones(len(fit))])
    corpus = corpus.with_sampler(_sampler(first.corpus, kept, found, fit), table)
    examples = [first.examples[row]._replace(row=at) for at, row in enumerate(kept)]
    for at in range(count):
        asked = first.examples[found.owner[at]]
        examples.append(_example(asked, found.texts[at], number, at % found.draws, len(kept) + at))
    groups = _groups(config, len(kept), count, corpus.rows, found.draws, number)
    question = np.concatenate([kept, found.owner])
    response = np.concatenate([np.full(len(kept), -1), np.arange(count)])
    task = first._replace(
        examples=examples, corpus=corpus, groups=groups if config.refine.ratio == "sequence" else None
    )
    return Made(task, question, response, base)


def question_weights(made: Made, weights: Float[np.ndarray, "rows"], count: int) -> Float[np.ndarray, "questions"]:
    """The weight of each question, of `count`: the mean over its rows by what they count; 1 for one without rows."""
    mass = np.bincount(made.question, made.base, count)
    total = np.bincount(made.question, made.base * weights, count)
    return np.divide(total, mass, out=np.ones(count), where=mass > 0)


# ---- parts


def _corpus(first: Corpus, kept: Int[np.ndarray, "kept"], found: Answers, fit: Int[np.ndarray, "fit"]) -> Corpus:
    rows = [first.row(int(row)) for row in kept]
    for at, response in enumerate(found.tokens):
        before = np.array(found.prompts[at // found.draws].tokens, np.int32)
        supervised = np.arange(len(before) + len(response)) >= len(before)
        rows.append(tokens.Tokenized(np.concatenate([before, response]), supervised))
    return tokens.corpus_of(rows + [first.row(int(row)) for row in fit])


def _sampler(
    first: Corpus, kept: Int[np.ndarray, "kept"], found: Answers, fit: Int[np.ndarray, "fit"]
) -> Float[np.ndarray, "tokens"]:
    """The log-probability of each token under the sampler; nan for prompts and offline rows."""
    parts = [np.full(first.lengths[kept].sum(), np.nan)]
    for at, log_probs in enumerate(found.log_probs):
        parts += [np.full(len(found.prompts[at // found.draws].tokens), np.nan), log_probs]
    return np.concatenate([*parts, np.full(first.lengths[fit].sum(), np.nan)])


def _example(asked: Example, text: str, number: int, draw: int, row: int) -> Example:
    last = max(at for at, turn in enumerate(asked.turns) if turn.role == "assistant")
    return asked._replace(
        id=f"{asked.id}/{number}/{draw}",
        row=row,
        turns=(*asked.turns[:last], Turn("assistant", text)),
        source="responses",
        label=None,
    )


def _groups(
    config: RefineConfig, kept: int, count: int, rows: int, draws: int, number: int
) -> Int[np.ndarray, "groups draws"]:
    """Offline rows side by side at random, the last group filled up with `rows`; then the responses by question."""
    offline = np.random.default_rng((config.data.seed, 11, number)).permutation(kept)
    filled = np.concatenate([offline, np.full(-kept % draws, rows)])
    return np.concatenate([filled, kept + np.arange(count)]).reshape(-1, draws).astype(np.int64)


def judged(checks: Float[np.ndarray, "responses"]) -> float | None:
    """The mean of what a checker said; None without one."""
    return float(checks.mean()) if len(checks) and np.isfinite(checks).all() else None
