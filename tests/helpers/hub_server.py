"""A tiny hub on 127.0.0.1: the few routes that ``huggingface_hub`` needs to push and to download, held in memory.

It checks the bearer token as the real hub does. Reading needs no token, and a wrong token is refused (401). Writing into
another namespace or with a read-only token is refused too (403).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_SecretOfTheTests"
READ_ONLY = "hf_SecretThatOnlyReads"
USER = "ana"


class Hub:
    """Repositories of the hub: ``repos[id][revision][path]`` is a file's content."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}  # by sha256, as LFS keeps them
        self.messages: list[str] = []  # of commits
        self.requests: list[str] = []  # as "GET /path"
        self.broken = False  # answer 503 to everything
        self.url = ""

    def put(self, repo: str, folder: Path) -> None:
        """Add a repository with every file of ``folder``."""
        self.repos[repo] = {"main": {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}}

    def sha(self, repo: str, revision: str) -> str:
        """Return a commit's id, derived from its content."""
        files = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.repos[repo][revision].items())
        return hashlib.sha1(repr((repo, files)).encode()).hexdigest()

    def find(self, repo: str, revision: str) -> str | None:
        """Return the branch of ``revision``, a branch or a commit."""
        branches = self.repos[repo]
        return next((name for name in branches if revision in (name, self.sha(repo, name))), None)


class RefusedError(Exception):
    """Answer with an error status."""

    def __init__(self, status: int, message: str, code: str = "", echo: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = {"error": f"{message} {echo}"}  # a server may echo the token


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.broken:
                raise RefusedError(503, "the hub is being repaired")
            self._who()
            for methods, pattern, answer in ROUTES:
                if self.command in methods.split() and (found := re.fullmatch(pattern, path)):
                    return answer(self, body, *found.groups())
            raise RefusedError(404, f"no such page: {path}")
        except RefusedError as refusal:
            headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self._send(refusal.status, json.dumps(refusal.body).encode(), headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def log_message(self, *_: object) -> None:
        pass

    def _who(self) -> str | None:
        header = self.headers.get("Authorization")
        if header and header.removeprefix("Bearer ") not in (TOKEN, READ_ONLY):
            raise RefusedError(401, "Invalid credentials in Authorization header", echo=header)
        return header and header.removeprefix("Bearer ")

    def _may_write(self, repo: str) -> None:
        if self._who() is None:
            raise RefusedError(401, "Invalid username or password.")
        if self._who() == READ_ONLY:
            raise RefusedError(403, "this token may only read")
        if not repo.startswith(f"{USER}/"):
            raise RefusedError(403, f"you don't have the rights to create a model under this namespace: {repo}")

    def _may_read(self, repo: str, revision: str) -> str:
        if repo not in self.hub.repos or (repo in self.hub.private and self._who() is None):
            raise RefusedError(401 if self._who() is None else 404, "Repository not found", "RepoNotFound")
        if (branch := self.hub.find(repo, revision)) is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return branch

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        self._may_write(repo)
        there = repo in self.hub.repos
        self.hub.repos.setdefault(repo, {"main": {}})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self.json({"url": f"{self.hub.url}/{repo}", "name": repo}, 409 if there else 200)

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            values = yaml.safe_load(front[1]) if front else {}
            said = [] if isinstance(values, dict) else ["metadata is no mapping"]
        except yaml.YAMLError as error:
            said = [str(error)]
        self.json({"errors": [{"message": message} for message in said], "warnings": []}, 400 if said else 200)

    def branch(self, _: bytes, repo: str, revision: str) -> None:
        self._may_write(repo)
        branches = self.hub.repos[repo]
        if revision in branches:
            raise RefusedError(409, "Reference already exists")
        branches[revision] = dict(branches["main"])
        self.json({})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._may_write(repo)
        self._may_read(repo, revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        self.json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def batch(self, body: bytes, repo: str) -> None:
        self._may_write(repo)
        objects = []
        for item in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}", "header": {}}}
            known = item["oid"] in self.hub.objects
            objects.append({"oid": item["oid"], "size": item["size"], **({} if known else {"actions": action})})
        self.json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "the content is not what its name says")
        self.hub.objects[oid] = body
        self.json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        self._may_write(repo)
        files = self.hub.repos[repo][self._may_read(repo, revision)]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.sha(repo, revision)
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        branch = self._may_read(repo, revision or "main")
        files = [{"rfilename": path} for path in sorted(self.hub.repos[repo][branch])]
        values = {"id": repo, "modelId": repo, "sha": self.hub.sha(repo, branch), "siblings": files, "tags": []}
        self.json({**values, "private": repo in self.hub.private})

    def tree(self, _: bytes, repo: str, revision: str, folder: str | None) -> None:
        files = self.hub.repos[repo][self._may_read(repo, revision)]
        inside = {path: data for path, data in files.items() if folder is None or path.startswith(f"{folder}/")}
        if folder is not None and not inside:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        oids = {path: hashlib.sha1(data).hexdigest() for path, data in inside.items()}
        self.json([{"type": "file", "path": path, "size": len(inside[path]), "oid": oids[path]} for path in inside])

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> None:
        branch = self._may_read(repo, revision)
        files = self.hub.repos[repo][branch]
        if path not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.sha(repo, branch)})


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/objects/(\w+)", Handler.store),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", Handler.commit),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(.+))?", Handler.info),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub at ``hub.url`` during the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Return the environment that makes a new process use this hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
