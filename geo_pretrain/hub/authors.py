"""Checkpoints in their authors' formats: downloaded, converted into our checkpoint folder, cached.

An authors' file is a pickle from a stranger. It is read in a subprocess that executes nothing of it (`extract`); what
comes out are tensors, converted (`convert`), put into the network, run once for the golden values, and written as a
checkpoint folder. Later calls read that folder alone. torch is imported only when something is converted.
"""

from __future__ import annotations

import datetime
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geo_pretrain import __version__
from geo_pretrain.cards import render_card
from geo_pretrain.catalog import AuthorsFile, Entry
from geo_pretrain.checkpoint import (
    CONFIG,
    WEIGHT_ROLES,
    Checkpoint,
    check_target,
    intact_checkpoint,
    read_checkpoint,
    read_weights,
    sha256,
    write_checkpoint,
)
from geo_pretrain.convert import FORMATS, Converted, convert
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError, UnsafeFile, WeightsMismatch, unknown
from geo_pretrain.files import parse_json, write_text
from geo_pretrain.hub.cache import exclusive
from geo_pretrain.hub.extract import Extracted, extract
from geo_pretrain.hub.transfer import Progress, download
from geo_pretrain.tensors import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

CONVERSION = 1  # raised when a rule of conversion changes: older folders in the cache are then made anew
DIGESTS = "digests.json"


@dataclass(frozen=True)
class Origin:
    """The authors' file that a folder was made from; the card and config.json state it."""

    url: str
    sha256: str
    format: str
    content: str
    fetched: str  # date


def fetch(
    entry: Entry,
    roles: Sequence[str],
    cache_dir: Path,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download an entry's authors' file and convert it; return the checkpoint folder, which has at least `roles`.

    Several files may hold the roles: the one with the fewest others is tried first (an encoder's own file before a
    whole training state). Raises `HubError` with each file's address and reason.
    """
    folder = cache_dir / "authors" / entry.name
    if _is_usable(folder, roles):
        return folder
    if offline:
        raise HubError(f"not in the cache {folder}, and downloads are off (local_files_only or HF_HUB_OFFLINE)")
    if impossible := [role for role in roles if role not in (*WEIGHT_ROLES, "golden", "card")]:
        raise HubError(f"a folder made from an authors' file holds no {' and '.join(impossible)}")
    wanted = [role for role in roles if role in WEIGHT_ROLES]
    files = sorted((f for f in entry.authors_files if set(wanted) <= set(f.roles)), key=lambda f: len(f.roles))
    if not files:
        have = "; ".join(f"{f.content}: {', '.join(f.roles)}" for f in entry.authors_files)
        raise HubError(f"the authors offer no {' and '.join(wanted)} of it; they offer {have}")
    with exclusive(folder):
        if _is_usable(folder, roles):  # another process was quicker
            return folder
        before = _encoder(folder)
        failures: list[Exception] = []
        for file in files:
            try:
                _make(entry, file, folder, cache_dir, progress)
                if before:
                    _warn_if_changed(entry.name, before, _encoder(folder))
            except (HubError, CheckpointError, WeightsMismatch, OSError) as error:
                failures.append(error)
            else:
                return folder
        raise HubError(said_once(list(map(str, failures)))) from failures[-1]


def said_once(messages: Sequence[str]) -> str:
    """Messages in one, with the advice that all of them end with said once.

    >>> said_once(["a: gone. Check the network.", "b: gone. Check the network."])
    'a: gone; b: gone. Check the network.'
    """
    tails = [message.partition(". ")[2] for message in messages]
    if len(messages) < 2 or not tails[0] or len(set(tails)) > 1:
        return "; ".join(messages)
    return "; ".join(message.partition(". ")[0] for message in messages) + f". {tails[0]}"


def convert_file(
    path: Path,
    folder: Path,
    *,
    like: Entry,
    format: str,
    name: str | None = None,
    origin: Origin | None = None,
    work: Path | None = None,
    overwrite: bool = False,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
    note: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """Convert an authors' file, or a safetensors file with such weights, into the checkpoint folder `folder`.

    `like` is the catalog entry with the architecture, contract and license of the weights; `name` of the checkpoint
    is the entry's by default. Each network role that the file has is written whole; the file of a U-Net's encoder
    gives a checkpoint of that ResNet. `work` is a folder for intermediate files; `overwrite` allows to replace a
    checkpoint.

    Where the file holds more than the network, the one prefix is looked for under which a whole network lies, in the
    entry that the format names and then among all dicts of the file; `prefix` names it ("": none), and keys that match
    one of `ignore` are left out. `note` is told what was found of each part, and what was not used.

    Raises `UnsafeFile`, `CheckpointError`, or `WeightsMismatch` when the network is not in the file.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    path, name = Path(path), name or like.name
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; an authors' file in format {format!r} is accepted.")
    check_target(folder, name)
    if (folder / CONFIG).is_file() and not overwrite:
        raise CheckpointError(f"{folder} holds a checkpoint; give another folder, or overwrite=True (--overwrite).")
    if origin is None:
        content = FORMATS[format].text
        origin = Origin(path.name, sha256(path), format, content, datetime.date.today().isoformat())
    beside = folder.resolve().with_name(f".{folder.name}.converting")
    tensors = (work or beside) / "tensors.safetensors"
    try:
        tensors.parent.mkdir(parents=True, exist_ok=True)
        chosen = _Chosen(prefix, tuple(ignore), network_states_of(like))
        converted, extracted = chosen.convert(path, tensors, format)
        note(converted.report.coverage(chosen.networks))
        return _write(converted, extracted, folder, like, name, origin)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror or error}). Choose another one."
        ) from error
    finally:
        with suppress(OSError):
            tensors.unlink(missing_ok=True)
        shutil.rmtree(beside, ignore_errors=True)


