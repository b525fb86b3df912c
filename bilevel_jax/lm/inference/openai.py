"""A client of OpenAI-compatible chat completion servers."""

import contextlib
import email.utils
import hashlib
import http.client
import json
import math
import queue
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from bilevel_jax.lm.inference import transport
from bilevel_jax.lm.inference.api_key import ApiKey, read_api_key
from bilevel_jax.lm.inference.generate import (
    NULL_RESPONSE_STORE,
    Prompt,
    Response,
    ResponseStore,
    SamplingParams,
    deduplicate_prompts,
    hash_generation,
)
from bilevel_jax.lm.inference.parameters import SERVICE_PARAMETERS

RETRY_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is sent again: the service is busy, or broken for a while."""
MAX_RETRY_WAIT = 60.0
"""Seconds that are waited before a request is sent again, at most."""
ENDED, CUT = ("stop", "eos", "eos_token", "stop_sequence", "end_turn"), ("length", "max_tokens", "model_length")
"""The finish_reason of a response that the model has ended, and of one that max_new_tokens has cut."""
TEMPORARY_CODES = (
    "rate_limit_exceeded", "rate_limit_error", "rate_limit", "too_many_requests", "resource_exhausted", "overloaded",
    "overloaded_error", "engine_overloaded", "server_error", "internal_server_error", "internal_error", "api_error",
    "service_unavailable", "unavailable", "timeout", "insufficient_system_resource", "abort", "error",
)  # fmt: skip
"""Names of errors that are gone after a while, in answers without a number for a status, and as finish_reason."""
LASTING_CODES = ("insufficient_quota", "billing_hard_limit_reached", "quota_exceeded")
"""Names of errors that stay, though their status is 429."""
CONTENT_CODES = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation", "content_filtered")
"""Names of errors that say that this prompt was refused for what it holds, and nothing of the others."""
MAX_SHOWN = 300
"""Characters of a service's text that an error shows."""
POLL_SECONDS = 0.5
"""Seconds between two looks at signals while no response arrives."""

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
    parameter_names: Mapping[str, str] = {},  # noqa: B006 - never changed
    section: str = "generate",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ChatClient:
    """The client of a model behind the OpenAI-compatible HTTP API (vLLM, SGLang, llama.cpp, ...).

    Each draw is a request of its own with n = 1 and its own seed, a function of (seed, prompt id, draw): so it does not
    depend on what else is asked for. Whether the server honours the seed is up to it. `top_k` is sent where it is above
    0; the official API has none and refuses it.

    The log-probs of a response are the server's where these are the sampler's: under temperature 1 without top-k and
    top-p, since servers report the model's own. In other cases, and where there are none, (). Token ids are not
    reported, nor, by most servers, the end token's log-prob.

    A reply without an answer (null content, a refusal, a call of a tool, tokens that were all spent on reasoning, an
    error that names a content filter) is a response with the reason in `missing`, an empty text, and not ended. An
    error in a reply of status 200 is treated as the status that it names. No redirect is followed. The key is taken out
    of whatever the service sends back.

    Args:
        url: ends before /chat/completions, as in http://localhost:8000/v1.
        model: the server's name of the model.
        sampling: temperature, top-k, top-p, the most tokens of a response and the seed.
        api_key_env: the environment variable that holds the API key; it is sent to `url` and stored nowhere. Where
            there is no such variable, none is sent.
        concurrency: requests at the same time.
        timeout: seconds from sending a request to the last byte of its answer, after which it counts as lost.
        retries: how often a request is sent again after a status in RETRY_STATUSES, a lost connection or a timeout.
        first_wait: seconds before the first retry, doubled for each further one, unless the server's Retry-After says
            another time; MAX_RETRY_WAIT at most.
        parameter_names: for some of SERVICE_PARAMETERS the name by which this service knows it; "" leaves it out.
        section: the section of the config whose keys errors name.
        progress: called with (responses done, responses in all) after each.

    Returns:
        A function of (prompts, draws, store). It raises ValueError for a prompt without messages, and RuntimeError,
        with the server's message, for a status that is not in RETRY_STATUSES, for an answer that is no chat completion,
        for one that holds the key or log-probs above 0, and after the last retry; the responses to other requests are
        then in the store.

    Raises:
        ValueError: no http address, one with a password or a query, no model name, a count out of range, a parameter
            that is not sent, or a key that no header can carry.

    Example:
        >>> generate = make_chat_client("http://localhost:8000/v1", "my-model", SamplingParams(max_new_tokens=64))
        >>> generate([], [0], NULL_RESPONSE_STORE)  # no prompt, so no request
        []
    """
    _check_address(url, model, section)
    if concurrency < 1 or retries < 0 or timeout <= 0:
        raise ValueError(
            f"concurrency {concurrency}, retries {retries}, timeout {timeout}: give at least 1, at least 0, above 0."
        )
    if unknown := sorted(set(parameter_names) - set(SERVICE_PARAMETERS)):
        raise ValueError(f"parameter_names has {unknown}; what is sent is {', '.join(SERVICE_PARAMETERS)}.")
    address = url.rstrip("/") + "/chat/completions"
    connection = _Connection(
        address,
        model,
        sampling,
        dict(parameter_names),
        read_api_key(api_key_env, f"{section}.api_key_env"),
        timeout,
        retries,
        first_wait,
        section,
    )

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
    """Adds what is missing of (prompt id, draw) -> response.

    A response is stored before its thread sends another request: a kill loses no more than are under way.
    """
    by_id, stopped, storing = {prompt.id: prompt for prompt in prompts}, threading.Event(), threading.Lock()

    def request_and_store(pair: tuple[str, int]) -> None:
        response = connection.request(by_id[pair[0]], pair[1], stopped)
        with storing:
            store.save({keys[pair]: response})
            responses[pair] = response

    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="service")
    done: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
    missing = [pair for pair in keys if pair not in responses]
    for pair in missing:
        pool.submit(request_and_store, pair).add_done_callback(done.put)
    num_pending = len(missing)
    try:
        while num_pending:
            with contextlib.suppress(queue.Empty):  # what came meanwhile is told at once
                done.get(timeout=POLL_SECONDS).result()
                num_pending -= 1
                while num_pending:
                    done.get_nowait().result()
                    num_pending -= 1
            progress(len(responses), len(keys))
    finally:  # after an error or a signal nothing more is sent, and requests under way, perhaps paid for, are stored
        stopped.set()
        pool.shutdown(cancel_futures=True)


