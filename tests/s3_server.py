"""An S3 server on loopback (moto's), whose answers a test can refuse, and whose objects it can put back."""

import contextlib
import json
import threading

import fsspec
import pytest

from bilevel_jax.storage import copies, lease, objects, urls

BUCKET = "bucket"
SLOW_DOWN, FAILURE, DENIED = (503, "SlowDown"), (500, "InternalError"), (403, "AccessDenied")
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class FaultyServer:
    """`refuse(method, path, number)` says what a request is answered instead, or None; `number` counts writes."""

    def __init__(self, app):
        self.app, self.refuse, self.writes, self.requests = app, None, 0, []
        self._lock = threading.Lock()

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests.append((method, path))
            number = self.writes
            if method in ("PUT", "POST", "DELETE") and "/.lock." not in path:
                self.writes += 1
            answer = self.refuse(method, path, number) if self.refuse else None
        if answer is None:
            return self.app(environ, start_response)
        with contextlib.suppress(Exception):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<Error><Code>{answer[1]}</Code><Message>as the test wants</Message></Error>".encode()
        start_response(
            f"{answer[0]} refused",
            [("Content-Type", "application/xml"), ("Content-Length", str(0 if method == "HEAD" else len(body)))],
        )
        return [] if method == "HEAD" else [body]


class S3:
    """The server, and a client of its own that no fault meets."""

    def __init__(self, app, url):
        self.app, self.url, self.client = app, url, None

    def start_anew(self):
        """Forget faults and objects."""
        self.app.refuse = None
        if self.client is None:
            self.client = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
            if not self.client.exists(BUCKET):  # another folder of tests has a server of its own, with the same objects
                self.client.mkdir(BUCKET)
        if paths := self.client.find(BUCKET):
            self.client.rm(paths)
        self.app.writes, self.app.requests = 0, []

    def names(self, folder=""):
        """Name -> bytes of every object below a folder, the lock aside."""
        root = f"{BUCKET}/{folder}".rstrip("/")
        paths = [path for path in self.client.find(root) if ".lock." not in path]
        return {path.removeprefix(f"{root}/"): self.client.cat_file(path) for path in paths}

    def write(self, name, data):
        self.client.pipe_file(f"{BUCKET}/{name}", data if isinstance(data, bytes) else json.dumps(data).encode())


@pytest.fixture(scope="session")
def s3_server():
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    pytest.importorskip("moto.server", reason="moto is not installed")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log_request(self, *_):
            pass

    app = FaultyServer(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    forget_clients()
    yield S3(app, f"http://127.0.0.1:{server.server_port}")
    forget_clients()
    server.shutdown()
    thread.join()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """An empty bucket on the server, with clients that find it, give up soon and hold leases for a moment."""
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": s3_server.url}).items():
        monkeypatch.setenv(name, value)
    be_quick(monkeypatch)
    copies.forget_copies()
    objects.open_store.cache_clear()
    s3_server.start_anew()
    yield s3_server
    s3_server.app.refuse = None


def be_quick(monkeypatch):
    """Waits of a test's length."""
    monkeypatch.setattr(objects, "RETRY_SECONDS", 30.0)
    monkeypatch.setattr(objects, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(copies, "JOURNAL_SECONDS", 0.2)


def forget_clients():
    """Have the next request look at the environment anew."""
    copies.forget_copies()
    objects.open_store.cache_clear()
    urls._make_filesystem.cache_clear()
    if "s3" in fsspec.registry:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
