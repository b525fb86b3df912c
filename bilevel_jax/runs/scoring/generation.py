"""Response generation by the model or a service, with stored responses."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from bilevel_jax.core.types import Batch, Params, Stream
from bilevel_jax.lm.data.encode import DEFAULT_TEMPLATE
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.inference import generate, openai
from bilevel_jax.lm.inference.generate import GenerateFn, Prompt, Response, ResponseStore
from bilevel_jax.lm.inference.prompts import find_end_tokens, make_prompts
from bilevel_jax.lm.inference.sampling import SamplingParams
from bilevel_jax.lm.models import Decoder
from bilevel_jax.runs.config.schema import DataSection, GenerateSection
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.journal import Journal
from bilevel_jax.runs.infra.placement import place_stream
from bilevel_jax.runs.infra.session import Interrupted, Session
from bilevel_jax.runs.scoring.likelihoods import fingerprint_params
from bilevel_jax.runs.tasks.text import TextTask

RESPONSES_FILE = "responses.jsonl"
"""In the run's checkpoints: one line for each batch of stored responses."""


def make_task_prompts(task: TextTask, data: DataSection, examples: Sequence[Example]) -> list[Prompt]:
    """`make_prompts` with the tokenizer, the template and the vocabulary of a task."""
    return make_prompts(
        examples,
        task.tokenizer,
        template=data.template or DEFAULT_TEMPLATE,
        vocab_size=task.architecture.vocab_size,
    )


def make_generator_factory(
    settings: GenerateSection, decoder: Decoder, tokenizer: Any, mesh: Mesh, session: Session
) -> Callable[[Params], GenerateFn]:
    """What makes a `Generator`, (prompts, draws) -> responses[prompt][draw], of the model with some parameters.

    `make_prompts` makes prompts of examples; the draws of a round are any numbers, `range(settings.draws)` or those
    of a later round. The parameters are whole ones (with the base, `assemble_params`); no program is compiled again for
    others. A service writes with the model that it has, whatever the parameters.

    Every response is stored in the run's folder under the prompt, the draw, the sampling and the fingerprint of the
    model that wrote it. What is stored is not generated again, in this run or after a stop; on a CPU the same call
    after a stop then ends with the same bits. Between batches (of a service: responses) a signal is noticed, and raises
    `Interrupted`.
    """
    if settings.backend == "service":
        generate_from_service = make_service_generator(settings, session)
        return lambda params: generate_from_service
    sampling, response_store, progress = _prepare(settings, session)

    def place_batch(batch: Batch) -> Batch:
        return place_stream(mesh, Stream(lambda step: batch, 1)).batch(0)

    sampler = generate.make_sampler(
        decoder,
        sampling,
        generate.make_detokenizer(tokenizer),
        end_tokens=find_end_tokens(tokenizer, decoder.config.eos),
        max_batch_tokens=settings.max_batch_tokens,
        row_multiple=mesh.size,
        place=place_batch,
        fetch=distributed.fetch_to_host,
        progress=progress,
    )

    def make_generator(params: Params) -> GenerateFn:
        store = ResponseStore(fingerprint_params(params), response_store.responses, response_store.append)
        return lambda prompts, draws: sampler.resume(params, prompts, draws, store)

    return make_generator


def make_service_generator(settings: GenerateSection, session: Session, section: str = "generate") -> GenerateFn:
    """(prompts, draws) -> responses[prompt][draw] of the model `settings.model` on the server at `settings.url`.

    Every response is stored in the run's folder as it arrives, and not asked for again. Errors name the keys of
    `section`.
    """
    sampling, response_store, progress = _prepare(settings, session)
    query_service = openai.make_chat_client(
        settings.url,
        settings.model,
        sampling,
        api_key_env=settings.api_key_env,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        parameter_names=parse_parameter_names(settings.parameter_names),
        section=section,
        progress=progress,
    )
    store = ResponseStore(f"{settings.url} {settings.model}", response_store.responses, response_store.append)

    def generate_from_service(prompts: Sequence[Prompt], draws: Sequence[int]) -> list[list[Response]]:
        return ask_on_first_process(lambda: query_service(prompts, draws, store), response_store, session)

    return generate_from_service


def ask_on_first_process(
    ask: Callable[[], list[list[Response]]], response_store: "ResponseFile", session: Session
) -> list[list[Response]]:
    """What `ask` gets from a service and stores: the first process asks, and then all read what is stored.

    A signal to any process ends the requests of the first, or what comes after them, and all stop together.
    """

    def ask_until_signal() -> None:
        with contextlib.suppress(Interrupted):
            ask()

    distributed.run_on_first_process(ask_until_signal)
    session.check_signals(at_once=True)
    response_store.read_new()
    return ask()  # all of it is there


def _prepare(
    settings: GenerateSection, session: Session
) -> tuple[SamplingParams, "ResponseFile", Callable[[int, int], None]]:
    """How responses are drawn, where they are stored, and what is called after each batch."""

    def progress(done: int, total: int) -> None:
        session.set_phase(f"writing responses, {done:,} of {total:,}")
        session.check_signals()

    distributed.wait_for_all_processes()  # the first may still be storing what an earlier generator wrote
    return _make_sampling(settings), ResponseFile(session.folder / "checkpoints" / RESPONSES_FILE), progress


def _make_sampling(settings: GenerateSection) -> SamplingParams:
    return SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.max_new_tokens, settings.seed)


def read_responses(
    settings: GenerateSection, folder: Path, fingerprint: str, prompts: Sequence[Prompt], draws: Sequence[int]
) -> list[list[Response]]:
    """responses[prompt][draw] that a run has stored in its `folder`, of the model in this process with a fingerprint.

    The model is not needed again. Raises KeyError for a response that was not generated.
    """
    sampling, stored = _make_sampling(settings), ResponseFile(folder / "checkpoints" / RESPONSES_FILE).responses
    requested = draws if settings.temperature else [0] * len(draws)  # a greedy response is stored once
    return [
        [stored[generate.hash_generation(prompt, draw, sampling, fingerprint)] for draw in requested]
        for prompt in prompts
    ]


class ResponseFile:
    """Responses in a journal; each record holds those of one call of `append`."""

    def __init__(self, path: Path):
        self.responses: dict[str, Response] = {}
        self._journal = Journal(path, fsync=True)
        self.read_new()

    def read_new(self) -> None:
        """Take in what another process has written since."""
        for record in self._journal.read_new():
            self.responses |= {key: _parse_response(fields) for key, fields in record.items()}

    def append(self, new_responses: dict[str, Response]) -> None:
        """Append; it is on the disk when this returns. Of several processes the first writes."""
        self.responses |= new_responses
        if new_responses:
            self._journal.append(new_responses)


def _parse_response(fields: list[Any]) -> Response:
    text, tokens, log_probs, ended, *more = fields
    missing = more[0] if more else ""  # earlier versions had neither of the two, or no usage
    return Response(text, tuple(tokens), tuple(log_probs), ended, missing, tuple(more[1]) if len(more) > 1 else ())


def parse_parameter_names(pairs: Sequence[str]) -> dict[str, str]:
    """`max_tokens=max_completion_tokens` and the like as {name: the service's name}."""
    return {name: other for name, _, other in (pair.partition("=") for pair in pairs)}
