"""Cached arrays: made once, made again when the file is not what was written, never left half written."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.cache import arrays_digest, cached_arrays

ARRAYS = {"b": np.arange(6, dtype=np.int32).reshape(2, 3), "a": np.array([0.5, -1.0], dtype=np.float32)}


def get(path, calls):
    def make():
        calls.append(path)
        return ARRAYS

    found = cached_arrays(path, make, "sets")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_arrays_are_made_once_and_nothing_else_is_left(tmp_path):
    path, calls = tmp_path / "new" / "folder" / "x.safetensors", []
    get(path, calls)
    get(path, calls)
    assert len(calls) == 1
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    "altered",
    [
        {**ARRAYS, "a": np.array([0.5, 1.0], np.float32)},
        {"b": ARRAYS["b"], "aa": ARRAYS["a"]},
        {**ARRAYS, "b": ARRAYS["b"].reshape(3, 2)},
        {**ARRAYS, "b": ARRAYS["b"].view(np.uint32)},
        {"a": ARRAYS["a"]},
    ],
    ids=["value", "name", "shape", "type", "missing"],
)
def test_a_file_with_other_arrays_under_the_same_digest_is_made_again(tmp_path, altered):
    path, calls = tmp_path / "x.safetensors", []
    get(path, calls)
    with safe_open(path, framework="np") as file:
        facts = file.metadata()
    save_file(altered, path, metadata=facts)
    get(path, calls)
    get(path, calls)
    assert len(calls) == 2


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_none_is_made_again(tmp_path, content):
    path, calls = tmp_path / "x.safetensors", []
    if content is None:
        save_file(ARRAYS, path)  # without a digest
    else:
        path.write_bytes(content)
    get(path, calls)
    get(path, calls)
    assert len(calls) == 1


def test_digest_is_that_of_the_arrays_whatever_their_order_and_layout():
    turned = {"a": ARRAYS["a"], "b": np.asfortranarray(ARRAYS["b"])}
    assert arrays_digest(turned) == arrays_digest(ARRAYS)


def test_a_cache_that_cannot_be_written_is_told_with_what_and_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot write the sets to '.*x\.safetensors'(.|\n)*GEO_PRETRAIN_CACHE"):
        get(tmp_path / "file" / "x.safetensors", [])

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(DataError, match=r"Cannot write the sets to .*[Ff]ile"):
            get(tmp_path / "x.safetensors", [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
