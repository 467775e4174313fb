"""The hub against real servers on the loopback interface and real folders, each source failing in its own way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from geo_pretrain import checkpoint, hub
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.catalog.entry import File
from geo_pretrain.checkpoint import read_checkpoint, read_weights, verify_file
from geo_pretrain.errors import CheckpointError, DigestMismatch, GeoPretrainError, HubError, UnknownName
from geo_pretrain.loading import load_backbone
from tests.forked import Forked, import_anew
from tests.zoo import as_tiny, resolve, role_weights, unsealed, write_tiny, write_tiny_3d

NAME = "tiny_net_r18"
Behavior = Callable[[str, bytes], tuple[int, dict[str, str], bytes]]


class Server:
    """Serves a folder; `behave` may change an answer (status, headers, body) by path. Counts requests by path."""

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, []
        self.has_own_paths = False  # True: `behave` maps paths to files itself
        self.behave: Behavior = lambda path, data: (200, {}, data)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: object) -> None:
        self.owner = server
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.owner.requests.append(self.path)
        file = self.owner.root / self.path.lstrip("/")
        there = file.is_file()
        status, headers, body = self.owner.behave(self.path, file.read_bytes() if there else b"")
        if status == 200 and not (there or self.owner.has_own_paths):
            status = 404
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_tiny(tmp_path / "www" / NAME)
    server = Server(tmp_path / "www")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("GEO_PRETRAIN_HUB", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_needed_files_are_fetched_and_the_rest_later(server: Server):
    folder = resolve(NAME, hub=server.url)
    assert names(folder) == ["config.json", "encoder.safetensors"]
    assert server.requests == [f"/{NAME}/config.json", f"/{NAME}/encoder.safetensors"]
    again = resolve(NAME, hub=server.url, roles=("encoder", "decoder"))
    assert again == folder
    assert server.requests[2:] == [f"/{NAME}/config.json", f"/{NAME}/decoder.safetensors"]
    found = read_checkpoint(folder)
    original = read_checkpoint(server.root / NAME)
    assert found.files == original.files
    for role in ("encoder", "decoder"):
        name = found.file_of(role)
        assert (folder / name).read_bytes() == (server.root / NAME / name).read_bytes()


def test_a_network_in_one_piece_is_fetched_whole(server: Server):
    write_tiny_3d(server.root / "tiny_net_srunet34")
    folder = resolve("tiny_net_srunet34", hub=server.url)
    assert names(folder) == ["config.json", "model.safetensors"]
    folder = resolve("tiny_net_srunet34", hub=server.url, roles=("model", "golden"))
    assert names(folder) == ["config.json", "golden.safetensors", "model.safetensors"]
    with pytest.raises(HubError, match="no file with role 'decoder'; it has: model, golden"):
        resolve("tiny_net_srunet34", hub=server.url, roles=("decoder",))


def test_the_second_call_needs_no_network(server: Server):
    folder = resolve(NAME, hub=server.url)
    server.stop()
    assert resolve(NAME, hub=server.url) == folder
    assert resolve(NAME, hub=server.url, local_files_only=True) == folder
    with pytest.raises(HubError, match="refused"):
        resolve(NAME, hub=server.url, roles=("decoder",))


def test_a_url_is_a_name_too_and_cache_dir_is_used(server: Server, tmp_path: Path):
    folder = resolve(f"{server.url}/{NAME}/", cache_dir=tmp_path / "other")
    assert folder.is_relative_to(tmp_path / "other")
    assert not (tmp_path / "cache").exists()


def test_the_environment_variable_lists_hubs_tried_in_order(server: Server, monkeypatch, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GEO_PRETRAIN_HUB", f"{tmp_path / 'empty'}, {server.url}/nothing, {server.url}")
    folder = resolve(NAME)
    assert server.requests[0] == f"/nothing/{NAME}/config.json"
    assert folder.is_relative_to(tmp_path / "cache")
    # an explicit hub replaces the variable
    assert resolve(NAME, hub=[str(server.root)]) == server.root / NAME


def test_redirects_are_followed(server: Server):
    server.behave = lambda path, data: (
        (302, {"Location": f"{server.url}/{path.removeprefix('/moved/')}"}, b"")
        if "/moved/" in path
        else (200, {}, data)
    )
    folder = resolve(NAME, hub=f"{server.url}/moved")
    verify_file(read_checkpoint(folder), "encoder.safetensors")


def broken(kind: str) -> Behavior:
    def behave(path: str, data: bytes) -> tuple[int, dict[str, str], bytes]:
        if path.endswith("encoder.safetensors"):
            if kind == "truncated":  # the connection ends before the promised length
                return 200, {"Content-Length": str(len(data))}, data[: len(data) // 2]
            if kind == "short":
                return 200, {}, data[: len(data) // 2]
            if kind == "altered":
                return 200, {}, data[:-1] + bytes([data[-1] ^ 1])
            if kind == "endless":
                return 200, {}, data + bytes(1 << 20)
        return 200, {}, data

    return behave


@pytest.mark.parametrize(
    ("kind", "times", "reason"),
    [
        ("truncated", 3, "the connection ended after 360996 of 721992 bytes"),
        ("short", 2, "fetched twice"),
        ("altered", 2, "fetched twice"),
        ("endless", 1, "at most 721992 are accepted"),
    ],
)
def test_a_broken_transfer_is_tried_again_and_then_refused(
    server: Server, tmp_path: Path, kind: str, times: int, reason: str
):
    server.behave = broken(kind)
    with pytest.raises(HubError, match=reason) as caught:
        resolve(NAME, hub=server.url)
    if reason == "fetched twice":
        assert read_checkpoint(server.root / NAME).files["encoder.safetensors"].sha256 in str(caught.value)
        assert isinstance(caught.value.__cause__, DigestMismatch)
    assert server.requests.count(f"/{NAME}/encoder.safetensors") == times
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []  # nothing half-fetched, no config.json that promises files


def test_a_transfer_that_breaks_once_succeeds(server: Server):
    server.behave = lambda path, data: broken("truncated")(path, data) if len(server.requests) < 3 else (200, {}, data)
    verify_file(read_checkpoint(resolve(NAME, hub=server.url)), "encoder.safetensors")
    assert len(server.requests) == 3


def test_a_truncated_config_is_tried_once_more_and_then_refused(server: Server):
    server.behave = lambda path, data: (200, {}, data[:50])
    with pytest.raises(HubError, match="is not JSON"):
        resolve(NAME, hub=server.url)
    assert len(server.requests) == 2


def test_a_server_error_is_reported_with_its_status(server: Server):
    server.behave = lambda path, data: (503, {}, b"")
    with pytest.raises(HubError, match="HTTP 503"):
        resolve(NAME, hub=server.url)


def test_a_damaged_cache_is_repaired(server: Server):
    folder = resolve(NAME, hub=server.url)
    good = (folder / "encoder.safetensors").read_bytes()
    (folder / "encoder.safetensors").write_bytes(good[:100])
    resolve(NAME, hub=server.url)
    assert (folder / "encoder.safetensors").read_bytes() == good
    (folder / "config.json").write_text("{")
    resolve(NAME, hub=server.url)
    assert read_checkpoint(folder).name == NAME


def test_offline_says_so(server: Server, monkeypatch):
    with pytest.raises(HubError, match="not in the cache"):
        resolve(NAME, hub=server.url, local_files_only=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="downloads are off"):
        resolve(NAME, hub=server.url)
    assert server.requests == []


def test_local_hubs_and_folders_are_used_in_place(tmp_path: Path):
    write_tiny(tmp_path / "hub" / NAME)
    assert resolve(NAME, hub=str(tmp_path / "hub")) == tmp_path / "hub" / NAME
    assert resolve(tmp_path / "hub" / NAME) == tmp_path / "hub" / NAME
    assert resolve(str(tmp_path / "hub" / NAME), roles=("encoder", "golden")) == tmp_path / "hub" / NAME


def test_folders_that_are_no_checkpoints_say_what_is_missing(tmp_path: Path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(str(tmp_path / "nowhere"))
    write_tiny(tmp_path / "tiny")
    (tmp_path / "tiny/decoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors: is missing"):
        resolve(tmp_path / "tiny", roles=("encoder", "decoder"))
    with pytest.raises(CheckpointError, match="no file with role 'heads'"):
        resolve(tmp_path / "tiny", roles=("heads",))
    # a folder of the working directory that happens to have a catalog name does not hide the name
    (tmp_path / "pri3d_view_r18").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="no hub is given"):
        resolve("pri3d_view_r18")


def test_an_unknown_name_gets_the_three_nearest(server: Server, tmp_path: Path):
    message = "Unknown backbone 'pri3d_viewgeo_r50'. Closest: 'pri3d_view_geo_r50', "
    with pytest.raises(UnknownName) as caught:
        resolve("pri3d_viewgeo_r50")
    assert str(caught.value).startswith(message)
    assert str(caught.value).count("'pri3d_") == 4
    with pytest.raises(UnknownName, match="Not on these hubs either") as caught:
        resolve("pri3d_viewgeo_r50", hub=[str(tmp_path), server.url])
    assert server.url in str(caught.value)


def test_every_source_is_listed_with_its_reason_and_what_to_do(server: Server, tmp_path: Path):
    server.behave = lambda path, data: (500, {}, b"")
    with pytest.raises(HubError) as caught:
        resolve("pri3d_view_r18", hub=[str(tmp_path), server.url])
    text = str(caught.value)
    assert f"- {tmp_path}: no folder" in text
    assert f"- {server.url}: " in text
    assert "HTTP 500" in text
    assert "`geo-pretrain train pri3d_view_r18 --data scannet:PATH --out DIR`" in text
    with pytest.raises(HubError, match=r"1nKng03DqkjREi9_mr2yQ-6uugIIzNzGm/view \(by way of GEO_PRETRAIN_MIRROR"):
        resolve("pri3d_view_geo_r50")
    with pytest.raises(HubError, match=r"geo-pretrain train pri3d_geo_r18\.rooms --out DIR"):
        resolve("pri3d_geo_r18.rooms")


def test_a_name_that_nobody_offers_or_makes_says_so(monkeypatch: pytest.MonkeyPatch):
    unmade = dataclasses.replace(CATALOG["pri3d_unsup_geo_r50"], status="planned", recipe=None)
    monkeypatch.setattr(hub, "find", {unmade.name: unmade}.get)
    with pytest.raises(HubError, match="no recipe makes it yet"):
        resolve(unmade.name)


@pytest.mark.parametrize("name", ["../www/tiny_net_r18", "a/b", "..", ""])
def test_names_cannot_leave_the_hub(tmp_path: Path, name: str):
    write_tiny(tmp_path / "www" / NAME)
    (tmp_path / "hub").mkdir()
    with pytest.raises((UnknownName, CheckpointError)):
        resolve(name, hub=str(tmp_path / "hub"))


def test_revision_is_refused_where_it_means_nothing(server: Server):
    with pytest.raises(HubError, match="Hugging Face only"):
        resolve(NAME, hub=server.url, revision="v1")
    with pytest.raises(HubError, match="Hugging Face only"):
        resolve(server.root / NAME, revision="v1")


def test_a_renamed_backbone_is_found_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import geo_pretrain.catalog as catalog

    write_tiny(tmp_path / "hub/pri3d_view_r18", name="pri3d_view_r18")
    monkeypatch.setattr(catalog, "RENAMED", {"pri3d_views_r18": "pri3d_view_r18"})
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {"pri3d_view_r18": as_tiny("pri3d_view_r18")})
    with pytest.warns(FutureWarning, match="pri3d_view_r18"):
        folder = resolve("pri3d_views_r18", hub=str(tmp_path / "hub"))
    assert folder == tmp_path / "hub/pri3d_view_r18"


def test_installed_bundles_are_found_by_name_and_come_after_the_hubs(server: Server, tmp_path: Path):
    write_tiny(tmp_path / "cache/bundles" / NAME)
    assert resolve(NAME, local_files_only=True) == tmp_path / "cache/bundles" / NAME
    assert resolve(NAME, hub=f"{server.url}/nothing") == tmp_path / "cache/bundles" / NAME
    assert resolve(NAME, hub=str(server.root)) == server.root / NAME


def test_published_entries_are_pinned_to_their_digests(server: Server, monkeypatch):
    entry = as_tiny("pri3d_geo_r18.rooms")
    write_tiny(server.root / entry.name, name=entry.name)
    stored = read_checkpoint(server.root / entry.name).files["encoder.safetensors"]
    source = f"{server.url}/{entry.name}/encoder.safetensors"

    def publish(digest: str) -> None:
        file = File("encoder", "encoder.safetensors", stored.size, digest, (source,))
        published = replace(entry, files=(file,))
        monkeypatch.setattr(hub, "find", {entry.name: published}.get)

    publish("0" * 64)
    with pytest.raises(HubError, match=f"promises sha256 {stored.sha256} .* expected {'0' * 64}"):
        resolve(entry.name)
    publish(stored.sha256)
    path = resolve(entry.name) / "encoder.safetensors"
    whole, config = path.read_bytes(), path.with_name("config.json")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # in the cache, with the digest of loads in config.json
    config.write_text(json.dumps(unsealed(path.parent)).replace(str(stored.xxh3), checkpoint.xxh3(path)))
    assert resolve(entry.name) == path.parent
    assert path.read_bytes() == whole


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hugging_face(server: Server) -> Behavior:
    """The part of the Hugging Face protocol a download needs: HEAD and GET of /owner/repo/resolve/revision/file."""

    def behave(path: str, data: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        missing = {"X-Error-Code": "RepoNotFound"}
        if len(parts) != 5 or parts[:3] != ["lab", NAME, "resolve"]:
            return 404, missing, b""
        file = server.root / NAME / parts[4]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        body = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body

    return behave


def in_process(calls: list[dict[str, object]], server: Server, cache: Path, **environment: str) -> list[str]:
    """huggingface_hub reads its settings when imported, so each case gets a fork of its own that imports it anew."""
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    settings["HF_HUB_DISABLE_TELEMETRY"] = settings["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"

    def work() -> None:
        import_anew("huggingface_hub")
        answers = []
        for call in calls:
            try:
                answers.append(str(resolve(**call)))
            except GeoPretrainError as error:
                answers.append(f"{type(error).__name__}: {error}")
        print(json.dumps(answers))

    process = Forked(work, settings)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return json.loads(printed.splitlines()[-1])


def test_hugging_face_repositories(server: Server, tmp_path: Path):
    server.behave, server.has_own_paths = hugging_face(server), True
    first, by_org, missing = in_process(
        [
            {"name_or_path": f"hf-hub:lab/{NAME}@v1"},
            {"name_or_path": NAME, "hub": "hf:lab", "revision": "v1"},
            {"name_or_path": "hf-hub:lab/nothing"},
        ],
        server,
        tmp_path / "hf",
    )
    folder = Path(first)
    assert folder.name == COMMIT
    assert by_org == first
    assert names(folder) == ["config.json", "encoder.safetensors"]
    assert read_weights(read_checkpoint(folder), "encoder")
    assert any(f"/lab/{NAME}/resolve/v1/config.json" in path for path in server.requests)
    assert any(f"/lab/{NAME}/resolve/{COMMIT}/encoder.safetensors" in path for path in server.requests)
    assert missing.startswith("HubError")
    assert "lab/nothing" in missing
    # without the network: what is there works, what is not says so
    server.requests.clear()
    offline = [
        {"name_or_path": f"hf-hub:lab/{NAME}@v1"},
        {"name_or_path": f"hf-hub:lab/{NAME}@v1", "roles": ["decoder"]},
    ]
    again, absent = in_process(offline, server, tmp_path / "hf", HF_HUB_OFFLINE="1")
    assert again == first
    assert absent.startswith("HubError")
    assert server.requests == []


@pytest.mark.parametrize("spec", ["", "lab", "lab/a/b", "/a", "lab/"])
def test_what_is_no_repository_is_refused_before_anybody_is_asked(spec: str):
    with pytest.raises(HubError, match=f"'{spec}' is no repository; OWNER/REPO or OWNER/REPO@REVISION is accepted"):
        resolve(f"hf-hub:{spec}@v1")


def test_two_revisions_that_differ_are_refused():
    with pytest.raises(HubError, match="lab/a@v1 states its revision; revision='v2' is another"):
        resolve("hf-hub:lab/a@v1", revision="v2")


def test_offline_hugging_face_names_both_switches(tmp_path: Path):
    with pytest.raises(HubError, match=r"config.json is not in its cache, .* \(local_files_only or HF_HUB_OFFLINE\)"):
        resolve("hf-hub:lab/a", cache_dir=tmp_path, local_files_only=True)


def test_a_file_and_nothing_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"weights.pth is not a folder; a checkpoint folder"):
        resolve("weights.pth")
    (tmp_path / "config.json").write_text("{}")  # "" must not mean the folder one is in
    with pytest.raises(UnknownName, match="Unknown backbone ''"):
        resolve("")


def test_an_encoder_alone_does_not_stop_the_search_for_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, roles = "pri3d_view_r18", {"encoder": role_weights("encoder")}
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {name: as_tiny(name)})
    write_tiny(tmp_path / "first" / name, name, arch=Arch("resnet", {"depth": 18, "width": 8}), weights=roles)
    write_tiny(tmp_path / "second" / name, name)
    hubs = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert isinstance(load_backbone(name, hub=hubs), ResNetEncoder)
    assert isinstance(load_backbone(name, hub=hubs, decoder=True), ResNetUNet)
    with pytest.raises(HubError, match=r"first.*holds no file with role 'decoder'"):
        load_backbone(name, hub=hubs[0], decoder=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"out_indices": 3}, "out_indices is 3; accepted: a list"), ({"in_chans": True}, "in_chans is True; accepted")],
)
def test_options_of_no_network_are_refused_before_anything_is_fetched(server: Server, options: dict, text: str):
    with pytest.raises(ValueError, match=text):
        load_backbone("pri3d_view_r18", hub=server.url, **options)
    assert server.requests == []


def test_the_hub_does_not_import_torch_or_hugging_face():
    code = "import sys, geo_pretrain.hub; sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_opened_checkpoint_answers_to_the_former_spelling_of_license(tmp_path: Path):
    opened = hub.open(write_tiny(tmp_path / NAME).folder)
    with pytest.warns(FutureWarning, match="'licence' is now 'license'"):
        assert opened.licence is opened.license
