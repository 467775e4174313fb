"""Losses of segmentation against slow twins."""

from __future__ import annotations

import itertools

import pytest
import torch

from geo_pretrain.training.losses import lovasz_softmax


def slow_lovasz(logits, labels):
    """Row by row: errors from the largest, each times how much 1 - IoU grows when that row becomes wrong, too."""
    probabilities, losses = logits.softmax(1), []
    for label in sorted(set(labels.tolist())):
        truth = [int(value == label) for value in labels]
        errors = [abs(t - float(p)) for t, p in zip(truth, probabilities[:, label], strict=True)]
        wrong, loss, before = set(), 0.0, 0.0
        for row in sorted(range(len(labels)), key=lambda row: -errors[row]):
            wrong.add(row)
            hit = sum(t for row_, t in enumerate(truth) if row_ not in wrong)
            union = sum(1 for row_, t in enumerate(truth) if t or row_ in wrong)
            loss, before = loss + errors[row] * (1 - hit / union - before), 1 - hit / union
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
def test_lovasz_is_its_slow_twin(seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    assert float(lovasz_softmax(logits, labels)) == pytest.approx(slow_lovasz(logits, labels))


def test_lovasz_of_sure_predictions_is_one_minus_the_mean_iou():
    for guess in itertools.product(range(2), repeat=4):
        labels = torch.tensor([0, 0, 1, 1])
        logits = 200.0 * torch.nn.functional.one_hot(torch.tensor(guess), 2).double()
        ious = []
        for label in range(2):
            both = sum(g == t == label for g, t in zip(guess, labels.tolist(), strict=True))
            either = sum(label in pair for pair in zip(guess, labels.tolist(), strict=True))
            ious.append(both / either)
        assert float(lovasz_softmax(logits, labels)) == pytest.approx(1 - sum(ious) / 2, abs=1e-9)


def test_lovasz_has_gradients_and_none_without_rows():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x, torch.tensor([0, 1, 1, 2, 0, 2])), logits)
    lovasz_softmax(logits[:0], torch.zeros(0, dtype=torch.long)).backward()
    assert logits.grad.abs().sum() == 0