class _TemporaryError(Exception):
    """The service is busy or broken for a while; `pause` seconds are asked for, or 0."""

    def __init__(self, text: str, pause: float = 0.0):
        super().__init__(text)
        self.pause = pause


class _LastingError(Exception):
    """The same request would fail again."""


@dataclass(frozen=True)
class _Connection:
    """Where and how requests are sent."""

    address: str
    model: str
    sampling: SamplingParams
    parameter_names: dict[str, str]
    api_key: ApiKey = field(repr=False)
    timeout: float
    retries: int
    first_wait: float
    section: str

    def request(self, prompt: Prompt, draw: int, stopped: threading.Event) -> Response:
        """The server's response, after retries; `stopped` ends the waits between them."""
        body = _request_body(self.model, prompt, draw, self.sampling, self.parameter_names)
        headers = {"Authorization": f"Bearer {self.api_key.value}"} if self.api_key.value else {}
        for attempt in range(self.retries + 1):
            pause = self.first_wait * 2**attempt
            try:
                reply = transport.post_json(self.address, body, headers, self.timeout)
                return self._read_response(reply, body)
            except _LastingError as error:
                raise RuntimeError(f"{self._shown(self.address)}, prompt {prompt.id}: {error}") from None
            except transport.TooLargeError as error:
                raise RuntimeError(
                    f"{self._shown(self.address)}, prompt {prompt.id}: {self._shown(str(error))}."
                ) from None
            except _TemporaryError as error:
                problem, pause = str(error), error.pause or pause
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and resets are OSErrors
                problem = self._shown(str(error) or type(error).__name__)
            except ValueError as error:  # urllib's words for an address that it cannot use
                raise RuntimeError(f"{self._shown(self.address)} cannot be used: {self._shown(str(error))}.") from None
            if attempt == self.retries or stopped.wait(min(pause, MAX_RETRY_WAIT)):
                break
        raise RuntimeError(
            f"{self._shown(self.address)} did not answer prompt {prompt.id} after {attempt + 1} tries; the last: "
            f"{problem}. Is it running, and within its limits? Lower concurrency, or raise timeout."
        )

    def _read_response(self, reply: transport.Reply, body: dict[str, Any]) -> Response:
        """The response in a reply; _TemporaryError or _LastingError, without the key in it, where there is none."""
        try:
            content = json.loads(reply.body)
        except (ValueError, RecursionError):  # also what is no UTF-8
            content = None
        error = _find_error(content)
        if error and error.code.strip().lower() in CONTENT_CODES:
            reason = self._shown(f"the service refused the prompt for its content: {error.text}")
            return Response("", (), (), False, reason)
        if 300 <= reply.status < 400:
            raise _LastingError(self._describe_redirect(reply))
        if not 200 <= reply.status < 300:
            code, text = (error.code, error.text) if error else ("", _describe_body(reply))
            raise self._explain(_ServiceError(reply.status, code, text), f"status {reply.status}", reply, body)
        if error:
            raise self._explain(error, f"an error in an answer of status {reply.status}", reply, body)
        try:
            return self._parse_choice(content)
        except _NoCompletionError as problem:
            text = self._shown(f"{problem}: {_describe_body(reply)}").rstrip(". ")
            raise _LastingError(f"the answer is no chat completion: {text}.") from None

    def _explain(self, error: "_ServiceError", where: str, reply: transport.Reply, body: dict[str, Any]) -> Exception:
        """What a service's error means for the request."""
        code = error.code.strip().lower()
        named = f" {error.status or error.code}" if reply.status < 300 and (error.status or error.code) else ""
        text = self._shown(f"{where}{named}: {error.text}").rstrip(". ")
        is_temporary = error.status in RETRY_STATUSES if error.status else code in TEMPORARY_CODES
        if is_temporary and code not in LASTING_CODES:
            return _TemporaryError(text, _retry_after(reply.headers))
        return _LastingError(f"refused with {text}.{self._remedy(error, body)}")

    def _remedy(self, error: "_ServiceError", body: dict[str, Any]) -> str:
        if error.status in (401, 403) and not self.api_key.value:
            return f" No key was sent: the environment variable {self.api_key.variable} is empty; set it."
        if error.status in (401, 403):
            return f" The key is that of the environment variable {self.api_key.variable}."
        if error.status not in (400, 422, None):
            return ""
        for name in SERVICE_PARAMETERS:
            sent = self.parameter_names.get(name, name)
            if sent in body and re.search(rf"""['"`]{re.escape(sent)}['"`]""", error.text):
                example = "max_completion_tokens" if name == "max_tokens" else "NAME"
                return (
                    f" Give {name} the name that this service knows in {self.section}.parameter_names, as "
                    f"{name}={example}, or leave it out, as {name}=."
                )
        return ""

    def _describe_redirect(self, reply: transport.Reply) -> str:
        """Where a redirect leads, without its query."""
        location = re.split(r"[?#]", reply.headers.get("Location") or "nowhere")[0]
        location = re.sub(r"//[^/]*@", "//", location).removesuffix("/chat/completions")
        return (
            f"the service has moved: status {reply.status} to {self._shown(location)}. Redirects are not followed, so "
            f"that prompts and the key go only where they were sent; set {self.section}.url to the address that you "
            "trust."
        )

    def _parse_choice(self, content: Any) -> Response:
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list):
            raise _NoCompletionError("it has no list of choices")
        if len(choices) != 1:
            raise _NoCompletionError(f"it has {len(choices)} choices where 1 was asked for")
        [choice] = choices
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise _NoCompletionError("its choice has no message")
        reason = choice.get("finish_reason")
        if not isinstance(reason, str | None):
            raise _NoCompletionError("its finish_reason is no text")
        if reason in TEMPORARY_CODES:
            raise _TemporaryError(f"an answer with finish_reason {reason}")
        text = _message_text(message)
        if self.api_key.is_in(text):
            raise _LastingError(
                f"it holds the API key, so it is not stored. Is {self.section}.url the service that the key of "
                f"{self.api_key.variable} is for?"
            )
        usage = _parse_usage(content.get("usage"))
        if missing := self._why_missing(text, reason, message, content.get("usage")):
            return Response("", (), (), False, self._shown(missing), usage)
        log_probs = _parse_log_probs(
            choice.get("logprobs"), self.sampling.max_new_tokens, content.get("usage"), self.section
        )
        is_sampler = _has_sampler_log_probs(self.sampling, self.parameter_names)
        return Response(text, (), log_probs if is_sampler else (), reason in ENDED, usage=usage)

    def _why_missing(self, text: str, reason: str | None, message: dict[str, Any], usage: Any) -> str:
        """Why a message is no answer; "" for one that is."""
        details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
        counted = details.get("reasoning_tokens") if isinstance(details, dict) else None
        has_reasoned = bool(message.get("reasoning_content") or message.get("reasoning") or counted)
        if message.get("refusal"):
            return f"the model refused: {message['refusal']}"
        if reason == "content_filter":
            return "the service's content filter held the answer back"
        if reason in ("tool_calls", "function_call") or (message.get("tool_calls") and not text.strip()):
            return "the model called a tool, though none was offered"
        if reason is not None and reason not in ENDED + CUT:
            return f"the answer ended with finish_reason {reason!r}"
        if text.strip():
            return ""
        if reason in CUT:
            on = "on reasoning" if has_reasoned else "before an answer began, most likely on reasoning"
            return f"{self.section}.max_new_tokens = {self.sampling.max_new_tokens} was spent {on}"
        return f"the message is empty (finish_reason {reason}){' behind its reasoning' if has_reasoned else ''}"

    def _shown(self, text: str) -> str:
        """A service's text on one line, without the key, and not too long."""
        text = self.api_key.hide(" ".join(text[: 8 * MAX_SHOWN].split()))
        return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


