"""Publishing, end to end: real folders, and a Hub on the loopback interface that keeps what it is sent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from geo_pretrain import publish as publishing
from geo_pretrain.catalog import CATALOG, Arch, File, License
from geo_pretrain.checkpoint import Checkpoint, read_checkpoint
from geo_pretrain.contract import contract_from_dict
from geo_pretrain.errors import CheckpointError, DigestMismatch, GeoPretrainError, HubError
from geo_pretrain.publish import publish
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task
from tests.hub.loopback_hub import Fault, LoopbackHub
from tests.zoo import LICENSE, PLANES, golden_file, resolve, write_tiny, write_tiny_3d

NAME = "tiny_net_r18"
ROOT = Path(__file__).resolve().parents[1]
CARD = "---\nlicense: mit\nlibrary_name: geo_pretrain\n---\n# tiny\n"

# huggingface_hub reads its settings when it is imported, so a process of its own makes the calls, one a line.
WORKER = """
import json, os, sys
from dataclasses import asdict
import geo_pretrain as gp
from geo_pretrain.publish import publish
from huggingface_hub import constants
usual = {"ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": constants.HF_HUB_OFFLINE}
print("ready", flush=True)
for line in sys.stdin:
    call = json.loads(line)
    os.environ["HF_TOKEN"] = call.pop("token")
    for key, value in (usual | call.pop("settings", {})).items():
        setattr(constants, key, value)
    try:
        if "load" in call:
            encoder = gp.load_backbone(call.pop("load"), **call)
            answer = {"coverage": encoder.load_report.coverage, "name": encoder.name}
        else:
            done = publish(**call)
            answer = asdict(done) | {"lines": done.catalog_lines(), "size": done.size, "shown": str(done)}
    except BaseException as error:
        notes = getattr(error, "__notes__", [])
        answer = {"error": type(error).__name__, "text": str(error), "notes": notes}
    print("answer " + json.dumps(answer), flush=True)
