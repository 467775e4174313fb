"""Checkpoints that Python packages of this project hold: digests, mirrors, numbers measured with these very files.

`geo-pretrain weights` writes this file; a name that stands here never changes meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

from geo_pretrain.catalog.entry import Result, Shipped

__all__ = ["SHIPPED", "Result"]

SHIPPED: Mapping[str, Shipped] = {
    "csc_srunet34.rooms": Shipped(
        package="geo_pretrain_weights_3d",
        files={
            "model.safetensors": (75835056, "30048754e819358a2c352a4a59133d6c11fe5a91109170b10b6c067bd1e56350"),
            "golden.safetensors": (114580, "40c38109f564342469eeef0288578292487ff7e0470a57e018fd352c999b4672"),
            "recipe.yaml": (1107, "b2eca09fb7d9024923835fc0bfed789e852b82d56e539a8629434ff3f8ad5f36"),
            "log.jsonl": (203933, "2222aaa3a1a8ce3318de1b7b2d9a7259302a8682d5ebe9ccf62808830efdda93"),
        },
        made="10,000 steps in 1.7 h on cpu",
        measured=(
            Result(
                task="voxel matching",
                dataset="7-Scenes, kitchen",
                metric="recall at 2 voxels (%)",
                value=15.13,
                table="benchmarks/results/awareness_kitchen3d.json#/networks/csc_srunet34.rooms/matching/layers/block8 ~11/recall/mean",  # noqa: E501
                note="random: 4.0",
            ),
            Result(
                task="voxel matching",
                dataset="rooms",
                metric="recall at 2 voxels (%)",
                value=18.35,
                table="benchmarks/results/awareness_rooms3d.json#/networks/csc_srunet34.rooms/matching/layers/block8 ~11/recall/mean",  # noqa: E501
                note="random: 4.9",
            ),
        ),
    ),
    "pri3d_view_r18.rooms": Shipped(
        package="geo_pretrain_weights",
        files={
            "encoder.safetensors": (22421056, "6ed50f93bc60ba3a44b9a6a3f2ab11f6a5652592cf28beac15e9a3f6a317c015"),
            "decoder.safetensors": (19005992, "44e4cf5e83ab990069125f2052ded76a8f612efb08d978a741e95b5ac3b9ba7e"),
            "heads.safetensors": (220, "509c6f743aff3dab8f19a71214130358f76220a164bad33d5e8d4e086a2a7430"),
            "golden.safetensors": (848432, "bf5e94870bf5f88e249f51e087a7bcdb6ef99bd013d20efa289822b1e2ecc71a"),
            "recipe.yaml": (1034, "cced341d64cec9a71cba988b3b73530944dab34e6abe9bbbfd773c8ca3d6fafd"),
            "log.jsonl": (257768, "c0e22187eccc6c04bc0649c3bf4c8222533da5353b966317109db20218374e84"),
        },
        made="20,000 steps in 2.2 h on cpu",
        size=(120, 160),
        measured=(
            Result(
                task="dense matching",
                dataset="rooms",
                metric="recall at 4 px (%)",
                value=57.81,
                table="benchmarks/results/front_picture.json#/weights/scores/pri3d_view_r18.rooms/recall",
                note="random: 11.2",
            ),
            Result(
                task="dense matching",
                dataset="7-Scenes, kitchen",
                metric="recall at 4 px (%)",
                value=16.29,
                table="benchmarks/results/awareness_kitchen.json#/networks/pri3d_view_r18.rooms/matching/layers/layer2 ~18/4 px/mean",  # noqa: E501
                note="random: 8.3",
            ),
            Result(
                task="semantic segmentation",
                dataset="rooms",
                metric="mIoU",
                value=33.68,
                table="benchmarks/results/few_labels.json#/measured/7/mean",
                note="random: 20.2",
            ),
            Result(
                task="semantic segmentation, 5 % of the labels",
                dataset="rooms",
                metric="mIoU",
                value=23.19,
                table="benchmarks/results/few_labels.json#/measured/5/mean",
                note="random: 14.7",
            ),
        ),
    ),
}