@dataclass(frozen=True)
class _Chosen:
    """Which of a file's tensors are converted, for which networks."""

    prefix: str | None
    ignore: tuple[str, ...]
    networks: Mapping[str, Mapping[str, Tensor]]

    def convert(self, path: Path, tensors: Path, format: str) -> tuple[Converted, Extracted]:
        """Convert from the entries of the format; where nothing fits there, from all dicts of the file."""
        from safetensors.torch import load_file

        if is_safetensors(path):
            state = load_tensors(path)
            return self._converted(format, state), Extracted("", len(state), (), {}, {})
        try:
            extracted = extract(path, tensors, entries=FORMATS[format].entries)
            return self._converted(format, load_file(tensors)), extracted
        except UnsafeFile:
            raise
        except (CheckpointError, WeightsMismatch) as error:
            if self.prefix == "":
                raise
            try:
                extracted = extract(path, tensors, entries=("*",))
                return self._converted(format, load_file(tensors)), extracted
            except (CheckpointError, WeightsMismatch) as other:
                # what lies in the format's own entry says more, unless there is nothing
                nothing = not isinstance(error, WeightsMismatch) and isinstance(other, WeightsMismatch)
                raise (other if nothing or self.prefix else error) from None

    def _converted(self, format: str, state: Mapping[str, Tensor]) -> Converted:
        return convert(format, state, self.networks, prefix=self.prefix, ignore=self.ignore)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do: the length of a JSON object, and the object."""
    with path.open("rb") as stream:
        head = stream.read(10)
    return len(head) == 10 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def network_states_of(entry: Entry) -> Mapping[str, Mapping[str, Tensor]]:
    """The state dict of each part of an entry's network, on the meta device."""
    from geo_pretrain.backbones.build import network_states

    return network_states(entry.arch)


def _is_usable(folder: Path, roles: Sequence[str]) -> bool:
    """Whether a folder was converted by today's rules and its files of these roles are intact."""
    checkpoint = intact_checkpoint(folder, roles)
    return checkpoint is not None and checkpoint.provenance.get("conversion") == CONVERSION


