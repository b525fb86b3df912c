"""Rollouts of a `refine` round and the training task they make."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from bilevel_jax.lm.data import tokens
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.data.turns import Turn
from bilevel_jax.lm.inference.generate import GenerateFn, Prompt, Response
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.rules import trains_generator
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.scoring.generation import make_task_prompts
from bilevel_jax.runs.scoring.verifiers import Verifier
from bilevel_jax.runs.tasks.text import TextTask


class Rollouts(NamedTuple):
    """The responses of a round, question by question: response j of question q is number q * draws + j."""

    questions: Int[np.ndarray, "questions"]
    """Rows of the first task, ascending."""
    prompts: list[Prompt]
    texts: list[str]
    tokens: list[Int[np.ndarray, "length"]]
    log_probs: list[Float[np.ndarray, "length"]]
    """Of each token under the sampler, nats."""
    ended: list[bool]
    verifier_scores: Float[np.ndarray, "responses"]
    """What the verifier says, 0 to 1; nan without one."""
    fingerprint: str
    """Of the model that wrote them."""
    num_generations: int

    @property
    def question_rows(self) -> Int[np.ndarray, "responses"]:
        """The question of each response, a row of the first task."""
        return np.repeat(self.questions, self.num_generations)


class RoundScores(NamedTuple):
    """The scores of some rows by the model that training starts from."""

    values: Float[np.ndarray, "examples"]
    """Larger is better; nan where there is none."""
    standard_errors: Float[np.ndarray, "examples"] | None
    """Over several sets of demonstrations; None for one set."""
    facts: dict[str, Any]
    """`work` and `seconds` of the scoring, and `notes` on it."""


class RoundTask(NamedTuple):
    """The task of a round, and where its rows come from."""

    task: TextTask
    question_rows: Int[np.ndarray, "examples"]
    """The row of the first task whose question each row answers."""
    response_numbers: Int[np.ndarray, "examples"]
    """The number of the response in `Rollouts`; -1 for an offline row."""
    multiplicity: Float[np.ndarray, "examples"]
    """How much each row counts before any weight; mean 1."""
    is_fitted: bool = False
    """Whether validation had a say before the round: in the model that answers and is trained, or in its questions."""
    scores: RoundScores | None = None
    """Of every row, where a candidate is weighted by scores."""

    @property
    def trained(self) -> Int[np.ndarray, "trained"]:
        """The rows that are trained on: not those that are too long, or that count nothing."""
        rows = self.task.trainable_indices()
        return rows[self.multiplicity[rows] > 0]


def choose_questions(
    config: RefineConfig,
    trainable: Int[np.ndarray, "kept"],
    weights: Float[np.ndarray, "questions"],
    round_number: int = 0,
) -> Int[np.ndarray, "chosen"]:
    """The questions of a round, ascending, their number the same in every round.

    fixed: drawn once from data.seed. redrawn: one part of the shuffled questions after the other, shuffled anew when
    fewer are left than a round asks. dynamic: those of the least weight now, ties by the draw of fixed. all, none.
    """
    count = count_questions(config, len(trainable))
    if config.refine.questions in ("all", "none"):
        return trainable[:count]
    if config.refine.questions == "redrawn":
        epoch, part = divmod(round_number, len(trainable) // count)
        return np.sort(_shuffle(config, trainable, epoch)[part * count : (part + 1) * count])
    shuffled = _shuffle(config, trainable)
    if config.refine.questions == "dynamic":
        shuffled = shuffled[np.argsort(weights[shuffled], kind="stable")]
    return np.sort(shuffled[:count])


def count_questions(config: RefineConfig, num_trainable: int) -> int:
    """The questions that each round asks."""
    whole = {"all": num_trainable, "none": 0}
    return whole.get(config.refine.questions, max(1, round(config.refine.share * num_trainable)))


def count_round_rows(config: RefineConfig, num_trainable: int) -> int:
    """The rows of each round's task: the offline ones that stay, and the responses."""
    asked = count_questions(config, num_trainable)
    left = 0 if config.refine.keep_offline else asked
    return num_trainable - left + asked * config.generate.num_generations


def _shuffle(config: RefineConfig, trainable: Int[np.ndarray, "kept"], epoch: int = 0) -> Int[np.ndarray, "kept"]:
    return np.random.default_rng((config.data.seed, 7, *((epoch,) if epoch else ()))).permutation(trainable)


