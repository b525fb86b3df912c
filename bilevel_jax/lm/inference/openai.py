"""A client of OpenAI-compatible chat completion servers."""

import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.message import Message
from typing import Any

from bilevel_jax.lm.inference.generate import (
    NULL_RESPONSE_STORE,
    Prompt,
    Response,
    ResponseStore,
    SamplingParams,
    deduplicate_prompts,
    hash_generation,
)

RETRY_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is sent again: the service is busy, or broken for a while."""
MAX_RETRY_WAIT = 60.0
"""Seconds that are waited before a request is sent again, at most."""

ChatClient = Callable[[Sequence[Prompt], Sequence[int], ResponseStore], list[list[Response]]]
"""(prompts, draws, store) -> responses, [prompt][draw]; each is saved to the store as it arrives."""


def make_chat_client(
    url: str,
    model: str,
    sampling: SamplingParams,
    *,
    api_key_env: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    timeout: float = 120.0,
    retries: int = 6,
    first_wait: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ChatClient:
    """The client of a model behind the OpenAI-compatible HTTP API (vLLM, SGLang, llama.cpp, ...).

    Each draw is a request of its own with n = 1 and its own seed, a function of (seed, prompt id, draw): so it does not
    depend on what else is asked for. Whether the server honours the seed is up to it. `top_k` is sent where it is above
    0; the official API has none and refuses it.

    The log-probs of a response are the server's where these are the sampler's: under temperature 1 without top-k and
    top-p, since servers report the model's own. In other cases, and where there are none, (). Token ids are not
    reported, nor, by most servers, the end token's log-prob.

    Args:
        url: ends before /chat/completions, as in http://localhost:8000/v1.
        model: the server's name of the model.
        sampling: temperature, top-k, top-p, the most tokens of a response and the seed.
        api_key_env: the environment variable that holds the API key; it is sent to `url` and stored nowhere. Where
            there is no such variable, none is sent.
        concurrency: requests at the same time.
        timeout: seconds without a byte from the server until a request counts as lost.
        retries: how often a request is sent again after a status in RETRY_STATUSES, a lost connection or a timeout.
        first_wait: seconds before the first retry, doubled for each further one, unless the server's Retry-After says
            another time.
        progress: called with (responses done, responses in all) after each.

    Returns:
        A function of (prompts, draws, store). It raises ValueError for a prompt without messages, and RuntimeError,
        with the server's message, for a status that is not in RETRY_STATUSES, for an answer that is no chat completion,
        and after the last retry; the responses to other requests are then in the store.

    Raises:
        ValueError: no http address, no model name, or a count out of range.

    Example:
        >>> generate = make_chat_client("http://localhost:8000/v1", "my-model", SamplingParams(max_new_tokens=64))
        >>> generate([], [0], NULL_RESPONSE_STORE)  # no prompt, so no request
        []
    """
    if not url.startswith(("http://", "https://")) or not model:
        raise ValueError(f"url {url!r}, model {model!r}: give a url that begins with http, and the name of a model.")
    if concurrency < 1 or retries < 0 or timeout <= 0:
        raise ValueError(
            f"concurrency {concurrency}, retries {retries}, timeout {timeout}: give at least 1, at least 0, above 0."
        )
    address = url.rstrip("/") + "/chat/completions"
    connection = _Connection(address, model, sampling, api_key_env, timeout, retries, first_wait)

    def generate(
        prompts: Sequence[Prompt], draws: Sequence[int], store: ResponseStore = NULL_RESPONSE_STORE
    ) -> list[list[Response]]:
        unique_prompts = deduplicate_prompts(prompts)
        if without_messages := [prompt.id for prompt in unique_prompts if not prompt.messages]:
            raise ValueError(f"prompt {without_messages[0]} has no messages, and a service reads nothing else.")
        keys = {
            (prompt.id, draw): hash_generation(prompt, draw, sampling, store.fingerprint)
            for prompt in unique_prompts
            for draw in sorted(set(draws))
        }
        responses = {pair: store.results[key] for pair, key in keys.items() if key in store.results}
        _send_requests(connection, unique_prompts, keys, responses, store, concurrency, progress)
        return [[responses[prompt.id, draw] for draw in draws] for prompt in prompts]

    return generate


def _send_requests(
    connection: "_Connection",
    prompts: Sequence[Prompt],
    keys: dict[tuple[str, int], str],
    responses: dict[tuple[str, int], Response],
    store: ResponseStore,
    concurrency: int,
    progress: Callable[[int, int], None],
) -> None:
    """Adds what is missing of (prompt id, draw) -> response, and stores each as it arrives."""
    by_id, stopped = {prompt.id: prompt for prompt in prompts}, threading.Event()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="service")
    futures = {
        pool.submit(connection.request, by_id[id], draw, stopped): (id, draw)
        for id, draw in keys
        if (id, draw) not in responses
    }

    def store_response(future: Future[Response]) -> None:
        pair = futures[future]
        if pair not in responses:
            responses[pair] = future.result()
            store.save({keys[pair]: responses[pair]})

    try:
        for future in as_completed(futures):
            store_response(future)
            progress(len(responses), len(keys))
    finally:  # after an error or a signal nothing more is sent, and requests under way, perhaps paid for, are stored
        stopped.set()
        pool.shutdown(cancel_futures=True)
        for future in futures:
            if not future.cancelled() and future.exception() is None:
                store_response(future)


@dataclass(frozen=True)
class _Connection:
    """Where and how requests are sent."""

    address: str
    model: str
    sampling: SamplingParams
    api_key_env: str
    timeout: float
    retries: int
    first_wait: float

    def request(self, prompt: Prompt, draw: int, stopped: threading.Event) -> Response:
        """The server's response, after retries; `stopped` ends the waits between them."""
        body = _request_body(self.model, prompt, draw, self.sampling)
        api_key = os.environ.get(self.api_key_env, "")
        for attempt in range(self.retries + 1):
            try:
                return _parse_response(_post(self.address, body, api_key, self.timeout), self.sampling)
            except urllib.error.HTTPError as error:
                with error:
                    error_text = error.read(2000).decode("utf-8", "replace").strip()
                error_text = error_text.replace(api_key, "(the key)") if api_key else error_text
                problem = f"status {error.code}: {error_text or error.reason}"
                if error.code not in RETRY_STATUSES:
                    raise RuntimeError(f"{self.address} refused prompt {prompt.id}: {problem}") from None
                pause = _retry_after(error.headers) or self.first_wait * 2**attempt
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and resets are OSErrors
                problem, pause = str(error) or type(error).__name__, self.first_wait * 2**attempt
            if attempt == self.retries or stopped.wait(min(pause, MAX_RETRY_WAIT)):
                break
        raise RuntimeError(
            f"{self.address} did not answer prompt {prompt.id} after {attempt + 1} tries; the last: {problem}. "
            "Is it running, and within its limits? Lower concurrency, or raise timeout."
        )


