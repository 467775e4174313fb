"""Export our checkpoints in the formats of other libraries.

`OUT_FORMATS` lists the formats. A 2D format holds the encoder (no host has our decoders), a 3D format the whole U-Net.
Name, contract, license chain and provenance, for which these formats have no field, go to `<file>.json`; a safetensors
file also carries them in its metadata. Detectron2 and the OpenMMLab libraries get `<file>.yaml`, the part of a config
that states the network's input. No torch at import.

The formats follow the hosts' loaders: Detectron2's checkpoint/detection_checkpoint.py (Apache-2.0),
MMEngine's runner/checkpoint.py (Apache-2.0), PointContrast's and CSC's `load_state_with_same_shape` (MIT).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geo_pretrain import __version__
from geo_pretrain.checkpoint import FINETUNED, Checkpoint, read_weights, sha256
from geo_pretrain.convert import kernels
from geo_pretrain.convert.detectron2 import to_detectron2
from geo_pretrain.convert.keys import State
from geo_pretrain.errors import CheckpointError, WeightsMismatch, unknown
from geo_pretrain.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

MODALITIES = {"encoder": "2D", "model": "3D"}
WIDTH = 64  # these hosts build ResNets of no other width
NUMPY_2, NUMPY_1 = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"


@dataclass(frozen=True)
class OutFormat:
    """A weight format of another library."""

    role: str  # the role of a checkpoint folder that is written, "encoder" or "model"
    suffixes: tuple[str, ...]  # accepted suffixes of the file, the usual one first
    rename: Callable[[State], dict[str, Tensor]]
    text: str  # description for users
    entry: str = ""  # the key of a .pth file under which its reader looks for the state dict; "": top level
    config: Callable[[Checkpoint, Path], dict[str, Any]] | None = None


def export_weights(format: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Convert the weights of a checkpoint to the names and layouts of another library, a key of `OUT_FORMATS`.

    Raises `UnknownName` for an unknown format, `WeightsMismatch` for a network that the format cannot hold (naming
    formats that can), `CheckpointError` when the weights are missing and `DigestMismatch` when they were altered.
    """
    rule = _rule(format, checkpoint)
    return rule.rename(read_weights(checkpoint, rule.role))


def write_export(format: str, checkpoint: Checkpoint, out: Path | str, *, overwrite: bool = False) -> list[Path]:
    """Write a checkpoint's weights to the file `out`, and contract, license and provenance to files beside it.

    The suffix of `out` chooses the container: .safetensors; .pth (torch.save); .pkl (a pickle of numpy arrays). Returns
    the files written, weights first. They are moved into place once all are complete, the weights last. Raises what
    `export_weights` raises, and `CheckpointError` for another suffix, for existing files unless `overwrite`, and for
    disk errors.
    """
    rule, out = _rule(format, checkpoint), Path(out)
    if out.suffix not in rule.suffixes:
        accepted = ", ".join(rule.suffixes)
        raise CheckpointError(f"{out}: {format} cannot be read from a file ending in {out.suffix!r}; use: {accepted}.")
    beside = [_beside(out, "json")] + ([] if rule.config is None else [_beside(out, "yaml")])
    in_the_way = [str(path) for path in (out, *beside) if path.is_dir() or (path.exists() and not overwrite)]
    if in_the_way:
        raise CheckpointError(
            f"{', '.join(in_the_way)}: in the way; give another name, or overwrite=True (--overwrite) to replace files."
        )
    state = {key: value.contiguous() for key, value in export_weights(format, checkpoint).items()}
    try:
        with ExitStack() as stack:  # which puts the weights, entered first, in place last
            parts = {path: stack.enter_context(atomic_write(path)) for path in (out, *reversed(beside))}
            WRITERS[out.suffix](state, parts[out], rule, checkpoint)
            note = json.dumps(_note(format, checkpoint, out, parts[out]), indent=2)
            parts[beside[0]].write_text(f"{note}\n", encoding="utf-8")
            if rule.config is not None:
                text = _config_text(format, checkpoint, rule.config(checkpoint, out))
                parts[beside[1]].write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{out}: could not be written ({error.strerror or error}).") from error
    return [out, *beside]


def format_of(name: str) -> OutFormat:
    """A format of `OUT_FORMATS`. Raises `UnknownName` with the nearest ones."""
    if name not in OUT_FORMATS:
        said = name.lower()
        meant = [key for key, format in OUT_FORMATS.items() if said and said in format.text.lower()]
        hint = f"Accepted: {', '.join(f'{key} ({format.text})' for key, format in OUT_FORMATS.items())}."
        raise unknown("format to write", name, meant or OUT_FORMATS, hint)
    return OUT_FORMATS[name]


def _rule(format: str, checkpoint: Checkpoint) -> OutFormat:
    rule = format_of(format)
    role = checkpoint.network_roles(decoder=False)[0]
    if rule.role != role:
        fitting = ", ".join(name for name, other in OUT_FORMATS.items() if other.role == role)
        raise WeightsMismatch(
            f"{checkpoint.name!r} is a {MODALITIES[role]} network and {format} holds {MODALITIES[rule.role]} ones. "
            f"Formats for it: {fitting}."
        )
    width = checkpoint.arch.args.get("width", WIDTH)
    if role == "encoder" and width != WIDTH:
        raise WeightsMismatch(f"{checkpoint.name!r} is a ResNet of width {width}; {format} has those of width {WIDTH}.")
    return rule


# --- writers, by suffix ---


def _write_safetensors(state: State, path: Path, rule: OutFormat, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save

    about = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _about(checkpoint).items()}
    # not save_file: its files are readable by their owner alone, whatever the umask says
    path.write_bytes(_in_order(save(dict(state), metadata={"format": "pt"} | about)))


