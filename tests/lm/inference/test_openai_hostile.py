"""The client of the OpenAI-compatible API against what services really send, and what hostile ones may."""

import base64
import email.utils
import gzip
import json
import re
import threading
import time
import urllib.parse
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bilevel_jax.lm.inference import openai, transport
from bilevel_jax.lm.inference.api_key import ApiKey, read_api_key
from bilevel_jax.lm.inference.generate import NULL_RESPONSE_STORE, Prompt, Response, SamplingParams
from bilevel_jax.lm.inference.openai import make_chat_client
from bilevel_jax.lm.inference.parameters import SERVICE_PARAMETERS

KEY = "sk-proj-7Hq2/Zx+9LmN04vTb_Rw"
GOOD = Response("Then she went home.", (), (), True)


def message(fields, reason="stop", **more):
    return {"choices": [{"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": reason, **more}]}


def words(text="Then she went home.", **more):
    return message({"content": text}, **more)


def log_probs(*values):
    return words(logprobs={"content": [{"token": "a", "logprob": value} for value in values]})


def error(code=None, text="try again", **more):
    return {"error": {"code": code, "message": text, **more}}


def http(body=b"", status=200, headers=(), length=None):
    """The bytes of an HTTP reply."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers), "Connection: close"]
    lines += [f"Content-Length: {len(body) if length is None else length}"] if length != "none" else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*chunks, end=True):
    text = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks) + (
        b"0\r\n\r\n" if end else b""
    )
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + text


PACKED = gzip.compress(json.dumps(words()).encode())
PAGE = b"<!DOCTYPE html><html><head><title>502 Bad\n Gateway</title></head><body>nginx</body></html>"
JSON = json.dumps(words()).encode()

ANSWERS = {
    "a list of texts": (
        message({"content": [{"type": "text", "text": "Then "}, {"type": "text", "text": "home."}]}),
        Response("Then home.", (), (), True),
    ),
    "cut": (message({"content": "Then she"}, "length"), Response("Then she", (), (), False)),
    "an unknown end": (message({"content": "Then she"}, None), Response("Then she", (), (), False)),
    "no finish_reason": ({"choices": [{"message": {"content": "Then"}}]}, Response("Then", (), (), False)),
    "TGI's end": (message({"content": "So."}, "eos_token"), Response("So.", (), (), True)),
    "an error that is null": (words() | {"error": None}, GOOD),
    "log-probs": (log_probs(-0.5, 0), GOOD._replace(log_probs=(-0.5, 0.0))),
    "log-probs of null": (words(logprobs=None), GOOD),
    "log-probs without content": (words(logprobs={"content": None}), GOOD),
    "odd ids": (words() | {"id": None, "model": ["\x1b[2J"], "object": 7, "created": "x"}, GOOD),
    "half a pair": (http(b'{"choices":[{"message":{"content":"a\\ud83d!"}}]}'), Response("a\ufffd!", (), (), False)),
    "a whole pair": (http(b'{"choices":[{"message":{"content":"\\ud83d\\ude00"}}]}'), Response("😀", (), (), False)),
    "UTF-16": (http(json.dumps(words()).encode("utf-16")), GOOD),
    "a byte order mark": (http(b"\xef\xbb\xbf" + JSON), GOOD),
    "another content type": (http(JSON, headers=[("Content-Type", "text/html")]), GOOD),
    "gzip": (http(PACKED, headers=[("Content-Encoding", "gzip")]), GOOD),
    "in chunks": (chunked(JSON[:9], JSON[9:]), GOOD),
    "without a length": (http(JSON, length="none"), GOOD),
    "status 201": (http(JSON, 201), GOOD),
}
"""mode -> (reply, the response)."""

MISSING = {
    "null, cut, reasoned": (
        message({"content": None, "reasoning_content": "plums"}, "length"),
        "generate.max_new_tokens = 256 was spent on reasoning",
    ),
    "null, cut": (message({"content": None}, "length"), "spent before an answer began, most likely on reasoning"),
    "empty, cut": (message({"content": "", "reasoning": "plums"}, "length"), "256 was spent on reasoning"),
    "counted reasoning": (
        message({"content": ""}, "length") | {"usage": {"completion_tokens_details": {"reasoning_tokens": 9}}},
        "256 was spent on reasoning",
    ),
    "null, stop": (message({"content": None}), r"the message is empty \(finish_reason stop\)$"),
    "null, stop, reasoned": (message({"content": None, "reasoning_content": "seven"}), "empty .* behind its reasoning"),
    "absent": (message({}), "the message is empty"),
    "blank": (message({"content": " \n"}), "the message is empty"),
    "a refusal": (message({"content": None, "refusal": "I cannot."}), r"the model refused: I cannot\."),
    "a refusal with text": (message({"content": "Sorry.", "refusal": "No\x1b."}), "the model refused: No"),
    "content filter": (message({"content": "Then"}, "content_filter"), "content filter held"),
    "a tool": (message({"content": None, "tool_calls": [{"id": "x"}]}, "tool_calls"), "called a tool"),
    "a function": (message({"content": None, "function_call": {}}, "function_call"), "called a tool"),
    "another reason": (message({"content": "Then"}, "recitation"), "ended with finish_reason 'recitation'"),
}
"""mode -> (reply, why there is no answer)."""

REPEATED = {
    "429 in a 200": error(429),
    "'429' in a 200": error("429"),
    "503 in the type": {"error": {"type": "overloaded_error", "message": "busy"}},
    "a list of one error": http([{"error": {"code": 429, "message": "x", "status": "RESOURCE_EXHAUSTED"}}], 429),
    "a list of one error in a 200": [{"error": {"message": "x", "status": "RESOURCE_EXHAUSTED"}}],
    "a code in words": error("rate_limit_exceeded"),
    "an error in the choice": {"choices": [{"error": {"code": 502, "message": "x"}, "message": {"content": ""}}]},
    "vLLM's error object": {"object": "error", "message": "busy", "type": "InternalServerError", "code": 500},
    "an aborted answer": message({"content": "The"}, "abort"),
    "status 503 and a page": http(PAGE, 503),
    "status 408": http(b"", 408),
    "Retry-After in seconds": http(b"", 429, [("Retry-After", "0.02")]),
    "Retry-After as a date": http(b"", 429, [("Retry-After", email.utils.formatdate(0))]),
    "Retry-After of nonsense": http(b"", 429, [("Retry-After", "²")]),
    "Retry-After of nan": http(b"", 503, [("Retry-After", "nan")]),
    "cut short": http(JSON[:20], length=len(JSON)),
    "cut in a chunk": chunked(JSON[:20], end=False),
    "cut gzip": http(PACKED[:30], headers=[("Content-Encoding", "gzip")]),
    "nothing at all": b"",
    "no HTTP": b"220 mail ready\r\n",
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200 + b"\r\n",
}
"""mode -> what comes first; the second request is answered."""

REFUSED = {
    "quota": (http(error("insufficient_quota", "You exceeded your quota"), 429), "status 429: You exceeded your quota"),
    "402 in a 200": (error(402, "no credits"), "an error in an answer of status 200 402: no credits"),
    "400 in a list": (http([error(400, "no such model")], 400), r"status 400: no such model\."),
    "an error in words": ({"error": "model 'm' not found"}, "status 200: model 'm' not found"),
    "FastAPI's detail": (http({"detail": [{"msg": "field required"}]}, 422), 'status 422: .*"msg": "field required"'),
    "401 without a body": (http(b"", 401), r"status 401: .*The key is that of the environment variable MY_KEY\."),
    "a renamed parameter": (
        http(error("unsupported_parameter", "'max_tokens' is not supported. Use 'max_completion_tokens'."), 400),
        r"Give max_tokens the name that this service knows in generate.parameter_names, as max_tokens=max_completion",
    ),
    "an unknown parameter": (http(error(None, "unknown field `seed`"), 400), r"or leave it out, as seed=\."),
    "a page": (http(PAGE), r"no chat completion: .*a page of HTML, 502 Bad Gateway\. Give the address of the API"),
    "404 and a page": (http(PAGE, 404), "status 404: a page of HTML"),
    "empty": (http(b""), "no chat completion"),
    "204": (http(b"", 204), "no chat completion"),
    "no JSON": (http(b"OK"), "no chat completion: it has no list of choices: OK"),
    "no UTF-8": (http(b'{"a": "\xff\xfe"}'), "no chat completion"),
    "half of a JSON": (http(JSON[:40]), "no chat completion"),
    "deep JSON": (http(b"[" * 15_000), "no chat completion"),
    "a number of 5,000 digits": (http(b'{"choices": ' + b"1" * 5000 + b"}"), "no chat completion"),
    "events": (http(b'data: {"choices": []}\n\ndata: [DONE]\n\n'), "a stream of events, which was not asked for"),
    "a list": (["x"], "it has no list of choices"),
    "null": (http(b"null"), "it has no list of choices"),
    "choices as an object": ({"choices": {"0": 1}}, "it has no list of choices"),
    "no choice": ({"choices": []}, "it has 0 choices where 1 was asked for"),
    "two choices": ({"choices": words()["choices"] * 2}, "it has 2 choices where 1"),
    "a choice that is text": ({"choices": ["Then"]}, "its choice has no message"),
    "a chunk of a stream": ({"choices": [{"delta": {"content": "T"}}]}, "its choice has no message"),
    "content that is a number": (message({"content": 7}), "its content is a int"),
    "content with a picture": (message({"content": [{"type": "image_url"}]}), "a part that is no text"),
    "a reason that is a list": (message({"content": "x"}, ["stop"]), "its finish_reason is no text"),
    "log-probs above 0": (log_probs(-1.0, 0.1), r"log-prob 1 is 0\.1, and a finite number of at most 0"),
    "log-probs of nan": (log_probs(float("nan")), "log-prob 0 is nan"),
    "log-probs of -inf": (log_probs(float("-inf")), "log-prob 0 is -inf"),
    "log-probs as text": (log_probs("-1"), "log-prob 0 is '-1'"),
    "log-probs of true": (log_probs(False), "log-prob 0 is False"),
    "log-probs of null entries": (words(logprobs={"content": [None]}), "log-prob 0 is None"),
    "log-probs as an object": (words(logprobs={"content": {"a": -1}}), "log-prob 0 is None"),
    "more log-probs than tokens": (log_probs(*[-1.0] * 257), "257 log-probs for 256 tokens"),
    "more log-probs than counted": (
        log_probs(-1, -1) | {"usage": {"completion_tokens": 1}},
        "2 log-probs for 1 tokens",
    ),
    "a large answer": (http(b"{}", length=2**40), "the answer has 1,099,511,627,776 bytes, more than"),
    "a large answer in chunks": (chunked(b" " * 30_000), "the answer has more than 20,000 bytes"),
    "a bomb": (http(gzip.compress(b" " * 10**6), headers=[("Content-Encoding", "gzip")]), "more than 20,000 bytes"),
    "no gzip": (http(JSON, headers=[("Content-Encoding", "gzip")]), "says that it is gzip, and is not"),
    "brotli": (http(JSON, headers=[("Content-Encoding", "br")]), "packed as 'br'"),
    "moved": (
        http(b"", 307, [("Location", "http://u:p@evil.test/v2/chat/completions?k=1")]),
        r"the service has moved: status 307 to http://evil\.test/v2\. .*generate\.url",
    ),
    "moved, as a GET": (http(b"", 302, [("Location", "/login")]), "moved: status 302 to /login"),
    "moved to a file": (http(b"", 301, [("Location", "file:///etc/passwd")]), "moved: status 301"),
    "moved nowhere": (http(b"", 308), "moved: status 308 to nowhere"),
}
"""mode -> (reply, the error)."""

FORMS = {
    "as it is": KEY,
    "as a header": f"Authorization: Bearer {KEY}",
    "quoted": urllib.parse.quote(KEY, safe=""),
    "quoted twice": urllib.parse.quote(urllib.parse.quote(KEY, safe="")),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of a header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64 of a login": base64.urlsafe_b64encode(f"user:{KEY}".encode()).decode(),
    "hexadecimal": KEY.encode().hex(),
    "escaped": "".join(f"\\u{ord(letter):04x}" for letter in KEY),
    "backwards": KEY[::-1],
    "in capitals": KEY.upper(),
    "its half": KEY[:14] + "***",
    "spaced": " ".join(KEY),
    "entities": "".join(f"&#{ord(letter)};" for letter in KEY),
}
"""How a service may send back the key."""


@pytest.fixture(scope="module")
def service():
    """A server that answers a question by the reply of that name: bytes as they are, else JSON; later ones are GOOD."""
    seen, replies = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            mode = body["messages"][-1]["content"]
            repeated = sum(one["messages"] == body["messages"] for one, _ in seen)
            seen.append((body, self.headers))
            reply = replies[mode] if not (mode in REPEATED and repeated) else words()
            if callable(reply):
                reply(self.wfile)
            else:
                self.wfile.write(reply if isinstance(reply, bytes) else http(reply))
            self.close_connection = True

        def log_message(self, *args):
            pass

        def handle_error(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client that has gone is no error of the server
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.url, server.seen, server.replies = f"http://127.0.0.1:{server.server_address[1]}/v1", seen, replies
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr(transport, "MAX_REPLY_BYTES", 20_000)


def ask(service, mode, reply, **options):
    service.replies[mode] = reply
    options = {"api_key_env": "MY_KEY", "first_wait": 0.001, "retries": 1, "timeout": 5, **options}
    generate = make_chat_client(service.url, "m", SamplingParams(), **options)
    prompt = Prompt(mode, (), ({"role": "user", "content": mode},))
    [[response]] = generate([prompt], [0], NULL_RESPONSE_STORE)
    return response


@pytest.mark.parametrize("mode", ANSWERS)
def test_an_answer_in_any_of_the_usual_forms(service, mode):
    reply, expected = ANSWERS[mode]
    if mode.startswith("log-probs"):
        reply = http(reply)
    assert ask(service, mode, reply) == expected


@pytest.mark.parametrize("mode", MISSING)
def test_no_answer_is_named_and_never_an_empty_finished_one(service, mode):
    reply, why = MISSING[mode]
    response = ask(service, mode, reply)
    assert response == Response("", (), (), False, response.missing)
    assert re.search(why, response.missing)


@pytest.mark.parametrize("mode", REPEATED)
def test_what_passes_is_asked_again(service, mode):
    before = len(service.seen)
    assert ask(service, mode, REPEATED[mode]) == GOOD
    assert len(service.seen) == before + 2


@pytest.mark.parametrize("mode", REFUSED)
def test_what_stays_is_one_sentence_at_once(service, mode):
    reply, text = REFUSED[mode]
    before = len(service.seen)
    with pytest.raises(RuntimeError, match=text) as caught:
        ask(service, mode, reply, retries=3)
    assert len(service.seen) == before + 1
    assert mode in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert str(caught.value).endswith(".") and caught.value.__suppress_context__


@pytest.mark.parametrize("form", FORMS)
def test_the_key_is_never_shown(service, form):
    """In an error, a redirect, a header, a status line, a refusal, an answer."""
    sent = FORMS[form]
    places = {
        "body": http(error(None, f"bad key {sent}"), 401),
        "in a 200": error(429, sent),
        "page": http(f"<html><title>{sent}</title>".encode()),
        "no JSON": http(sent.encode()),
        "redirect": http(b"", 307, [("Location", f"http://evil.test/{sent.replace(' ', '+')}/v1")]),
        "status line": f"HTTP/1.1 4444 {sent}\r\n\r\n".encode(),
        "encoding": http(b"", headers=[("Content-Encoding", sent)]),
        "reason": message({"content": "x"}, sent),
        "refusal": message({"content": None, "refusal": f"I know {sent}"}),
        "log-prob": log_probs(sent),
        "answer": words(f"Your key is {sent}."),
    }
    for place, reply in places.items():
        if place == "answer" and form == "its half":
            continue
        try:
            shown = repr(ask(service, f"{form} {place}", reply, retries=0))
        except RuntimeError as caught:
            shown = str(caught)
        hidden = "".join(filter(str.isalnum, shown.casefold()))
        for text in (sent, KEY, KEY[:14], KEY[-14:]):
            assert text not in shown, (place, shown)
            assert "".join(filter(str.isalnum, text.casefold())) not in hidden, (place, shown)


def test_the_key_is_sent_to_one_host_only_and_stands_in_no_repr(service):
    ask(service, "cut", ANSWERS["cut"][0])
    assert service.seen[-1][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(ApiKey(KEY)) and ApiKey("").hide("as it was") == "as it was"
    assert ApiKey("EMPTY").hide("the key EMPTY, no empty key") == "the key (the key), no empty key"
    for placeholder in ("token", "not-needed", "lm-studio", "EMPTY", "a-key-of-letters-alone", "0000000000000000"):
        assert not ApiKey(placeholder).is_in(f"A proof is not needed: {placeholder}")
    assert ApiKey(KEY).is_in(f"so {KEY}")
    before = len(service.seen)
    there = service.url + "/chat/completions"
    with pytest.raises(RuntimeError, match="has moved"):
        ask(service, "moved here", http(b"", 307, [("Location", there)]))
    assert len(service.seen) == before + 1


@pytest.mark.parametrize("value, shown", [("sk-1\n23", "U+000A"), ("sk-1 23", "U+0020"), ("sk-é", "U+00E9")])
def test_a_key_that_no_header_carries_is_refused_without_it(value, shown, monkeypatch):
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ValueError, match="environment variable MY_KEY") as caught:
        read_api_key("MY_KEY")
    assert value not in str(caught.value) and shown in str(caught.value)
    monkeypatch.setenv("MY_KEY", " sk-123\r\n")
    assert read_api_key("MY_KEY").value == "sk-123"


def drip(*head):
    """One byte every 20 ms, for ever."""

    def write(file):
        for part in head:
            file.write(part)
        for _ in range(200):
            file.write(b" ")
            file.flush()
            time.sleep(0.02)

    return write


@pytest.mark.parametrize(
    "head", [(), (b"HTTP/1.1 200 OK\r\nX: ",), (b"HTTP/1.1 200 OK\r\n\r\n",)], ids=["status", "header", "body"]
)
def test_the_whole_time_is_bounded(service, head):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no whole answer within 0\.15 s"):
        ask(service, f"drip {len(head)} {head}", drip(*head), timeout=0.15, retries=0)
    assert time.monotonic() - began < 1.5


def test_a_long_wait_is_asked_for_and_bounded(service, monkeypatch):
    monkeypatch.setattr(openai, "MAX_RETRY_WAIT", 0.02)
    began = time.monotonic()
    for header in ("999999", email.utils.formatdate(time.time() + 9999)):
        with pytest.raises(RuntimeError, match="after 2 tries; the last: status 429"):
            ask(service, f"later {header}", http(b"", 429, [("Retry-After", header)]))
    assert time.monotonic() - began < 1
    headers = Message()
    headers["Retry-After"] = email.utils.formatdate(time.time() + 30)
    assert 20 < openai._retry_after(headers) <= 30


def test_parameters_have_other_names_or_none(service):
    names = {"max_tokens": "max_completion_tokens", "seed": "", "temperature": ""}
    response = ask(service, "names", log_probs(-0.5), parameter_names=names)
    body = service.seen[-1][0]
    assert body["max_completion_tokens"] == 256 and not {"max_tokens", "seed", "temperature"} & set(body)
    assert response.log_probs == () and not body["logprobs"]  # the service's own temperature is not known
    ask(service, "all names", log_probs(-0.5))
    assert set(service.seen[-1][0]) == {"model", "messages", *SERVICE_PARAMETERS} - {"top_k"}
    with pytest.raises(ValueError, match=r"parameter_names has \['max_token'\]; what is sent is n, seed"):
        ask(service, "names", words(), parameter_names={"max_token": "x"})


@pytest.mark.parametrize(
    "url",
    ["http://", "http://h:99999/v1", "http://[::1/v1", "ftp://h/v1", "http://h/v1 x", "http://hé/v1", "file:///etc"],
)
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match="give a url that begins with http"):
        make_chat_client(url, "m", SamplingParams())


@pytest.mark.parametrize("url", ["http://u:secret@h/v1", "https://h/v1?key=secret", "http://h/v1#secret"])
def test_an_address_with_a_secret_is_refused_without_it(url):
    with pytest.raises(ValueError, match="has a password, a query or a fragment") as caught:
        make_chat_client(url, "m", SamplingParams())
    assert "secret" not in str(caught.value)