def _encoder(folder: Path) -> dict[str, Tensor]:
    """The cached encoder, without BatchNorm's counters, which some formats leave out; empty if there is none."""
    try:
        state = read_weights(read_checkpoint(folder), "encoder")
    except CheckpointError:
        return {}
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _warn_if_changed(name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Warn when two of the authors' files hold different encoders: whoever used the first should know."""
    changed = [key for key in before if key not in after or not before[key].equal(after[key])]
    if changed:
        warnings.warn(
            f"{name}: the authors' files hold different encoders ({len(changed)} of {len(before)} tensors differ, such "
            f"as {changed[0]!r}). The one of the file that was fetched last is used from now on.",
            stacklevel=2,
        )


def _make(entry: Entry, file: AuthorsFile, folder: Path, cache_dir: Path, progress: Progress | None) -> None:
    work = folder.with_name(f".{entry.name}.part")
    shutil.rmtree(work, ignore_errors=True)  # a killed process may have left it; the lock is ours
    work.mkdir(parents=True)
    try:
        part = work / "download.part"
        digest = _download_checked(file, part, cache_dir, progress)
        today = datetime.date.today().isoformat()
        origin = Origin(file.url, digest, file.format, file.content, today)
        try:
            convert_file(
                part,
                folder,
                like=entry,
                format=file.format,
                origin=origin,
                work=work,
                overwrite=True,
                prefix="",  # all that such a file holds is known
            )
        except (CheckpointError, WeightsMismatch) as error:  # the message names the temporary file, which will be gone
            text = str(error).removeprefix(f"{part}: ").removeprefix(f"{file.url}: ")
            raise type(error)(f"{file.url}: {text}") from error
        _record_digest(file.url, digest, cache_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download_checked(file: AuthorsFile, part: Path, cache_dir: Path, progress: Progress | None) -> str:
    """Download a file and compare its digest with the catalog's or the first use's; retry once."""
    known = file.sha256 or read_digests(cache_dir).get(file.url, {}).get("sha256")
    for _ in range(2):
        digest = download(file.url, part, limit=file.size, progress=progress)
        if known in (None, digest):
            return digest
    whose = "the catalog states" if file.sha256 else f"its first use here recorded ({cache_dir / 'authors' / DIGESTS})"
    raise DigestMismatch(
        f"{file.url}, fetched twice: sha256 is {digest}, but {whose} {known}. The file was altered at its source or on "
        "the way; nothing of it was read."
    )


def read_digests(cache_dir: Path) -> dict[str, dict[str, Any]]:
    """Digests of authors' files as first seen here: {url: {"sha256", "first_used"}}."""
    path = cache_dir / "authors" / DIGESTS
    try:
        digests = parse_json(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is not JSON ({error}). Without it changed files go unnoticed; remove it to begin anew."
        ) from error
    if not isinstance(digests, dict) or not all(isinstance(value, dict) for value in digests.values()):
        raise CheckpointError(
            f"{path}: is not a list of digests. Without it changed files go unnoticed; remove it to begin anew."
        )
    return digests


def _record_digest(url: str, digest: str, cache_dir: Path) -> None:
    path = cache_dir / "authors" / DIGESTS
    with exclusive(path):
        digests = read_digests(cache_dir)
        if url in digests:
            return
        digests[url] = {"sha256": digest, "first_used": datetime.date.today().isoformat()}
        write_text(path, json.dumps(digests, indent=2, sort_keys=True) + "\n")


def _write(
    converted: Converted, extracted: Extracted, folder: Path, like: Entry, name: str, origin: Origin
) -> Checkpoint:
    from geo_pretrain.backbones.build import golden_values

    expected = network_states_of(like)
    network = _network(like, {role: converted.weights[role] for role in expected if role in converted.weights})
    golden = golden_values(network, ones=not getattr(like.contract, "given_channels", True))
    bad = [key for key, value in golden.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{origin.url}: its weights give infinite or undefined outputs ({', '.join(bad)}).")
    provenance = {
        "source": asdict(origin),
        "in_the_file": dict(extracted.scalars),
        "foreign": list(extracted.foreign),  # classes in the file that were not built
        "not_used": len(converted.report.unexpected),
        **({"prefix": converted.report.prefix} if converted.report.prefix else {}),
        "converted_by": __version__,
        "conversion": CONVERSION,
    }
    is_the_entry = name == like.name
    whole = converted.weights.keys() >= expected.keys()
    arch = like.arch if whole else like.arch.encoder_alone  # config.json describes this folder alone
    card = render_card(
        name,
        arch,
        like.contract,
        like.license,
        provenance,
        recipe=like.recipe if is_the_entry else None,
        roles=tuple(converted.weights),
    )
    return write_checkpoint(
        folder,
        name=name,
        arch=arch,
        contract=like.contract,
        weights=converted.weights,
        golden=golden,
        license=like.license,
        provenance=provenance,
        recipe_yaml=None,
        log=None,
        card=card,
    )


def _network(like: Entry, weights: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """The network in evaluation mode: whole if all of its roles are in `weights`, else the encoder alone."""
    import torch

    from geo_pretrain.backbones.build import build

    roles = like.arch.roles
    if roles[0] not in weights:
        raise WeightsMismatch(
            f"{like.name!r}: the file holds no {roles[0]}; it gave {', '.join(weights) or 'nothing'}."
        )
    whole = len(weights) == len(roles) > 1
    with torch.device("meta"):
        network = build(like.arch, decoder=whole)
    state = weights[roles[0]] if not whole else {f"{r}.{k}": v for r in roles for k, v in weights[r].items()}
    network.load_state_dict(state, assign=True)
    return network.eval()
