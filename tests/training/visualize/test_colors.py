"""Features as colors against numpy's singular values, and what they are sure to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geo_pretrain.errors import DataError
from geo_pretrain.training.visualize import colors
from geo_pretrain.training.visualize.colors import fit_colors, shared_pca


@pytest.fixture
def parts():
    """Three arrays of features with clear directions, not centered."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) * np.array([9, 5, 3, 1, 0.5, 0.1])[:, None]
    return [torch.from_numpy(rng.normal(size=(n, 6)) @ mixing + 7).float() for n in (50, 80, 30)]


def slow_colors(parts, percentiles=(1, 99)):
    """By singular values of the centered rows, row by row."""
    rows = np.concatenate([part.numpy() for part in parts]).astype(np.float64)
    centered = rows - rows.mean(axis=0)
    _, _, right = np.linalg.svd(centered, full_matrices=False)
    columns = []
    for axis in right[:3]:
        axis = axis if axis[np.abs(axis).argmax()] > 0 else -axis
        along = np.array([row @ axis for row in centered])
        low, high = (np.percentile(along, p) for p in percentiles)
        columns.append([round(255 * min(max((x - low) / (high - low), 0.0), 1.0)) for x in along])
    return np.array(columns).T


def test_colors_equal_those_of_singular_values(parts):
    found = shared_pca(parts)
    assert [len(part) for part in found] == [50, 80, 30]
    assert all(part.dtype == np.uint8 for part in found)
    assert np.abs(np.concatenate(found).astype(int) - slow_colors(parts)).max() <= 1  # rounding of halves


def test_arrays_and_their_order_and_cutting_do_not_matter(parts, monkeypatch):
    found = np.concatenate(shared_pca(parts))
    again = shared_pca([part.numpy() for part in parts[::-1]])
    assert np.abs(np.concatenate(again[::-1]).astype(int) - found).max() <= 1
    monkeypatch.setattr(colors, "_CHUNK", 7)
    assert np.abs(np.concatenate(shared_pca(parts)).astype(int) - found).max() <= 1


def test_signs_do_not_depend_on_the_solver(parts, monkeypatch):
    found, eigh = np.concatenate(shared_pca(parts)), torch.linalg.eigh

    def flipped(matrix):
        values, vectors = eigh(matrix)
        return torch.return_types.linalg_eigh((values, -vectors))

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    assert np.array_equal(np.concatenate(shared_pca(parts)), found)


def test_one_color_is_one_feature_in_all_parts(parts):
    parts[2][5] = parts[0][3]
    found = shared_pca(parts)
    assert np.array_equal(found[2][5], found[0][3])


def test_a_few_odd_rows_do_not_fade_the_others(parts):
    plain = shared_pca([parts[0][:, :3]])[0]
    odd = torch.cat([parts[0][:, :3].repeat(10, 1), parts[0].new_full((1, 3), 1e4)])
    assert shared_pca([odd])[0][:50].std() > plain.std() / 4


def test_axes_are_orthonormal_and_ordered_by_variance(parts):
    space = fit_colors(parts)
    np.testing.assert_allclose(space.axes.T @ space.axes, np.eye(3), atol=1e-12)
    spread = np.concatenate([space.components(part) for part in parts]).std(axis=0)
    assert spread[0] > spread[1] > spread[2] > 0


def test_what_does_not_vary_is_half_bright():
    constant = torch.full((9, 5), 0.1)
    assert (shared_pca([constant])[0] == 128).all()
    constant[::2] = torch.nextafter(constant[::2], torch.tensor(1.0))  # nor does what float32 rounds
    assert (shared_pca([constant])[0] == 128).all()
    line = torch.outer(torch.linspace(0, 1, 101), torch.tensor([3.0, 4.0]))
    found = shared_pca([line])[0]
    assert found[0, 0] == 0
    assert found[-1, 0] == 255
    assert found[50, 0] in (127, 128)
    assert (found[:, 1:] == 128).all()  # the second channel varies with the first, and a third is not there


def test_one_channel_is_enough():
    assert shared_pca([torch.arange(3.0)[:, None]])[0][:, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "parts, part",
    [
        ([], "0 features"),
        ([torch.zeros(0, 4)], "0 features"),
        ([torch.zeros(2, 4), torch.zeros(2, 3)], r"\[3, 4\] channels"),
        ([torch.tensor([[1.0, float("nan")], [float("inf"), 0], [0, 0]])], "2 of 3 features are not finite"),
    ],
)
def test_what_has_no_colors_is_refused(parts, part):
    with pytest.raises(DataError, match=part):
        fit_colors(parts)
