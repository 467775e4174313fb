"""A pre-trained encoder inside DeepLabV3+ of segmentation-models-pytorch, trained in a loop of your own.

    python examples/deeplab.py --out deeplab --backbone pri3d_view_geo_r18   # needs a network once; default: random

Needs `pip install "geo_pretrain[adapters]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from geo_pretrain.adapters import smp
from geo_pretrain.rooms import CLASSES, RoomGenerator, RoomsConfig


def labelled_images(scenes: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, 3] uint8 and their classes [N, H, W]; put your own here."""
    rooms = RoomGenerator(RoomsConfig(scenes=scenes, frames=4, width=128, height=96, split=split, renderer="auto"))
    rendered = [rooms.render(name) for name in rooms.names()]
    return tuple(np.concatenate([room[key] for room in rendered]) for key in ("color", "semantic"))  # type: ignore[return-value]


def main() -> None:
    """Train for some steps and write a prediction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("deeplab"))
    parser.add_argument(
        "--backbone", help="a catalog name or a folder; default: pri3d_view_geo_r18 with random weights"
    )
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    name = given.backbone or "pri3d_view_geo_r18"
    network = smp.deeplabv3plus(name, num_classes=len(CLASSES), pretrained=given.backbone is not None).train()
    prepare = network.contract.transforms(resize=False)  # network.transforms would bring images to 240x320
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    images, labels = labelled_images(6, "train")
    for step in range(given.steps):
        chosen = torch.randint(len(images), (4,)).numpy()
        batch = torch.stack([prepare(image) for image in images[chosen]])
        loss = F.cross_entropy(network(batch), torch.from_numpy(labels[chosen].astype(np.int64)), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == given.steps - 1:
            print(f"step {step}: loss {loss.item():.2f}", flush=True)

    image = labelled_images(1, "val")[0][0]
    with torch.no_grad():
        found = network.eval()(prepare(image)[None])[0].argmax(0).numpy()
    palette = np.random.default_rng(0).integers(60, 255, (len(CLASSES), 3), dtype=np.uint8)
    Image.fromarray(np.concatenate([image, palette[found]], axis=1)).save(given.out / "prediction.png")
    print(f"Wrote {given.out / 'prediction.png'}: {', '.join(CLASSES[number] for number in np.unique(found))}")


if __name__ == "__main__":
    main()
