"""A chat completion server on this machine that answers by functions: models that are asked, and a judge."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHOWN = re.compile(r"\[BEGIN ([a-z ]+) ([0-9a-f]{16})\]\n(.*?)\n\[END \1 \2\]", re.DOTALL)


class Server(ThreadingHTTPServer):
    """With room for all connections that wait at once: one that is dropped is tried again after a second."""

    request_queue_size = 128


class ChatServer:
    """`models[name](text of the last message) -> the reply`, or the status of an error; all requests are kept."""

    def __init__(self, models):
        self.models, self.requests, self.lock = models, [], threading.Lock()
        self.before = lambda number: None
        """Called with the number of each request before it is answered."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(body)
                    number = len(server.requests)
                server.before(number)
                reply = server.models[body["model"]](body["messages"][-1]["content"])
                if isinstance(reply, int):
                    return self.answer(reply, {"error": {"message": "no"}})
                choice = {"index": 0, "message": {"content": reply}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 100, "completion_tokens": 7}
                return self.answer(200, {"choices": [choice], "usage": usage})

            def answer(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def of(self, model):
        """The requests to one model."""
        return [body for body in self.requests if body["model"] == model]

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def shown_texts(request):
    """What a request of the judge shows between its marks, by name."""
    return {name: text for name, _, text in SHOWN.findall(request)}


def uniform(text):
    """A number from 0 to 1 that a text decides."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def make_judge(quality, *, noise=0.0, bias=0.0):
    """A judge that prefers the answer of higher quality, errs with a probability, and favours what it sees first."""

    def judge(request):
        texts = shown_texts(request)
        if "answer" in texts:
            return "Thought.\n[[SAFE]]" if quality(texts["answer"]) >= 0 else "Thought.\n[[UNSAFE]]"
        gain = quality(texts["answer a"]) - quality(texts["answer b"])
        if gain == 0:
            return "Thought.\n[[C]]" if not bias else ["[[A]]", "[[B]]"][uniform(request) > 0.5 + bias]
        first = (1 - noise if gain > 0 else noise) + bias
        return f"Thought.\n**{['[[A]]', '[[B]]'][uniform(request) > first]}**"

    return judge
