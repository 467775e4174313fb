"""Files as the authors of published checkpoints save them: their key lists (manifests), random weights, their pickles.

Nothing of `geo_pretrain.convert` is used: kernels are put into the old order with the table of `kernel_offsets.json`,
names are written out or come from the manifests. Each layout comes with what must be read out of it, role by role.
Weights of a part depend on the seed alone, so a ResNet is the same one in each format. They are scaled such that a
network with them gives finite outputs that differ from place to place.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import types
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geo_pretrain.catalog import Arch, Entry

DATA = Path(__file__).resolve().parent / "data"
State = dict[str, Tensor]
MANIFESTS_3D = {
    "pointcontrast": "pointcontrast_res16unet34c",
    "csc": "csc_res16unet34c",
    "votenet": "pointcontrast_res16unet34c",
    "slidr": "slidr_minkunet",
    "pri3d_3d": "pri3d_resunet3d",
}
# how the files are stored: torch's archive (from 1.6), its stream of pickles (before), or one pickle
STORAGE = {"detectron2": "pickle", "pointcontrast": "legacy", "votenet": "legacy"}


@dataclass(frozen=True)
class Layout:
    """One file, in memory."""

    content: Any  # what is pickled
    entry: str  # where the flat state dict lies in it; "": it is the state dict
    expected: dict[str, State]  # role -> what must be read, in our layout

    @property
    def state(self) -> Any:
        """The flat state dict."""
        return self.content[self.entry] if self.entry else self.content


def write(
    what: Entry | str, path: Path | str, seed: int = 0, *, arch: Arch | None = None, file: int = 0, **options: Any
) -> dict[str, State]:
    """Write a file in a format, or the `file`-th one that the authors of an entry offer. Returns what it must yield.

    `options`: `storage` ("zip", "legacy", "pickle"), and those of the format's function below.
    """
    if isinstance(what, Entry):
        offered = what.authors_files[file]
        arch, what = what.arch, offered.format
        if what == "pri3d":
            options = {"geo": "3D" in offered.content} | options
        if what == "slidr":
            options = {"raw": "image" in offered.content} | options
    storage = options.pop("storage", STORAGE.get(what, "zip"))
    made = layout(what, seed, arch=arch, **options)
    with foreign_modules():
        if storage == "pickle":
            Path(path).write_bytes(pickle.dumps(made.content))
        else:
            torch.save(made.content, path, _use_new_zipfile_serialization=storage == "zip")
    return made.expected


def layout(format: str, seed: int = 0, *, arch: Arch | None = None, **options: Any) -> Layout:
    """The file that `write` writes."""
    if format in MANIFESTS_3D and format != "pri3d_3d" and format != "slidr":
        return _old_sr_unet(format, seed, arch, **options)
    if format in ("slidr", "slidr_images"):
        return _slidr(format, seed, arch, **options)
    return {
        "pri3d": _pri3d, "pri3d_3d": _pri3d_3d, "torchvision": _torchvision, "moco": _moco,
        "detectron2": _detectron2, "monodepth2": _monodepth2,
    }[format](seed, _depth(arch), **_narrowing(arch, format), **options)  # fmt: skip


# --- formats ---


def _pri3d(
    seed: int,
    depth: int,
    *,
    geo: bool = True,
    depth_proxy: bool = True,
    optimizer: bool = False,
    prefix: str = "",
    narrow: int = 1,
) -> Layout:
    """A training state of Pri3D; `geo` and `depth_proxy`: which losses were on; `prefix`: "module." or nothing.

    `narrow`: by how much its layers have fewer channels than the published ones.
    """
    shapes = narrowed(manifest(f"pri3d_full_model_r{depth}")["keys"], narrow)
    absent = () if geo else ("backbone3d.", "w2d.", "w3d.")
    absent = absent if depth_proxy else (*absent, "headnet.", "headloss.")
    encoder = random_state(narrowed(_unet_shapes(depth, "encoder"), narrow), seed, "encoder")
    decoder = random_state(narrowed(_unet_shapes(depth, "decoder"), narrow), seed, "decoder")
    parts = {f"backbone.encoder.{key}": value for key, value in encoder.items()}
    parts |= {f"backbone.decoder.{key}": value for key, value in decoder.items()}
    rest = {key: shape for key, shape in shapes.items() if key not in parts and not key.startswith(absent)}
    heads = random_state(rest, seed, "heads")
    model = {key: (parts | heads)[key] for key in shapes if not key.startswith(absent)}
    _check_shapes(model, shapes)
    state = _state_dict(model, prefix)
    content = {"step": 5, "optimizer": _sgd(model, optimizer), "scheduler": _scheduler(5), "model": state}
    expected = {"encoder": encoder, "decoder": decoder}
    learned = {key: value for key, value in heads.items() if not key.startswith("headloss.")}
    return Layout(content, "model", expected | ({"heads": learned} if learned else {}))


def _pri3d_3d(seed: int, depth: int, **options: Any) -> Layout:
    made = _pri3d(seed, depth, **options)
    prefix = "backbone3d."
    heads = made.expected["heads"]
    return Layout(
        made.content, made.entry, {"model": {k.removeprefix(prefix): heads[k] for k in heads if k.startswith(prefix)}}
    )


def _torchvision(
    seed: int, depth: int, *, fc: bool = False, counters: bool = True, prefix: str = "", narrow: int = 1
) -> Layout:
    """A ResNet's state dict; `fc` and `counters` (of batches, in norms): whether it has them."""
    encoder = resnet(depth, seed, narrow)
    written = encoder | (_classifier(depth, seed, narrow) if fc else {})
    content = _state_dict(_without_counters(written, counters), prefix)
    return Layout(content, "", {"encoder": _zero_counters(encoder, counters)})


