"""Match two images by the features of a backbone: for each pixel of one, the most similar place of the other.

python examples/match_two_views.py --out matches            # trains a small backbone first
python examples/match_two_views.py --backbone runs/kitchen  # or one of yours, or a catalog name
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import geo_pretrain as gp
from geo_pretrain.rooms import RoomGenerator, RoomsConfig


def main() -> None:
    """Match two frames of a room and draw 40 of the matches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("matches"))
    parser.add_argument("--backbone", help="a folder or a name; default: a toy that is trained here")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    backbone = given.backbone
    if backbone is None:
        backbone = given.out / "backbone"
        overrides = [f"optim.steps={given.steps}", "data.options.scenes=8", "workers=0", "precision=fp32"]
        command = ["train", "pri3d_view_r18.rooms_toy", "--out", str(backbone), "--overwrite"]
        command += [word for override in overrides for word in ("--set", override)]
        subprocess.run([sys.executable, "-m", "geo_pretrain", *command], check=True)

    unet = gp.load_backbone(backbone, decoder=True)
    rooms = RoomGenerator(RoomsConfig(scenes=1, frames=24, width=128, height=96, split="val", renderer="auto"))
    first, second = rooms.render(rooms.names()[0])["color"][[3, 4]]
    prepare = unet.contract.transforms(resize=False)
    with torch.no_grad():
        maps = unet(torch.stack([prepare(image) for image in (first, second)]))  # [2, C, H/2, W/2]
    one, two = (F.normalize(features.flatten(1), dim=0) for features in maps)
    best = (one.T @ two).max(dim=1)  # over all places of the other map

    width = maps.shape[-1]
    canvas = Image.fromarray(np.concatenate([first, second], axis=1)).resize((1024, 384), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for place in best.values.topk(400).indices[::10].tolist():
        start, end = ((index % width, index // width) for index in (place, int(best.indices[place])))
        scale = 512 / width
        draw.line([*(value * scale for value in start), end[0] * scale + 512, end[1] * scale], fill="lime", width=1)
    canvas.save(given.out / "matches.png")
    print(f"Wrote {given.out / 'matches.png'}")


if __name__ == "__main__":
    main()
