"""The client of the OpenAI-compatible API, against a small real server on this machine."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bilevel_jax.lm.inference import openai
from bilevel_jax.lm.inference.generate import NULL_RESPONSE_STORE, Prompt, Response, ResponseStore, SamplingParams
from bilevel_jax.lm.inference.openai import make_chat_client

PROMPTS = [Prompt(f"row {at}", (), ({"role": "user", "content": f"Question {at}?"},)) for at in range(3)]
PLAIN = SamplingParams()
SECRET = "a-key-that-nobody-may-see"


class Server:
    """Answers a request by its content and seed; `trouble` says what comes before: statuses, or "silence"."""

    def __init__(self):
        self.requests, self.keys, self.trouble, self.lock = [], [], [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append((self.path, body))
                    server.keys.append(self.headers.get("Authorization"))
                    trouble = server.trouble.pop(0) if server.trouble else 200
                if trouble == "silence":
                    time.sleep(1.0)
                elif trouble == "nonsense":
                    self.answer(200, b'{"object": "list"}')
                elif isinstance(trouble, dict):
                    self.answer(400, json.dumps({"error": trouble}).encode())
                elif trouble != 200:
                    words = {"error": {"message": f"no {body['model']} for {server.keys[-1]}"}}
                    self.answer(trouble, json.dumps(words).encode())
                else:
                    self.answer(200, json.dumps(written(body)).encode())

            def answer(self, status, content):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Retry-After", "0.05" if status == 429 else "")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def written(body):
    """What a model that keeps to its seed would say."""
    text = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).hexdigest()[:8]
    told = {"content": [{"token": letter, "logprob": -0.25} for letter in text]} if body["logprobs"] else None
    reason = "stop" if body["max_tokens"] > 8 else "length"
    return {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": reason, "logprobs": told}]}


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    one = Server()
    yield one
    one.close()


def ask(server, sampling=PLAIN, prompts=PROMPTS, draws=(0, 1), store=NULL_RESPONSE_STORE, **options):
    respond = make_chat_client(
        server.url, "small", sampling, **{"first_wait": 0.01, "timeout": 5, "retries": 2, **options}
    )
    return respond(prompts, draws, store)


def test_a_draw_is_a_request_of_its_own(server):
    out = ask(server)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions" and len(server.requests) == 6
    assert len({body["seed"] for _, body in server.requests}) == 6
    assert body | {"seed": 0, "messages": 0} == {
        "model": "small", "n": 1, "seed": 0, "messages": 0, "temperature": 1.0, "top_p": 1.0, "max_tokens": 256,
        "logprobs": True,
    }  # fmt: skip
    assert out[0][0] == Response(out[0][0].text, (), (-0.25,) * 8, True)
    assert len({response.text for row in out for response in row}) == 6
    again = ask(server, prompts=PROMPTS[::-1], draws=(1, 0, 0), concurrency=1)
    assert again == [[row[1], row[0], row[0]] for row in out[::-1]]
    assert len(server.requests) == 12


def test_log_probs_are_those_of_the_sampler_or_none(server):
    ((cut,),) = ask(server, SamplingParams(0.7, 5, 0.9, max_new_tokens=8), PROMPTS[:1], (0,))
    body = server.requests[0][1]
    assert (body["temperature"], body["top_k"], body["top_p"], body["logprobs"]) == (0.7, 5, 0.9, False)
    assert cut.log_probs == () and not cut.ended


def test_a_busy_or_silent_service_is_asked_again(server):
    expected = ask(server)
    for trouble in ([429, 429], [503, "silence"]):
        server.trouble[:] = trouble
        before = len(server.requests)
        assert ask(server, timeout=0.3, concurrency=1) == expected
        assert len(server.requests) - before == 6 + 2


def test_a_service_that_stays_away_is_an_error(server):
    server.trouble[:] = ["silence"] * 2
    with pytest.raises(
        RuntimeError, match=r"did not answer prompt row 0 after 2 tries; the last: no whole answer within 0.1 s"
    ):
        ask(server, prompts=PROMPTS[:1], draws=(0,), retries=1, timeout=0.1)
    server.trouble[:] = [500] * 3
    with pytest.raises(RuntimeError, match=r"after 3 tries; the last: status 500: .*no small for None"):
        ask(server, prompts=PROMPTS[:1], draws=(0,))


def test_what_came_before_an_error_is_kept_and_not_asked_again(server):
    kept = {}
    store = ResponseStore("small", kept, kept.update)
    server.trouble[:] = [200, 200, 404]
    with pytest.raises(RuntimeError, match="prompt row 1: refused with status 404"):
        ask(server, store=store, concurrency=1)
    assert 2 <= len(kept) < 6
    before, already = len(server.requests), len(kept)
    server.trouble[:] = []
    out = ask(server, store=store)
    assert len(server.requests) - before == 6 - already and out == ask(server)


def test_a_response_is_stored_before_its_thread_asks_again(server):
    """However slow the disk is, a kill loses no more responses than requests are under way."""
    lost = []

    def save(new):
        lost.append(len(server.requests) - len(kept))  # asked, and not stored
        time.sleep(0.01)
        kept.update(new)

    kept = {}
    ask(server, draws=range(8), store=ResponseStore("small", kept, save), concurrency=3)
    assert len(kept) == len(server.requests) == 24 and max(lost) <= 3


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation"])
def test_a_prompt_that_a_filter_refuses_is_a_missing_response(server, code):
    """Of that prompt alone: the others are answered, and another refusal of status 400 still is an error."""
    server.trouble[:] = [{"code": code, "type": None, "status": 400, "message": f"flagged for {SECRET}"}]
    kept = {}
    first, *others = ask(server, draws=(0,), concurrency=1, store=ResponseStore("small", kept, kept.update))
    assert first[0].text == "" and not first[0].ended
    assert "refused the prompt for its content: flagged" in first[0].missing
    assert all(response.text for [response] in others) and len(kept) == len(PROMPTS)
    server.trouble[:] = [{"code": "unsupported_value", "message": "no such size"}]
    with pytest.raises(RuntimeError, match="refused with status 400: no such size"):
        ask(server, prompts=PROMPTS[:1], draws=(0,))


def test_usage_is_kept_where_it_is_counted():
    counted = {"prompt_tokens": 5, "completion_tokens": 3}
    assert openai._parse_usage(counted) == (5, 3)
    odd = [counted | {key: value} for key in counted for value in (-1, True, "3", 10**30, None, 1.5)]
    assert {openai._parse_usage(usage) for usage in (None, [], {}, {"prompt_tokens": 5}, *odd)} == {()}


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    server.trouble[:] = [401]
    with pytest.raises(RuntimeError, match=r"status 401: .*no small for Bearer \(the key\)") as error:
        ask(server, prompts=PROMPTS[:1], draws=(0,), api_key_env="MY_KEY")
    assert server.keys == [f"Bearer {SECRET}"] and SECRET not in str(error.value)


def test_errors_name_what_is_wrong(server):
    server.trouble[:] = ["nonsense"]
    with pytest.raises(RuntimeError, match=r"row 0: .* no chat completion: it has no list of choices: .*\"object\""):
        ask(server, prompts=PROMPTS[:1], draws=(0,))
    with pytest.raises(ValueError, match="prompt bare has no messages"):
        ask(server, prompts=[Prompt("bare", (1, 2))])
    with pytest.raises(ValueError, match="url 'localhost:8000', model 'small'"):
        make_chat_client("localhost:8000", "small", SamplingParams())
    with pytest.raises(ValueError, match="concurrency 0, retries 6"):
        make_chat_client(server.url, "small", SamplingParams(), concurrency=0)
