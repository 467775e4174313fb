"""Set-InfoNCE against the values of the formulas and against a loop over sets and pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geo_pretrain.training.losses.sets import set_info_nce
from tests.training.losses.test_contrastive import close


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[2] / "data" / "losses.safetensors")


@pytest.mark.parametrize(
    "variant, count, options",
    [
        ("eq2_12", 10, {"symmetric": False, "renormalize": False}),
        ("eq2_21", 10, {"symmetric": False, "renormalize": False}),
        ("eq2_12_renorm", 10, {"symmetric": False}),
        ("eq3_all", 20, {"denominator": "all", "renormalize": False}),
        ("eq3_noself", 20, {"denominator": "ntxent", "renormalize": False}),
    ],
)
def test_each_reading_of_the_paper_gives_its_golden_sum(golden, variant, count, options):
    features = [golden[f"set.f{k}"].clone().requires_grad_() for k in (1, 2)]
    views = [(features[k], golden[f"set.ids{k + 1}"]) for k in (0, 1)]
    (f1, ids1), (f2, ids2) = views[::-1] if variant == "eq2_21" else views
    loss = set_info_nce(f1, f2, ids1, ids2, temperature=0.4, **options) * count  # the golden values are sums
    loss.backward()
    close(loss.detach(), golden[f"set.{variant}.loss_sum"][0], 1e-5)
    for k in (1, 2):
        close(features[k - 1].grad, golden[f"set.{variant}.grad_f{k}"], 2e-5)


def unit(vector):
    length = np.linalg.norm(vector)
    return vector / length if length else vector


def slow_sets(features, ids, draws, renormalize, min_size):
    """id -> (mean, what stands for the set) of one view."""
    sets = {}
    for number in sorted(set(ids.tolist()) - {-1}):
        pixels = [p for p in range(len(ids)) if ids[p] == number]
        if len(pixels) < min_size:
            continue
        mean = sum(unit(features[p]) for p in pixels) / len(pixels)
        mean = unit(mean) if renormalize else mean
        single = mean if draws is None else unit(features[min(pixels, key=lambda p: draws[p])])
        sets[number] = mean, single
    return sets


def slow_set_loss(views, temperature, denominator, symmetric, renormalize, min_size, unmatched):
    """views: one (features1, features2, ids1, ids2, draws1, draws2) a pair; returns one loss a pair."""
    sets = [
        [slow_sets(f, ids, d, renormalize, min_size) for f, ids, d in ((f1, i1, d1), (f2, i2, d2))]
        for f1, f2, i1, i2, d1, d2 in views
    ]

    def candidates(pair, view):
        own, other = sets[pair][view], sets[pair][1 - view]
        return [number for number in own if unmatched or number in other]

    out = []
    for pair in range(len(sets)):
        matched = sorted(sets[pair][0].keys() & sets[pair][1].keys())
        directions = []
        for view in (0, 1) if symmetric else (0,):
            total = 0.0
            for i in matched:
                anchor = sets[pair][view][i][1]
                positive = np.exp(anchor @ sets[pair][1 - view][i][0] / temperature)
                below = positive
                for where in range(len(sets)) if denominator == "batch" else (pair,):
                    for k in candidates(where, 1 - view):
                        if (where, k) != (pair, i):
                            below += np.exp(anchor @ sets[where][1 - view][k][1] / temperature)
                if denominator in ("ntxent", "all"):
                    for k in candidates(pair, view):
                        if k != i or denominator == "all":
                            below += np.exp(anchor @ sets[pair][view][k][1] / temperature)
                total -= np.log(positive / below)
            directions.append(total / len(matched) if matched else 0.0)
        out.append(np.mean(directions))
    return out


def random_views(rng, pairs=4, sizes=(60, 50)):
    """Features, ids and draws of four pairs of views; the second has no common set, the last has one."""
    features = [rng.normal(size=(pairs, n, 6)) for n in sizes]
    ids = [rng.integers(-1, 9, (pairs, n)) for n in sizes]
    ids[0][:, :30], ids[1][:, :30] = rng.integers(-1, 6, (2, pairs, 30))
    ids[0][0, 40:] = 20  # seen in one view alone
    ids[1][2, :20] = 4  # a large set
    ids[0][3, :10] = ids[1][3, :10] = 0
    for pair, common in ((1, -1), (3, 0)):
        ids[1][pair] = np.where(ids[1][pair] > common, ids[1][pair] + 100, ids[1][pair])
    return features, ids, [rng.random((pairs, n)) for n in sizes]


@pytest.mark.parametrize("denominator", ["other", "ntxent", "all", "batch"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unmatched", [True, False])
@pytest.mark.parametrize("drawn, renormalize, min_size", [(False, True, 1), (True, False, 4), (True, True, 5)])
def test_loss_equals_the_loop(denominator, symmetric, unmatched, drawn, renormalize, min_size):
    features, ids, draws = random_views(np.random.default_rng(0))
    if not drawn:
        draws = [None, None]
    got = set_info_nce(
        *map(torch.from_numpy, (*features, *ids)),
        temperature=0.3,
        denominator=denominator,
        symmetric=symmetric,
        renormalize=renormalize,
        min_size=min_size,
        unmatched=unmatched,
        draws=(torch.from_numpy(draws[0]), torch.from_numpy(draws[1])) if drawn else None,
    )
    views = [
        (features[0][b], features[1][b], ids[0][b], ids[1][b], *(None if d is None else d[b] for d in draws))
        for b in range(4)
    ]
    want = slow_set_loss(views, 0.3, denominator, symmetric, renormalize, min_size, unmatched)
    assert want[1] == 0
    assert min(want[0], want[2]) > 0.1
    assert (want[3] > 0) == (denominator in ("all", "batch") or unmatched)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)


def test_pairs_do_not_see_each_other_and_numbers_of_sets_mean_nothing():
    features, ids, _ = (list(map(torch.from_numpy, part)) for part in random_views(np.random.default_rng(1)))
    together = set_info_nce(*features, *ids, temperature=0.4)
    alone = [set_info_nce(*(f[b] for f in features), *(i[b] for i in ids), temperature=0.4) for b in range(4)]
    torch.testing.assert_close(together, torch.stack(alone))
    renamed = [torch.where(i >= 0, (i + 1) * 10**12 - i**2, -1) for i in ids]
    torch.testing.assert_close(set_info_nce(*features, *renamed, temperature=0.4), together)


def test_pixels_without_a_set_get_no_gradient():
    features, ids, _ = (list(map(torch.from_numpy, part)) for part in random_views(np.random.default_rng(2)))
    for f in features:
        f.requires_grad_()
    set_info_nce(*features, *ids, temperature=0.4)[0].backward()
    for f, i, other in ((features[0], ids[0], ids[1]), (features[1], ids[1], ids[0])):
        used = torch.isin(i[0], other[0][other[0] >= 0]) & (i[0] >= 0)
        assert (f.grad[0][used].abs().sum(-1) > 0).all()
        assert (f.grad[0][~used] == 0).all()
        assert (f.grad[1:] == 0).all()


@pytest.mark.parametrize("none", [-1, 3])
@pytest.mark.parametrize("denominator", ["other", "ntxent", "batch"])
def test_views_without_a_common_set_cost_nothing_and_reach_the_features(none, denominator):
    features = torch.randn(2, 10, 4, requires_grad=True)
    ids1, ids2 = torch.full((2, 10), -1), torch.full((2, 10), none)
    for draws in (None, (torch.rand(2, 10), torch.rand(2, 10))):
        loss = set_info_nce(
            features, features, ids1, ids2, temperature=0.4, denominator=denominator, unmatched=True, draws=draws
        )
        assert loss.tolist() == [0, 0]
        (gradient,) = torch.autograd.grad(loss.sum(), features)
        assert (gradient == 0).all()


def test_zero_features_give_no_nan():
    features = torch.zeros(1, 12, 4, requires_grad=True)
    ids = torch.arange(12)[None] % 3
    set_info_nce(features, features, ids, ids, temperature=0.4).sum().backward()
    assert torch.isfinite(features.grad).all()


def test_gradients_are_those_of_finite_differences():
    features, ids, draws = (
        [torch.from_numpy(part[:, 20:36]) for part in parts] for parts in random_views(np.random.default_rng(3))
    )
    for f in features:
        f.requires_grad_()

    def loss(f1, f2):
        return set_info_nce(f1, f2, *ids, temperature=0.5, denominator="ntxent", unmatched=True, draws=tuple(draws))

    assert loss(*features)[0] > 0
    assert torch.autograd.gradcheck(loss, features)
