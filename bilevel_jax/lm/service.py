"""Responses from a service with the OpenAI-compatible HTTP API (vLLM, SGLang, llama.cpp): chat completions."""

import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from email.message import Message
from typing import Any

from bilevel_jax.lm.generate import NOTHING, Prompt, Response, Sampling, Store, distinct, key

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is sent again: the service is busy, or broken for a while."""
LONGEST = 60.0
"""Seconds that are waited before a request is sent again, at most."""

Client = Callable[[Sequence[Prompt], Sequence[int], Store], list[list[Response]]]
"""(prompts, draws, store) -> responses, [prompt][draw]; each is kept in the store as it comes."""


def client(
    url: str,
    model: str,
    sampling: Sampling,
    *,
    key_variable: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    timeout: float = 120.0,
    retries: int = 6,
    wait: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Client:
    """The client of a model at a service; `url` ends before /chat/completions, as in http://localhost:8000/v1.

    Each draw is a request of its own with n = 1 and its own seed, a function of (seed, prompt id, draw): so it does not
    depend on what else is asked for. Whether the service keeps to the seed is up to it. `top_k` is sent where it is
    above 0; the official API has none and refuses it.

    The log-probs of a response are the service's where these are the sampler's: under temperature 1 without top-k and
    top-p, since services report the model's own. In other cases, and where there are none, (). Tokens are not told,
    nor, by most services, the end token's log-prob.

    key_variable  the environment variable that holds the service's key; it is sent to `url` and kept nowhere. Where
                  there is no such variable, none is sent
    concurrency   requests at the same time
    timeout       seconds without a sign of the service until a request counts as lost
    retries       how often a request is sent again after a status in AGAIN, a lost connection or a timeout, first after
                  `wait` seconds, then after twice as long each time, or as long as the service's Retry-After says
    progress      called with (responses done, responses wanted) after each

    Raises RuntimeError, with the service's words, for a status that is not in AGAIN, for an answer that is no chat
    completion, and after the last retry; what other requests brought is in the store.
    """
    if not url.startswith(("http://", "https://")) or not model:
        raise ValueError(f"url {url!r}, model {model!r}: give a url that begins with http, and the name of a model.")
    if concurrency < 1 or retries < 0 or timeout <= 0:
        raise ValueError(
            f"concurrency {concurrency}, retries {retries}, timeout {timeout}: give at least 1, at least 0, above 0."
        )
    address = url.rstrip("/") + "/chat/completions"

    def ask(prompt: Prompt, draw: int, stopped: threading.Event) -> Response:
        body, secret = _body(model, prompt, draw, sampling), os.environ.get(key_variable, "")
        for again in range(retries + 1):
            try:
                return _response(_post(address, body, secret, timeout), sampling)
            except urllib.error.HTTPError as error:
                with error:
                    words = error.read(2000).decode("utf-8", "replace").strip()
                words = words.replace(secret, "(the key)") if secret else words
                trouble = f"status {error.code}: {words or error.reason}"
                if error.code not in AGAIN:
                    raise RuntimeError(f"{address} refused prompt {prompt.id}: {trouble}") from None
                pause = _retry_after(error.headers) or wait * 2**again
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and resets are OSErrors
                trouble, pause = str(error) or type(error).__name__, wait * 2**again
            if again == retries or stopped.wait(min(pause, LONGEST)):
                break
        raise RuntimeError(
            f"{address} did not answer prompt {prompt.id} after {again + 1} tries; the last: {trouble}. "
            "Is it running, and within its limits? Lower concurrency, or raise timeout."
        )

    def respond(prompts: Sequence[Prompt], draws: Sequence[int], store: Store = NOTHING) -> list[list[Response]]:
        different = distinct(prompts)
        if silent := [prompt.id for prompt in different if not prompt.messages]:
            raise ValueError(f"prompt {silent[0]} has no messages, and a service reads nothing else.")
        names = {
            (prompt.id, draw): key(prompt, draw, sampling, store.fingerprint)
            for prompt in different
            for draw in sorted(set(draws))
        }
        known = {pair: store.done[name] for pair, name in names.items() if name in store.done}
        by_id, stopped = {prompt.id: prompt for prompt in different}, threading.Event()
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="service")
        asked = {
            pool.submit(ask, by_id[id], draw, stopped): (id, draw) for id, draw in names if (id, draw) not in known
        }

        def keep(future: Future[Response]) -> None:
            pair = asked[future]
            if pair not in known:
                known[pair] = future.result()
                store.save({names[pair]: known[pair]})

        try:
            for future in as_completed(asked):
                keep(future)
                progress(len(known), len(names))
        finally:  # after an error or a signal nothing more is sent, and what is under way, perhaps paid for, is kept
            stopped.set()
            pool.shutdown(cancel_futures=True)
            for future in asked:
                if not future.cancelled() and future.exception() is None:
                    keep(future)
        return [[known[prompt.id, draw] for draw in draws] for prompt in prompts]

    return respond


def _body(model: str, prompt: Prompt, draw: int, sampling: Sampling) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([sampling.seed, prompt.id, draw]).encode()).digest()
    body = {
        "model": model,
        "messages": list(prompt.messages),
        "n": 1,
        "seed": int.from_bytes(digest[:4], "little") >> 1,  # 31 bits: some services refuse more
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new,
        "logprobs": _same_log_probs(sampling),
    }
    return body | ({"top_k": sampling.top_k} if sampling.top_k else {})


def _same_log_probs(sampling: Sampling) -> bool:
    """Whether the model's log-probs are the sampler's."""
    return sampling.temperature == 1 and sampling.top_k == 0 and sampling.top_p == 1


def _post(address: str, body: dict[str, Any], secret: str, timeout: float) -> bytes:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if secret:
        request.add_unredirected_header("Authorization", f"Bearer {secret}")  # not to another host
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


def _response(answer: bytes, sampling: Sampling) -> Response:
    try:
        choice = json.loads(answer)["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        told = (choice.get("logprobs") or {}).get("content") or []
        log_probs = tuple(float(token["logprob"]) for token in told) if _same_log_probs(sampling) else ()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RuntimeError(f"the service's answer is no chat completion ({error!r}): {answer[:200]!r}") from None
    return Response(text or "", (), log_probs, reason == "stop")


def _retry_after(headers: Message) -> float:
    """Seconds that the service asks for; 0 where it says nothing, or a date."""
    said = headers.get("Retry-After", "")
    return float(said) if said.replace(".", "", 1).isdigit() else 0.0
