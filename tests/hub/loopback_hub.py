"""A Hugging Face Hub on the loopback interface: what huggingface_hub needs to create, fill, tag and read repositories.

Real HTTP, real bytes: content is kept by commit, large files go through the LFS protocol and are served by a second
server, as the Hub's own are by a CDN. Tokens, private repositories and faults are imitated; Xet is not, so clients run
with HF_HUB_DISABLE_XET=1. Routes and answers were written from what the client (huggingface_hub 2.4) sends and expects.

    with LoopbackHub() as hub:
        commit = hub.push("lab/tiny", {"config.json": b"{}"}, tag="v1")
        subprocess.run(..., env=os.environ | hub.environment(tmp_path, token="hf_lab"))
"""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tests.hub.repositories import ACCOUNTS, Account, Fault, Repository, entries, git_hash, is_large, sha256

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
COMMIT = re.compile(r"[0-9a-f]{40}")


class LoopbackHub:
    """`requests` lists "METHOD /path" in order, `auth` those with their token; `sent` counts bytes of answers."""

    def __init__(self, accounts: Mapping[str, Account] = ACCOUNTS) -> None:
        self.accounts = dict(accounts)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files of all repositories, by sha256
        self.requests: list[str] = []
        self.auth: list[tuple[str, str]] = []  # (request, token) of every request that carried one
        self.sent: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.hits: Counter[Fault] = Counter()
        self.before: Callable[[str], None] = lambda request: None  # called with "METHOD /path" before an answer
        self.lock = threading.RLock()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self)) for _ in ("api", "cdn")]
        self.threads = [threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True) for s in self.servers]
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.daemon_threads = True
            thread.start()

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self.servers[1].server_port}"

    def stop(self) -> None:
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables of a process that is to use this hub; without a token it is nobody."""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token or ""}
        quiet = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_UPDATE_CHECK")
        return settings | dict.fromkeys(quiet, "1") | {"HF_HUB_OFFLINE": "0", "HUGGING_FACE_HUB_TOKEN": ""}

    def push(
        self, repo: str, files: Mapping[str, bytes | Path], *, tag: str | None = None, private: bool = False
    ) -> str:
        """Put files into a repository from the server's side, beside those that are there; returns the commit."""
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository(private))
            content = self.content(repo) if repository.branches else {".gitattributes": GITATTRIBUTES}
            content |= {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()}
            large = {sha256(data): data for name, data in content.items() if is_large(name)}
            self.objects |= large
            repository.objects |= set(large)
            commit = repository.commit(content, "pushed by the test")
            if tag is not None:
                repository.tags[tag] = commit
            return commit

    def content(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision."""
        repository = self.repositories[repo]
        commit = repository.find(revision)
        if commit is None:
            raise KeyError(revision)
        return dict(repository.commits[commit])

    def fault(self, *faults: Fault) -> None:
        """Replace the faults; none: all is well again."""
        with self.lock:
            self.faults, self.hits = list(faults), Counter()

    def forget(self) -> None:
        """Forget requests and faults, keep the content."""
        with self.lock:
            self.fault()
            self.requests, self.auth, self.sent = [], [], Counter()
            self.before = lambda request: None

    def struck(self, request: str) -> Fault | None:
        """The fault that hits this request, counted."""
        with self.lock:
            for fault in self.faults:
                if re.search(fault.request, request):
                    self.hits[fault] += 1
                    if fault.skip < self.hits[fault] <= fault.skip + fault.times:
                        return fault
        return None


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True  # headers and body in one packet: half the time of the tests

    def __init__(self, hub: LoopbackHub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *arguments: object) -> None:
        """Silence."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client went away, or a fault closed the connection
            self.close_connection = True

    def answer_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        fault = self.hub.struck(request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.kind == "drop":
            self.rfile.read(min(fault.after, length))
            self.record(request)
            self.hang_up()
            return
        body = self.rfile.read(length)
        self.record(request)
        self.hub.before(request)
        if fault is not None and fault.kind == "status":
            headers = {"X-Error-Message": fault.message, **fault.headers}
            self.send(request, fault.status, headers, json.dumps({"error": fault.message}).encode())
            return
        try:
            with self.hub.lock:
                status, headers, data = self.route(path, body)
        except Refused as error:
            status, headers, data = error.status, error.headers, json.dumps({"error": str(error)}).encode()
        if fault is not None and fault.kind == "swallow":
            self.hang_up()
            return
        self.send(request, status, headers, data, fault)

    def do_GET(self) -> None:
        self.answer_request()

    def do_HEAD(self) -> None:
        self.answer_request()

    def do_POST(self) -> None:
        self.answer_request()

    def do_PUT(self) -> None:
        self.answer_request()

    def do_DELETE(self) -> None:
        self.answer_request()

    def record(self, request: str) -> None:
        with self.hub.lock:
            self.hub.requests.append(request)
            if self.token:
                self.hub.auth.append((request, self.token))

    def hang_up(self) -> None:
        """A reset instead of an orderly end, so that nobody mistakes it for a complete answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def send(
        self, request: str, status: int, headers: Mapping[str, str], body: bytes, fault: Fault | None = None
    ) -> None:
        start, end = 0, len(body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and asked and self.command == "GET":
            start, end = int(asked[1]), min(end, int(asked[2]) + 1 if asked[2] else end)
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        part = body[start:end]
        if fault is not None and fault.kind == "corrupt" and part:
            part = part[:-1] + bytes([part[-1] ^ 1])
        self.send_response(status)
        for key, value in {"Content-Length": str(len(part)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind == "truncate":
            self.wfile.write(part[: fault.after])
            self.wfile.flush()
            self.hang_up()
            return
        self.wfile.write(part)
        self.hub.sent[request] += len(part)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def account(self) -> Account | None:
        """Who asks; nobody without a token. A token that nobody has is refused, as by the Hub."""
        if not self.token:
            return None
        if self.token not in self.hub.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.accounts[self.token]

    def route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        def fits(method: str, pattern: str) -> re.Match[str] | None:
            return re.fullmatch(pattern, path) if self.command == method else None

        repo = r"/api/models/([^/]+/[^/]+)"
        if self.server.server_port == self.hub.servers[1].server_port:
            return self.cdn(path)
        if fits("GET", "/api/whoami-v2"):
            return self.who()
        if fits("POST", "/api/repos/create"):
            return self.create(json.loads(body))
        if fits("POST", "/api/validate-yaml"):
            return self.validate_yaml(json.loads(body)["content"])
        if found := fits("GET", repo + "/refs"):
            return self.refs(found[1])
        if found := fits("GET", repo + "(?:/revision/(.+))?"):
            return self.info(found[1], found[2] or "main")
        if found := fits("GET", repo + "/tree/([^/]+)"):
            return self.tree(found[1], found[2])
        if found := fits("POST", repo + "/preupload/(.+)"):
            return self.preupload(found[1], found[2], json.loads(body))
        if found := fits("POST", repo + "/commit/(.+)"):
            return self.commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        if found := fits("POST", repo + "/tag/(.+)"):
            return self.tag(found[1], found[2], json.loads(body)["tag"])
        if found := fits("DELETE", repo + "/tag/(.+)"):
            return self.untag(found[1], found[2])
        if found := fits("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"):
            return self.batch(found[1], json.loads(body))
        if found := fits("PUT", "/lfs/([^/]+/[^/]+)/([0-9a-f]{64})"):
            return self.store(found[1], found[2], body)
        if found := fits("POST", "/lfs/([^/]+/[^/]+)/verify"):
            return self.confirm(found[1], json.loads(body))
        if found := (
            fits("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)") or fits("HEAD", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
        ):
            return self.resolve(found[1], found[2], found[3])
        raise Refused(404, f"no route {self.command} {path}")

    def who(self) -> tuple[int, dict[str, str], bytes]:
        account = self.account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        return answer({"type": "user", "name": account.name, "orgs": [{"name": name} for name in account.writes]})

    def readable(self, repo: str) -> Repository:
        account = self.account()
        found = self.hub.repositories.get(repo)
        owner = repo.split("/")[0]
        if found is None or (found.private and (account is None or owner not in (account.name, *account.writes))):
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, repo: str) -> Repository:
        found = self.readable(repo)
        self.may_write(repo)
        return found

    def may_write(self, repo: str) -> None:
        account = self.account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        if repo.split("/")[0] not in account.writes:
            raise Refused(403, f"You don't have the rights to write to {repo.split('/')[0]}")

    def at(self, repo: str, revision: str) -> tuple[Repository, str]:
        found = self.readable(repo)
        commit = found.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commit

    def create(self, asked: Mapping[str, Any]) -> tuple[int, dict[str, str], bytes]:
        account = self.account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        name = f"{asked.get('organization') or account.name}/{asked['name']}"
        self.may_write(name)
        body = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return 409, {}, json.dumps(body | {"error": "You already created this model repo"}).encode()
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": GITATTRIBUTES}, "initial commit")
        self.hub.repositories[name] = repository
        return answer(body)

    def validate_yaml(self, content: str) -> tuple[int, dict[str, str], bytes]:
        """The Hub refuses front matter that is no mapping and warns when there is none."""
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if front is None:
            return answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            problem = "" if isinstance(yaml.safe_load(front[1]), dict) else "metadata is no mapping"
        except yaml.YAMLError as error:
            problem = f"invalid YAML: {error}"
        if problem:
            return 400, {}, json.dumps({"errors": [{"message": problem}], "warnings": []}).encode()
        return answer({"errors": [], "warnings": []})

    def refs(self, repo: str) -> tuple[int, dict[str, str], bytes]:
        found = self.readable(repo)

        def listed(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in names.items()]

        return answer({"branches": listed("heads", found.branches), "tags": listed("tags", found.tags), "converts": []})

    def info(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        found, commit = self.at(repo, revision)
        files = [
            entry | {"rfilename": entry["path"], "blobId": entry["oid"]} for entry in entries(found.commits[commit])
        ]
        return answer({"id": repo, "sha": commit, "private": found.private, "tags": [], "siblings": files})

    def tree(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        found, commit = self.at(repo, revision)
        return answer(entries(found.commits[commit]))

    def preupload(self, repo: str, revision: str, asked: Mapping[str, Any]) -> tuple[int, dict[str, str], bytes]:
        self.writable(repo)
        found, commit = self.at(repo, revision)
        files = []
        for file in asked["files"]:
            path, there = file["path"], found.commits[commit].get(file["path"])
            oid = None if there is None else sha256(there) if is_large(path) else git_hash(there)
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return answer({"files": files})

    def batch(self, repo: str, asked: Mapping[str, Any]) -> tuple[int, dict[str, str], bytes]:
        found = self.writable(repo)
        objects = []
        for wanted in asked["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in found.objects:
                upload, verify = (f"{self.hub.url}/lfs/{repo}/{last}" for last in (wanted["oid"], "verify"))
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        return answer({"transfer": "basic", "objects": objects})

    def store(self, repo: str, oid: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The address is the permission, as with the Hub's signed ones."""
        if sha256(body) != oid:
            raise Refused(400, "the bytes do not have the promised sha256")
        self.hub.objects[oid] = body
        self.hub.repositories[repo].objects.add(oid)
        return answer({})

    def confirm(self, repo: str, asked: Mapping[str, Any]) -> tuple[int, dict[str, str], bytes]:
        found = self.writable(repo)
        if asked["oid"] not in found.objects or len(self.hub.objects[asked["oid"]]) != asked["size"]:
            raise Refused(404, "no such object")
        return answer({})

    def commit(self, repo: str, revision: str, lines: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        found = self.writable(repo)
        if revision != "main":
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        content, message = self.hub.content(repo), ""
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit", found.branches["main"]) != found.branches["main"]:
                    raise Refused(
                        412, "The branch was updated since you opened this page. Please refresh and try again."
                    )
            elif kind == "file":
                content[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif kind == "lfsFile":
                if value["oid"] not in found.objects:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                content[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                if content.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"cannot do {kind}")
        oid = found.commit(content, message)
        return answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def tag(self, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        found = self.writable(repo)
        _, commit = self.at(repo, revision)
        if name in found.tags:
            raise Refused(409, f"Tag reference exists already: {name}")
        found.tags[name] = commit
        return answer({})

    def untag(self, repo: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if self.writable(repo).tags.pop(name, None) is None:
            raise Refused(404, f"no tag {name}", "RevisionNotFound")
        return answer({})

    def resolve(self, repo: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        found, commit = self.at(repo, revision)
        headers = {"X-Repo-Commit": commit}
        data = found.commits[commit].get(path)
        if data is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if not is_large(path):
            return 200, headers | {"ETag": f'"{git_hash(data)}"', "Content-Type": "text/plain"}, data
        digest = sha256(data)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": f'"{digest}"'}
        return 302, headers | linked | {"Location": f"{self.hub.cdn}/{digest}"}, b""

    def cdn(self, path: str) -> tuple[int, dict[str, str], bytes]:
        data = self.hub.objects.get(path.strip("/"))
        if data is None:
            raise Refused(404, "no such object")
        return 200, {"ETag": f'"{path.strip("/")}"'}, data


def answer(data: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()
