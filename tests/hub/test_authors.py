"""Authors' files end to end: fetched from imitated hosts, extracted, converted, kept; and what goes wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geo_pretrain import checkpoint, digests, hub
from geo_pretrain.catalog import CATALOG, Arch, AuthorsFile, Entry
from geo_pretrain.checkpoint import read_checkpoint, read_weights, verify_files
from geo_pretrain.errors import CheckpointError, HubError, UnknownName, UnsafeFile, WeightsMismatch
from geo_pretrain.hub import authors
from geo_pretrain.loading import load_backbone, verify
from tests.authors_files import Layout, layout, resnet, write
from tests.forked import Forked
from tests.hub.hosts import Fault, Hosts
from tests.zoo import resolve

NAME = "pri3d_view_r18"
UNET = Arch("resnet_unet", {"depth": 18, "width": 8, "out_chans": 4})  # the network of that name has 64 and 32
RESNET = Arch("resnet", {"depth": 18, "width": 8})
NARROW = 8  # times fewer channels than the published networks have
ENTRY = replace(CATALOG[NAME], arch=UNET)
STATE, ENCODER = "https://drive.google.com/file/d/1State/view", "https://www.dropbox.com/s/1enc/encoder.pth?dl=0"
OTHER = "https://github.com/lab/zoo/releases/download/v1/encoder.pkl"
FILES = (
    AuthorsFile(STATE, "pri3d", "2D U-Net and depth head", ("encoder", "decoder", "heads")),
    AuthorsFile(ENCODER, "torchvision", "encoder", ("encoder",)),
    AuthorsFile(OTHER, "detectron2", "encoder", ("encoder",)),
)
WHOLE = ("encoder", "decoder")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three files of one checkpoint, and their twins with other weights."""
    folder = tmp_path_factory.mktemp("authors")
    paths = {}
    for seed, mark in ((0, ""), (1, " changed")):
        for file, options in zip(FILES, ({"geo": False}, {}, {}), strict=True):
            path = folder / f"{file.format}{seed}"
            write(file.format, path, seed, arch=UNET, **options)
            paths[file.url + mark] = path
    return paths


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hosts(written: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    offer(monkeypatch, *FILES)
    with Hosts({file.url: written[file.url] for file in FILES}) as hosts:
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", hosts.url)
        yield hosts


def offer(monkeypatch: pytest.MonkeyPatch, *files: AuthorsFile) -> Entry:
    """The entry as if its authors offered these files."""
    whole = any("decoder" in file.roles for file in files)
    entry = replace(ENTRY, arch=UNET if whole else RESNET, authors_files=files, status="published-by-authors")
    monkeypatch.setattr(hub, "find", {NAME: entry}.get)
    return entry


def files_in(cache: Path) -> list[str]:
    """What lies in the cache, but for locks."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_an_encoder_comes_from_its_own_file_and_a_decoder_from_the_whole_state(hosts: Hosts, cache: Path):
    folder = resolve(NAME)
    assert set(hosts.bytes_sent) == {ENCODER}
    found = read_checkpoint(folder)
    assert found.name == NAME
    assert [stored.role for stored in found.files.values()] == ["encoder", "golden", "card"]
    assert found.arch == RESNET  # what is in the folder
    assert len(verify(folder).errors) == 5
    encoder = load_backbone(NAME)  # no network: nothing more was sent
    assert set(hosts.bytes_sent) == {ENCODER}
    expected = layout("torchvision", arch=UNET).expected
    assert encoder.load_report.coverage == 1
    assert all(encoder.state_dict()[key].equal(value) for key, value in expected["encoder"].items())

    network = load_backbone(NAME, decoder=True)
    assert set(hosts.bytes_sent) == {ENCODER, STATE}
    expected = layout("pri3d", arch=UNET, geo=False).expected
    for role in WHOLE:
        state = network.get_submodule(role).state_dict()
        assert state.keys() == expected[role].keys()
        assert all(state[key].equal(value) for key, value in expected[role].items())
    heads = read_weights(read_checkpoint(folder), "heads")
    assert heads.keys() == expected["heads"].keys()
    assert verify(NAME).passed
    assert load_backbone(NAME, local_files_only=True).load_report.coverage == 1
    assert [*hosts.served.values()] == [1, 1]
    verify_files(read_checkpoint(folder))
    assert all(name.startswith(f"authors/{NAME}/") or name == "authors/digests.json" for name in files_in(cache))


def test_provenance_card_and_digest_say_where_it_came_from(hosts: Hosts, cache: Path, written: dict[str, Path]):
    from hashlib import sha256

    folder = resolve(NAME)
    digest = sha256(written[ENCODER].read_bytes()).hexdigest()
    source = read_checkpoint(folder).provenance["source"]
    assert (source["url"], source["sha256"], source["format"]) == (ENCODER, digest, "torchvision")
    card = (folder / "README.md").read_text()
    assert digest in card
    assert ENCODER in card
    recorded = json.loads((cache / "authors/digests.json").read_text())
    assert list(recorded) == [ENCODER]
    assert recorded[ENCODER]["sha256"] == digest


def test_the_next_file_is_tried_when_one_fails(hosts: Hosts):
    hosts.fault(ENCODER, Fault("status", status=404))
    folder = resolve(NAME)
    assert read_checkpoint(folder).provenance["source"]["url"] == OTHER
    hosts.fault(OTHER, Fault("status", status=404))
    assert resolve(NAME) == folder  # from the cache


def test_every_file_that_fails_is_named_with_its_reason(hosts: Hosts, cache: Path):
    for url in (ENCODER, OTHER):
        hosts.fault(url, Fault("status", status=404))
    hosts.fault(STATE, Fault("quota"))
    with pytest.raises(HubError) as caught:
        resolve(NAME)
    text = str(caught.value)
    for part in (ENCODER, OTHER, STATE, "404", "quota", "geo-pretrain train pri3d_view_r18", "geo-pretrain convert"):
        assert part in text
    assert all(text.count(url) == 1 for url in (ENCODER, OTHER))
    assert files_in(cache) == []


def test_a_damaged_file_is_called_by_its_address(hosts: Hosts, cache: Path, monkeypatch: pytest.MonkeyPatch):
    offer(monkeypatch, FILES[1])
    hosts.fault(ENCODER, Fault("corrupt"))
    with pytest.raises(HubError, match=f"authors' own file: {re.escape(ENCODER)}: .*damaged") as caught:
        resolve(NAME)
    assert ".part" not in str(caught.value)
    assert files_in(cache) == []


def test_the_first_fetch_reads_no_weights_again(hosts: Hosts, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    real = checkpoint.sha256
    for module in (checkpoint, digests):
        monkeypatch.setattr(module, "sha256", lambda path: (read.append(path.name), real(path))[1])
    resolve(NAME)
    assert read.count("encoder.safetensors") == 1


def test_a_list_of_digests_of_another_shape_is_refused(hosts: Hosts, cache: Path):
    (cache / "authors").mkdir(parents=True)
    for text in ("[]", '{"https://a": "b"}'):
        (cache / "authors/digests.json").write_text(text)
        with pytest.raises(HubError, match=r"digests.json: is not a list of digests.*remove it"):
            resolve(NAME)


def test_roles_that_nobody_offers_are_an_error(hosts: Hosts, monkeypatch: pytest.MonkeyPatch):
    offer(monkeypatch, FILES[1])
    with pytest.raises(HubError, match="no encoder and decoder of it; they offer encoder: encoder"):
        resolve(NAME, roles=WHOLE)
    assert hosts.requests == []


def test_a_recipe_is_not_among_what_an_authors_file_gives(hosts: Hosts):
    resolve(NAME)
    with pytest.raises(HubError, match="holds no recipe"):
        resolve(NAME, roles=("encoder", "recipe"))
    assert sum(hosts.served.values()) == 1  # it is not fetched again in the hope of one


def test_an_altered_file_is_noticed_by_the_digest_of_the_first_use(
    hosts: Hosts, cache: Path, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    from geo_pretrain.hub.cache import remove

    offer(monkeypatch, FILES[1])
    resolve(NAME)
    remove([NAME])
    hosts.files[ENCODER] = written[ENCODER + " changed"]
    sent = hosts.served[ENCODER]
    with pytest.raises(HubError, match=r"fetched twice: sha256 is .* but its first use here recorded"):
        resolve(NAME)
    assert hosts.served[ENCODER] == sent + 2  # one forced retry
    assert files_in(cache) == ["authors/digests.json"]
    hosts.files[ENCODER] = written[ENCODER]
    assert resolve(NAME).is_dir()


def test_a_corrupt_transfer_is_cured_by_the_retry(hosts: Hosts, monkeypatch: pytest.MonkeyPatch):
    from geo_pretrain.hub.cache import remove

    offer(monkeypatch, FILES[1])
    good = read_checkpoint(resolve(NAME)).files["encoder.safetensors"]
    remove([NAME])
    hosts.fault(ENCODER, Fault("corrupt", times=1))
    assert read_checkpoint(resolve(NAME)).files["encoder.safetensors"] == good


def test_a_digest_of_the_catalog_comes_before_the_first_use(hosts: Hosts, monkeypatch: pytest.MonkeyPatch):
    offer(monkeypatch, replace(FILES[1], sha256="0" * 64))
    with pytest.raises(HubError, match=f"the catalog states {'0' * 64}"):
        resolve(NAME)


def test_two_files_with_different_encoders_are_warned_about(
    hosts: Hosts, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    resolve(NAME)
    hosts.files[STATE] = written[STATE + " changed"]
    with pytest.warns(UserWarning, match="100 of 100 tensors differ"):
        resolve(NAME, roles=WHOLE)


def test_a_folder_made_by_older_rules_is_made_anew(hosts: Hosts, monkeypatch: pytest.MonkeyPatch):
    resolve(NAME)
    assert hosts.served[ENCODER] == 1
    monkeypatch.setattr(authors, "CONVERSION", authors.CONVERSION + 1)
    resolve(NAME)
    assert hosts.served[ENCODER] == 2


def test_a_damaged_folder_is_made_anew(hosts: Hosts):
    folder = resolve(NAME)
    good = (folder / "encoder.safetensors").read_bytes()
    (folder / "encoder.safetensors").write_bytes(good[:1000])
    assert resolve(NAME) == folder
    assert (folder / "encoder.safetensors").read_bytes() == good


def test_offline_says_so(hosts: Hosts, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(HubError, match="downloads are off"):
        resolve(NAME, local_files_only=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="downloads are off"):
        resolve(NAME)
    assert hosts.requests == []


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_a_hostile_file_is_refused_and_nothing_runs(hosts: Hosts, tmp_path: Path, cache: Path):
    canary = tmp_path / "canary"
    for url in (ENCODER, STATE, OTHER):
        hosts.files[url] = pickle.dumps({"model": {"conv1.weight": torch.zeros(1)}, "x": Attack(canary)})
    with pytest.raises(HubError, match="system"):
        resolve(NAME)
    assert not canary.exists()
    assert files_in(cache) == []


def test_a_file_of_another_network_is_refused(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offer(monkeypatch, FILES[1])
    write("torchvision", tmp_path / "r50", arch=Arch("resnet", {"depth": 50, "width": 8}))
    hosts.files[ENCODER] = tmp_path / "r50"
    with pytest.raises(HubError, match="of 120 tensors match this network"):
        resolve(NAME)


def test_weights_that_compute_nothing_are_refused(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offer(monkeypatch, FILES[1])
    state = resnet(18, 0, NARROW)
    state["layer3.0.bn1.running_var"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    hosts.files[ENCODER] = tmp_path / "nan.pth"
    with pytest.raises(HubError, match=r"undefined outputs .*encoder\.3"):
        resolve(NAME)


def test_many_processes_fetch_once(hosts: Hosts):
    started = [Forked(lambda: print(hub.open(NAME).fetch("encoder").folder)) for _ in range(3)]
    folders = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(folders) == 1
    assert dict(hosts.served) == {ENCODER: 1}


# --- convert_file: a file that lies here already ---


def test_a_file_fetched_by_hand(tmp_path: Path, written: dict[str, Path]):
    found = authors.convert_file(written[OTHER], tmp_path / "mine", like=ENTRY, format="detectron2", name="my_r18")
    assert found.name == "my_r18"
    assert found.license == ENTRY.license
    assert verify_encoder(tmp_path / "mine", layout("detectron2", arch=UNET))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_what_is_there_is_kept(tmp_path: Path, written: dict[str, Path]):
    arguments = {"like": ENTRY, "format": "detectron2"}
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    authors.convert_file(written[OTHER], tmp_path / "out", work=work, **arguments)
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    before = (tmp_path / "out/config.json").read_bytes()
    with pytest.raises(CheckpointError, match="out holds a checkpoint; give another folder, or overwrite=True"):
        authors.convert_file(written[OTHER], tmp_path / "out", name="other", **arguments)
    assert (tmp_path / "out/config.json").read_bytes() == before
    assert (
        authors.convert_file(written[OTHER], tmp_path / "out", overwrite=True, name="other", **arguments).name
        == "other"
    )
    with pytest.raises(CheckpointError, match=r"notes.txt/x: cannot be written \(Not a directory\)"):
        authors.convert_file(written[OTHER], work / "notes.txt/x", **arguments)


def verify_encoder(folder: Path, expected: Layout) -> bool:
    state = load_backbone(folder).state_dict()
    return all(state[key].equal(value) for key, value in expected.expected["encoder"].items())


def test_convert_file_refuses_what_it_cannot_do_and_leaves_nothing(tmp_path: Path, written: dict[str, Path]):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "page.pth").write_text("<html>Sign in</html>")
    for kwargs, error, text in (
        ({"path": tmp_path / "nothing.pth"}, CheckpointError, "is not a file"),
        ({"format": "pri4d"}, UnknownName, "Closest: 'pri3d'"),
        ({"format": "moco"}, WeightsMismatch, "encoder_q"),
        ({"folder": tmp_path / "full"}, CheckpointError, "left alone"),
        ({"name": "../evil"}, CheckpointError, "letters, digits"),
        ({"path": tmp_path / "page.pth"}, UnsafeFile, "web page"),
    ):
        arguments = {"path": written[OTHER], "folder": tmp_path / "out", "like": ENTRY, "format": "detectron2"} | kwargs
        with pytest.raises(CheckpointError if error is UnsafeFile else error, match=text):
            authors.convert_file(arguments.pop("path"), arguments.pop("folder"), **arguments)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "page.pth"]
        assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_foreign_objects_are_reported(tmp_path: Path):
    entry = CATALOG["pointcontrast_nce_srunet34"]
    entry = replace(entry, arch=Arch("sr_unet", dict(entry.arch.args) | {"width": 32 // NARROW}))
    expected = write(entry, tmp_path / "nce.pth", 3)
    found = authors.convert_file(tmp_path / "nce.pth", tmp_path / "nce", like=entry, format="pointcontrast")
    assert found.provenance["foreign"] == [
        "omegaconf.base.ContainerMetadata",
        "omegaconf.dictconfig.DictConfig",
        "typing.Any",
    ]
    assert found.provenance["in_the_file"]["curr_iter"] == 60000
    model = read_weights(found, "model")
    assert model.keys() == expected["model"].keys()
    assert all(model[key].equal(value) for key, value in expected["model"].items())
    golden = read_weights(found, "golden")
    assert golden["input.feats"].eq(1).all()  # PointContrast sees ones
