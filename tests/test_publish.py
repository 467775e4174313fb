"""Publishing, end to end: real folders, and a Hub on the loopback interface that keeps what it is sent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from geo_pretrain.catalog import File
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.loading import load_backbone
from geo_pretrain.publish import publish
from tests.forked import Forked, import_anew
from tests.hub.loopback_hub import Fault, LoopbackHub
from tests.zoo import write_tiny, write_tiny_3d

NAME = "tiny_net_r18"
ROOT = Path(__file__).resolve().parents[1]
CARD = "---\nlicense: mit\nlibrary_name: geo_pretrain\n---\n# tiny\n"


def answer_calls(connection: Connection) -> None:
    """Make the calls that arrive, and send what comes of each."""
    import_anew("huggingface_hub")
    from huggingface_hub import constants

    usual = {"ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": constants.HF_HUB_OFFLINE}
    with suppress(EOFError):
        while True:
            call = connection.recv()
            os.environ["HF_TOKEN"] = call.pop("token")
            for key, value in (usual | call.pop("settings", {})).items():
                setattr(constants, key, value)
            connection.send(answer_to(call))


def answer_to(call: dict[str, Any]) -> dict[str, Any]:
    """What a call gives, or how it fails."""
    try:
        if "load" in call:
            encoder = load_backbone(call.pop("load"), **call)
            return {"coverage": encoder.load_report.coverage, "name": encoder.name}
        done = publish(**call)
        answer = asdict(done) | {"lines": done.catalog_lines(), "size": done.size, "shown": str(done)}
        return json.loads(json.dumps(answer))
    except BaseException as error:
        notes = getattr(error, "__notes__", [])
        return {"error": type(error).__name__, "text": str(error), "notes": notes}


class Worker:
    """A fork that publishes to the loopback Hub: huggingface_hub reads its settings when it is imported."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.calls, theirs = Pipe()

        def work() -> None:
            self.calls.close()
            answer_calls(theirs)

        self.process = Forked(work, environment)
        theirs.close()

    def __call__(self, *, token: str = "hf_lab", **call: Any) -> dict[str, Any]:
        self.calls.send(json.loads(json.dumps({"token": token, **call}, default=str)))
        return self.calls.recv()

    def stop(self) -> None:
        self.calls.close()
        self.process.communicate()


@pytest.fixture(scope="module")
def loopback() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(loopback: LoopbackHub) -> LoopbackHub:
    loopback.forget()
    return loopback


@pytest.fixture(scope="module")
def worker(loopback: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(loopback.environment(tmp_path_factory.mktemp("hf_home")))
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "run", card=CARD).folder


NUMBERS = count()


@pytest.fixture
def repo() -> str:
    return f"lab/tiny{next(NUMBERS)}"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def sent(hub: LoopbackHub, pattern: str) -> list[str]:
    return [request for request in hub.requests if re.search(pattern, request)]


CHANGES = r"POST /api/repos/create|PUT /lfs|/commit/|POST .*/tag/"