def collect_rollouts(
    config: RefineConfig,
    task: TextTask,
    question_rows: Int[np.ndarray, "chosen"],
    round_number: int,
    path: Path,
    generator: GenerateFn,
    fingerprint: str,
    verifier: Verifier | None,
) -> Rollouts:
    """The responses of a round: generated now and stored at `path`, or read from there.

    Of several processes the first verifies and stores them, and all read what it stored.

    Raises ValueError where the file holds responses of another model, or to other questions.
    """
    question_examples = [task.examples[row] for row in question_rows]
    question_prompts = make_task_prompts(task, config.data, question_examples)
    draws = config.generate.num_generations
    if not distributed.is_there(path):
        numbers = range(round_number * draws, (round_number + 1) * draws)
        responses = generator(question_prompts, numbers) if question_prompts else []

        def store() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            table = _build_response_table(question_examples, responses, round_number, draws, fingerprint, verifier)
            run_dir.write_parquet(path, table)

        distributed.run_on_first_process(store)
    stored = run_dir.read_parquet(path)
    _check_stored_rollouts(path, stored, question_examples, draws, fingerprint)
    return Rollouts(
        questions=question_rows,
        prompts=question_prompts,
        texts=stored["text"].to_pylist(),
        tokens=[np.array(item, np.int32) for item in stored["tokens"].to_pylist()],
        log_probs=[np.array(item, np.float32) for item in stored["log_probs"].to_pylist()],
        ended=stored["ended"].to_pylist(),
        verifier_scores=stored["checker"].to_numpy(),
        fingerprint=fingerprint,
        num_generations=draws,
    )


def _build_response_table(
    question_examples: list[Example],
    responses_by_question: list[list[Response]],
    round_number: int,
    draws: int,
    fingerprint: str,
    verifier: Verifier | None,
) -> pa.Table:
    """One line for each response, question by question."""
    pairs = [
        (example, response)
        for example, responses in zip(question_examples, responses_by_question, strict=True)
        for response in responses
    ]
    responses = [response for _, response in pairs]
    scores = [verifier(example, response.text) if verifier else np.nan for example, response in pairs]
    return pa.table(
        {
            "id": [f"{example.id}/{round_number}/{draw}" for example in question_examples for draw in range(draws)],
            "question": [example.id for example in question_examples for _ in range(draws)],
            "round": np.full(len(responses), round_number),
            "draw": np.tile(np.arange(draws), len(question_examples)),
            "model": [fingerprint] * len(responses),
            "text": [item.text for item in responses],
            "ended": [item.ended for item in responses],
            "log_prob": [float(sum(item.log_probs)) for item in responses],
            "tokens": pa.array([list(item.tokens) for item in responses], pa.list_(pa.int32())),
            "log_probs": pa.array([list(item.log_probs) for item in responses], pa.list_(pa.float32())),
            "checker": np.array(scores, float),
        }
    )


def _check_stored_rollouts(
    path: Path, stored: pa.Table, question_examples: list[Example], draws: int, fingerprint: str
) -> None:
    others = sorted({*stored["model"].to_pylist()} - {fingerprint})
    if others:
        raise ValueError(
            f"{path} holds responses of the model {others[0]}, and this round's is {fingerprint}: their "
            "log-probabilities are not its own. Remove the file, or start anew in another folder."
        )
    if stored["question"].to_pylist() != [example.id for example in question_examples for _ in range(draws)]:
        raise ValueError(f"{path} holds responses to other questions. Start anew in another folder.")


def build_round_task(config: RefineConfig, offline_task: TextTask, rollouts: Rollouts, round_number: int) -> RoundTask:
    """The task whose rows are the offline ones, without those of the chosen questions or with them, and responses.

    A question counts once: each of its G responses has the multiplicity 1/G, or, where wrong ones are filtered out, a
    share of what the verifier says; a question without a right response counts nothing. All rounds have tasks of one
    shape.
    """
    offline_rows = offline_task.trainable_indices()
    if not config.refine.keep_offline:
        offline_rows = np.setdiff1d(offline_rows, rollouts.questions)
    count = len(rollouts.texts)
    credit = np.ones(count) if config.refine.verifier_use == "report" else np.nan_to_num(rollouts.verifier_scores)
    credit = credit.reshape(-1, rollouts.num_generations)
    total = credit.sum(1, keepdims=True)
    shares = np.divide(credit, total, out=np.zeros_like(credit), where=total > 0).ravel()
    multiplicity = np.concatenate([np.ones(len(offline_rows)), shares])
    multiplicity = multiplicity * len(multiplicity) / multiplicity.sum()
    validation_rows = np.arange(offline_task.num_examples, offline_task.corpus.num_examples)
    corpus = _build_corpus(offline_task.corpus, offline_rows, rollouts, validation_rows)
    multiplicities = np.concatenate([multiplicity, np.ones(len(validation_rows))])
    corpus = corpus.with_sampler_log_probs(
        _sampler_log_probs(offline_task.corpus, offline_rows, rollouts, validation_rows), multiplicities
    )
    examples = [offline_task.examples[row]._replace(row=at) for at, row in enumerate(offline_rows)]
    for at in range(count):
        question_example = offline_task.examples[rollouts.question_rows[at]]
        examples.append(
            _make_response_example(
                question_example,
                rollouts.texts[at],
                round_number,
                at % rollouts.num_generations,
                len(offline_rows) + at,
            )
        )
    groups = _group_rows(config, len(offline_rows), count, corpus.num_examples, rollouts.num_generations, round_number)
    question = np.concatenate([offline_rows, rollouts.question_rows])
    response = np.concatenate([np.full(len(offline_rows), -1), np.arange(count)])
    task = offline_task._replace(examples=examples, corpus=corpus, groups=groups if keeps_groups(config) else None)
    return RoundTask(task, question, response, multiplicity)


