"""InfoNCE by blocks of scores against a plain twin in float64: values, gradients, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from geo_pretrain.training import losses
from geo_pretrain.training.losses import fused


def plain_info_nce(query, key, temperature, symmetric, normalize, ignore):
    """The definition, with all scores at once."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = query @ key.mT / temperature
    if ignore is not None:
        logits = logits.masked_fill(ignore & ~torch.eye(logits.shape[-1], dtype=torch.bool), -torch.inf)
    positive = logits.diagonal(dim1=-2, dim2=-1)
    there = (logits.logsumexp(-1) - positive).mean(-1)
    return (there + (logits.logsumexp(-2) - positive).mean(-1)) / 2 if symmetric else there


@pytest.mark.parametrize("block", [10, 40, 300, 10_000], ids=["a row", "some rows", "a problem", "all"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ignoring", [True, False])
@pytest.mark.parametrize(
    "temperature, normalize, size", [(0.4, True, 1.0), (0.034, True, 1.0), (0.01, True, 1.0), (0.1, False, 20.0)]
)
def test_values_and_gradients_are_the_plain_twins(
    monkeypatch, block, symmetric, ignoring, temperature, normalize, size
):
    monkeypatch.setitem(fused.BLOCK, "cpu", block)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, 12, 6, dtype=torch.float64, generator=generator) * size
    rows[1] += rows[0]  # matched rows are alike
    ignore = torch.rand(5, 12, 12, generator=generator) < 0.3 if ignoring else None
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    found = []
    for dtype, loss in ((torch.float64, losses.info_nce), (torch.float64, None), (torch.float32, losses.info_nce)):
        leaves = [view.to(dtype).clone().requires_grad_() for view in rows]
        options = {"temperature": temperature, "symmetric": symmetric, "normalize": normalize, "ignore": ignore}
        values = loss(*leaves, **options) if loss else plain_info_nce(*leaves, *options.values())
        (values * weights.to(dtype)).sum().backward()
        found.append([values.detach(), *(leaf.grad for leaf in leaves)])
    for ours, twin, single in zip(*found, strict=True):
        scale = twin.abs().max().item()
        torch.testing.assert_close(ours, twin, rtol=1e-11, atol=1e-12 * scale)
        torch.testing.assert_close(single.double(), twin, rtol=1e-3, atol=1e-5 * scale)


def test_no_matrix_of_scores_is_kept():
    kept = []
    leaves = [torch.randn(3, 50, 4, requires_grad=True) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        losses.info_nce(*leaves, temperature=0.4)
    assert kept
    assert max(kept) == 3 * 50 * 4


def test_rows_of_a_single_problem_have_no_batch_axis():
    rows = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert losses.info_nce(*rows, temperature=0.1).shape == ()
    each = losses.info_nce(rows[None, :, None], rows.flip(0)[None, :, None], temperature=0.1)
    assert each.shape == (1, 2, 1)
