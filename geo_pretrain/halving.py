"""Store a checkpoint in half the size: its matrices as float16, everything else as it was.

`load_backbone` turns them into float32 again. Biases, norms and their statistics stay float32: they are small, and
variances may leave float16's range.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geo_pretrain.catalog.entry import WEIGHT_ROLES
from geo_pretrain.checkpoint import Checkpoint, read_checkpoint, read_weights, verify_files, write_checkpoint
from geo_pretrain.errors import CheckpointError, some

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_ERROR = 0.01  # of an output, relative to its largest magnitude: float16 keeps 11 bits of each weight


def write_halved(folder: Path | str, out: Path | str, *, without: Collection[str] = ()) -> Checkpoint:
    """Write the checkpoint `folder` to `out` with its matrices in float16 and golden outputs of these weights.

    `without`: roles to leave out, "heads" and "teacher"; a pair of networks becomes the folder's own network alone.
    `provenance["float16"]` tells how far each golden output moved, relative to its largest magnitude. Raises
    `CheckpointError` where a weight exceeds float16's range or an output moves by more than 1 %, and what
    `loading.verify` raises.
    """
    from geo_pretrain.loading import golden_of, verify

    checkpoint = read_checkpoint(folder)
    verify_files(checkpoint)
    verify(folder)
    if needed := [role for role in without if role not in ("heads", "teacher")]:
        raise CheckpointError(f"Role {needed[0]!r} cannot be left out; accepted: heads, teacher.")
    partner = checkpoint.pairing
    if partner is not None and set(without) & set(partner.roles()):
        checkpoint = replace(checkpoint, pairing=None)
    roles = [role for role in WEIGHT_ROLES if role in checkpoint.roles and role not in without]
    weights = {role: _halved(read_weights(checkpoint, role), checkpoint, role) for role in roles}
    before = read_weights(checkpoint, "golden")
    if partner is not None and checkpoint.pairing is None:
        before = {key: value for key, value in before.items() if "pair." not in key}
    _write(checkpoint, out, weights, before, {})
    after = golden_of(out)
    moved = {
        key: float((after[key] - value).abs().max() / value.abs().max().clamp_min(1e-12))
        for key, value in before.items()
        if not key.startswith("input")
    }
    if too_far := [key for key, value in moved.items() if not value <= LARGEST_ERROR]:
        raise CheckpointError(
            f"{checkpoint.folder}: in float16 its golden outputs move by more than {LARGEST_ERROR:.0%}: "
            f"{', '.join(f'{key} by {moved[key]:.1%}' for key in too_far)}. Publish it as it is."
        )
    return _write(checkpoint, out, weights, before | after, {"float16": {"moved": moved}})


def _halved(state: Mapping[str, Tensor], checkpoint: Checkpoint, role: str) -> dict[str, Tensor]:
    import torch

    largest = torch.finfo(torch.float16).max
    matrices = {key for key, value in state.items() if value.dtype is torch.float32 and value.ndim > 1}
    if over := [key for key in sorted(matrices) if not state[key].abs().max() <= largest]:
        raise CheckpointError(
            f"{checkpoint.folder}: {role} has weights above {largest:g}, which float16 does not hold: "
            f"{some(over, 3)}. Publish it as it is."
        )
    return {key: value.half() if key in matrices else value for key, value in state.items()}


def _write(
    checkpoint: Checkpoint,
    out: Path | str,
    weights: Mapping[str, Mapping[str, Tensor]],
    golden: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> Checkpoint:
    def text(role: str) -> str | None:
        if role not in checkpoint.roles:
            return None
        return (checkpoint.folder / checkpoint.file_of(role)).read_text(encoding="utf-8")

    return write_checkpoint(
        out,
        name=checkpoint.name,
        arch=checkpoint.arch,
        contract=checkpoint.contract,
        weights=weights,
        golden=golden,
        license=checkpoint.license,
        provenance={**checkpoint.provenance, **facts},
        recipe_yaml=text("recipe"),
        log=text("log"),
        card=text("card") or "",
        finished=checkpoint.finished,
        pairing=checkpoint.pairing,
    )