def _request_body(model: str, prompt: Prompt, draw: int, sampling: SamplingParams) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([sampling.seed, prompt.id, draw]).encode()).digest()
    body = {
        "model": model,
        "messages": list(prompt.messages),
        "n": 1,
        "seed": int.from_bytes(digest[:4], "little") >> 1,  # 31 bits: some services refuse more
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": _has_sampler_log_probs(sampling),
    }
    return body | ({"top_k": sampling.top_k} if sampling.top_k else {})


def _has_sampler_log_probs(sampling: SamplingParams) -> bool:
    """Whether the model's log-probs are the sampler's."""
    return sampling.temperature == 1 and sampling.top_k == 0 and sampling.top_p == 1


def _post(address: str, body: dict[str, Any], api_key: str, timeout: float) -> bytes:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if api_key:
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")  # not to another host
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


def _parse_response(answer: bytes, sampling: SamplingParams) -> Response:
    try:
        choice = json.loads(answer)["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        log_probs = tuple(float(token["logprob"]) for token in tokens) if _has_sampler_log_probs(sampling) else ()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RuntimeError(f"the service's answer is no chat completion ({error!r}): {answer[:200]!r}") from None
    return Response(text or "", (), log_probs, reason == "stop")


def _retry_after(headers: Message) -> float:
    """Seconds that the service asks for; 0 where it says nothing, or a date."""
    header = headers.get("Retry-After", "")
    return float(header) if header.replace(".", "", 1).isdigit() else 0.0
