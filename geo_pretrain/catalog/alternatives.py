"""Backbones outside this zoo that are often the better choice, with what their authors state; none was measured here.

docs/alternatives.md has them as a table, `geo-pretrain recommend` names those that fit a question. Licenses are those
of the weights, as the repositories' README files state them.
"""

from __future__ import annotations

from dataclasses import dataclass

from geo_pretrain.catalog.license import LICENSE_GROUPS, check_license


@dataclass(frozen=True)
class Alternative:
    """One backbone of others: what it is for, what its authors report, its license, what it needs."""

    name: str
    url: str
    modality: str  # "2d": takes images, "3d": point clouds
    tasks: tuple[str, ...]  # those it is the first choice for; (): every task of its modality
    what: str  # it is for, in words
    reported: str  # Markdown
    license: str  # of the weights
    needs: str
    lidar: bool = False  # whether it takes LiDAR sweeps; told apart in 3D alone
    code: str = ""  # a line of Python that loads it where this library is installed

    def __post_init__(self) -> None:
        check_license(self.license)

    def matches(self, license: str) -> bool:
        """Whether the weights' license is this identifier, or in this group: "permissive", "non-commercial"."""
        return self.license in LICENSE_GROUPS.get(license, (license,))


SONATA = "[Sonata](https://arxiv.org/abs/2503.16429)"
PTV3 = "CUDA, spconv; FlashAttention if wanted"
ALTERNATIVES: tuple[Alternative, ...] = (
    Alternative(
        "DINOv2",
        "https://arxiv.org/abs/2304.07193",
        "2d",
        (),
        "ViT-S/14 to g/14, images",
        f"63.1 mIoU on ScanNet when its features are lifted to points, linear probe ({SONATA})",
        "Apache-2.0",
        "torch; also in timm and transformers",
        code='gp.load_backbone("timm/vit_small_patch14_dinov2.lvd142m")',
    ),
    Alternative(
        "DINOv3",
        "https://arxiv.org/abs/2508.10104",
        "2d",
        (),
        "ViT and ConvNeXt, images",
        "above DINOv2 on dense tasks",
        "LicenseRef-DINOv3",
        "torch; timm 1.0.20, transformers 4.56 or newer; the weights are behind a form",
    ),
    Alternative(
        "Depth Anything V2 Small",
        "https://arxiv.org/abs/2406.09414",
        "2d",
        ("depth",),
        "relative depth of single images",
        "its Base, Large and Giant are CC-BY-NC-4.0",
        "Apache-2.0",
        "torch; also in transformers",
    ),
    Alternative(
        "RoMa",
        "https://arxiv.org/abs/2305.15404",
        "2d",
        ("matching",),
        "dense matches between two images",
        "pixel-dense warps with certainties, on DINOv2's features",
        "MIT",
        "torch; its README states MIT of the code, and nothing of the weights",
    ),
    Alternative(
        "MASt3R",
        "https://arxiv.org/abs/2406.09756",
        "2d",
        ("matching", "depth"),
        "matches and metric 3D of two images",
        "points, depth and matches from one network",
        "CC-BY-NC-SA-4.0",
        "torch; a GPU to be quick",
    ),
    Alternative(
        "Sonata",
        "https://arxiv.org/abs/2503.16429",
        "3d",
        (),
        "Point Transformer V3, indoor clouds",
        "72.5 mIoU on ScanNet by a linear probe, where earlier 3D methods had 21.8",
        "CC-BY-NC-4.0",
        PTV3,
    ),
    Alternative(
        "Concerto",
        "https://arxiv.org/abs/2510.23607",
        "3d",
        (),
        "Point Transformer V3, indoor clouds, with images in training",
        "80.7 mIoU on ScanNet fine-tuned; 4.8 % above Sonata in linear probes",
        "CC-BY-NC-4.0",
        PTV3,
    ),
    Alternative(
        "Utonia",
        "https://arxiv.org/abs/2603.03283",
        "3d",
        (),
        "Point Transformer V3, indoor, outdoor and object clouds",
        "one encoder for all of them",
        "CC-BY-NC-4.0",
        PTV3,
        lidar=True,
    ),
)
