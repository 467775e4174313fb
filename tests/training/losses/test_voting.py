"""VoteNet's losses against slow loops over clouds, proposals and boxes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from geo_pretrain.training import losses
from geo_pretrain.training.losses.voting import Assignment, BoxTargets, Proposals, assign_proposals

CLOUDS, PROPOSALS, PLACES, BINS, CLASSES = 2, 12, 5, 4, 3
WEIGHTS = {"vote": 10, "objectness": 5, "center": 10, "heading_class": 1, "heading_residual": 10, "size_class": 1,
           "size_residual": 10, "class": 1}  # fmt: skip


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    present = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    centers = normal(CLOUDS, PLACES, 3) * present[..., None]
    bases = normal(CLOUDS, PROPOSALS, 3)
    bases[:, :4] = centers[:, :1] + 0.1 * normal(CLOUDS, 4, 3)  # positive
    bases[0, 4] = centers[0, 1] + 0.05
    bases[:, 5] = 0.05  # near the origin: of padding
    bases[:, 6] = centers[:, 0] + torch.tensor([0.45, 0, 0])  # between near and far
    whole = [torch.randint(n, (CLOUDS, PLACES), generator=generator) * present for n in (BINS, CLASSES, CLASSES)]
    targets = BoxTargets(present, centers, whole[0], normal(CLOUDS, PLACES) * present, whole[1],
                         2 * normal(CLOUDS, PLACES, 3) * present[..., None], whole[2])  # fmt: skip
    shapes = (2,), (3,), (BINS,), (BINS,), (CLASSES,), (CLASSES, 3), (CLASSES,)
    proposals = Proposals(bases, *[normal(CLOUDS, PROPOSALS, *shape) for shape in shapes])
    votes = normal(CLOUDS, 7, 2, 3), normal(CLOUDS, 7, 3, 3), torch.rand(CLOUDS, 7, generator=generator) < 0.6
    return votes, proposals, targets


def distance2(a, b):
    return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))


def entropy(logits, label):
    return math.log(sum(math.exp(float(v)) for v in logits)) - float(logits[label])


def huber(x):
    x = abs(float(x))
    return 0.5 * x * x if x <= 1 else x - 0.5


def slow_losses(votes, p, t, padding):
    """The weighted terms, one seed and one proposal after another."""
    seeds = [
        min(sum(abs(float(x) - float(y)) for x, y in zip(vote, truth, strict=True))
            for vote in votes[0][b, s] for truth in votes[1][b, s])
        for b in range(CLOUDS) for s in range(7) if votes[2][b, s]
    ]  # fmt: skip
    terms = {name: [] for name in ("objectness", "back", *list(WEIGHTS)[2:])}
    positives = counted = boxes = 0
    for b in range(CLOUDS):
        places = [m for m in range(PLACES) if padding or t.present[b, m]]
        for m in range(PLACES):
            if t.present[b, m]:
                boxes += 1
                terms["back"].append(min(distance2(c, t.centers[b, m]) for c in p.centers[b]))
        for k in range(PROPOSALS):
            own = min(places, key=lambda m, b=b, k=k: (distance2(p.bases[b, k], t.centers[b, m]), m))
            distance = math.sqrt(distance2(p.bases[b, k], t.centers[b, own]) + 1e-6)
            if 0.3 <= distance <= 0.6:
                continue
            counted += 1
            positive = distance < 0.3
            terms["objectness"].append((0.8 if positive else 0.2) * entropy(p.objectness[b, k], int(positive)))
            if not positive:
                continue
            positives += 1
            terms["center"].append(min(distance2(p.centers[b, k], t.centers[b, m]) for m in places))
            bin, size = int(t.headings[b, own]), int(t.sizes[b, own])
            terms["heading_class"].append(entropy(p.headings[b, k], bin))
            terms["heading_residual"].append(huber(p.heading_residuals[b, k, bin] - t.heading_residuals[b, own]))
            terms["size_class"].append(entropy(p.sizes[b, k], size))
            errors = p.size_residuals[b, k, size] - t.size_residuals[b, own]
            terms["size_residual"].append(sum(huber(e) for e in errors) / 3)
            terms["class"].append(entropy(p.classes[b, k], int(t.classes[b, own])))
    means = {name: sum(values) / (positives + 1e-6) for name, values in terms.items()}
    means["vote"] = sum(seeds) / (len(seeds) + 1e-6)
    means["objectness"] = sum(terms["objectness"]) / (counted + 1e-6)
    means["center"] += sum(terms["back"]) / (boxes + 1e-6)
    return {name: weight * means[name] for name, weight in WEIGHTS.items()}, positives


@pytest.mark.parametrize("padding", [False, True])
def test_all_terms_are_the_slow_ones(padding: bool):
    votes, proposals, targets = random_case()
    got = losses.votenet_losses(votes, proposals, targets, padding_at_origin=padding)
    wanted, positives = slow_losses(votes, proposals, targets, padding)
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].item() == pytest.approx(value, rel=1e-9), name
    assert positives > 8


def test_padding_at_the_origin_makes_objects_only_as_the_released_code():
    _, proposals, targets = random_case()
    plain, released = (assign_proposals(proposals.bases, targets, padding_at_origin=p) for p in (False, True))
    assert not plain.positive[1, 5]
    assert released.positive[1, 5]
    assert not targets.present[1, released.boxes[1, 5]]


def test_a_cloud_without_boxes_has_only_negatives_and_finite_gradients():
    votes, proposals, targets = random_case()
    empty = BoxTargets(*[torch.zeros_like(value) for value in targets])
    centers = proposals.centers.clone().requires_grad_()
    terms = losses.votenet_losses(votes, proposals._replace(centers=centers), empty)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(centers.grad).all()
    assert {name for name, term in terms.items() if term.item()} == {"vote", "objectness"}


def test_objectness_counts_what_is_near_or_far():
    """One object at 0.3 sure, one empty place, one between them: 0.8 log 2 and 0.2 log 2 over two."""
    positive, counted = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    loss = losses.objectness_loss(torch.zeros(1, 3, 2), Assignment(torch.zeros(1, 3), positive, counted))
    assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-5)


def test_perfect_proposals_cost_nothing_but_their_certainty():
    _, proposals, targets = random_case()
    places = assign_proposals(proposals.bases, targets).boxes
    rows = torch.arange(CLOUDS)[:, None]
    chosen = (targets.headings, BINS), (targets.sizes, CLASSES), (targets.classes, CLASSES)
    sure = [50 * F.one_hot(classes[rows, places], count).double() for classes, count in chosen]
    perfect = proposals._replace(
        headings=sure[0], sizes=sure[1], classes=sure[2],
        heading_residuals=targets.heading_residuals[rows, places][..., None].expand(-1, -1, BINS),
        size_residuals=targets.size_residuals[rows, places][:, :, None].expand(-1, -1, CLASSES, 3),
    )  # fmt: skip
    terms = losses.box_losses(perfect, targets, assign_proposals(proposals.bases, targets))
    assert all(term.item() < 1e-12 for term in terms.values())