def _moco(
    seed: int,
    depth: int,
    *,
    variant: str = "raw",
    entry: str = "state_dict",
    counters: bool = True,
    narrow: int = 1,
    **extra: bool,
) -> Layout:
    """A training state of MoCo v2 (`variant` "raw"), or one converted to keys with `variant` in front."""
    fc = extra.get("fc", variant == "raw")
    encoder = resnet(depth, seed, narrow)
    channels = _channels(depth, narrow)
    projection = {"fc.0.weight": [channels, channels], "fc.0.bias": [channels]}
    projection |= {"fc.2.weight": [128, channels], "fc.2.bias": [128]}
    head = random_state(projection, seed, "projection") if fc else {}
    network = _without_counters(encoder | head, counters)
    expected = {"encoder": _zero_counters(encoder, counters)}
    if variant != "raw":
        state = _state_dict(network, variant)
        return Layout({entry: state} if entry else state, entry, expected)
    state = _state_dict(network, "module.encoder_q.")
    keys = {key: value * 2 for key, value in network.items()}  # the slow copy: never the one that is wanted
    state |= _state_dict(keys, "module.encoder_k.")
    state |= {"module.queue": torch.ones(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    content = {"epoch": 200, "arch": f"resnet{depth}", "state_dict": state, "optimizer": _sgd(network, False)}
    return Layout(content, "state_dict", expected)


DETECTRON2_STAGES = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}
DETECTRON2_LAYERS = {
    "conv1": "conv1", "conv2": "conv2", "conv3": "conv3",
    "bn1": "conv1.norm", "bn2": "conv2.norm", "bn3": "conv3.norm",
    "downsample.0": "shortcut", "downsample.1": "shortcut.norm",
}  # fmt: skip


def detectron2_name(key: str) -> str:
    """Detectron2's name of a tensor of torchvision's ResNet."""
    *module, leaf = key.split(".")
    if module[0] == "fc":
        return f"stem.fc.{leaf}"
    if len(module) == 1:
        return f"stem.{DETECTRON2_LAYERS[module[0]]}.{leaf}"
    stage, block, *layer = module
    return f"{DETECTRON2_STAGES[stage]}.{block}.{DETECTRON2_LAYERS['.'.join(layer)]}.{leaf}"


def _detectron2(
    seed: int,
    depth: int,
    *,
    fc: bool = False,
    counters: bool = False,
    prefix: str = "",
    detector: bool = False,
    narrow: int = 1,
) -> Layout:
    """What the usual conversion script pickles: arrays. `detector`: the ResNet inside a fine-tuned one."""
    encoder = resnet(depth, seed, narrow)
    written = _without_counters(encoder | (_classifier(depth, seed, narrow) if fc else {}), counters)
    model = {prefix + detectron2_name(key): value.numpy() for key, value in written.items()}
    if detector:
        rest = {"backbone.fpn_lateral2.weight": [256, 256, 1, 1], "roi_heads.box_predictor.cls_score.bias": [20]}
        rest |= {"backbone.fpn_lateral2.bias": [256], "proposal_generator.rpn_head.conv.bias": [256]}
        model |= {key: value.numpy() for key, value in random_state(rest, seed, "detector").items()}
    content = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    return Layout(content, "model", {"encoder": _zero_counters(encoder, counters)})


MONODEPTH2_CONVS = (  # in the order of their numbers
    "upconv4_0", "upconv4_1", "upconv3_0", "upconv3_1", "upconv2_0", "upconv2_1", "upconv1_0", "upconv1_1",
    "upconv0_0", "upconv0_1", "head", "dispconv1", "dispconv2", "dispconv3",
)  # fmt: skip


def _monodepth2(seed: int, depth: int, *, part: str = "both", scales: int = 1, out_chans: int = 16) -> Layout:
    """`part`: "both" in one file, as listed by the manifest, or "encoder" and "depth", the two files of the original.

    `scales`: how many outputs the decoder has; with `out_chans` 1 and 4 scales it predicts disparity.
    """
    shapes = dict(manifest("assumed_janda_resunet18_16d")["keys"])
    outputs = {0: 16, 1: 32, 2: 64, 3: 128}
    for scale in range(scales):
        chans = outputs[scale]
        shapes[f"decoder.decoder.{10 + scale}.conv.weight"] = [out_chans, chans, 3, 3]
        shapes[f"decoder.decoder.{10 + scale}.conv.bias"] = [out_chans]
    encoder, fc = resnet(depth, seed), _classifier(depth, seed)
    names = {}
    for key in shapes:
        head, _, rest = key.partition(".decoder.")
        if head == "decoder":
            number, leaf = int(rest.split(".")[0]), rest.split(".")[-1]
            names[key] = f"{MONODEPTH2_CONVS[number]}.{leaf}"
    ours = random_state({names[key]: shapes[key] for key in names}, seed, "depth decoder")
    expected: dict[str, State] = {"encoder": encoder, "decoder": {}, "heads": {}}
    for name, value in ours.items():
        expected["heads" if name.startswith("dispconv") else "decoder"][name] = value
    content: dict[str, Any] = {f"encoder.encoder.{key}": value for key, value in (encoder | fc).items()}
    content |= {key: ours[name] for key, name in names.items()}
    if depth == 18:
        _check_shapes(content, shapes)
    if part == "encoder":
        content = {"height": 192, "width": 640, "use_stereo": False}
        content |= {f"encoder.{key}": value for key, value in (encoder | fc).items()}
        expected = {"encoder": encoder}
    elif part == "depth":
        content = {key.removeprefix("decoder."): ours[name] for key, name in names.items()}
        del expected["encoder"]
    return Layout(OrderedDict(content), "", {role: state for role, state in expected.items() if state})


def _old_sr_unet(
    format: str, seed: int, arch: Arch | None, *, optimizer: bool = False, prefix: str | None = None
) -> Layout:
    """PointContrast, CSC, VoteNet: block kernels in the order of MinkowskiEngine 0.4."""
    ours = _sr_unet(format, seed, arch)
    table = torch.tensor(manifest("kernel_offsets")["hybrid_from_cube"])
    theirs = dict(ours)
    for title, keys in manifest(MANIFESTS_3D[format])["kernel_layout"].items():
        for key in keys if "HYBRID" in title else ():
            theirs[key] = ours[key][table]
    default = {"votenet": "backbone_net.net."}.get(format, "")
    state = _state_dict(theirs, default if prefix is None else prefix)
    content: dict[str, Any] = {"curr_iter": 60000, "state_dict": state, "optimizer": _sgd(theirs, optimizer)}
    content["scheduler"] = _scheduler(60000)
    if format == "pointcontrast":
        content["config"] = foreign_config()
    if format == "votenet":
        rest = {"vgen.conv1.weight": [256, 256, 1], "vgen.conv1.bias": [256], "pnet.conv3.bias": [79]}
        state |= random_state(rest, seed, "votenet")
        content = {"epoch": 180, "optimizer_state_dict": content["optimizer"], "loss": torch.tensor(3.5)}
        content["state_dict"] = state
    return Layout(content, "state_dict", {"model": ours})


def _slidr(format: str, seed: int, arch: Arch | None, *, raw: bool | None = None, prefix: str = "") -> Layout:
    """The published point network, or with `raw` the training state, which has the image network too."""
    images = format == "slidr_images"
    points = _sr_unet("slidr", seed, None if images else arch)
    content: dict[str, Any] = {"model_points": _state_dict(points, prefix)}
    content["config"] = {"dataset": "nuScenes", "lr": 0.5, "name": None, "crop": (224, 416)}
    if not (images or raw):
        return Layout(content, "model_points", {"model": points})
    depth, narrow = (_depth(arch), _narrowing(arch, format)["narrow"]) if images else (50, 1)
    encoder = resnet(depth, seed, narrow)
    channels = _channels(depth, narrow)
    head = {"decoder.0.weight": [64, channels, 1, 1], "decoder.0.bias": [64]}
    head = random_state(head, seed, "image head")
    content["model_images"] = _state_dict({f"encoder.{k}": v for k, v in encoder.items()} | head, prefix)
    content["epoch"] = 49
    if images:
        return Layout(content, "model_images", {"encoder": encoder, "heads": head})
    return Layout(content, "model_points", {"model": points})


# --- parts ---


@cache
def manifest(name: str) -> Any:
    """A list of names and shapes, as the authors' own class gave it."""
    return json.loads((DATA / f"{name}.json").read_text())


def resnet(depth: int, seed: int, narrow: int = 1) -> State:
    """A ResNet-18 or -50 without classifier, torchvision's names."""
    return random_state(narrowed(_unet_shapes(depth, "encoder"), narrow), seed, "encoder")


def random_state(shapes: Mapping[str, list[int]], seed: int, part: str) -> State:
    """Random weights that keep activations in range: He-scaled kernels, norms near the identity."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{part} {seed}".encode()))  # it uses 32 bits
    return {key: _random(key, shape, generator) for key, shape in shapes.items()}


def _random(key: str, shape: list[int], generator: torch.Generator) -> Tensor:
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.randint(1, 100_000, (), generator=generator)
    value = torch.empty(shape)
    if leaf == "running_var":
        return value.uniform_(0.5, 1.5, generator=generator)
    if leaf in ("bias", "running_mean"):
        return value.normal_(0, 0.1, generator=generator)
    if len(shape) == 1:  # of a norm
        return value.normal_(1, 0.1, generator=generator)
    fan_in = math.prod(shape[:-1] if leaf == "kernel" else shape[1:])
    return value.normal_(0, math.sqrt(2 / fan_in), generator=generator)


def _sr_unet(format: str, seed: int, arch: Arch | None) -> State:
    stored = manifest(MANIFESTS_3D[format])["keys"]
    args = arch.args if arch is not None else {}
    out_chans = args.get("out_chans", stored["final.bias"][1])
    shapes = narrowed(stored, 32 // args.get("width", 32))
    shapes |= {"final.kernel": [shapes["final.kernel"][0], out_chans], "final.bias": [1, out_chans]}
    return random_state(shapes, seed, format)


def narrowed(shapes: Mapping[str, list[int]], factor: int) -> dict[str, list[int]]:
    """The shapes of the same network with fewer channels: every layer of the published ones has a multiple of 32."""
    return {key: [size // factor if size % 32 == 0 else size for size in shape] for key, shape in shapes.items()}


def _narrowing(arch: Arch | None, format: str) -> dict[str, int]:
    real = 32 if format == "pri3d_3d" else 64
    width = real if arch is None else arch.args.get("width", real)
    return {} if format == "monodepth2" else {"narrow": real // width}


def _unet_shapes(depth: int, part: str) -> dict[str, list[int]]:
    shapes = manifest(f"pri3d_res{depth}unet")["keys"]
    return {key.removeprefix(f"{part}."): shape for key, shape in shapes.items() if key.startswith(f"{part}.")}


def _channels(depth: int, narrow: int = 1) -> int:
    """Channels of a ResNet's last map."""
    return (512 if depth < 50 else 2048) // narrow


def _classifier(depth: int, seed: int, narrow: int = 1) -> State:
    return random_state({"fc.weight": [1000, _channels(depth, narrow)], "fc.bias": [1000]}, seed, "fc")


def _without_counters(state: State, counters: bool) -> State:
    return {k: v for k, v in state.items() if counters or not k.endswith("num_batches_tracked")}


def _zero_counters(state: State, counters: bool) -> State:
    zero = torch.tensor(0)
    return {k: v if counters or not k.endswith("num_batches_tracked") else zero for k, v in state.items()}


def _depth(arch: Arch | None) -> int:
    return 18 if arch is None else arch.args.get("depth", 18)


def _check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    wrong = [key for key, value in state.items() if shapes.get(key) != list(value.shape)]
    if wrong:
        raise ValueError(f"not as in the manifest: {wrong[:5]}")


# --- what lies around the weights ---


def _state_dict(state: State, prefix: str) -> OrderedDict[str, Any]:
    """As `nn.Module.state_dict` gives it: an OrderedDict with an attribute, which pickles carry along."""
    made = OrderedDict((prefix + key, value) for key, value in state.items())
    made._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return made


def _sgd(state: State, momentum: bool) -> dict[str, Any]:
    """An SGD's state; with `momentum` its buffers, as large as the weights."""
    weights = [v for k, v in state.items() if v.is_floating_point() and "running" not in k]
    buffers = {i: {"momentum_buffer": v.clone()} for i, v in enumerate(weights)} if momentum else {}
    group = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0, "nesterov": False}
    return {"state": buffers, "param_groups": [group | {"params": list(range(len(weights)))}]}


