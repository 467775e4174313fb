"""Read, write and validate checkpoint folders. The only file that knows their format.

A folder holds config.json (this format's number, name, architecture, contract, digests of all other files, license
chain, provenance), the weights of each role as safetensors, golden input and outputs, recipe, log and card. Nothing is
pickled. torch is imported only where tensors are touched, so the hub can look at a folder without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import FILE_NAME, WEIGHT_ROLES, Arch, License
from geo_pretrain.contract import ImageContract, VoxelContract, contract_from_dict
from geo_pretrain.digests import inventory_line, sha256, xxh3, xxh3_hasher
from geo_pretrain.errors import CheckpointError, DigestMismatch, renamed, run_note
from geo_pretrain.files import SEAL, atomic_write, expanded, is_file, is_folder, parse_json, tree_digest, write_text
from geo_pretrain.staging import recover, replaced
from geo_pretrain.tensors import NotTensors, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
CONFIG = "config.json"
_UNSEALED = object()  # in place of the digest of a config.json of an older version
TEXT_ROLES = {"recipe": "recipe.yaml", "log": "log.jsonl", "card": "README.md"}
FINETUNED = "finetuned"  # role of the whole network in a fine-tuning run's folder, and key of its provenance
ROLES = {role: f"{role}.safetensors" for role in (*WEIGHT_ROLES, "golden")} | TEXT_ROLES
BACKBONE_FILE = "backbone.safetensors"  # there, of a backbone in one piece: model.safetensors is the whole network
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class StoredFile:
    """One line of the folder's inventory."""

    role: str
    size: int  # bytes
    sha256: str  # compared after downloads, before publication
    # XXH3 of 128 bits, compared at each load: as quick as memory. It finds damage, not forgery, which a digest that
    # lies beside the file could not find either. None: an older folder, whose loads compare sha256.
    xxh3: str | None = None


@dataclass(frozen=True)
class Pairing:
    """The network of the other modality whose features share a space with the folder's own; see `feature_pair`."""

    arch: Arch
    contract: ImageContract | VoxelContract
    role: str  # of the file that holds its weights
    prefix: str = ""  # of its tensors' names in that file
    image_projection: str | None = None  # names of linear layers in the file "heads"; None: there is none
    point_projection: str | None = None
    # how the image's map becomes as large as the image: bilinear with or without align_corners, or nearest
    interpolation: Literal["corners", "bilinear", "nearest"] = "bilinear"

    def roles(self) -> tuple[str, ...]:
        """The roles of the files that the pair needs beside the folder's own network."""
        projected = self.image_projection is not None or self.point_projection is not None
        return (self.role, "heads") if projected and self.role != "heads" else (self.role,)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        arch = {"name": self.arch.name, "args": dict(self.arch.args)}
        return {**self.__dict__, "arch": arch, "contract": self.contract.to_dict()}