def test_a_checkpoint_is_created_uploaded_verified_and_tagged(
    hub: LoopbackHub, worker: Worker, folder: Path, repo: str, tmp_path: Path
):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    done = worker(folder=run, to=f"hf-hub:{repo}")
    repository = hub.repositories[repo]
    # exactly the checkpoint is there, in one commit, with the tag on it
    there = hub.content(repo, "v1")
    assert there.pop(".gitattributes")
    assert there == content(folder)
    assert repository.tags == {"v1": done["commit"]} == {"v1": repository.branches["main"]}
    assert [repository.messages[oid] for oid in repository.commits] == ["initial commit", f"{NAME} v1"]
    assert not repository.private
    # what it says it did
    assert done["name"] == NAME
    assert (done["to"], done["repo"], done["tag"], done["dry_run"]) == (f"hf-hub:{repo}", repo, "v1", False)
    assert done["url"] == f"{hub.url}/{repo}/tree/v1"
    assert done["left_out"] == ["notes.txt"]
    shown = done["shown"]
    assert shown.startswith(f"Published '{NAME}' to hf-hub:{repo} (public if new), tag v1:\n")
    assert f"commit {done['commit']}\nFetched again: all digests agree, golden outputs within " in shown
    assert shown.endswith(f"For its catalog entry:\n{done['lines']}")
    expected = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content(folder).items()}
    assert {file["name"]: (file["size"], file["sha256"]) for file in done["files"]} == expected
    assert done["files"][-1]["role"] == "config"
    assert done["size"] == sum(size for size, _ in expected.values())
    assert set(done["verified"]) == {"decoder", *(f"encoder.{i}" for i in range(1, 5))}
    assert max(done["verified"].values()) < 1e-4
    # large files went as such, every file came back, and only then the tag was set
    assert len(sent(hub, "PUT /lfs/")) == 3
    fetched = {request.rsplit("/", 1)[1] for request in sent(hub, f"GET /{repo}/resolve/{done['commit']}/")}
    assert fetched == {name for name in expected if not name.endswith(".safetensors")}
    assert {request.rsplit("/", 1)[1] for request in sent(hub, r"^GET /[0-9a-f]{64}$")} == {
        digest for name, (_, digest) in expected.items() if name.endswith(".safetensors")
    }
    assert hub.requests[-1] == f"POST /api/models/{repo}/tag/{done['commit']}"
    assert all(token == "hf_lab" for _, token in hub.auth)
    assert not [request for request, _ in hub.auth if re.match(r"(GET|HEAD) /[0-9a-f]{64}$", request)]  # the CDN's


def test_the_catalog_lines_lead_back_to_the_published_files(
    hub: LoopbackHub, worker: Worker, folder: Path, repo: str, tmp_path: Path
):
    done = worker(folder=folder, to=f"hf-hub:{repo}")
    lines = done["lines"]
    scope: dict[str, Any] = {"File": File}
    exec(f"entry = dict({lines.rstrip(',')})", scope)
    files = scope["entry"]["files"]
    assert {(file.role, file.name, file.size, file.sha256) for file in files} == {
        (stored.role, name, stored.size, stored.sha256) for name, stored in read_checkpoint(folder).files.items()
    }
    assert {file.sources for file in files} == {(f"hf-hub:{repo}@{done['commit']}",)}
    # later pushes change nothing for who loads from that source
    hub.push(repo, {"config.json": b"{}"})
    loaded = worker(load=files[0].sources[0], token="", cache_dir=str(tmp_path))
    assert loaded == {"coverage": 1.0, "name": NAME}


def test_a_dry_run_says_what_would_go_and_touches_nothing(hub: LoopbackHub, worker: Worker, folder: Path, repo: str):
    plan = worker(folder=folder, to=f"hf-hub:{repo}", dry_run=True, token="", private=True, tag="v7")
    assert hub.requests == []
    assert (plan["dry_run"], plan["commit"], plan["tag"], plan["private"]) == (True, None, "v7", True)
    assert plan["lines"] == ""
    assert plan["shown"].startswith(f"Would publish '{NAME}' to hf-hub:{repo} (private if new), tag v7:\n")
    assert plan["shown"].endswith("This was a dry run: nothing was written or sent.")
    for name, data in content(folder).items():
        assert f"  {name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}\n" in plan["shown"]
    real = worker(folder=folder, to=f"hf-hub:{repo}")
    assert plan["files"] == real["files"]


def test_the_same_content_again_changes_nothing(hub: LoopbackHub, worker: Worker, folder: Path, repo: str):
    first = worker(folder=folder, to=f"hf-hub:{repo}")
    hub.forget()
    assert worker(folder=folder, to=f"hf-hub:{repo}") == first
    assert sent(hub, CHANGES) == []
    assert sent(hub, f"GET /{repo}/resolve/")  # it was verified all the same
    # a second tag on the same content needs no second commit
    second = worker(folder=folder, to=f"hf-hub:{repo}", tag="release")
    assert second["commit"] == first["commit"]
    assert hub.repositories[repo].tags == {"v1": first["commit"], "release": first["commit"]}