def keeps_groups(config: RefineConfig) -> bool:
    """Whether the responses to a question share every batch: for ratios that compare them, and for rewards.

    A hypergradient is proportional to the learning rate, and to what training is left, of the step that its row is in;
    in one batch the responses to a question differ by what they say alone.
    """
    return config.refine.ratio == "sequence" or trains_generator(config)


def average_question_weights(
    round_task: RoundTask, weights: Float[np.ndarray, "examples"], num_questions: int
) -> Float[np.ndarray, "questions"]:
    """The weight of each question: the mean over its examples by multiplicity; 1 for one without examples."""
    mass = np.bincount(round_task.question_rows, round_task.multiplicity, num_questions)
    total = np.bincount(round_task.question_rows, round_task.multiplicity * weights, num_questions)
    return np.divide(total, mass, out=np.ones(num_questions), where=mass > 0)


# ---- parts


def _build_corpus(
    offline_corpus: Corpus,
    offline_rows: Int[np.ndarray, "kept"],
    rollouts: Rollouts,
    validation_rows: Int[np.ndarray, "validation"],
) -> Corpus:
    rows = [offline_corpus.get_sequence(int(row)) for row in offline_rows]
    for at, response in enumerate(rollouts.tokens):
        before = np.array(rollouts.prompts[at // rollouts.num_generations].tokens, np.int32)
        supervised = np.arange(len(before) + len(response)) >= len(before)
        rows.append(tokens.TokenizedSequence(np.concatenate([before, response]), supervised))
    return tokens.corpus_from_sequences(rows + [offline_corpus.get_sequence(int(row)) for row in validation_rows])


def _sampler_log_probs(
    offline_corpus: Corpus,
    offline_rows: Int[np.ndarray, "kept"],
    rollouts: Rollouts,
    validation_rows: Int[np.ndarray, "validation"],
) -> Float[np.ndarray, "tokens"]:
    """The log-probability of each token under the sampler; nan for prompts and offline examples."""
    parts = [np.full(offline_corpus.lengths[offline_rows].sum(), np.nan)]
    for at, log_probs in enumerate(rollouts.log_probs):
        parts += [np.full(len(rollouts.prompts[at // rollouts.num_generations].tokens), np.nan), log_probs]
    return np.concatenate([*parts, np.full(offline_corpus.lengths[validation_rows].sum(), np.nan)])


def _make_response_example(question_example: Example, text: str, round_number: int, draw: int, row: int) -> Example:
    last = max(at for at, turn in enumerate(question_example.turns) if turn.role == "assistant")
    return question_example._replace(
        id=f"{question_example.id}/{round_number}/{draw}",
        row=row,
        turns=(*question_example.turns[:last], Turn("assistant", text)),
        source="responses",
        label=None,
    )


def _group_rows(
    config: RefineConfig, num_offline: int, num_responses: int, padding_row: int, draws: int, round_number: int
) -> Int[np.ndarray, "groups draws"]:
    """Offline examples in random groups, the last filled up with `padding_row`; then the responses by question."""
    offline = np.random.default_rng((config.data.seed, 11, round_number)).permutation(num_offline)
    filled = np.concatenate([offline, np.full(-num_offline % draws, padding_row)])
    return np.concatenate([filled, num_offline + np.arange(num_responses)]).reshape(-1, draws).astype(np.int64)


def mean_verifier_score(verifier_scores: Float[np.ndarray, "responses"]) -> float | None:
    """The mean of the verifier's scores; None without a verifier."""
    return float(verifier_scores.mean()) if len(verifier_scores) and np.isfinite(verifier_scores).all() else None
