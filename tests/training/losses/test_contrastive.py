"""Losses against the values of the released code and against slow loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from geo_pretrain.training import losses
from geo_pretrain.training.losses import fused


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[2] / "data" / "losses.safetensors")


def close(got, want, rel):
    assert (got - want).abs().max() <= rel * want.abs().max()


def test_symmetric_info_nce_is_pri3ds(golden):
    q, k = (golden[name].clone().requires_grad_() for name in "qk")
    loss = losses.info_nce(q, k, temperature=0.4)
    loss.backward()
    close(loss.detach(), golden["pri3d_infonce.loss"][0], 1e-5)
    close(q.grad, golden["pri3d_infonce.grad_q"], 2e-5)
    close(k.grad, golden["pri3d_infonce.grad_k"], 2e-5)


def test_one_sided_info_nce_is_algorithm_1_of_ppkt(golden):
    q, k = (golden[name].clone().requires_grad_() for name in "qk")
    loss = losses.info_nce(q, k, temperature=0.04, symmetric=False)
    loss.backward()
    close(loss.detach(), golden["ppnce.loss_mean"][0], 1e-5)
    close(q.grad, golden["ppnce.grad_mean_z3d"], 2e-5)


def test_one_sided_info_nce_without_normalizing_is_pointcontrasts(golden):
    q, k = (golden[name].clone().requires_grad_() for name in "qk")
    loss = losses.info_nce(q, k, temperature=0.4, symmetric=False, normalize=False)
    loss.backward()
    close(loss.detach(), golden["point_infonce.loss"][0], 1e-5)
    close(q.grad, golden["point_infonce.grad_q"], 2e-5)
    close(k.grad, golden["point_infonce.grad_k"], 2e-5)


def slow_info_nce(query, key, temperature, symmetric, ignore):
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    key = key / np.linalg.norm(key, axis=1, keepdims=True)
    score = np.exp(query @ key.T / temperature)

    def one_way(score, ignore):
        total = 0.0
        for i in range(len(score)):
            total -= np.log(score[i, i] / sum(score[i, j] for j in range(len(score)) if i == j or not ignore[i, j]))
        return total / len(score)

    there = one_way(score, ignore)
    return (there + one_way(score.T, ignore.T)) / 2 if symmetric else there


@pytest.mark.parametrize("symmetric", [True, False])
def test_batched_info_nce_with_ignored_negatives_equals_the_loop(symmetric):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 3, 7, 5))
    ignore = rng.random((3, 7, 7)) < 0.3
    got = losses.info_nce(
        torch.from_numpy(query),
        torch.from_numpy(key),
        temperature=0.2,
        symmetric=symmetric,
        ignore=torch.from_numpy(ignore),
    )
    want = [slow_info_nce(query[b], key[b], 0.2, symmetric, ignore[b]) for b in range(3)]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)


def test_zero_features_give_no_nan():
    features = torch.zeros(2, 4, 8, requires_grad=True)
    losses.info_nce(features, features, temperature=0.4).sum().backward()
    assert torch.isfinite(features.grad).all()


def hardest_arguments(golden):
    return [golden[f"hardest.{name}"] for name in ("pairs", "pos_sel", "sel0", "sel1")]


def test_hardest_contrastive_is_pointcontrasts(golden):
    f0, f1 = (golden[f"hardest.f{k}"].clone().requires_grad_() for k in (0, 1))
    positive, negative = losses.hardest_contrastive(f0, f1, *hardest_arguments(golden))
    (positive + negative).backward()
    close(positive.detach(), golden["hardest.pos_loss"][0], 1e-5)
    close(negative.detach(), golden["hardest.neg_loss"][0], 1e-5)
    close((positive + negative).detach(), golden["hardest.loss"][0], 1e-5)
    close(f0.grad, golden["hardest.grad_f0"], 2e-5)
    close(f1.grad, golden["hardest.grad_f1"], 2e-5)


def slow_hardest(f0, f1, pairs, positives, candidates0, candidates1, squared):
    matches = {(i, j) for i, j in pairs.tolist()}
    pull, push = [], ([], [])
    for i, j in pairs[positives].tolist():
        gap = np.linalg.norm(f0[i] - f1[j])
        pull.append(max(gap**2 - 0.1, 0) if squared else max(gap - 0.1, 0) ** 2)
        distance, k = min((np.linalg.norm(f0[i] - f1[k]), k) for k in candidates1.tolist())
        if (i, k) not in matches:
            push[0].append(max(1.4 - distance, 0) ** 2)
        distance, k = min((np.linalg.norm(f1[j] - f0[k]), k) for k in candidates0.tolist())
        if (k, j) not in matches:
            push[1].append(max(1.4 - distance, 0) ** 2)
    return np.mean(pull), (np.mean(push[0]) + np.mean(push[1])) / 2


@pytest.mark.parametrize("squared", [True, False])
def test_hardest_contrastive_equals_the_loop(golden, squared):
    f0, f1 = (golden[f"hardest.f{k}"].double() for k in (0, 1))
    arguments = hardest_arguments(golden)
    got = losses.hardest_contrastive(f0, f1, *arguments, squared=squared)
    want = slow_hardest(f0.numpy(), f1.numpy(), *(a.numpy() for a in arguments), squared)
    np.testing.assert_allclose([value.item() for value in got], want, rtol=1e-6)  # the code adds 1e-7 under the root


def test_hardest_contrastive_without_any_negative_is_finite():
    features = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1).requires_grad_()
    rows = torch.arange(3)
    everything = torch.cartesian_prod(rows, rows)
    positive, negative = losses.hardest_contrastive(features, features, everything, rows[:0], rows, rows)
    assert positive.item() == negative.item() == 0
    positive, negative = losses.hardest_contrastive(features, features, everything, torch.arange(9), rows, rows)
    (positive + negative).backward()
    assert negative.item() == 0
    assert torch.isfinite(features.grad).all()


def slow_partition_nce(query, key, points, temperature, inner, outer):
    total = 0.0
    score = np.exp(query @ key.T / temperature)
    for above in (True, False):
        for far in (False, True):
            for i, point in enumerate(points):
                inside = score[i, i]
                for k, other in enumerate(points):
                    distance, rise = np.linalg.norm(other - point), other[2] - point[2]
                    ring = distance > outer if far else inner < distance <= outer
                    if ring and (rise > 0 if above else rise < 0):
                        inside += score[i, k]
                total -= np.log(score[i, i] / inside) / len(points) / 4
    return total


def test_partition_nce_equals_the_loop():
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(2, 40, 6))
    points = rng.uniform(-1, 1, (40, 3))
    points[20:, 2] = points[0, 2]  # anchors of equal height are no negatives of each other
    got = losses.partition_info_nce(
        *(torch.from_numpy(a) for a in (query, key, points)), temperature=0.4, inner=0.3, outer=0.9
    )
    assert got.item() == pytest.approx(slow_partition_nce(query, key, points, 0.4, 0.3, 0.9), rel=1e-10)


def slow_eight_parts(points, i, k, inner, outer):
    x, y, z = points[k] - points[i]
    distance = math.sqrt(x * x + y * y + z * z + 1e-7)
    if distance < inner:
        return None
    left = math.atan2(y, x) < 0 or (y == 0 and math.atan2(y, x) == math.pi)  # azimuth in [pi, 2 pi)
    tilt = math.atan2(y, z) % math.pi >= math.pi / 2
    return 4 * (distance >= outer) + 2 * left + tilt


def test_eight_partitions_equal_the_loop_and_each_holds_rows():
    rng = np.random.default_rng(2)
    query, key = rng.normal(size=(2, 40, 6))
    points = rng.uniform(-1, 1, (40, 3))
    score, total, met = np.exp(query @ key.T / 0.4), 0.0, set()
    for part in range(8):
        for i in range(40):
            rows = [k for k in range(40) if slow_eight_parts(points, i, k, 0.3, 0.9) == part]
            met |= {part} if rows else set()
            total -= np.log(score[i, i] / (score[i, i] + score[i, rows].sum())) / 40 / 8
    got = losses.partition_info_nce(
        *(torch.from_numpy(a) for a in (query, key, points)), temperature=0.4, inner=0.3, outer=0.9, partitions=8
    )
    assert (got.item(), met) == (pytest.approx(total, rel=1e-10), set(range(8)))


def whole_partition_nce(query, key, points, temperature, inner, outer):
    """The released code's fast form, on whole matrices."""
    part = torch.where(points[None, :, 2] > points[:, None, 2], 0, 2) + (torch.cdist(points, points) > outer)
    none = (points[None, :, 2] == points[:, None, 2]) | (torch.cdist(points, points) <= inner)
    ratio = ((query @ key.T - (query * key).sum(1, keepdim=True)) / temperature).exp() * ~none
    return torch.stack([(ratio * (part == number)).sum(1) for number in range(4)]).log1p().mean()