def test_a_tag_keeps_its_content_and_a_new_version_replaces_the_old_files(
    hub: LoopbackHub, worker: Worker, folder: Path, repo: str, tmp_path: Path
):
    first = worker(folder=folder, to=f"hf-hub:{repo}")
    hub.push(repo, {"picture.png": b"somebody's"})
    other = write_tiny(tmp_path / "other", card=CARD, provenance={"steps": 8}, recipe_yaml=None).folder
    hub.forget()
    refused = worker(folder=other, to=f"hf-hub:{repo}")
    assert refused["error"] == "HubError"
    assert "has a tag 'v1' with other content" in refused["text"]
    assert "such as 'v2'" in refused["text"]
    assert refused["text"].endswith("Nothing was published.")
    assert sent(hub, CHANGES) == []
    second = worker(folder=other, to=f"hf-hub:{repo}", tag="v2")
    there = hub.content(repo, "v2")
    assert there.pop("picture.png") == b"somebody's"
    assert there.pop(".gitattributes")
    assert there == content(other)
    assert "recipe.yaml" not in there
    assert hub.repositories[repo].tags == {"v1": first["commit"], "v2": second["commit"]}
    assert "recipe.yaml" in hub.content(repo, "v1")


def test_a_repository_that_holds_something_else_is_left_alone(
    hub: LoopbackHub, worker: Worker, folder: Path, repo: str, tmp_path: Path
):
    other = write_tiny(tmp_path / "other", name="tiny_other_r18").folder
    hub.push(f"{repo}-other", content(other))
    hub.push(f"{repo}-model", {"pytorch_model.bin": b"x", "tokenizer.json": b"{}", "a": b"", "b": b""})
    hub.push(f"{repo}-config", {"config.json": b'{"model_type": "bert"}'})
    for kind, message in {
        "other": "holds 'tiny_other_r18', not 'tiny_net_r18'",
        "model": r"holds something else \(a, b, pytorch_model\.bin and 1 more\); give a new repository",
        "config": "'format' is missing",
    }.items():
        before = hub.content(f"{repo}-{kind}")
        answer = worker(folder=folder, to=f"hf-hub:{repo}-{kind}")
        assert re.search(message, answer["text"]), answer
        assert hub.content(f"{repo}-{kind}") == before
    assert sent(hub, CHANGES) == []
    # one that was just made on the website is as good as new
    hub.push(f"{repo}-fresh", {"README.md": b"# soon\n", "LICENSE": b"MIT"})
    assert worker(folder=folder, to=f"hf-hub:{repo}-fresh")["tag"] == "v1"
    assert hub.content(f"{repo}-fresh")["README.md"] == CARD.encode()


def test_private_repositories(hub: LoopbackHub, worker: Worker, folder: Path, repo: str):
    done = worker(folder=folder, to=f"hf-hub:{repo}", private=True)
    assert hub.repositories[repo].private
    assert done["private"]
    assert worker(load=f"hf-hub:{repo}", token="")["error"] == "HubError"
    assert worker(load=f"hf-hub:{repo}")["coverage"] == 1.0
    hub.push(f"{repo}-public", {"README.md": b""})
    refused = worker(folder=folder, to=f"hf-hub:{repo}-public", private=True)
    assert "is public; make it private on the website" in refused["text"]
    assert set(hub.content(f"{repo}-public")) == {".gitattributes", "README.md"}