def _scheduler(steps: int) -> dict[str, Any]:
    return {"base_lrs": [0.1], "last_epoch": steps, "_step_count": steps + 1, "lr_lambdas": [None]}


class ContainerMetadata:
    """Of a configuration object: what it was made from."""

    def __init__(self, kind: type) -> None:
        self.ref_type, self.object_type, self.optional = Any, kind, True


class DictConfig:
    """A stranger's class in the file, as OmegaConf's are: whoever has not got it cannot unpickle the file plainly."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._metadata, self._parent, self._content = ContainerMetadata(dict), None, values


FOREIGN = {"omegaconf.dictconfig": DictConfig, "omegaconf.base": ContainerMetadata}
for _module, _class in FOREIGN.items():
    _class.__module__ = _module  # where the pickle says it comes from


def foreign_config() -> DictConfig:
    """A configuration object, nested."""
    trainer = DictConfig({"lr": 0.1, "stat_freq": 40, "resume": None})
    return DictConfig({"trainer": trainer, "misc": DictConfig({"nceT": 0.4, "out_dir": "./outputs"})})


@contextmanager
def foreign_modules() -> Iterator[None]:
    """For the time of writing the foreign classes can be found where they claim to be."""
    names = ("omegaconf", *FOREIGN)
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        if name in FOREIGN:
            setattr(sys.modules[name], FOREIGN[name].__name__, FOREIGN[name])
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
