"""Generation, log-likelihoods and tokens of a loaded language model."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from bilevel_jax.core.types import Batch, Stream
from bilevel_jax.language_model.finetuning import check_count
from bilevel_jax.lm.data import tokens
from bilevel_jax.lm.data.encode import DEFAULT_TEMPLATE
from bilevel_jax.lm.data.examples import Example, hash_content
from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.lm.data.turns import Turn
from bilevel_jax.lm.inference.generate import Prompt, Response, Sampler, make_detokenizer, make_sampler
from bilevel_jax.lm.inference.loglik import LogLik, LogLikRequest, LogLikScorer, make_loglik_scorer
from bilevel_jax.lm.inference.prompts import find_end_tokens, make_prompts
from bilevel_jax.lm.inference.sampling import SamplingParams
from bilevel_jax.lm.models import Decoder
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import place_stream
from bilevel_jax.runs.infra.progress import make_progress_bar
from bilevel_jax.runs.tasks.text import tokenize_examples
from bilevel_jax.scores.requests import TokenizedExamples, make_target_requests, make_tokenized_examples

if TYPE_CHECKING:
    from bilevel_jax.language_model.model import LanguageModel


class LogLiks(NamedTuple):
    """log p(response | prompt) of each pair."""

    nats: Float[np.ndarray, "pairs"]
    """Summed over the tokens of the response, its end token included; at most 0."""
    num_tokens: Int[np.ndarray, "pairs"]
    """Of the response."""


def generate(
    lm: "LanguageModel",
    prompts: Any,
    sampling: SamplingParams,
    num_generations: int,
    *,
    max_batch_tokens: int = 8192,
    progress: bool = False,
) -> list[list[Response]]:
    """As `LanguageModel.generate`."""
    for name, count in (("num_generations", num_generations), ("max_new_tokens", sampling.max_new_tokens)):
        check_count(name, count)
    ready = make_text_prompts(lm, as_examples(lm, prompts))
    sampler, reporter = _sampler(lm.decoder, sampling, _Detokenizer(lm.tokenizer), lm.mesh, max_batch_tokens)
    with reporter.show("generating", progress):
        return sampler.sample(lm.joined_params, ready, range(num_generations))


def loglik(lm: "LanguageModel", prompts: Any, responses: Sequence[str], *, progress: bool = False) -> LogLiks:
    """As `LanguageModel.loglik`."""
    if isinstance(responses, str) or isinstance(prompts, str):
        raise ValueError("prompts and responses are lists of the same length; put a single string into a list.")
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; give a response to each prompt.")
    questions = as_examples(lm, prompts)
    for place, response in enumerate(responses, 1):
        if not isinstance(response, str):
            raise ValueError(f"responses:{place}: {describe_value(response)}; a string is wanted.")
    pairs = [
        question._replace(turns=(*question.turns[:-1], Turn("assistant", response)))
        for question, response in zip(questions, responses, strict=True)
    ]
    candidates = tokenize_whole(lm, pairs)
    requests = [make_target_requests(candidates.sequences(i)[0])[-1] for i in range(len(pairs))]
    logliks = answer_requests(lm, requests, progress=progress)
    return LogLiks(*(np.array([value[part] for value in logliks]) for part in (0, 1)))


def answer_requests(lm: "LanguageModel", requests: Sequence[LogLikRequest], *, progress: bool = False) -> list[LogLik]:
    """The log-likelihoods that a score asks for."""
    scorer, reporter = _loglik_scorer(lm.decoder, lm.mesh)
    with reporter.show("reading", progress):
        return scorer.score(lm.joined_params, requests)


def make_text_prompts(lm: "LanguageModel", examples: Sequence[Example]) -> list[Prompt]:
    """The prompts of the last responses; their id is that of the question, so equal ones are drawn alike."""
    prompts = make_prompts(
        examples,
        lm.tokenizer,
        template=lm.data.template or DEFAULT_TEMPLATE,
        vocab_size=lm.architecture.vocab_size,
    )
    return [
        prompt._replace(id=hash_content(Turn(message["role"], message["content"]) for message in prompt.messages))
        for prompt in prompts
    ]


def as_examples(lm: "LanguageModel", prompts: Any) -> list[Example]:
    """Prompts as examples whose last response is a placeholder; examples and rows with responses as they are."""
    if isinstance(prompts, str):
        raise ValueError(f"the prompts are the string {prompts!r}; a list is wanted: [{prompts!r}].")
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str | list | tuple) for prompt in prompts):
        return lm.read(prompts, name="prompts")
    if not prompts:
        raise ValueError("there are no prompts; give at least one.")
    if any(isinstance(prompt, Example) for prompt in prompts):
        return lm.read(prompts, name="prompts")
    rows = []
    for place, prompt in enumerate(prompts, 1):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not messages or not isinstance(messages[-1], dict) or messages[-1].get("role") != "user":
            raise ValueError(
                f"prompts:{place}: {describe_value(prompt)}; a string or messages that end with the user's are wanted."
            )
        rows.append({"messages": [*messages, {"role": "assistant", "content": "yes"}]})
    return lm.read(rows, DataSection(format="chat"), name="prompts")


def tokenize(lm: "LanguageModel", examples: list[Example]) -> TokenizedExamples:
    """Examples as training reads them: within the max_length of the model's data section, cut as that says."""
    corpus, _ = tokenize_examples(lm.data, examples, lm.tokenizer, lm.architecture)
    return make_tokenized_examples(examples, corpus)