class _NoCompletionError(Exception):
    """A reply is no chat completion."""


@dataclass(frozen=True)
class _ServiceError:
    """An error as a service states it."""

    status: int | None
    code: str
    text: str


def _check_address(url: str, model: str, section: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of brackets
        has_host = False
    if re.search(r"//[^/]*@|[?#]", url):
        raise ValueError(
            "the url of the service has a password, a query or a fragment. Give what ends before /chat/completions, "
            f"and the key by the environment variable that {section}.api_key_env names."
        )
    if not has_host or not model or not all("!" <= character <= "~" for character in url):
        raise ValueError(f"url {url!r}, model {model!r}: give a url that begins with http, and the name of a model.")


def _request_body(
    model: str, prompt: Prompt, draw: int, sampling: SamplingParams, parameter_names: Mapping[str, str]
) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([sampling.seed, prompt.id, draw]).encode()).digest()
    values = {
        "n": 1,
        "seed": int.from_bytes(digest[:4], "little") >> 1,  # 31 bits: some services refuse more
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": _has_sampler_log_probs(sampling, parameter_names),
    } | ({"top_k": sampling.top_k} if sampling.top_k else {})
    named = {parameter_names.get(name, name): value for name, value in values.items()}
    return {"model": model, "messages": list(prompt.messages)} | {name: named[name] for name in named if name}


