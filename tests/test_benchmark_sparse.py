"""The benchmark of sparse convolutions: a dry run of all its parts, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import sparse


def test_a_dry_run_measures_and_keeps_nothing(capsys, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(sparse, "write_results", lambda *_: pytest.fail("was kept"))
    sparse.main(["--quick", "--device", "cpu", "--inputs", "frame", "--engines", "plain", "fast"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["fast_start_s"] >= 0
    frame = results["inputs"]["frame"]
    assert list(frame["engines"]) == ["plain", "fast"]
    for entry in frame["engines"].values():
        assert entry["forward_s"]["min"] > 0
        assert entry["train_s"]["min"] > 0
        assert entry["groups"]["block8"]["gflop"] > 0
        gradients = entry["kernel_gradients"]
        assert gradients["ms"] > 0
        in_forward = sum(group["gflop"] for group in entry["groups"].values())
        assert 0 < gradients["gflop"] <= in_forward + 0.01 * len(entry["groups"])
    assert 0 < frame["differs_from_plain_by"]["fast"] < 1e-3
    assert set(frame["times_faster"]) == {"forward_fast_than_plain", "train_fast_than_plain"}


def test_an_engine_that_fails_is_named_and_the_others_are_compared(monkeypatch):
    monkeypatch.setattr(sparse, "Engine", lambda name, *_: 1 / 0 if name == "spconv" else FakeEngine())
    options = sparse.parse(["--quick"])
    bench, results = sparse.Bench(options, ["plain", "spconv"], 1.0), {}
    assert list(bench.engines(torch.zeros(1, 4), "float32", results)) == ["plain"]
    assert results["failed"] == {"spconv": "ZeroDivisionError: division by zero"}
    assert list(results["first_calls_s"]) == ["plain"]


def test_when_time_is_over_the_rest_is_named_not_measured(monkeypatch):
    kept = []
    monkeypatch.setattr(sparse, "build_inputs", lambda *_, **__: {"frame": None, "batch": None, "room": None})
    sparse.Bench(sparse.parse(["--quick", "--budget", "1e-9"]), ["plain"], 1.0).run(lambda done: kept.append(len(done)))
    assert kept == [1, 2, 3]


def test_bf16_is_compared_with_float32():
    times = {"train": {"plain": [4.0], "fast": [2.0], "fast_bf16": [1.0]}}
    assert sparse.ratios(times) == {"train_fast_bf16_than_fast": 2.0, "train_fast_than_plain": 2.0}
    for name, precision in (("fast", torch.float32), ("fast_bf16", torch.bfloat16)):
        assert sparse.Engine(name, torch.zeros(1, 4, dtype=torch.int32)).precision == precision


class FakeEngine:
    def forward(self) -> None: ...

    def train(self) -> None: ...


def test_what_cannot_be_measured_is_refused(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            sparse.parse(["--device", "cuda"])
        assert "torch finds no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sparse.parse(["--precision", "float16"])
    assert "the engine fast_bf16 has bfloat16" in capsys.readouterr().err
