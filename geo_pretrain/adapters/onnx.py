"""Our image networks as ONNX files: pixels in [0, 1] in, maps or class scores out, at any batch and size.

The file normalizes by itself, so whoever runs it needs nothing of this package: `onnxruntime`, OpenCV and TensorRT take
it. Every file that is written was run by onnxruntime and compared with torch first, at several sizes.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import CheckpointError, GeoPretrainError, first_line, require
from geo_pretrain.files import atomic_write

TOLERANCE = 1e-4  # of the largest magnitude of an output
INPUT = "images"
SIZES = ((1, 64, 96), (2, 128, 64), (1, 97, 131))  # batch, height, width of the comparison; rounded to the multiple


@dataclass(frozen=True)
class OnnxReport:
    """What was written: outputs with the largest difference from torch, relative to their magnitude, and the sizes."""

    path: Path
    outputs: Mapping[str, float]
    sizes: tuple[tuple[int, int, int], ...]  # batch, height, width
    multiple: int  # of which height and width have to be

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max(self.outputs.values())


class WithNormalization(nn.Module):
    """Images [B, 3, H, W] in [0, 1] -> named outputs of a network that takes normalized ones."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, contract: ImageContract, *, names: Sequence[str], classes: bool) -> None:
        super().__init__()
        self.network, self.names, self.classes = network, tuple(names), classes
        self.register_buffer("mean", torch.tensor(contract.mean)[None, :, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(contract.std)[None, :, None, None], persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs as a tuple; with `classes` logits of the classes 1..C, and the labels 1..C."""
        found = self.network((images - self.mean) / self.std)
        outputs = tuple(found) if isinstance(found, list | tuple) else (found,)
        return (*outputs, outputs[0].argmax(1) + 1) if self.classes else outputs


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode, each part in its own mode again afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def export_onnx(
    network: nn.Module,
    contract: ImageContract,
    path: Path,
    *,
    names: Sequence[str],
    classes: Sequence[str] = (),
    multiple: int = 1,
    facts: Mapping[str, str] = {},
) -> OnnxReport:
    """Write an image network as ONNX with dynamic batch, height and width, after comparing it with torch.

    Args:
        network: normalized images -> an output, or a list of them; on the CPU.
        contract: its input; normalization becomes part of the file.
        path: of the file.
        names: of the outputs; with `classes`, of the logits and of the labels.
        classes: names of the labels 1..C, of a segmentation network whose output is the logits of these.
        multiple: what height and width have to be multiples of.
        facts: stored in the file's metadata, beside channels, range and classes.

    Raises:
        MissingDependency: the extra `onnx` is not installed.
        CheckpointError: torch cannot export the network, or onnxruntime computes something else; nothing is written.
    """
    runtime, onnx, path = require("onnxruntime", "onnx"), require("onnx", "onnx"), Path(path)
    require("onnxscript", "onnx")
    wrapped = WithNormalization(network, contract, names=names, classes=bool(classes))
    metadata = {
        "channels": ", ".join(contract.channels),
        "range": "0 to 1; the file normalizes by mean and standard deviation",
        "trained_size": "x".join(map(str, contract.size)),
        "multiple": str(multiple),
        **({"classes": json.dumps(list(classes))} if classes else {}),
        **facts,
    }
    with _evaluating(wrapped):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "network.onnx"
            _write(wrapped, part, len(contract.channels), names, multiple)
            model = onnx.load(part)
            for key, value in metadata.items():
                entry = model.metadata_props.add()
                entry.key, entry.value = key, value
            data = model.SerializeToString()
        sizes = tuple(dict.fromkeys((b, _up(h, multiple), _up(w, multiple)) for b, h, w in SIZES))
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        errors = _differences(wrapped, session, sizes, len(contract.channels), names)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise CheckpointError(
            f"onnxruntime computes something else than torch ({wrong}, relative); nothing is written."
        )
    with atomic_write(path) as target:
        target.write_bytes(data)
    return OnnxReport(path, errors, sizes, multiple)


def _up(side: int, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple


def _write(wrapped: nn.Module, path: Path, channels: int, names: Sequence[str], multiple: int) -> None:
    """Export by torch's tracer of whole programs, with batch, height and width left open."""
    example = torch.rand(2, channels, 4 * multiple * math.ceil(16 / multiple), 6 * multiple * math.ceil(16 / multiple))
    dynamic = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(wrapped, (example,), dynamic_shapes=dynamic, strict=False)
            made: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(names)
            )
            made.save(path)
    except GeoPretrainError:
        raise
    except Exception as error:  # torch raises its own kinds for what it cannot trace
        raise CheckpointError(
            f"torch {torch.__version__} cannot export this network to ONNX: {first_line(error)}"
        ) from error


@torch.no_grad()
def _differences(
    wrapped: nn.Module, session: Any, sizes: Sequence[tuple[int, int, int]], channels: int, names: Sequence[str]
) -> dict[str, float]:
    """The largest difference of each output between torch and onnxruntime; of labels, the share of other pixels."""
    generator = torch.Generator().manual_seed(0)
    errors = dict.fromkeys(names, 0.0)
    for batch, height, width in sizes:
        noise = torch.rand(batch, channels, max(height // 8, 1), max(width // 8, 1), generator=generator)
        images = F.interpolate(noise, (height, width), mode="bilinear")
        given = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        for name, expected, found in zip(names, wrapped(images), given, strict=True):
            own = expected.numpy()
            if own.shape != found.shape:
                errors[name] = float("inf")
            elif own.dtype.kind == "i":  # ties may fall either way
                errors[name] = max(errors[name], 0.0 if (own != found).mean() < 1e-3 else 1.0)
            else:
                largest = float(np.abs(own).max()) or 1.0
                errors[name] = max(errors[name], float(np.abs(own - found).max()) / largest)
    return errors