@dataclass(frozen=True)
class Checkpoint:
    """A validated config.json and its folder; `read_weights` reads the weights."""

    folder: Path
    name: str
    arch: Arch
    contract: ImageContract | VoxelContract
    files: Mapping[str, StoredFile]  # by file name
    license: License
    provenance: Mapping[str, Any]
    finished: bool  # False: written on the way, training goes on
    pairing: Pairing | None = None  # None: it holds one network alone

    licence = renamed("licence", "license")

    def network_roles(self, *, decoder: bool = True) -> tuple[str, ...]:
        """The roles of the files with the network's weights; decoder=False: only the first, which is enough for it."""
        return self.arch.network_roles(decoder=decoder)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the files in the inventory."""
        return tuple(stored.role for stored in self.files.values())

    def file_of(self, role: str) -> str:
        """The name of the file with this role. Raises `CheckpointError` naming the roles there are."""
        for name, stored in self.files.items():
            if stored.role == role:
                return name
        raise CheckpointError(f"{self.folder}: holds no file with role {role!r}; it has: {', '.join(self.roles)}.")


def write_checkpoint(
    folder: Path | str,
    *,
    name: str,
    arch: Arch,
    contract: ImageContract | VoxelContract,
    weights: Mapping[str, Mapping[str, Tensor]],
    golden: Mapping[str, Tensor],
    license: License,
    provenance: Mapping[str, Any],
    recipe_yaml: str | None,
    log: Path | str | None,
    card: str,
    finished: bool = True,
    pairing: Pairing | None = None,
) -> Checkpoint:
    """Write a checkpoint folder, whole or not at all; an older checkpoint there is replaced.

    `weights` maps a role ("encoder" and "decoder", or "model" for a network in one piece; "heads"; "teacher") to its
    state dict.
    `golden` holds "input" (3D: "input.coords" and "input.feats") and the outputs to reproduce. `log` is a file to copy
    (Path) or the text itself; weights that were not trained here have neither recipe nor log (None). One writer at a
    time. Files that the format does not know (somebody's notes) are carried
    over. Raises `CheckpointError` when `folder` holds something else.
    """
    folder = Path(folder).resolve()
    check_target(folder, name)
    _check_roles(weights)
    tensors = {role: state for role, state in weights.items() if state} | {"golden": golden}
    texts = {"recipe": recipe_yaml, "log": log.read_text("utf-8") if isinstance(log, Path) else log, "card": card}
    with staged(folder) as staging:
        for role, state in tensors.items():
            _save_tensors(state, staging / ROLES[role])
        written = [role for role, text in texts.items() if text is not None]
        for role in written:
            (staging / ROLES[role]).write_bytes(str(texts[role]).encode())
        paths = {role: staging / ROLES[role] for role in (*tensors, *written)}
        files = {path.name: inventory_line(path, role) for role, path in paths.items()}
        config = _config(name, arch, contract, files, license, provenance, finished=finished, pairing=pairing)
        (staging / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", "utf-8", newline="\n")
        read_checkpoint(staging)  # what nobody could read back is not put in place
    return read_checkpoint(folder)


def add_checkpoint(
    folder: Path,
    *,
    name: str,
    arch: Arch,
    contract: ImageContract | VoxelContract,
    weights: Mapping[str, Mapping[str, Tensor]],
    golden: Mapping[str, Tensor],
    license: License,
    provenance: Mapping[str, Any],
    card: str,
    present: Mapping[str, str],
) -> Checkpoint:
    """Make a folder that holds other results, such as a fine-tuning run's, a checkpoint folder as well.

    `present`: names of files that are there, with their roles; others as in `write_checkpoint`. A network in one piece
    goes into `BACKBONE_FILE`. config.json is written last.
    """
    _check_roles(weights)
    (folder / CONFIG).unlink(missing_ok=True)
    roles = {BACKBONE_FILE if role == "model" else ROLES[role]: role for role in weights} | {ROLES["golden"]: "golden"}
    for file, role in roles.items():
        with atomic_write(folder / file) as part:
            _save_tensors(golden if role == "golden" else weights[role], part)
    write_text(folder / ROLES["card"], card)
    listed = dict(present) | roles | {ROLES["card"]: "card"}
    files = {file: inventory_line(folder / file, role) for file, role in listed.items()}
    config = _config(name, arch, contract, files, license, provenance, finished=True)
    write_text(folder / CONFIG, json.dumps(config, indent=2, allow_nan=False) + "\n")
    return read_checkpoint(folder)


def _config(
    name: str,
    arch: Arch,
    contract: ImageContract | VoxelContract,
    files: Mapping[str, Any],
    license: License,
    provenance: Mapping[str, Any],
    *,
    finished: bool,
    pairing: Pairing | None = None,
) -> dict[str, Any]:
    """The content of config.json, with its digest."""
    config = {
        "format": FORMAT,
        "name": name,
        "arch": {"name": arch.name, "args": dict(arch.args)},
        "contract": contract.to_dict(),
        "files": files,
        "licence": asdict(license),
        "provenance": _plain(dict(provenance)),
        "finished": finished,
    } | ({} if pairing is None else {"pair": pairing.to_dict()})
    return config | {SEAL: tree_digest(config)}


def read_checkpoint(folder: Path | str) -> Checkpoint:
    """Read and validate config.json; no other file is opened and none needs to be there.

    Raises `CheckpointError` naming the file and the key that is missing, of a wrong type or of another format.
    """
    if not (folder := Path(folder)).exists():
        recover(folder, _own_files)
    path = folder / CONFIG
    if not path.is_file():
        state = f"has no {CONFIG}" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        state += run_note(folder)
        raise CheckpointError(f"{folder} {state}; a checkpoint folder with {CONFIG} and its weights is accepted.")
    return parse_config(path.read_bytes(), folder)


def parse_config(text: bytes | str, folder: Path) -> Checkpoint:
    """Parse and validate the text of the config.json of `folder`, which need not exist yet."""
    path = folder / CONFIG
    try:
        config = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds {type(config).__name__}; an object with key 'format' is accepted.")
    if config.get(SEAL, _UNSEALED) not in (_UNSEALED, tree_digest({k: v for k, v in config.items() if k != SEAL})):
        raise CheckpointError(
            f"{path}: was altered: its {SEAL} is not that of its content. Fetch or write the checkpoint again; whoever "
            f"changed it on purpose removes the key {SEAL!r}."
        )
    number = _get(config, "format", int, path)
    if number != FORMAT:
        hint = "; a newer geo_pretrain wrote it, please upgrade" if number > FORMAT else ""
        raise CheckpointError(f"{path}: format is {number}; this version reads format {FORMAT}{hint}.")
    name = _get(config, "name", str, path)
    if not CHECKPOINT_NAME.fullmatch(name):
        raise CheckpointError(f"{path}: name is {name!r}; letters, digits, '.', '_' and '-' are accepted.")
    arch = _get(config, "arch", dict, path)
    try:
        return Checkpoint(
            folder=folder,
            name=name,
            arch=Arch(_get(arch, "name", str, path, "arch."), _get(arch, "args", dict, path, "arch.")),
            contract=contract_from_dict(_get(config, "contract", dict, path)),
            files={file: _stored(file, entry, path) for file, entry in _get(config, "files", dict, path).items()},
            license=_license(_get(config, "licence", dict, path), path),
            provenance=_get(config, "provenance", dict, path),
            finished=_get(config, "finished", bool, path),
            pairing=_pairing(_get(config, "pair", dict, path), path) if "pair" in config else None,
        )
    except (ValueError, TypeError, KeyError) as error:  # from the dataclasses' own checks
        raise CheckpointError(f"{path}: {error}") from error


def means_folder(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder is meant: one with a checkpoint, any path, or a folder (or run) that is no catalog name."""
    folder = expanded(name_or_path)
    if is_file(folder / CONFIG) or not isinstance(name_or_path, str):
        return True
    separators = (os.sep, os.altsep or os.sep)  # Windows has two
    looks_like_path = any(one in name_or_path for one in separators) or name_or_path.startswith((".", "~"))
    if looks_like_path or name_or_path in CATALOG:
        return looks_like_path
    return is_file(folder) or is_folder(folder) or is_folder(Path(f"{folder}.run"))


def intact_checkpoint(folder: Path, roles: Iterable[str]) -> Checkpoint | None:
    """The checkpoint in `folder` if its files of these roles are as promised; None: they have to be made again."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        checkpoint = read_checkpoint(folder)
        for role in roles:
            verify_file(checkpoint, checkpoint.file_of(role), load_digest=True)
    except CheckpointError:
        return None
    return checkpoint


def read_weights(checkpoint: Checkpoint, role: str) -> dict[str, Tensor]:
    """Read the tensors of one role (one of `WEIGHT_ROLES`, or "golden") to the CPU; float16 as float32, see `halving`.

    The digest is computed of the very memory that the tensors are, and nobody else can change it: it is no map of the
    file. Raises `DigestMismatch`, which names the file and both digests.
    """
    from torch import float16

    path, stored = _listed(checkpoint, checkpoint.file_of(role))
    digest = hashlib.sha256() if stored.xxh3 is None else xxh3_hasher()
    try:
        tensors, size = read_tensors(path, digest)
    except NotTensors as error:
        check_digest(path, stored)
        raise CheckpointError(f"{path}: is not a safetensors file of weights ({error}).") from error
    if (digest.hexdigest(), size) != (stored.xxh3 or stored.sha256, stored.size):
        _raise_mismatch(path, stored, digest.hexdigest())
    return {key: value.float() if value.dtype is float16 else value for key, value in tensors.items()}


def verify_file(checkpoint: Checkpoint, name: str, *, load_digest: bool = False) -> None:
    """Compare one file with the inventory. Raises `CheckpointError` (absent, unlisted) or `DigestMismatch`.

    By its sha256 or, for a file that was compared so before, with `load_digest` by the digest of loads.
    """
    path, stored = _listed(checkpoint, name)
    if load_digest and stored.xxh3 is not None:
        actual = xxh3(path)
        if (actual, path.stat().st_size) != (stored.xxh3, stored.size):
            _raise_mismatch(path, stored, actual)
    else:
        check_digest(path, stored)


def _listed(checkpoint: Checkpoint, name: str) -> tuple[Path, StoredFile]:
    """The path of a file that is there, and its line of the inventory."""
    if name not in checkpoint.files:
        listed = ", ".join(checkpoint.files)
        raise CheckpointError(f"{checkpoint.folder / name}: is not listed in {CONFIG}; listed are: {listed}.")
    path, stored = checkpoint.folder / name, checkpoint.files[name]
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; {CONFIG} lists it with {stored.size} bytes.")
    return path, stored


def verify_files(checkpoint: Checkpoint) -> None:
    """Compare every file with the inventory, and refuse weight files that are not in it."""
    for name in checkpoint.files:
        verify_file(checkpoint, name)
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        verify_file(checkpoint, path.name)


def check_digest(path: Path, stored: StoredFile) -> None:
    """Raise `DigestMismatch`, naming file, expected and actual digest, unless the bytes are the promised ones."""
    actual, size = sha256(path), path.stat().st_size
    if (actual, size) != (stored.sha256, stored.size):
        raise DigestMismatch(
            f"{path}: sha256 is {actual} ({size} bytes), expected {stored.sha256} ({stored.size} bytes). "
            "The file was truncated or altered; nothing of it was loaded. Fetch or write it again."
        )


def _raise_mismatch(path: Path, stored: StoredFile, actual: str) -> NoReturn:
    """Raise the error of a file whose digest of loads is not the promised one."""
    check_digest(path, stored)
    raise DigestMismatch(
        f"{path}: xxh3 is {actual}, expected {stored.xxh3}, although sha256 and size are the expected ones: "
        f"{CONFIG} was altered; nothing of the file was loaded. Fetch or write it again."
    )


def staged(folder: Path, writer: str = "") -> AbstractContextManager[Path]:
    """A new folder that takes the place of `folder`, see `replaced`; files that belong to no checkpoint are kept."""
    return replaced(folder, _own_files, writer)


def _own_files(folder: Path) -> set[str]:
    known = {CONFIG, *ROLES.values()}
    with suppress(CheckpointError, OSError):
        known |= parse_config((folder / CONFIG).read_bytes(), folder).files.keys()
    return known


def check_target(folder: Path | str, name: str) -> None:
    """Raise `CheckpointError` when a checkpoint called `name` could not be written to `folder`: ask before training."""
    folder = Path(folder)
    if not CHECKPOINT_NAME.fullmatch(name):
        raise CheckpointError(f"Checkpoint name {name!r}; letters, digits, '.', '_' and '-' are accepted.")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a new or empty folder, or a checkpoint folder, is accepted.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds files but no {CONFIG}, so it is not a checkpoint folder and is left alone; "
            "give a new or empty folder."
        )


def _plain(value: Any) -> Any:
    """Values for JSON, which has no NaN and no infinity: they become texts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _check_roles(weights: Mapping[str, Any]) -> None:
    unknown_roles = [role for role in weights if role not in WEIGHT_ROLES]
    if unknown_roles or not any(weights.values()):
        raise CheckpointError(
            f"Weights have roles {list(weights)}; accepted: one or more of {', '.join(WEIGHT_ROLES)}."
        )


def _save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save

    # clones: safetensors refuses tensors that share memory, and views would drag their whole storage along.
    # Not save_file: its files are readable by their owner alone, whatever the umask says.
    path.write_bytes(save({key: value.detach().cpu().clone().contiguous() for key, value in state.items()}))


def _get(config: Mapping[str, Any], key: str, kind: type, path: Path, prefix: str = "") -> Any:
    if key not in config:
        raise CheckpointError(f"{path}: key '{prefix}{key}' is missing.")
    value = config[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{path}: key '{prefix}{key}' is {value!r}; {kind.__name__} is accepted.")
    return value


def _stored(file: str, entry: Any, path: Path) -> StoredFile:
    if not FILE_NAME.fullmatch(file) or file == CONFIG:
        raise CheckpointError(f"{path}: lists a file {file!r}; plain names inside the folder are accepted.")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: key 'files.{file}' is {entry!r}; an object is accepted.")
    prefix = f"files.{file}."
    role, digest = _get(entry, "role", str, path, prefix), _get(entry, "sha256", str, path, prefix)
    if role in (*WEIGHT_ROLES, "golden") and not file.endswith(".safetensors"):
        raise CheckpointError(f"{path}: {file!r} has role {role!r}; only .safetensors files may hold tensors.")
    quick = _get(entry, "xxh3", str, path, prefix) if "xxh3" in entry else None
    for key, value, digits in (("sha256", digest, 64), ("xxh3", quick, 32)):
        if value is not None and not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise CheckpointError(f"{path}: key '{prefix}{key}' is {value!r}; {digits} hex digits are accepted.")
    return StoredFile(role=role, size=_get(entry, "size", int, path, prefix), sha256=digest, xxh3=quick)


def _pairing(entry: Mapping[str, Any], path: Path) -> Pairing:
    arch = _get(entry, "arch", dict, path, "pair.")
    interpolation = _get(entry, "interpolation", str, path, "pair.")
    if interpolation not in ("corners", "bilinear", "nearest"):
        raise ValueError(f"key 'pair.interpolation' is {interpolation!r}; corners, bilinear or nearest is accepted.")
    names = {key: entry.get(key) for key in ("image_projection", "point_projection")}
    for key, value in names.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"key 'pair.{key}' is {value!r}; str or null is accepted.")
    return Pairing(
        arch=Arch(_get(arch, "name", str, path, "pair.arch."), _get(arch, "args", dict, path, "pair.arch.")),
        contract=contract_from_dict(_get(entry, "contract", dict, path, "pair.")),
        role=_get(entry, "role", str, path, "pair."),
        prefix=_get(entry, "prefix", str, path, "pair."),
        interpolation=interpolation,
        **names,
    )


def _license(entry: Mapping[str, Any], path: Path) -> License:
    texts = {key: _get(entry, key, str, path, "licence.") for key in ("code", "weights", "base_model")}
    datasets: Iterable[Any] = _get(entry, "datasets", list, path, "licence.")
    return License(datasets=tuple(tuple(pair) for pair in datasets), **texts)