"""


class Worker:
    """A process that publishes to the loopback Hub."""

    def __init__(self, environment: dict[str, str]) -> None:
        settings = (
            os.environ | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GEO_PRETRAIN_SPARSE": "plain"}
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=settings,
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __call__(self, *, token: str = "hf_lab", **call: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"token": token, **call}, default=str) + "\n")
        self.process.stdin.flush()
        while not (line := self.read()).startswith("answer "):
            assert self.process.poll() is None, "the worker died"
        return json.loads(line.removeprefix("answer "))

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=300)


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


# From here on: what is refused before anything goes anywhere, and folders as targets; no network, so no other process.


def shifted() -> dict[str, Any]:
    golden = golden_file()
    return {"input": golden["input"], "decoder": golden["eval.out"] + 1e-3 * golden["eval.out"].abs().max()}


def licensed(**changes: Any) -> dict[str, Any]:
    return {"license": replace(LICENSE, **changes)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unfinished run": ({"finished": False}, "its training did not finish.*Resume the run"),
    "unstated weights": (licensed(weights="LicenseRef-unstated"), "nobody stated terms for the weights"),
    "unstated data": (
        licensed(weights="LicenseRef-unstated", datasets=(("photos", "LicenseRef-unstated"), ("none", "MIT"))),
        r"the weights, the data set photos \(LicenseRef-unstated\)",
    ),
    "unstated code": (licensed(code="LicenseRef-unstated"), "nobody stated terms for the code"),
    "an unstated start": (
        licensed(weights="LicenseRef-x", base_model="somebody's (LicenseRef-unstated)"),
        "terms for the start weights",
    ),
    "an empty card": ({"card": " \n"}, r"README\.md: is empty"),
    "golden values of another network": ({"golden": shifted()}, "golden outputs are not reproduced"),
    "no golden outputs": ({"golden": {"input": golden_file()["input"]}}, "golden outputs are not reproduced"),
    "another network under a name of the catalog": (
        {"name": "pri3d_view_r18.rooms"},
        "is a name of the catalog, whose network is",
    ),
}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def drop(role: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_config(folder, lambda config: config["files"].pop(read_checkpoint(folder).file_of(role)))

    return change


def foreign_role(folder: Path) -> None:
    (folder / "setup.py").write_text("x")
    entry = {"role": "setup", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    edit_config(folder, lambda config: config["files"].update({"setup.py": entry}))


def flip(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return change


EDITED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no card": (drop("card"), "holds no file with role 'card'"),
    "no golden values": (drop("golden"), "holds no file with role 'golden'"),
    "no decoder": (drop("decoder"), "holds no file with role 'decoder'"),
    "an altered weight file": (flip("decoder.safetensors"), r"decoder\.safetensors: sha256 is"),
    "an altered card": (flip("README.md"), r"README\.md: sha256 is"),
    "an absent log": (lambda folder: (folder / "log.jsonl").unlink(), r"log\.jsonl: is missing"),
    "unlisted weights": (
        lambda folder: shutil.copy(folder / "encoder.safetensors", folder / "heads.safetensors"),
        r"heads\.safetensors: is not listed",
    ),
    "a file that no role explains": (foreign_role, r"setup\.py: has role 'setup'; accepted: encoder"),
    "an incomplete license chain": (
        lambda folder: edit_config(folder, lambda config: config["licence"].update(code="")),
        "license chain is incomplete",
    ),
    "no checkpoint": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
}


def assert_refused(folder: Path, target: Path, message: str) -> None:
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=message) as caught:
            publish(folder, target, dry_run=dry_run)
        assert str(folder) in str(caught.value)
        assert not target.exists()


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_must_not_go_out_is_refused(tmp_path: Path, case: str):
    changes, message = REFUSED[case]
    assert_refused(write_tiny(tmp_path / "run", **changes).folder, tmp_path / "hub", message)


@pytest.mark.parametrize("case", list(EDITED))
def test_what_is_not_whole_is_refused(folder: Path, tmp_path: Path, case: str):
    change, message = EDITED[case]
    run = shutil.copytree(folder, tmp_path / "run")
    change(run)
    assert_refused(run, tmp_path / "hub", message)


def test_a_name_of_the_catalog_keeps_network_input_and_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "pri3d_view_r18.rooms"
    found = write_tiny(tmp_path / "run", name=name)
    files: tuple[File, ...] = ()

    def catalog(**changes: Any) -> None:
        facts = {"arch": found.arch, "contract": found.contract, "files": files} | changes
        entry = type("Entry", (), facts)
        monkeypatch.setattr(publishing, "CATALOG", {name: entry})
        monkeypatch.setattr("geo_pretrain.hub.bundle.CATALOG", {name: entry})

    catalog()
    assert publish(found.folder, tmp_path / "hub", dry_run=True).name == name
    catalog(contract=replace(found.contract, interpolation="bilinear"))
    with pytest.raises(CheckpointError, match=r"whose input is images: .*bilinear.*Give it another name"):
        publish(found.folder, tmp_path / "hub", dry_run=True)
    stored = found.files["encoder.safetensors"]
    source = (f"http://localhost/{name}/encoder.safetensors",)
    files = (File("encoder", "encoder.safetensors", stored.size, "1" * 64, source),)
    catalog()
    with pytest.raises(DigestMismatch, match=f"published with sha256 {'1' * 64}"):
        publish(found.folder, tmp_path / "hub", dry_run=True)
    files = (replace(files[0], sha256=stored.sha256),)
    catalog()
    assert publish(found.folder, tmp_path / "hub", dry_run=True).name == name


R18 = {"depth": 18, "width": 64}


@pytest.mark.parametrize(
    ("name", "one", "other", "same"),
    [
        ("resnet_unet", R18, R18 | {"out_chans": 32}, True),  # 32 follows from the depth
        ("resnet_unet", R18, R18 | {"out_chans": 16}, False),
        ("resnet_unet", R18, {"depth": 18, "in_chans": 3}, True),
        ("resnet_unet", R18, {"depth": 34, "width": 64}, False),
        ("resnet_unet", R18, {"depth": 18, "width": 8}, False),
        ("sr_unet", {"planes": PLANES, "width": 8}, {"planes": list(PLANES), "width": 8}, True),
        (
            "sr_unet",
            {"width": 8, "in_chans": 3},
            {"width": 8, "in_chans": 3, "normalize": True},
            False,
        ),  # no weight tells
    ],
)
def test_networks_are_compared_by_what_they_are(name: str, one: dict[str, Any], other: dict[str, Any], same: bool):
    assert publishing._same_network(Arch(name, one), Arch(name, other)) is same
    assert publishing._same_network(Arch(name, other), Arch(name, one)) is same
    assert not publishing._same_network(Arch("resnet", {"depth": 18}), Arch(name, one))


@pytest.mark.parametrize("name", ["pri3d_view_r18.rooms", "pri3d_geo_r50", "csc_srunet34.rooms"])
def test_what_a_recipe_makes_may_have_its_name(name: str):
    """As training states it, after a round trip through JSON."""
    recipe = load_recipe(name)
    if recipe.model is not None:
        recipe = replace(recipe, model=replace(recipe.model, init="scratch"))
    with torch.device("meta"):
        task: Any = build_task(recipe)[0]
    arch = Arch(CATALOG[name].arch.name, json.loads(json.dumps(task.arch_args)))
    contract = contract_from_dict(json.loads(json.dumps(task.contract.to_dict())))
    publishing._check_name(Checkpoint(Path(name), name, arch, contract, {}, CATALOG[name].license, {}, True))


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("hf-hub:lonely", {}, "hf-hub:owner/repo is accepted"),
        ("hf-hub:a/b/c", {}, "hf-hub:owner/repo is accepted"),
        ("hf-hub:lab/tiny@v1", {}, "hf-hub:owner/repo is accepted"),
        ("hf-hub:lab/--bad--", {}, "hf-hub:owner/repo is accepted"),
        ("hf:lab", {}, "hf-hub:owner/repo or a folder is accepted"),
        ("https://example.org/hub", {}, "hf-hub:owner/repo or a folder is accepted"),
        ("hf-hub:lab/tiny", {"tag": "not a tag"}, "such as 'v2'"),
        ("hf-hub:lab/tiny", {"tag": ""}, "such as 'v2'"),
        ("some/folder", {"tag": "v1"}, "Hugging Face only"),
        ("some/folder", {"private": True}, "Hugging Face only"),
    ],
)
def test_targets_that_cannot_be(folder: Path, to: str, options: dict[str, Any], message: str):
    with pytest.raises(HubError, match=message):
        publish(folder, to, dry_run=True, **options)
    assert not Path("some").exists()


def test_a_folder_becomes_a_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    target = tmp_path / "new" / "hub"
    plan = publish(run, target, dry_run=True)
    assert not (tmp_path / "new").exists()
    done = publish(run, str(target))
    assert replace(plan, dry_run=False) == replace(done, to=str(target))
    assert done.url == str(target / NAME)
    assert done.left_out == ("notes.txt",)
    assert str(done).startswith(f"Published '{NAME}' to {target / NAME}:\n")
    assert str(done).endswith("\nNot part of the checkpoint, so left out: notes.txt")
    assert content(target / NAME) == content(folder)
    assert os.listdir(target) == [NAME]
    monkeypatch.setenv("GEO_PRETRAIN_HUB", str(target))
    assert resolve(NAME) == target / NAME
    assert done.catalog_lines() == ""
    lines = done.catalog_lines("https://example.org/hub/")
    assert '"https://example.org/hub/tiny_net_r18/encoder.safetensors"' in lines
    assert lines.count("File(") == len(done.files) - 1


def test_a_folder_keeps_what_it_has(folder: Path, tmp_path: Path):
    publish(folder, tmp_path)
    before = {path: path.stat().st_ino for path in (tmp_path / NAME).iterdir()}
    publish(folder, tmp_path)
    assert {path: path.stat().st_ino for path in (tmp_path / NAME).iterdir()} == before
    publish(tmp_path / NAME, tmp_path)  # onto itself
    assert {path: path.stat().st_ino for path in (tmp_path / NAME).iterdir()} == before
    other = write_tiny(tmp_path / "other", provenance={"steps": 8}).folder
    for dry_run in (True, False):
        with pytest.raises(HubError, match=r"another checkpoint of this name\. A published name"):
            publish(other, tmp_path, dry_run=dry_run)
    assert content(tmp_path / NAME) == content(folder)
    # the same one, damaged, is repaired
    flip("encoder.safetensors")(tmp_path / NAME)
    (tmp_path / NAME / "log.jsonl").unlink()
    publish(folder, tmp_path, dry_run=True)
    assert content(tmp_path / NAME) != content(folder)
    publish(folder, tmp_path)
    assert content(tmp_path / NAME) == content(folder)
    assert sorted(os.listdir(tmp_path)) == ["other", NAME]


def test_folders_that_cannot_be_hubs(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "hub" / NAME).mkdir(parents=True)
    (tmp_path / "hub" / NAME / "thesis.tex").write_text("years of work")
    for target, message in {
        folder: "is a checkpoint itself; a folder that holds",
        tmp_path / "file": "is a file; a folder that holds",
        tmp_path / "file" / "below": "cannot be written .*Choose another folder",
        tmp_path / "hub": "holds files but no config",
    }.items():
        with pytest.raises(GeoPretrainError, match=message):
            publish(folder, target)
    assert os.listdir(tmp_path / "hub" / NAME) == ["thesis.tex"]
    assert NAME not in os.listdir(folder)


def test_a_copy_that_fails_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "decoder.safetensors":
            flip(target.name)(target.parent)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(DigestMismatch, match=r"decoder\.safetensors"):
        publish(folder, tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_catalog_has_an_entry_with_unstated_terms():
    """So the refusal is not of a case that never comes."""
    unstated = [name for name, entry in CATALOG.items() if entry.license.weights == publishing.UNSTATED]
    assert unstated
    assert isinstance(CATALOG[unstated[0]].license, License)
