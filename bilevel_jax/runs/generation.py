"""Who writes a run's responses: its model, or a service; each is kept as it comes, and never written twice."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from bilevel_jax.core.types import Batch, Params, Stream
from bilevel_jax.lm import generate, service
from bilevel_jax.lm.generate import Generator, Prompt, Response, Store
from bilevel_jax.lm.models import Decoder
from bilevel_jax.lm.prompts import ends
from bilevel_jax.lm.sampling import Sampling
from bilevel_jax.runs import files, processes
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.likelihoods import fingerprint
from bilevel_jax.runs.sections import GenerateSection
from bilevel_jax.runs.session import Session

NAME = "responses.jsonl"
"""In the run's checkpoints: one line for each time that something was kept."""


def generators(
    settings: GenerateSection, decoder: Decoder, tokenizer: Any, mesh: Mesh, session: Session
) -> Callable[[Params], Generator]:
    """What makes a `Generator`, (prompts, draws) -> responses[prompt][draw], of the model with some parameters.

    `prompts.prompts` makes prompts of examples; the draws of a round are any numbers, `range(settings.draws)` or those
    of a later round. The parameters are whole ones (with the base, `losses.assemble`); no program is compiled again for
    others. A service writes with the model that it has, whatever the parameters.

    Every response is kept in the run's folder under the prompt, the draw, the sampling and the fingerprint of the model
    that wrote it. What is kept is not written again, in this run or after a stop; on a CPU the same call after a stop
    then ends with the same bits. Between batches (of a service: responses) a signal is noticed, and raises
    `Interrupted`.
    """
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.max_new_tokens, settings.seed)
    kept = Kept(session.folder / "checkpoints" / NAME)

    def progress(done: int, total: int) -> None:
        session.phase(f"writing responses, {done:,} of {total:,}")
        session.check()

    if settings.backend == "service":
        ask = service.client(
            settings.url, settings.model, sampling, key_variable=settings.api_key_env,
            concurrency=settings.concurrency, timeout=settings.timeout, progress=progress,
        )  # fmt: skip
        store = Store(f"{settings.url} {settings.model}", kept.responses, kept.save)

        def answered(prompts: Sequence[Prompt], draws: Sequence[int]) -> list[list[Response]]:
            processes.by_first(lambda: ask(prompts, draws, store))
            kept.read()
            return ask(prompts, draws, store)  # all of it is there

        return lambda params: answered

    def place(batch: Batch) -> Batch:
        return placing.placed(mesh, Stream(lambda step: batch, 1)).batch(0)

    sampler = generate.sampler(
        decoder, sampling, generate.decoding(tokenizer), end=ends(tokenizer, decoder.config.eos),
        tokens=settings.max_batch_tokens, multiple=mesh.size, place=place, fetch=processes.fetch, progress=progress,
    )  # fmt: skip

    def generator(params: Params) -> Generator:
        store = Store(fingerprint(params), kept.responses, kept.save)
        return lambda prompts, draws: sampler.resume(params, prompts, draws, store)

    return generator


class Kept:
    """Responses in a file, one JSON object a line, appended; a line that a kill has torn is taken off."""

    def __init__(self, path: Path):
        self.responses: dict[str, Response] = {}
        self._path, self._read = path, 0
        processes.by_first(self._mend)
        self.read()

    def read(self) -> None:
        """Take in what another process has written since."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._read)
            for line in file:
                self.responses |= {key: _response(fields) for key, fields in json.loads(line).items()}
            self._read = file.tell()

    def save(self, new: dict[str, Response]) -> None:
        """Append; it is on the disk when this returns. Of several processes the first writes."""
        self.responses |= new
        if not new or not processes.first():
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(new) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise files.full(self._path, error) or error from error

    def _mend(self) -> None:
        if self._path.exists():
            content = self._path.read_bytes()
            os.truncate(self._path, content.rfind(b"\n") + 1)


def _response(fields: list[Any]) -> Response:
    text, tokens, log_probs, ended = fields
    return Response(text, tuple(tokens), tuple(log_probs), ended)
