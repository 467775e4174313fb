"""A small RGB-D recording on disk: the six procedural views of the golden geometry in 7-Scenes layout."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from geo_pretrain.training import loop

GOLDEN = Path(__file__).parents[1] / "data" / "geometry.safetensors"


def golden_views():
    """(depth in mm [120, 160], camera-to-world [4, 4]) of the six views."""
    golden = load_file(GOLDEN)
    return [
        (golden[f"{pair}.depth{k}_mm"], golden[f"{pair}.pose{k}"])
        for pair in ("pair80", "pair50", "pair30")
        for k in (1, 2)
    ]


def paint(depth_mm, pose, intrinsics):
    """Colors that stick to the surfaces: a texture of the world position."""
    v, u = np.mgrid[0 : depth_mm.shape[0], 0 : depth_mm.shape[1]]
    z = depth_mm / 1000
    points = np.stack(
        [
            (u - intrinsics[0, 2]) * z / intrinsics[0, 0],
            (v - intrinsics[1, 2]) * z / intrinsics[1, 1],
            z,
            np.ones_like(z),
        ]
    )
    world = np.einsum("ij,jhw->hwi", pose, points)[..., :3]
    waves = np.sin(world * np.array([5.0, 7.0, 9.0])) + np.sin(world[..., [1, 2, 0]] * np.array([13.0, 11.0, 17.0]))
    return ((waves + 2) / 4 * 255).astype(np.uint8)


def write_recording(folder, suffix=".png"):
    """Write the views as frames 0, 10, ..., 50."""
    folder.mkdir(parents=True, exist_ok=True)
    intrinsics = load_file(GOLDEN)["intrinsics"].astype(np.float64)
    np.savetxt(folder / "camera-intrinsics.txt", intrinsics)
    for number, (depth, pose) in enumerate(golden_views()):
        stem = folder / f"frame-{10 * number:06d}"
        Image.fromarray(depth.astype(np.uint16)).save(f"{stem}.depth.png")
        Image.fromarray(paint(depth, pose.astype(np.float64), intrinsics)).save(f"{stem}.color{suffix}")
        np.savetxt(f"{stem}.pose.txt", pose)
    return folder


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """Read-only; write your own with `write_recording` to break it."""
    return write_recording(tmp_path_factory.mktemp("recording"))


TINY = {
    "name": "pri3d_view_r18.tiny",
    "task": {"name": "pri3d_view", "matches": 64},
    "model": {"encoder": "resnet18", "init": "scratch", "width": 8},
    "data": {"source": "seven_scenes", "size": [48, 64], "overlap": [0.2, 1.0]},
    "optim": {"batch": 4, "lr": 0.05, "momentum": 0.9, "dampening": 0.1, "steps": 60},
    "workers": 0,
    "save_every": 7,
}


UNET3D = {"variant": "18A", "width": 8, "voxel_size": 0.15}
CLOUDS = {"model": None, "unet3d": UNET3D, "optim": {"dampening": 0.0, "bn_momentum": "constant", "steps": 30}}
TAUGHT = CLOUDS | {"data": {"units": "frames"}}
IMAGES = {"units": "frames", "overlap": None}
FROZEN = {"teacher": "scratch", "teacher_encoder": "resnet18"}
# What a tiny recipe of each task changes; 3D tasks see the same recording.
TINY_TASKS = {
    "pri3d_view": {},
    "depth_prediction": {"name": "depth_prediction_r18.tiny", "task": {"name": "depth_prediction", "matches": None}},
    "pri3d_geo": {
        "name": "pri3d_geo_r18.tiny",
        "task": {"name": "pri3d_geo"},
        "unet3d": UNET3D | {"stem_kernel": 5, "out_chans": 96},
    },
    "pri3d_view_geo": {
        "name": "pri3d_view_geo_r18.tiny",
        "task": {"name": "pri3d_view_geo"},
        "unet3d": UNET3D | {"stem_kernel": 5, "out_chans": 96},
    },
    "pointcontrast_nce": CLOUDS
    | {
        "name": "pointcontrast_nce_srunet18.tiny",
        "task": {"name": "pointcontrast_nce", "matches": 256, "temperature": 0.1, "rotation": "upright"},
    },
    "pointcontrast_hardest": CLOUDS
    | {
        "name": "pointcontrast_hardest_srunet18.tiny",
        "task": {"name": "pointcontrast_hardest", "matches": None, "positives": 128, "candidates": 64},
    },
    "csc": CLOUDS | {"name": "csc_srunet18.tiny", "task": {"name": "csc", "matches": 128}},
    "ppkt": TAUGHT | {"name": "ppkt_srunet18.tiny", "task": {"name": "ppkt", "matches": 128, **FROZEN}},
    "ppkd": TAUGHT
    | {
        "name": "ppkd_srunet18.tiny",
        "task": {"name": "ppkd", "matches": 128, **FROZEN},
        "unet3d": UNET3D | {"out_chans": 512},
    },
    **{
        name: TAUGHT | {"name": f"{name}_srunet18.tiny", "task": {"name": name, "matches": None, **FROZEN}}
        for name in ("global_kd", "gupta", "crd")
    },
    "gsc": {
        "name": "gsc_r18.tiny",
        "task": {"name": "gsc", "matches": None, "min_size": 2},
        "optim": {"bn_momentum": "constant"},
    },
    "trivial_correspondence": {
        "name": "trivial_correspondence_r18.tiny",
        "task": {"name": "trivial_correspondence", "matches": 32, "depth_proxy": True},
    },
    "moco_v2": {
        "name": "moco_v2_r18.tiny",
        # of smaller crops, or colder, the losses double what differs in the last digit
        "task": {"name": "moco_v2", "matches": None, "queue": 10, "dim": 8, "momentum": 0.9, "temperature": 1.0},
        "data": {"size": [96, 120], **IMAGES},
        "optim": {"dampening": 0.0, "bn_momentum": "constant"},
    },
    "pixel_simclr": {
        "name": "img2pc_stage1_r18.tiny",
        "task": {"name": "pixel_simclr", "matches": 48},
        "data": IMAGES,
        "optim": {"kind": "adam", "dampening": 0.0, "bn_momentum": "constant"},
    },
    "img2pc": CLOUDS  # its teacher is a first stage, which a recipe must name: {"stage1": {"recipe": PATH}}
    | {
        "name": "img2pc_srunet18.tiny",
        "task": {"name": "img2pc", "matches": 100, "temperature": 0.1},
        "unet3d": UNET3D | {"out_chans": 16},
        "data": IMAGES | {"augment": {"jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}},
    },
}


def recipe_writer(folder, recording):
    """What the fixture `tiny_recipe` gives."""

    def write(tiny="pri3d_view", **changes):
        tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
        tree["data"]["path"] = str(recording)
        for change in (TINY_TASKS[tiny], changes):
            for key, value in change.items():
                tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
        for section in (tree, *(value for value in tree.values() if isinstance(value, dict))):
            for key in [key for key, value in section.items() if value is None]:
                del section[key]
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def pickled_loaders(monkeypatch):
    """Loaders get what a worker would get that is started by spawn (macOS, Windows): pickled and unpickled."""

    def loader(dataset, *, batch_sampler, collate_fn, num_workers, generator, pin_memory):
        dataset, batch_sampler, collate_fn = pickle.loads(pickle.dumps((dataset, batch_sampler, collate_fn)))
        return DataLoader(dataset, batch_sampler=batch_sampler, collate_fn=collate_fn, generator=generator)

    monkeypatch.setattr(loop, "DataLoader", loader)


@pytest.fixture
def tiny_recipe(tmp_path, recording):
    """Writes a recipe that trains in seconds on the recording and gives its path.

    The first argument names the task (a key of TINY_TASKS); others replace keys of the recipe, None removes them.
    """
    return recipe_writer(tmp_path, recording)