def _has_sampler_log_probs(sampling: SamplingParams, parameter_names: Mapping[str, str]) -> bool:
    """Whether the model's log-probs are the sampler's; not known where the service's own temperature is left to it."""
    is_sent = all(parameter_names.get(name, name) for name in ("temperature", "top_p"))
    return is_sent and sampling.temperature == 1 and sampling.top_k == 0 and sampling.top_p == 1


def _find_error(content: Any) -> _ServiceError | None:
    """The error that a JSON reply states: beside or instead of choices, in its choice, or as the reply itself."""
    if isinstance(content, list) and len(content) == 1:  # as Google wraps it
        [content] = content
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = content.get("error") or first.get("error")
    if not error and (content.get("object") == "error" or not isinstance(choices, list)):
        error = next((content for key in ("message", "detail", "errors") if content.get(key)), None)
    if not error:
        return None
    fields = error if isinstance(error, dict) else {"message": error}
    codes = [fields.get(key) for key in ("code", "status", "status_code", "type")]
    numbers = [int(str(code)) for code in codes if re.fullmatch("[45][0-9][0-9]", str(code))]
    names = [code for code in codes if isinstance(code, str) and not code.isdigit()]
    text = next((fields[key] for key in ("message", "detail", "errors", "type") if fields.get(key)), error)
    name = next(
        (name for name in names if name.lower() in TEMPORARY_CODES + LASTING_CODES + CONTENT_CODES), (*names, "")[0]
    )
    return _ServiceError(
        numbers[0] if numbers else None, name, text if isinstance(text, str) else json.dumps(text)[: 8 * MAX_SHOWN]
    )


