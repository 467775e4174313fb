"""What a loopback Hub keeps: accounts, repositories by commit, the faults it shall imitate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Account:
    """Who a token belongs to and which namespaces it may write to."""

    name: str
    writes: tuple[str, ...]


ACCOUNTS = {"hf_lab": Account("lab", ("lab",)), "hf_reader": Account("reader", ())}


@dataclass(frozen=True, eq=False)  # each is counted by itself
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `request` (a regular expression, searched).

    `kind`: "status" answers `status`; "drop" resets the connection before an answer, after reading `after` bytes of
    what is sent; "truncate" sends `after` bytes of the body and hangs up; "corrupt" flips a bit of the body; "swallow"
    does the work and then resets the connection, so that the client never hears of it. The first `skip` are spared.
    """

    request: str
    kind: str = "status"
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "this is a fault"
    after: int = 0
    times: int = 1 << 30
    skip: int = 0


@dataclass
class Repository:
    """Content by commit; branches and tags point at commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)  # large files that were sent here, by sha256
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)

    def commit(self, files: Mapping[str, bytes], message: str) -> str:
        """Make these the whole content of main."""
        parent = self.branches.get("main", "")
        text = json.dumps([parent, message, len(self.commits), sorted((k, sha256(v)) for k, v in files.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.branches["main"] = dict(files), message, oid
        return oid


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def entries(content: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The files of a commit, as the API lists them."""
    listed = []
    for path, data in sorted(content.items()):
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        if is_large(path):
            entry["lfs"] = {"oid": sha256(data), "sha256": sha256(data), "size": len(data), "pointerSize": 134}
        listed.append(entry)
    return listed
