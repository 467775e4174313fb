"""Probes: features whose right answer is known, an optimum checked by another optimizer, and loops over pixels."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, CheckpointError, DataError, RecipeError, UnknownName
from geo_pretrain.loading import load_backbone
from geo_pretrain.training.evaluation import probes
from geo_pretrain.training.evaluation.probes import (
    RANDOM,
    Head,
    ImageData,
    ProbeSpec,
    Samples,
    apply_head,
    compare_probes,
    draw_samples,
    fit_head,
    knn_predict,
    probe_backbone,
    probe_extractor,
    read_at,
)
from tests.training.finetune.sweeps import Squares
from tests.zoo import ARCH, role_weights, write_tiny, write_tiny_3d

SPEC = ProbeSpec(size=(64, 96), pixels=600)
linear_probe, knn_probe = (partial(probe_backbone, probe=probe) for probe in ("linear", "knn"))


class Colors(nn.Module):
    """The normalized image itself at one or more strides, as a backbone would give maps."""

    def __init__(self, *strides):
        super().__init__()
        self.contract = ImageContract(size=(64, 96))
        self.unused = nn.Parameter(torch.zeros(1))
        self.strides = strides

    def forward(self, x):
        maps = [nn.functional.avg_pool2d(x, s) * 10**k for k, s in enumerate(self.strides)]
        return maps[0] if len(maps) == 1 else maps


def slow_read(feature, row, column, size):
    """One map [C, h, w] at one pixel: bilinear, corners aligned."""
    _, h, w = feature.shape
    y, x = row * (h - 1) / (size[0] - 1), column * (w - 1) / (size[1] - 1)
    total = 0.0
    for i in range(h):
        for j in range(w):
            total = total + max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * feature[:, i, j].double()
    return total


def test_features_are_read_as_a_loop_over_cells_does():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, 5, 7, generator=generator), torch.randn(1, 2, 3, 4, generator=generator)]
    pixels = torch.tensor([[0, 0], [17, 22], [5, 13], [17, 0], [9, 21]])
    read = read_at(maps, pixels, (18, 23))
    expected = [torch.cat([slow_read(m[0], int(r), int(c), (18, 23)) for m in maps]) for r, c in pixels]
    torch.testing.assert_close(read.double(), torch.stack(expected), atol=1e-5, rtol=0)


def random_samples(count=300, widths=(4, 3), classes=(1, 2, 5), seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, count)
    centers = rng.normal(size=(10, sum(widths)))
    features = (centers[labels] + rng.normal(size=(count, sum(widths)))) * rng.uniform(0.01, 50, sum(widths)) + 7
    return Samples(torch.from_numpy(features).float(), torch.from_numpy(labels), widths)


def test_the_fit_is_the_minimum_that_another_optimizer_finds():
    samples, penalty = random_samples(40), 0.01  # few: deviations by N and by N - 1 differ
    x = samples.features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    classes, target = np.unique(samples.labels.numpy(), return_inverse=True)

    def objective(flat):
        w, b = flat[:-3].reshape(3, -1), flat[-3:]
        logits = x @ w.T + b
        peak = logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(logits - peak).sum(1)) + peak[:, 0]
        return (log_sum - logits[np.arange(len(x)), target]).mean() + penalty / 2 * (w**2).sum()

    best = minimize(objective, np.zeros(3 * 7 + 3), method="BFGS", options={"gtol": 1e-7})
    head = fit_head(samples, penalty=penalty)
    assert head.classes.tolist() == classes.tolist() == [1, 2, 5]
    mine = torch.nn.functional.linear(samples.features, head.weight, head.bias).double().softmax(1).numpy()
    weight, bias = best.x[:-3].reshape(3, -1), best.x[-3:]
    logits = x @ weight.T + bias
    theirs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(mine, theirs, atol=2e-3)
    np.testing.assert_allclose(head.weight.numpy() * samples.features.numpy().std(0), weight, atol=5e-3)


def test_a_constant_channel_and_the_scale_of_others_change_nothing():
    samples = random_samples()
    more = Samples(torch.cat([samples.features, torch.full((300, 1), 1e4)], 1), samples.labels, (4, 4))
    scaled = Samples(samples.features * 100, samples.labels, samples.widths)
    head, wider, other = (fit_head(s, penalty=1e-3) for s in (samples, more, scaled))
    assert (wider.weight[:, 7] == 0).all()
    torch.testing.assert_close(wider.weight[:, :7], head.weight, atol=1e-4, rtol=1e-2)
    torch.testing.assert_close(other.weight * 100, head.weight, atol=1e-3, rtol=2e-2)


def test_a_head_on_maps_is_the_head_on_features_read_at_every_pixel():
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(1, 4, 6, 8, generator=generator), torch.randn(1, 3, 3, 4, generator=generator)]
    head = Head(torch.randn(3, 7, generator=generator), torch.randn(3, generator=generator), torch.tensor([1, 2, 5]))
    size = (23, 31)
    pixels = torch.stack(torch.meshgrid(torch.arange(23), torch.arange(31), indexing="ij"), -1).reshape(-1, 2)
    logits = read_at(maps, pixels, size) @ head.weight.T + head.bias
    expected = head.classes[logits.argmax(1)].reshape(size)
    assert torch.equal(apply_head(head, maps, (4, 3), size), expected)
    assert set(expected.unique().tolist()) == {1, 2, 5}


def slow_vote(bank, queries, k, temperature):
    chosen = []
    for query in queries.features.double():
        ranked = []
        for feature, label in zip(bank.features.double(), bank.labels.tolist(), strict=True):
            cosine, start = 0.0, 0
            for width in bank.widths:
                a, b = query[start : start + width], feature[start : start + width]
                cosine += float(a @ b / (a.norm() * b.norm())) / len(bank.widths)
                start += width
            ranked.append((cosine, label))
        votes = {}
        for cosine, label in sorted(ranked, reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + np.exp(cosine / temperature)
        chosen.append(max(votes, key=votes.get))
    return chosen


@pytest.mark.parametrize("k", [1, 7, 20])
def test_the_vote_equals_the_loop_over_neighbors(k):
    bank, queries = random_samples(40), random_samples(270, seed=0)  # more queries than one chunk holds
    queries = dataclasses.replace(queries, features=queries.features + 3 * torch.randn(270, 7, generator=_rng(5)))
    assert knn_predict(bank, queries, k=k, temperature=0.07).tolist() == slow_vote(bank, queries, k, 0.07)


def _rng(seed):
    return torch.Generator().manual_seed(seed)


def test_near_neighbors_count_more_than_many():
    bank = Samples(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([1, 2, 2]), (2,))
    query = Samples(torch.tensor([[1.0, 0.1]]), torch.tensor([1]), (2,))
    assert knn_predict(bank, query, k=3, temperature=0.07).tolist() == [1]
    assert knn_predict(bank, query, k=3, temperature=50.0).tolist() == [2]
    assert knn_predict(bank, query, k=50, temperature=50.0).tolist() == [2]  # a bank smaller than k


@pytest.mark.parametrize("network", [Colors(2), Colors(2, 4)], ids=["one map", "two maps"])
def test_colors_that_are_the_classes_are_segmented(network):
    train, val = Squares("train"), Squares("val")
    linear, knn = linear_probe(network, train, val, SPEC), knn_probe(network, train, val, SPEC)
    assert linear.miou > 0.8  # borders are blurred by the half-size map
    assert knn.miou > 0.85
    assert (linear.probe, knn.probe) == ("linear", "knn")
    assert linear.fitted == knn.fitted == knn.measured == 600
    assert linear.measured == 4 * 61 * 96  # every labelled pixel, the strip not
    assert linear.channels == 3 * len(network.strides)
    assert linear.accuracy == pytest.approx(np.trace(linear.confusion) / linear.confusion.sum())
    assert linear.confusion.shape == (4, 4)
    assert linear.to_dict() == {
        "probe": "linear",
        "miou": linear.miou,
        "accuracy": linear.accuracy,
        "pixels": [600, 4 * 61 * 96],
        "channels": linear.channels,
    }


def test_labels_of_another_size_are_judged_at_their_own_size():
    result = linear_probe(Colors(2), Squares("train", size=(128, 192)), Squares("val", 2, size=(160, 240)), SPEC)
    assert result.measured == 2 * 157 * 240
    assert result.miou > 0.8


def test_the_network_sees_the_size_asked_for_else_that_of_its_contract():
    seen = []

    class Watched(Colors):
        def forward(self, x):
            seen.append(tuple(x.shape[2:]))
            return super().forward(x)

    train, val = Squares("train", 1), Squares("val", 1)
    linear_probe(Watched(2), train, val, ProbeSpec(size=(32, 48), pixels=50))
    knn_probe(Watched(2), train, val, ProbeSpec(pixels=50))
    assert seen == [(32, 48)] * 2 + [(64, 96)] * 2


def test_the_seed_decides_the_pixels_and_the_same_one_gives_the_same_result():
    train, val = Squares("train", noise=60.0), Squares("val", noise=60.0)
    spec = dataclasses.replace(SPEC, pixels=80)
    for probe in (linear_probe, knn_probe):
        first, again = (probe(Colors(4), train, val, spec) for _ in range(2))
        other = probe(Colors(4), train, val, dataclasses.replace(spec, seed=1))
        assert np.array_equal(first.confusion, again.confusion)
        assert not np.array_equal(first.confusion, other.confusion)


def test_pixels_are_drawn_for_each_image_by_its_name(monkeypatch):
    """Two images of one content: each has its own pixels, the same ones alone and in company."""

    class Twins(Squares):
        def load(self, id):
            return super().load("one for all")

        def ids(self):
            return list(self.names)

    def drawn(*names, seed=0):
        source = Twins("train")
        source.names = names
        spec = dataclasses.replace(SPEC, pixels=40 * len(names), seed=seed)
        return draw_samples(
            ImageData(probe_extractor(Colors(1), spec.size), source), spec, "train", count()
        ).features.split(40)

    (first,), (both, other) = drawn("a"), drawn("a", "b")
    assert torch.equal(first, both)
    assert not torch.equal(first, other)
    assert not torch.equal(first, drawn("a", seed=1)[0])


def test_a_network_is_measured_as_it_is_used_and_a_twin_is_drawn_by_the_seed(folder):
    network = Colors(2).train()
    knn_probe(network, Squares("train", 1), Squares("val", 1), ProbeSpec(pixels=50))
    assert not network.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = load_backbone(folder, decoder=True, pretrained=False).state_dict()
    drawn = probes._load(str(folder), random_init=True, seed=3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in drawn.items())
    spec = ProbeSpec()
    assert (spec.k, spec.temperature, spec.penalty) == (20, 0.07, 1e-4)


def test_classes_that_training_lacks_are_never_predicted_and_count_against_the_mean():
    train, val = Squares("train", only=(1, 3)), Squares("val")
    for probe in (linear_probe, knn_probe):
        confusion = probe(Colors(2), train, val, SPEC).confusion
        assert confusion[:, 2].sum() == 0
        assert confusion[2].sum() > 0


def test_sources_without_usable_labels_are_refused():
    class Unlabelled(Squares):
        def load(self, id):
            return dataclasses.replace(super().load(id), semantic=None)

    class Blank(Squares):
        def load(self, id):
            found = super().load(id)
            return dataclasses.replace(found, semantic=np.zeros_like(found.semantic))

    class Broken(Squares):
        def load(self, id):
            raise BadFrame(f"/data/{id}.png", "label 77 is no class")

    good = Squares("train")
    for probe in (linear_probe, knn_probe):
        with pytest.raises(DataError, match="train_0 has no labels of pixels"):
            probe(Colors(2), Unlabelled("train"), good, SPEC)
        with pytest.raises(DataError, match=r"'squares', split 'train': no labelled pixel in 4 images"):
            probe(Colors(2), Blank("train"), good, SPEC)
        with pytest.raises(DataError, match=r"'squares', split 'val': no labelled pixel"):
            probe(Colors(2), good, Blank("val"), SPEC)
        with pytest.raises(DataError, match="no labelled pixel in 0 images"):
            probe(Colors(2), Squares("train", 0), good, SPEC)
        with pytest.raises(BadFrame, match=r"val_0\.png: label 77 is no class"):
            probe(Colors(2), good, Broken("val"), SPEC)


@pytest.mark.parametrize(
    "change", [{"pixels": 0}, {"k": 0}, {"iterations": 0}, {"penalty": 0.0}, {"temperature": -1.0}], ids=str
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(RecipeError, match=rf"'{next(iter(change))}' is .*accepted is"):
        ProbeSpec(**change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("probes") / "net").folder


def test_a_checkpoint_stands_beside_its_random_init_baseline(folder):
    train, val = Squares("train", noise=60.0), Squares("val", 2, noise=60.0)
    done = []
    results = compare_probes(str(folder), train, val, SPEC, progress=lambda *at: done.append(at))
    assert list(results) == [RANDOM, str(folder)]
    for alone in (linear_probe, knn_probe):
        each = []
        alone(str(folder), train, val, SPEC, progress=lambda *at, each=each: each.append(at))
        assert each == [(k, 6) for k in range(1, 7)]
    assert done == [(k, 16) for k in range(1, 17)]
    for name, pretrained in ((RANDOM, False), (str(folder), True)):
        assert list(results[name]) == ["linear", "knn"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SPEC.seed)
            network = load_backbone(folder, decoder=True, pretrained=pretrained)
        alone = knn_probe(network, train, val, SPEC)
        assert np.array_equal(results[name]["knn"].confusion, alone.confusion)
        assert results[name]["linear"].channels == 32
    by_name = linear_probe(folder, train, val, SPEC)
    assert np.array_equal(by_name.confusion, results[str(folder)]["linear"].confusion)
    assert not np.array_equal(by_name.confusion, results[RANDOM]["linear"].confusion)
    assert list(compare_probes(str(folder), train, val, SPEC, probes=("knn",))[RANDOM]) == ["knn"]


def test_the_encoder_gives_four_maps_of_its_own(folder, tmp_path):
    train, val = Squares("train"), Squares("val", 1)
    result = knn_probe(folder, train, val, SPEC, part="encoder")
    assert result.channels == 8 + 16 + 32 + 64  # the stem is left out
    alone = write_tiny(
        tmp_path / "encoder",
        arch=dataclasses.replace(ARCH, name="resnet", args={"depth": 18, "width": 8}),
        weights={"encoder": role_weights("encoder")},
    )
    assert np.array_equal(knn_probe(alone.folder, train, val, SPEC).confusion, result.confusion)
    with pytest.raises(CheckpointError, match=r"holds an encoder alone .*part='encoder'"):
        knn_probe(alone.folder, train, val, SPEC, part="unet")


def test_what_cannot_be_probed_is_refused(folder, tmp_path):
    train, val = Squares("train"), Squares("val")
    with pytest.raises(RecipeError, match=r"'squares' has no depth.*rooms"):
        linear_probe(write_tiny_3d(tmp_path / "net").folder, train, val, SPEC)
    with pytest.raises(CheckpointError, match="need an ImageContract"):
        linear_probe(nn.Conv2d(3, 3, 1), train, val, SPEC)
    with pytest.raises(UnknownName, match=r"Unknown probe 'lineal'. Closest: 'linear'"):
        compare_probes(str(folder), train, val, SPEC, probes=("lineal",))
    with pytest.raises(UnknownName, match="pri3d_view_geo_r50"):
        linear_probe("pri3d_view_geo_r5", train, val, SPEC)