def _describe_body(reply: transport.Reply) -> str:
    """What a reply holds that is no chat completion: the title of a page, or its first characters."""
    text = reply.body[: 8 * MAX_SHOWN].decode("utf-8", "replace").strip()
    if not text:
        return f"{reply.reason or 'no reason'}, and no text"
    if re.match(r"(?i)<!doctype html|<html|<head|<body", text):
        title = re.search(r"(?is)<(title|h1)[^>]*>(.*?)</\1", text)
        return (
            f"a page of HTML{f', {title[2].strip()}' if title else ''}. Give the address of the API, which ends in "
            "/v1, not that of a web page"
        )
    if text.startswith(("data:", "event:")):
        return "a stream of events, which was not asked for"
    return text


def _message_text(message: dict[str, Any]) -> str:
    """The text of a message: a string, or a list of parts that are texts. A half surrogate pair becomes U+FFFD."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise _NoCompletionError("its content has a part that is no text")
        content = "".join(parts)  # type: ignore[arg-type]
    if not isinstance(content, str | None):
        raise _NoCompletionError(f"its content is a {type(content).__name__}")
    return re.sub("[\ud800-\udfff]", "\ufffd", content or "")


def _parse_usage(usage: Any) -> tuple[int, int] | tuple[()]:
    """(tokens of the prompt, of the answer) as the service counts them; () where it does not."""
    if not isinstance(usage, dict):
        return ()
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or not (0 <= prompt < 2**53 and 0 <= completion < 2**53):
        return ()
    return prompt, completion


def _parse_log_probs(logprobs: Any, max_tokens: int, usage: Any, section: str) -> tuple[float, ...]:
    """Log-probs of the tokens; () where there are none."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else logprobs
    if not tokens:
        return ()
    entries = tokens if isinstance(tokens, list) else [None]
    values: list[Any] = [entry.get("logprob") if isinstance(entry, dict) else None for entry in entries]
    for at, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and value <= 0):
            raise _NoCompletionError(
                f"log-prob {at} is {value!r}, and a finite number of at most 0 is wanted ({section}.parameter_names "
                "leaves log-probs out by logprobs=)"
            )
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    most = min([max_tokens, *([count] if isinstance(count, int) else [])])
    if len(values) > most:
        raise _NoCompletionError(f"it has {len(values)} log-probs for {most} tokens")
    return tuple(map(float, values))


def _retry_after(headers: Message) -> float:
    """Seconds that the service asks for, by a number or a date; 0 where it says nothing that is understood."""
    header = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", header):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
