"""The code snippets of a card, one a library, and only those that work for the checkpoint.

Snippets of one card go together: the first makes `image` or `points`, which the others use. The tests run them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from geo_pretrain.catalog.entry import Arch
from geo_pretrain.contract import COLORS, ImageContract, VoxelContract

CLONE = "path/to/geo_pretrain"  # of this project, for torch.hub


@dataclass(frozen=True)
class Snippet:
    """One code snippet and the sentence above it."""

    text: str
    code: str

    def __str__(self) -> str:
        return f"{self.text}\n\n```python\n{self.code}\n```"


TORCH_HUB = Snippet(
    "From torch.hub, with the arguments of `load_backbone` (here from a clone of the project):",
    """\
import torch

network = torch.hub.load("{clone}", "{name}", source="local")""",
)
TIMM = Snippet(
    "In timm, whose `create_model` knows the name after the first import:",
    """\
import geo_pretrain.adapters.timm
import timm

features = timm.create_model("{name}", pretrained=True, features_only=True)
classifier = timm.create_model("{name}", pretrained=True, num_classes=10)""",
)
SMP = Snippet(
    "In segmentation-models-pytorch, under any of its decoders:",
    """\
import geo_pretrain.adapters.timm
import segmentation_models_pytorch as smp

network = smp.Unet("tu-{name}", encoder_weights=True, classes=20)""",
)
TORCHVISION = Snippet(
    "As torchvision's own `ResNet`, with a fresh classifier:",
    """\
from geo_pretrain.adapters.torchvision import resnet

network = resnet("{where}", num_classes=10)""",
)
MINKOWSKI = Snippet(
    "In MinkowskiEngine 0.5, where it is installed (nothing above needs it):",
    """\
import MinkowskiEngine as ME
from geo_pretrain.adapters.minkowski import me_network, state_dict

network = me_network("{where}")
output = network(ME.SparseTensor(voxels.feats, coordinates=voxels.coords))
weights = state_dict("{where}")  # for a network of your own""",
)


def snippets(
    where: str,
    arch: Arch,
    contract: ImageContract | VoxelContract,
    *,
    name: str | None,
    pretrained: bool = True,
    decoder: bool = True,
) -> list[Snippet]:
    """Snippets that load the network in each library that supports it.

    `where` is what load_backbone takes: a name, a folder or hf-hub:owner/repo. `name` is the catalog's, for libraries
    that know nothing else; None: it has none. `decoder=False`: its weights are not there. `pretrained=False`: no
    weights are, and only the network itself is shown.
    """
    hosts = {"name": name, "where": where, "clone": CLONE}
    if isinstance(contract, VoxelContract):
        shown = [_own_3d(where, arch, contract, pretrained)]
        others = [TORCH_HUB, MINKOWSKI]
    else:
        shown = [_own_2d(where, arch, contract, pretrained, decoder)]
        others = [TORCH_HUB, *([TIMM, SMP, TORCHVISION] if arch.host_encoder is not None else [])]
    for other in others if pretrained else ():
        if name is not None or "{name}" not in other.code:
            shown.append(replace(other, code=other.code.format(**hosts)))
    return shown


def encoder_channels(arch: Arch) -> tuple[int, ...]:
    """Channels of the encoder's maps, finest first."""
    return tuple(chans for chans, _ in arch.maps)


def dense_shape(arch: Arch, contract: ImageContract) -> str:
    """The shape of the U-Net's features for one image of the contract's size, such as "[1, 128, 120, 160]"."""
    height, width = (math.ceil(side / arch.architecture.dense_stride) for side in contract.size)
    return f"[1, {output_channels(arch)}, {height}, {width}]"


def output_channels(arch: Arch) -> int:
    """Channels of the network's output, stated or by the constructor's default."""
    stated = arch.args.get("out_chans") or arch.architecture.defaults.get("out_chans")
    return int(stated or encoder_channels(arch)[1] // 2)


def _own_2d(where: str, arch: Arch, contract: ImageContract, pretrained: bool, decoder: bool) -> Snippet:
    off = "" if pretrained else ", pretrained=False"
    maps, strides = (", ".join(map(str, values)) for values in zip(*arch.maps, strict=True))
    code = f"""\
import geo_pretrain as gp
from PIL import Image

image = Image.open("image.jpg")
encoder = gp.load_backbone("{where}"{off})
maps = encoder(encoder.transforms(image)[None])  # {maps} channels at strides {strides}"""
    if decoder and arch.has_decoder:
        code += f"""
unet = gp.load_backbone("{where}", decoder=True{off})
features = unet(unet.transforms(image)[None])  # {dense_shape(arch, contract)}"""
    text = "`.transforms` takes PIL images, uint8 arrays [H, W, 3] and tensors; `.train()` begins fine-tuning."
    return Snippet(text, code)


def _own_3d(where: str, arch: Arch, contract: VoxelContract, pretrained: bool) -> Snippet:
    names = contract.given_channels
    colors = bool(names) and set(names) <= COLORS
    given = "" if not names else "colors" if colors else "_".join(names)
    off = "" if pretrained else ", pretrained=False"
    call, loaded = "points", ""
    if given:
        call = f"points, {given}"
        loaded = f'\n{given} = cloud["{given}"]  # {"uint8" if colors else "float"} [N, {len(names)}]'
    code = f"""\
import geo_pretrain as gp
import numpy as np
from geo_pretrain.sparse import SparseTensor

cloud = np.load("cloud.npz")
points = cloud["points"]  # float [N, 3] in meters{loaded}
network = gp.load_backbone("{where}"{off})
features = network.encode_points({call})  # [N, D]: the maps of all strides, for each point
output = network.encode_points({call}, out="final")  # [N, {output_channels(arch)}]: what the loss saw
voxels = network.transforms({call})
maps = network.pyramid(SparseTensor(voxels.coords, voxels.feats))  # strides 1, 2, 4, 8, 16 in voxels"""
    text = "`.transforms` makes voxels of points as in pre-training; `.train()` begins fine-tuning."
    return Snippet(text, code)
