"""A server on this machine that speaks the part of the hub's API that huggingface_hub and datasets use."""

import base64
import hashlib
import json
import os
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_a_token_of_this_test"
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow")
KINDS = {"models": "model", "datasets": "dataset"}


def sha(content, kind="sha1"):
    return hashlib.new(kind, content).hexdigest()


@dataclass
class Repository:
    """Commits, the newest last, each all files of the repository; branches and tags."""

    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list = field(default_factory=list)

    def commit(self, files, message="", branch="main"):
        """A new state of all files; its hash."""
        text = json.dumps([message, len(self.commits), {path: sha(data) for path, data in files.items()}])
        commit = sha(text.encode())
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        self.messages.append(message)
        return commit

    @property
    def head(self):
        return self.refs.get("main")

    @property
    def files(self):
        return self.commits[self.head] if self.head else {}


class HubServer:
    """`repositories[kind, "owner/name"]`; every request is kept as (method, path, token)."""

    def __init__(self):
        self.repositories, self.requests, self.uploads, self.lock = {}, [], {}, threading.Lock()
        self.fail_with = None
        """(part of a path, status): requests to such a path are answered with it; status 0: not, for half a second."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, b"")

            do_HEAD = do_GET

            def do_POST(self):
                size = self.headers.get("Content-Length")
                if size is None:  # chunked
                    body = b""
                    while length := int(self.rfile.readline(), 16):
                        body += self.rfile.read(length)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(size))
                hub.answer(self, body)

            do_PUT = do_POST

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def add(self, kind, name, files, **settings):
        """A repository with one commit."""
        repository = self.repositories[kind, name] = Repository(**settings)
        repository.commit({path: text.encode() if isinstance(text, str) else text for path, text in files.items()})
        return repository

    def environment(self, home, *, token="", offline=False):
        """Environment variables of a process that asks this server, with an empty cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_TOKEN": token,
            "NO_PROXY": os.environ.get("NO_PROXY", "") + ",127.0.0.1",
        }

    # ---- answers

    def answer(self, request, body):
        path, _, query = request.path.partition("?")
        path = urllib.parse.unquote(path)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.fail_with and self.fail_with[0] in path and not self.fail_with[1]:
            time.sleep(0.5)
            request.close_connection = True
            return None
        with self.lock:
            self.requests.append((request.command, path, token))
            if self.fail_with and self.fail_with[0] in path:
                return send(request, self.fail_with[1], {"error": "broken"})
            if token and token != TOKEN:
                headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
                return send(request, 401, {"error": "Invalid username or password."}, headers)
            for pattern, function in self.routes():
                if match := re.fullmatch(pattern, path):
                    return function(request, body, token, urllib.parse.parse_qs(query), *match.groups())
            return send(request, 404, {"error": f"no route {path}"})

    def routes(self):
        repository = r"([\w.-]+/[\w.-]+?)"
        return [
            (r"/api/whoami-v2", self.who_am_i),
            (r"/api/validate-yaml", lambda request, *_: send(request, 200, {"errors": [], "warnings": []})),
            (r"/api/repos/create", self.create),
            (rf"/api/(models|datasets)/{repository}/tree/([^/]+|refs/[^/]+/[^/]+)(?:/(.*))?", self.tree),
            (rf"/api/(models|datasets)/{repository}/paths-info/(.+)", self.paths_info),
            (rf"/api/(models|datasets)/{repository}/refs", self.list_refs),
            (rf"/api/(models|datasets)/{repository}/preupload/(.+)", self.preupload),
            (rf"/api/(models|datasets)/{repository}/commit/(.+)", self.commit),
            (rf"/api/(models|datasets)/{repository}(?:/revision/(.+))?", self.info),
            (r"/api/(models|datasets)", self.list),
            (rf"/(datasets/)?{repository}\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/upload/(.+)", self.upload),
            (rf"/(datasets/)?{repository}/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)", self.resolve),
        ]

    def find(self, request, kind, name, revision, token, *, reads_file=False):
        """(repository, commit), or None where the answer is an error, which is sent."""
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not token):
            status = 404 if token else 401
            send(request, status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if reads_file and repository.gated:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."}
            send(request, 403 if token else 401, {"error": "gated"}, headers)
            return None
        revision = revision or "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits and (repository.commits or revision != "main"):
            send(request, 404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def info(self, request, body, token, query, kind, name, revision=None):
        if found := self.find(request, KINDS[kind], name, revision, token):
            repository, commit = found
            files = repository.commits.get(commit, {})
            send(request, 200, {
                "id": name, "modelId": name, "sha": commit if files else "0" * 40, "private": repository.private,
                "gated": "manual" if repository.gated else False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            })  # fmt: skip

    def list(self, request, body, token, query, kind):
        owner = query.get("author", [""])[0]
        names = [name for one, name in self.repositories if one == KINDS[kind] and name.startswith(f"{owner}/")]
        send(request, 200, [{"id": name, "modelId": name, "private": False, "tags": []} for name in names])

    def list_refs(self, request, body, token, query, kind, name):
        if found := self.find(request, KINDS[kind], name, None, token):
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": c} for ref, c in found[0].refs.items()
            ]
            send(request, 200, {"branches": branches, "tags": [], "converts": []})

    def tree(self, request, body, token, query, kind, name, revision, folder=None):
        if not (found := self.find(request, KINDS[kind], name, revision, token)):
            return
        files = found[0].commits.get(found[1], {})
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if folder and not inside:
            return send(request, 404, {"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"})
        entries = []
        if query.get("recursive", ["False"])[0].lower() in ("true", "1"):
            entries = [describe(path, data) for path, data in inside.items()]
        else:
            for path, data in inside.items():
                rest = path.removeprefix(prefix)
                if "/" not in rest:
                    entries.append(describe(path, data))
                elif (top := prefix + rest.split("/")[0]) not in [entry["path"] for entry in entries]:
                    entries.append({"type": "directory", "path": top, "size": 0, "oid": sha(top.encode())})
        send(request, 200, entries)

    def paths_info(self, request, body, token, query, kind, name, revision):
        if not (found := self.find(request, KINDS[kind], name, revision, token)):
            return
        files = found[0].commits.get(found[1], {})
        content = json.loads(body) if body.startswith(b"{") else urllib.parse.parse_qs(body.decode())
        paths = content["paths"]
        entries = [describe(path, files[path]) for path in paths if path in files]
        entries += [
            {"type": "directory", "path": path, "size": 0, "oid": sha(path.encode())}
            for path in paths
            if path not in files and any(file.startswith(f"{path}/") for file in files)
        ]
        send(request, 200, entries)

    def resolve(self, request, body, token, query, prefix, name, revision, path):
        kind = "dataset" if prefix else "model"
        if not (found := self.find(request, kind, name, revision, token, reads_file=True)):
            return
        repository, commit = found
        data = repository.commits.get(commit, {}).get(path)
        if data is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return send(request, 404, {"error": "Entry not found"}, headers)
        entry = describe(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {
            "ETag": f'"{etag}"', "X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes",
        }  # fmt: skip
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2]) + 1 if match[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}"
            return send(request, 206, data[start:end], headers)
        send(request, 200, data, headers)

    def who_am_i(self, request, body, token, query):
        if not token:
            return send(request, 401, {"error": "Unauthorized"})
        send(request, 200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    # ---- writing

    def create(self, request, body, token, query):
        content = json.loads(body)
        if not token:
            return send(request, 401, {"error": "Unauthorized"})
        name, kind = f"{content.get('organization') or 'me'}/{content['name']}", content.get("type", "model")
        if not name.startswith("me/"):
            return send(request, 403, {"error": "You don't have the rights"})
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.repositories:
            return send(request, 409, {"error": "You already created this repo", "url": url})
        private = content.get("visibility") == "private" or bool(content.get("private"))
        self.repositories[kind, name] = Repository(private=private)
        self.repositories[kind, name].commit({".gitattributes": b"*.parquet filter=lfs\n"}, "initial commit")
        send(request, 200, {"url": url, "name": name, "id": "0"})

    def preupload(self, request, body, token, query, kind, name, revision):
        if not token:
            return send(request, 401, {"error": "Unauthorized"})
        found = self.find(request, KINDS[kind], name, revision, token)
        if not found:
            return
        files = found[0].commits.get(found[1], {})
        send(request, 200, {"files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": describe(file["path"], files[file["path"]])["oid"] if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def lfs_batch(self, request, body, token, query, prefix, name):
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.uploads:
                one["actions"] = {"upload": {"href": f"{self.url}/upload/{one['oid']}"}}
        send(request, 200, {"transfer": "basic", "objects": objects})

    def upload(self, request, body, token, query, oid):
        assert sha(body, "sha256") == oid
        self.uploads[oid] = body
        send(request, 200, b"")

    def commit(self, request, body, token, query, kind, name, revision):
        if not token:
            return send(request, 401, {"error": "Unauthorized"})
        found = self.find(request, KINDS[kind], name, revision, token)
        if not found:
            return
        repository, head = found
        files, message = dict(repository.commits.get(head, {})), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    return send(request, 412, {"error": "A commit has happened since. Please refresh and try again."})
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(item)
        commit = repository.commit(files, message, revision)
        url = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{name}/commit/{commit}"
        send(request, 200, {"success": True, "commitUrl": url, "commitOid": commit})


def describe(path, data):
    """A file of a tree."""
    blob = sha(b"blob %d\0" % len(data) + data)
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": sha(data, "sha256"), "size": len(data), "pointerSize": 130}
    return entry


def send(request, status, content, headers=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    if not isinstance(content, bytes):
        request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)


def connect(patch, hub, home, *, token="", offline=False):
    """Have this process ask a server, with a cache and a token of its own; as `environment` does for another one.

    What huggingface_hub and datasets read from the environment when they are imported is replaced by hand.
    """
    import datasets
    from huggingface_hub import constants

    from bilevel_jax.lm.hub import downloads
    from bilevel_jax.runs.config import hub_names

    for name, value in hub.environment(home, token=token, offline=offline).items():
        patch.setenv(name, value)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": f"{home}/hub",
        "HF_TOKEN_PATH": f"{home}/token",
        "HF_STORED_TOKENS_PATH": f"{home}/stored_tokens",
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        patch.setattr(constants, name, value)
    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_DATASETS_CACHE": f"{home}/datasets",
        "HF_HUB_OFFLINE": offline,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
    }.items():
        patch.setattr(datasets.config, name, value)
    patch.setattr(downloads, "_commits", {})
    patch.setattr(downloads, "_folders", {})
    patch.setattr(hub_names, "_asked", {})