def tokenize_whole(lm: "LanguageModel", examples: list[Example]) -> TokenizedExamples:
    """Examples as training reads them, however long."""
    corpus, _ = tokens.tokenize(
        examples,
        lm.tokenizer,
        max_length=sys.maxsize,
        template=lm.data.template or DEFAULT_TEMPLATE,
        vocab_size=lm.architecture.vocab_size,
    )
    return make_tokenized_examples(examples, corpus)


# ---- compiled once for a model, whatever its parameters


class ProgressReporter:
    """What a compiled engine calls as it works: a bar where one is shown."""

    def __init__(self) -> None:
        self._report: Callable[[int, int], None] = lambda done, total: None

    def __call__(self, done: int, total: int) -> None:
        """Pass it on."""
        self._report(done, total)

    @contextmanager
    def show(self, description: str, shown: bool) -> Iterator[None]:
        """A bar, if it is to be shown, for what the engine does meanwhile."""
        with make_progress_bar(shown) as bar:
            entry = bar.add_task(description, total=None)
            self._report = lambda done, total: bar.update(entry, completed=done, total=total)
            yield
        self._report = lambda done, total: None


class _Detokenizer:
    """`make_detokenizer` of a tokenizer; equal for equal tokenizers, so that a sampler is found again."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._detokenize = make_detokenizer(tokenizer)

    def __call__(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        return self._detokenize(prompt, response)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Detokenizer) and other.tokenizer is self.tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)


@lru_cache(maxsize=8)
def _sampler(
    decoder: Decoder, sampling: SamplingParams, detokenize: _Detokenizer, mesh: Mesh, max_batch_tokens: int
) -> tuple[Sampler, ProgressReporter]:
    reporter = ProgressReporter()
    sampler = make_sampler(
        decoder,
        sampling,
        detokenize,
        end_tokens=find_end_tokens(detokenize.tokenizer, decoder.config.eos),
        max_batch_tokens=max_batch_tokens,
        row_multiple=mesh.size,
        place=lambda batch: place_batch(mesh, batch),
        fetch=fetch_to_host,
        progress=reporter,
    )
    return sampler, reporter


@lru_cache(maxsize=8)
def _loglik_scorer(decoder: Decoder, mesh: Mesh) -> tuple[LogLikScorer, ProgressReporter]:
    reporter = ProgressReporter()
    scorer = make_loglik_scorer(
        decoder,
        row_multiple=mesh.size,
        place=lambda batch: place_batch(mesh, batch),
        fetch=fetch_to_host,
        progress=reporter,
    )
    return scorer, reporter


def place_batch(mesh: Mesh, batch: Batch) -> Batch:
    """A batch on the devices."""
    return place_stream(mesh, Stream(lambda step: batch, 1)).batch(0)