def _in_order(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library writes in a different order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))


def _write_torch(state: State, path: Path, rule: OutFormat, checkpoint: Checkpoint) -> None:
    from io import BytesIO

    import torch

    nested = {rule.entry: dict(state), "meta": {"name": checkpoint.name, "licence": checkpoint.license.weights}}
    content = BytesIO()  # given a path, torch.save writes its name into the file, and hides why a disk refuses
    torch.save(nested if rule.entry else dict(state), content)
    path.write_bytes(content.getbuffer())


def _write_pickle(state: State, path: Path, rule: OutFormat, checkpoint: Checkpoint) -> None:
    """Write Detectron2's model file: numpy arrays, pickled under the module name that numpy 1 and 2 both know."""
    arrays = {key: value.float().numpy() for key, value in state.items()}
    content = {"model": arrays, "__author__": "geo_pretrain", "matching_heuristics": True}
    # the first occurrence is the only one (later arrays refer to it) and comes before all weights
    path.write_bytes(pickle.dumps(content, protocol=3).replace(NUMPY_2, NUMPY_1, 1))


WRITERS = {".safetensors": _write_safetensors, ".pth": _write_torch, ".pkl": _write_pickle}


# --- files beside the weights ---


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "architecture": str(checkpoint.arch),
        "licence": asdict(checkpoint.license),
        "contract": checkpoint.contract.to_dict(),
        "written_by": f"geo_pretrain {__version__}",
    }


def _note(format: str, checkpoint: Checkpoint, out: Path, written: Path) -> dict[str, Any]:
    digest = {"file": out.name, "format": format, "size": written.stat().st_size, "sha256": sha256(written)}
    classes = checkpoint.provenance.get(FINETUNED, {}).get("data", {}).get("classes", ())
    if classes and checkpoint.arch.args.get("out_chans") == 1 + len(classes):
        digest |= {"outputs": ["(no class)", *classes]}  # of a fine-tuned network for points
    return digest | _about(checkpoint) | {"provenance": dict(checkpoint.provenance), "finished": checkpoint.finished}


def _detectron2_config(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    order, mean, std = _pixels(checkpoint)
    depth = checkpoint.arch.args.get("depth", 18)
    # it refuses basic blocks unless told that their first stage is narrow
    narrow = {"RES2_OUT_CHANNELS": 64} if depth < 50 else {}
    resnets = {"DEPTH": depth, "STRIDE_IN_1X1": False} | narrow
    model = {"WEIGHTS": str(out.absolute()), "PIXEL_MEAN": mean, "PIXEL_STD": std, "RESNETS": resnets}
    return {"MODEL": model, "INPUT": {"FORMAT": order}}


def _mmlab_config(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    order, mean, std = _pixels(checkpoint)
    start = {"type": "Pretrained", "checkpoint": str(out.absolute()), "prefix": MMLAB_PREFIX}
    backbone = {"type": "ResNet", "depth": checkpoint.arch.args.get("depth", 18), "style": "pytorch", "init_cfg": start}
    pixels = {"mean": mean, "std": std, "bgr_to_rgb": order == "RGB"}  # they read images as BGR
    return {"model": {"data_preprocessor": pixels, "backbone": backbone}}


def _pixels(checkpoint: Checkpoint) -> tuple[str, list[float], list[float]]:
    """Color order, mean and standard deviation on the scale 0 to 255 that both libraries use."""
    contract: Any = checkpoint.contract
    order = "".join(contract.channels)
    if order not in ("RGB", "BGR"):
        raise WeightsMismatch(f"{checkpoint.name!r} sees {order}; a config can be written for RGB and BGR images.")
    mean, std = ([round(255 * value, 6) for value in values] for values in (contract.mean, contract.std))
    return order, mean, std


def _config_text(format: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    import yaml

    head = f"# {checkpoint.name} for {format}; license of the weights: {checkpoint.license.weights}\n"
    return head + yaml.safe_dump(dict(config), sort_keys=False)


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.{suffix}")


MMLAB_PREFIX = "backbone."


def _to_detectron2(state: State) -> dict[str, Tensor]:
    """Rename, and drop batch counters, which Detectron2's default frozen norms do not have."""
    return {key: value for key, value in to_detectron2(state).items() if not key.endswith(".num_batches_tracked")}


def _to_mmlab(state: State) -> dict[str, Tensor]:
    return {MMLAB_PREFIX + key: value for key, value in state.items()}


TENSORS = (".safetensors", ".pth")
OUT_FORMATS: Mapping[str, OutFormat] = {
    "torchvision": OutFormat("encoder", TENSORS, dict, "torchvision ResNet without fc"),
    "timm": OutFormat("encoder", TENSORS, dict, "timm ResNet with num_classes=0 (checkpoint_path=, or file= overlay)"),
    "detectron2": OutFormat(
        "encoder", (".pkl",), _to_detectron2, "Detectron2 ResNet, with a config", config=_detectron2_config
    ),
    "mmlab": OutFormat(
        "encoder",
        (".pth",),
        _to_mmlab,
        "ResNet of MMSegmentation and MMDetection, with a config",
        entry="state_dict",
        config=_mmlab_config,
    ),
    "me05": OutFormat("model", TENSORS, dict, "MinkowskiEngine 0.5"),
    "me04": OutFormat(
        "model", TENSORS, kernels.to_me04, "MinkowskiEngine 0.4: PointContrast's and CSC's code", entry="state_dict"
    ),
    "spconv": OutFormat("model", TENSORS, kernels.to_spconv, "spconv 2.2 and 2.3, indices (batch, z, y, x)"),
    "torchsparse": OutFormat("model", TENSORS, kernels.to_torchsparse, "torchsparse 1.4 to 2.1"),
}
