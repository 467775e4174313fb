"""Losses of all tasks: pure functions of tensors, each with a runnable example and a slow twin in a test."""

from __future__ import annotations

from geo_pretrain.training.losses.contrastive import (
    anchor_nce,
    hardest_contrastive,
    info_nce,
    nt_xent,
    partition_info_nce,
    queue_nce,
)
from geo_pretrain.training.losses.depth import depth_loss
from geo_pretrain.training.losses.distillation import crd_loss, crd_scores, kl_distillation, l2_distillation
from geo_pretrain.training.losses.fused import info_nce_of_rows, log_sums, partition_nce_of_rows
from geo_pretrain.training.losses.offsets import center_offsets, direction_loss, offset_loss
from geo_pretrain.training.losses.segmentation import lovasz_softmax
from geo_pretrain.training.losses.sets import set_info_nce
from geo_pretrain.training.losses.voting import (
    assign_proposals,
    box_losses,
    center_loss,
    objectness_loss,
    vote_loss,
    votenet_losses,
)

__all__ = [
    "anchor_nce",
    "assign_proposals",
    "box_losses",
    "center_loss",
    "center_offsets",
    "crd_loss",
    "crd_scores",
    "depth_loss",
    "direction_loss",
    "hardest_contrastive",
    "info_nce",
    "info_nce_of_rows",
    "kl_distillation",
    "l2_distillation",
    "log_sums",
    "lovasz_softmax",
    "nt_xent",
    "objectness_loss",
    "offset_loss",
    "partition_info_nce",
    "partition_nce_of_rows",
    "queue_nce",
    "set_info_nce",
    "vote_loss",
    "votenet_losses",
]
