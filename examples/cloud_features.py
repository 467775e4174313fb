"""Features of a point network on a cloud, written as the colors of a PLY.

python examples/cloud_features.py --out clouds                               # random weights
python examples/cloud_features.py --backbone pointcontrast_nce_srunet34      # fetches the authors' file once
python examples/cloud_features.py --backbone runs/pointcontrast              # or one of yours
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import geo_pretrain as gp
from geo_pretrain.rooms import RoomGenerator, RoomsConfig


def main() -> None:
    """Encode the points of a room and write them in colors of three principal components."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("clouds"))
    parser.add_argument("--backbone", help="a catalog name or a folder; default: pointcontrast_nce_srunet34, random")
    parser.add_argument("--steps", type=int, default=0, help="not used: nothing is trained here")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    net = gp.load_backbone(given.backbone or "pointcontrast_nce_srunet34", pretrained=given.backbone is not None)
    rooms = RoomGenerator(RoomsConfig(scenes=1))
    surface = rooms.points(rooms.names()[0], density=200)
    points, colors = torch.from_numpy(surface.points), torch.from_numpy(surface.colors) / 255  # meters; [0, 1]
    with (
        torch.no_grad()
    ):  # a network that was trained on ones refuses colors, one that was trained on colors asks for them
        features = net.encode_points(points, colors) if net.contract.given_channels else net.encode_points(points)
    print(f"{tuple(points.shape)} points -> {tuple(features.shape)} features")

    centered = features - features.mean(0)
    shown = centered @ torch.linalg.svd(centered[::10], full_matrices=False).Vh[:3].T
    low, high = shown.quantile(0.02, dim=0), shown.quantile(0.98, dim=0)
    rgb = ((shown - low) / (high - low)).clamp(0, 1).mul(255).byte().numpy()
    vertex = np.zeros(len(points), dtype=[("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "u1", 3)])
    for number, axis in enumerate("xyz"):
        vertex[axis] = points[:, number].numpy()
    vertex["rgb"] = rgb
    fields = "".join(f"property float {axis}\n" for axis in "xyz")
    fields += "".join(f"property uchar {color}\n" for color in ("red", "green", "blue"))
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{fields}end_header\n"
    (given.out / "features.ply").write_bytes(head.encode() + vertex.tobytes())
    print(f"Wrote {given.out / 'features.ply'}")


if __name__ == "__main__":
    main()