@pytest.mark.parametrize(
    ("token", "owner", "message"),
    [
        ("", "lab", "there is no token. Log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "lab", "log in with `hf auth login --force`"),
        ("hf_reader", "lab", "use one with write permission"),
        ("hf_lab", "others", "use one with write permission"),
    ],
)
def test_tokens_that_may_not_write(
    hub: LoopbackHub, worker: Worker, folder: Path, token: str, owner: str, message: str
):
    answer = worker(folder=folder, to=f"hf-hub:{owner}/nobody", token=token)
    assert answer["error"] == "HubError"
    assert message in answer["text"]
    assert f"{owner}/nobody" not in hub.repositories


# fault, then what the error says besides what is online, then what that is
CREATED = "the public repository 'REPO' was created"
BROKEN: dict[str, tuple[Fault, str, str]] = {
    "the Hub refuses the repository": (
        Fault("/api/repos/create", status=402, message="no more repositories for you"),
        "no more repositories for you",
        "creating the public repository 'REPO' failed",
    ),
    "the connection breaks as the repository is made": (
        Fault("/api/repos/create", "swallow"),
        "Check the network",
        "creating the public repository 'REPO' broke off, perhaps after it took effect",
    ),
    "the storage is full": (
        Fault("PUT /lfs/", status=507, message="no space"),
        "Error while uploading",
        f"{CREATED}; sending 7 files failed",
    ),
    "the token may not commit": (
        Fault("/commit/main", status=403, message="read only"),
        "use one with write permission",
        f"{CREATED}; sending 7 files failed",
    ),
    "the Hub breaks at the commit": (
        Fault("/commit/main", status=500),
        "The Hub has a problem: run the same command again later",
        f"{CREATED}; sending 7 files failed",
    ),
    "the answer to the commit is lost": (
        Fault("/commit/main", "swallow"),
        "Check the network",
        f"{CREATED}; sending 7 files broke off, perhaps after it took effect",
    ),
    "what arrived differs": (
        Fault("GET /[0-9a-f]{64}$", "corrupt"),
        "sha256 is",
        f"{CREATED}; 7 files are on main of 'REPO', in commit HEAD, without a tag",
    ),
    "config.json arrived altered": (
        Fault("GET .*/resolve/.*/config.json", "corrupt"),
        "its config.json is not the one that was sent",
        f"{CREATED}; 7 files are on main of 'REPO', in commit HEAD, without a tag",
    ),
    "a file is not there": (
        Fault("HEAD .*/resolve/.*/log.jsonl", status=404, headers={"X-Error-Code": "EntryNotFound"}),
        "Entry Not Found",
        f"{CREATED}; 7 files are on main of 'REPO', in commit HEAD, without a tag",
    ),
    "the tag is refused": (
        Fault("/tag/", status=403, message="tags are protected"),
        "tags are protected",
        f"{CREATED}; 7 files are on main of 'REPO', in commit HEAD, without a tag; setting the tag 'v1' failed",
    ),
    "somebody takes the tag": (
        Fault("/tag/", status=409, message="Tag reference exists already"),
        "Somebody else changed the repository meanwhile",
        f"{CREATED}; 7 files are on main of 'REPO', in commit HEAD, without a tag; setting the tag 'v1' failed",
    ),
    "too many requests": (
        Fault("whoami", status=429),
        "Wait a while, then run the same command again",
        "",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_breaks_says_what_is_online_and_the_same_command_goes_on(
    hub: LoopbackHub, worker: Worker, folder: Path, repo: str, case: str
):
    fault, message, so_far = BROKEN[case]
    hub.fault(fault)
    answer = worker(folder=folder, to=f"hf-hub:{repo}")
    assert answer["error"] == ("DigestMismatch" if fault.kind == "corrupt" else "HubError")
    assert message in answer["text"]
    head = hub.repositories[repo].branches["main"] if repo in hub.repositories else ""
    expected = so_far.replace("REPO", repo).replace("HEAD", head)
    last = f"So far: {expected}. The same command again goes on from there." if expected else "Nothing was published."
    assert answer["text"].splitlines()[-1] == last
    assert repo not in hub.repositories or hub.repositories[repo].tags == {}
    hub.fault()
    done = worker(folder=folder, to=f"hf-hub:{repo}")
    assert hub.repositories[repo].tags == {"v1": done["commit"]}
    there = hub.content(repo, "v1")
    assert there.pop(".gitattributes")
    assert there == content(folder)
    assert len(hub.repositories[repo].commits) == 2  # what had arrived was not sent twice


def test_transfers_that_break_once_succeed(hub: LoopbackHub, worker: Worker, folder: Path, repo: str):
    hub.fault(Fault("PUT /lfs/", "drop", after=1000, times=1), Fault("GET /[0-9a-f]{64}$", "corrupt", times=1))
    done = worker(folder=folder, to=f"hf-hub:{repo}")
    assert hub.repositories[repo].tags == {"v1": done["commit"]}
    assert len(sent(hub, "PUT /lfs/")) == 4
    assert len(sent(hub, r"^GET /[0-9a-f]{64}$")) == 4


def test_a_push_in_between_is_not_mixed_with_ours(hub: LoopbackHub, worker: Worker, folder: Path, repo: str):
    hub.push(repo, {"README.md": b"# soon\n"})
    before = hub.content(repo)

    def push(request: str) -> None:
        if request.endswith("/preupload/main"):
            hub.push(repo, {"README.md": b"# theirs\n"})

    hub.before = push
    answer = worker(folder=folder, to=f"hf-hub:{repo}")
    assert "Somebody else pushed meanwhile" in answer["text"]
    assert "sending 7 files failed" in answer["text"]
    assert hub.content(repo) == before | {"README.md": b"# theirs\n"}


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal that was sent has not reached the process yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_an_interrupt_says_what_is_online_too(hub: LoopbackHub, worker: Worker, folder: Path, repo: str):
    def interrupt(request: str) -> None:
        if "/tag/" in request:
            worker.process.send_signal(signal.SIGINT)
            while is_pending(worker.process.pid, signal.SIGINT):  # it is to arrive while the worker waits
                time.sleep(0.01)

    hub.before = interrupt
    answer = worker(folder=folder, to=f"hf-hub:{repo}")
    assert answer["error"] == "KeyboardInterrupt"
    assert len(answer["notes"]) == 1
    assert "without a tag; setting the tag 'v1' broke off, perhaps after it took effect" in answer["notes"][0]


def test_a_card_that_the_hub_refuses_is_named(hub: LoopbackHub, worker: Worker, repo: str, tmp_path: Path):
    run = write_tiny(tmp_path / "run", card="---\nlicense: [mit\n---\n# tiny\n").folder
    answer = worker(folder=run, to=f"hf-hub:{repo}")
    assert "Invalid metadata in README.md" in answer["text"]
    assert set(hub.content(repo)) == {".gitattributes"}


def test_a_hub_that_cannot_be_reached(hub: LoopbackHub, worker: Worker, folder: Path):
    with LoopbackHub() as gone:
        url = gone.url
    for settings, messages in (
        ({"ENDPOINT": url}, ("refused", "Check the network, then run the same command again.")),
        ({"HF_HUB_OFFLINE": True}, ("Unset HF_HUB_OFFLINE.",)),
    ):
        answer = worker(folder=folder, to="hf-hub:lab/tiny", settings=settings)
        assert answer["error"] == "HubError"
        for message in messages:
            assert message in answer["text"]
        assert answer["text"].endswith("Nothing was published.")
    assert hub.requests == []


def test_networks_of_every_kind_are_published(hub: LoopbackHub, worker: Worker, repo: str, tmp_path: Path):
    run = write_tiny_3d(tmp_path / "run", card=CARD).folder
    done = worker(folder=run, to=f"hf-hub:{repo}")
    assert set(done["verified"]) == {"output"}
    assert worker(load=f"hf-hub:{repo}@v1")["coverage"] == 1.0