@pytest.mark.parametrize("block", [1, 300, 2000, 1 << 20])  # scores: a row at a time, some rows, the last block shorter
def test_gradients_of_partition_nce_are_those_of_whole_matrices_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setitem(fused.BLOCK, "cpu", block)
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(70, 3, generator=generator, dtype=torch.float64)
    rows = [torch.randn(70, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    got = losses.partition_info_nce(*rows, points, temperature=0.4, inner=0.3, outer=0.6)
    want = whole_partition_nce(*rows, points, 0.4, 0.3, 0.6)
    torch.testing.assert_close(got, want)
    ours, theirs = (torch.autograd.grad(3 * loss, rows) for loss in (got, want))
    torch.testing.assert_close(ours, theirs)


def test_partition_nce_of_anchors_that_are_all_close_is_zero():
    features = torch.randn(5, 4)
    points = torch.rand(5, 3) / 100
    assert losses.partition_info_nce(features, features, points, temperature=0.4, inner=0.05, outer=0.5).item() == 0


def test_queue_contrast_equals_the_loop():
    rng = np.random.default_rng(0)
    query, key, queue = (F.normalize(torch.from_numpy(rng.normal(size=(n, 4))), dim=1) for n in (5, 5, 7))
    want = 0.0
    for q, k in zip(query.numpy(), key.numpy(), strict=True):
        scores = [q @ k / 0.07, *(q @ other / 0.07 for other in queue.numpy())]
        want += np.log(np.exp(scores).sum()) - scores[0]
    assert losses.queue_nce(query, key, queue, temperature=0.07).item() == pytest.approx(want / 5, rel=1e-10)
    assert losses.queue_nce(query, key, queue[:0], temperature=0.07).item() == pytest.approx(0, abs=1e-12)
