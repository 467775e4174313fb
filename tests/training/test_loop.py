"""The loop: a killed run continues bit for bit, alone, with workers, in two processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import CheckpointError, DataError, GeoPretrainError, RecipeError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.sparse.layers import BatchNorm
from geo_pretrain.training import loop, pretrain
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.sampler import MicroBatches
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import Budget, TrainingTask, fit
from geo_pretrain.training.recipe import OptimSpec, load_recipe
from geo_pretrain.training.schedule import learning_rate, pri3d_bn_momentum
from tests.forked import command_line, under_torchrun
from tests.training.conftest import recipe_writer, write_recording

ALONE = World(0, 1, torch.device("cpu"))


def run_here(recipe_path, out, overrides=(), **options):
    recipe = load_recipe(str(recipe_path), overrides)
    skips = SkippedFrames()
    source = open_source(recipe.data)
    pairs = find_pairs(source, recipe.data, skips=skips)
    return pretrain.train(recipe, out, source, pairs, ALONE, skips=skips, **options)


def command(recipe_path, out):
    return ["train", str(recipe_path), "--out", str(out), "--device", "cpu"]


def fork(recipe_path, out, processes=1):
    """The command in a fork of this process."""
    return command_line(command(recipe_path, out), processes)


def finish(process):
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output


def kill_all(process):
    """SIGKILL the process and its children (each has a session of its own)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*map(int, children), process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def wait_for_step(process, out, step, seconds=600):
    """Whether the step was reached; False when the run has ended before this was seen."""
    log = Path(f"{out}.run") / "log.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= step:
            return True
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[0]
            return False
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def break_off(recipe_path, out, steps, stop, processes=1):
    """Start a run and stop it at the first of `steps`, once more at the next if it ended before; what `stop` returns.

    On a busy machine a run may end before anybody sees how far it is.
    """
    for step in steps:
        process = fork(recipe_path, out, processes)
        stopped = stop(process) if wait_for_step(process, out, step) else None
        if Path(f"{out}.run").exists():
            return stopped
        shutil.rmtree(out)
    raise AssertionError("every run ended before it could be stopped")


def weights(folder):
    return {name: load_file(folder / f"{name}.safetensors") for name in ("encoder", "decoder", "heads")}


def assert_same_weights(folder1, folder2):
    first, second = weights(folder1), weights(folder2)
    for role in first:
        assert first[role].keys() == second[role].keys()
        for key, value in first[role].items():
            assert torch.equal(value, second[role][key]), (role, key)


def logged(folder):
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith("_per_second")}
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]


STEPS = 16  # of the runs that are broken off


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recording):
    """The same run, not broken off."""
    folder = tmp_path_factory.mktemp("whole")
    run_here(recipe_writer(folder, recording)(optim={"steps": STEPS}), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("workers, processes", [(2, 1), (0, 2)])  # without workers: interrupted, below
def test_killed_run_continues_bit_for_bit(tmp_path, tiny_recipe, whole, workers, processes):
    path = tiny_recipe(workers=workers, optim={"steps": STEPS})
    if processes > 1:
        whole = tmp_path / "whole"
        finish(fork(path, whole, processes))
    steps = (random.Random(os.getpid()).randrange(8, STEPS - 5), 8, 8, 8)
    break_off(path, tmp_path / "broken", steps, kill_all, processes)
    assert not (tmp_path / "broken" / "config.json").exists()
    assert (tmp_path / "broken.run" / "state.pt").exists()
    finish(fork(path, tmp_path / "broken", processes))
    assert_same_weights(whole, tmp_path / "broken")
    assert logged(whole) == logged(tmp_path / "broken")
    assert [line["step"] for line in logged(tmp_path / "broken")] == list(range(1, STEPS + 1))
    assert not (tmp_path / "broken.run").exists()


def test_interrupt_saves_a_loadable_checkpoint_and_says_how_to_go_on(tmp_path, tiny_recipe, whole):
    path = tiny_recipe(optim={"steps": STEPS})

    def interrupt(process):
        process.send_signal(signal.SIGINT)
        return process, process.communicate(timeout=600)[0]

    process, output = break_off(path, tmp_path / "run", (8, 8, 8), interrupt)
    assert process.returncode == 130, output
    assert "Give the same command again" in " ".join(output.split())
    checkpoint = read_checkpoint(tmp_path / "run")
    assert not checkpoint.finished
    assert 8 <= checkpoint.provenance["steps"] < STEPS
    with pytest.warns(UserWarning, match="unfinished"):
        load_backbone(tmp_path / "run", decoder=True)
    finish(fork(path, tmp_path / "run"))
    assert read_checkpoint(tmp_path / "run").finished
    assert_same_weights(whole, tmp_path / "run")


def test_workers_change_nothing(tmp_path, tiny_recipe):
    for workers in (0, 2):
        run_here(tiny_recipe(workers=workers, optim={"steps": 6}), tmp_path / str(workers))
    assert_same_weights(tmp_path / "0", tmp_path / "2")


def test_two_processes_equal_two_accumulation_steps(tmp_path, tiny_recipe):
    """Both see the same micro-batches, so gradients, and with them all parameters, agree but for rounding."""
    run_here(tiny_recipe(optim={"steps": 4, "accumulate": 2}), tmp_path / "accumulated")
    finish(under_torchrun(command(tiny_recipe(optim={"steps": 4}), tmp_path / "two"), processes=2))
    run_here(tiny_recipe(optim={"steps": 4}), tmp_path / "whole")
    accumulated, two, whole = (weights(tmp_path / name) for name in ("accumulated", "two", "whole"))
    for role in accumulated:
        for key, value in accumulated[role].items():
            if "running" not in key and "tracked" not in key:  # the BatchNorm statistics are those of one process
                torch.testing.assert_close(value, two[role][key], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(whole["encoder"]["conv1.weight"], two["encoder"]["conv1.weight"], atol=1e-3)


def test_checkpoint_of_a_run_is_complete(tmp_path, tiny_recipe):
    checkpoint = run_here(tiny_recipe(optim={"steps": 4}), tmp_path / "out")
    assert {file.role for file in checkpoint.files.values()} == {
        "encoder", "decoder", "heads", "golden", "recipe", "log", "card",
    }  # fmt: skip
    provenance = checkpoint.provenance
    assert {"code", "libraries", "seed", "steps", "seconds", "data", "init", "skipped", "notes"} <= provenance.keys()
    assert provenance["data"]["fingerprint"] == open_source(load_recipe(str(tmp_path / "tiny.yaml")).data).fingerprint()
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml")) == load_recipe(str(tmp_path / "tiny.yaml"))
    assert verify(tmp_path / "out").passed
    assert load_backbone(tmp_path / "out").load_report.coverage == 1


def test_event_files_are_kept_with_the_checkpoint(tmp_path, tiny_recipe):
    pytest.importorskip("tensorboard", reason="TensorBoard is an optional library")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for seed in (0, 1):
        run_here(tiny_recipe(optim={"steps": 3}), tmp_path / "out", [f"seed={seed}"], overwrite=True)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("loss/view")]
    assert values == pytest.approx([line["view"] for line in logged(tmp_path / "out")])


def test_loss_falls(tmp_path, tiny_recipe):
    run_here(tiny_recipe(optim={"steps": 40}), tmp_path / "out")
    lines = logged(tmp_path / "out")
    for name in ("view", "depth"):
        assert sum(line[name] for line in lines[-10:]) < 0.8 * sum(line[name] for line in lines[:10])


def test_finished_checkpoint_is_not_replaced_by_accident(tmp_path, tiny_recipe):
    path = tiny_recipe(optim={"steps": 2})
    run_here(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--overwrite"):
        run_here(path, tmp_path / "out")
    run_here(path, tmp_path / "out", ["seed=1"], overwrite=True)
    assert read_checkpoint(tmp_path / "out").provenance["seed"] == 1


def test_place_that_cannot_hold_a_checkpoint_is_refused_before_training(tmp_path, tiny_recipe):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thoughts.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        run_here(tiny_recipe(), tmp_path / "notes", on_step=stop_at(1))
    with pytest.raises(RecipeError, match="'name' is 'a/b', accepted is letters"):
        run_here(tiny_recipe(), tmp_path / "new", ["name=a/b"], on_step=stop_at(1))
    assert (tmp_path / "notes" / "thoughts.txt").read_text() == "mine"
    run_here(tiny_recipe(optim={"steps": 1}), tmp_path / "fine")
    for file in (tmp_path / "fine").glob("*.*"):
        assert file.stat().st_mode & 0o044 == 0o044 & ~current_umask(), file


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Stop(Exception):
    pass


def stop_at(step):
    def callback(info):
        if info.step == step:
            raise Stop

    return callback


def test_run_is_not_continued_with_another_recipe_or_other_data(tmp_path, tiny_recipe, recording):
    path = tiny_recipe(save_every=2)
    with pytest.raises(Stop):
        run_here(path, tmp_path / "out", on_step=stop_at(5))
    with pytest.raises(RecipeError, match=r"another recipe.*optim\.lr: 0\.05 -> 0\.2"):
        run_here(path, tmp_path / "out", ["optim.lr=0.2"])
    for steps in (3, 9):  # a state is saved after step 4
        with pytest.raises(RecipeError, match=rf"optim\.steps: \d+ -> {steps}.*Longer: .*, --set model\.init=.*Ctrl-C"):
            run_here(path, tmp_path / "out", [f"optim.steps={steps}"])
    elsewhere = write_recording(tmp_path / recording.name)
    frame = elsewhere / "frame-000000.color.png"
    frame.write_bytes((elsewhere / "frame-000010.color.png").read_bytes())
    recipe = load_recipe(str(path))
    source = open_source(load_recipe(str(path), [f"data.path={elsewhere}"]).data)
    pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
    with pytest.raises(RecipeError, match="data have changed"):
        pretrain.train(recipe, tmp_path / "out", source, pairs, ALONE)


def test_a_frame_that_was_altered_at_equal_size_and_time_is_noticed(tmp_path, tiny_recipe):
    folder = write_recording(tmp_path / "kitchen")
    path, overrides = tiny_recipe(save_every=1), [f"data.path={folder}", "optim.steps=3"]
    with pytest.raises(Stop):
        run_here(path, tmp_path / "out", overrides, on_step=stop_at(2))
    frame = folder / "frame-000000.color.png"
    stat, good = frame.stat(), frame.read_bytes()
    middle = len(good) // 2

    def replace(data):
        frame.write_bytes(data)
        os.utime(frame, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    replace(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    with pytest.raises(RecipeError, match="data have changed"):
        run_here(path, tmp_path / "out", overrides)
    replace(good)
    run_here(path, tmp_path / "out", overrides)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path, tiny_recipe):
    path = tiny_recipe(save_every=1)
    with pytest.raises(GeoPretrainError, match="not finite at step"):
        run_here(path, tmp_path / "out", ["optim.lr=1e30"])
    assert (tmp_path / "out.run" / "state.pt").exists()


def test_a_run_keeps_its_memory_until_it_ends_or_fails(tmp_path, tiny_recipe, monkeypatch):
    seen = []

    @contextmanager
    def kept():
        seen.append("kept")
        try:
            yield
        finally:
            seen.append("handed back")

    monkeypatch.setattr(loop, "kept_heap", kept)
    path = tiny_recipe(optim={"steps": 2})
    run_here(path, tmp_path / "out")
    with pytest.raises(GeoPretrainError, match="not finite at step"):
        run_here(path, tmp_path / "failed", ["optim.lr=1e30"])
    assert seen == ["kept", "handed back"] * 2


def test_batch_must_divide_over_processes_and_parts(tmp_path, tiny_recipe):
    recipe = load_recipe(str(tiny_recipe()))
    source = open_source(recipe.data)
    pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
    with pytest.raises(RecipeError, match="multiple of processes x accumulate = 3"):
        pretrain.train(recipe, tmp_path / "out", source, pairs, World(0, 3, torch.device("cpu")))


def test_broken_frames_are_skipped_counted_and_named(tmp_path, tiny_recipe):
    folder = write_recording(tmp_path / "kitchen")
    (folder / "frame-000000.pose.txt").write_text("-inf " * 16)
    (folder / "frame-000020.depth.png").write_bytes(b"broken")
    recipe = load_recipe(str(tiny_recipe()), [f"data.path={folder}", "optim.steps=2", "data.overlap=[0.05, 1.0]"])
    skips = SkippedFrames()
    source = open_source(recipe.data)
    pairs = find_pairs(source, recipe.data, skips=skips)
    pretrain.train(recipe, tmp_path / "out", source, pairs, ALONE, skips=skips)
    assert len(skips.reasons) == 2
    assert "frame-000000.pose.txt" in skips.summary()
    assert sum(read_checkpoint(tmp_path / "out").provenance["skipped"].values()) == 2
    for path in folder.glob("frame-*.pose.txt"):
        path.write_text("nan " * 16)
    with pytest.raises(DataError, match=r"No pair of frames is left(.|\n)*not finite"):
        find_pairs(source, recipe.data, skips=SkippedFrames())


def test_frame_that_breaks_during_the_run_is_replaced_and_counted(tmp_path, tiny_recipe):
    folder = write_recording(tmp_path / "kitchen")
    recipe = load_recipe(str(tiny_recipe()), [f"data.path={folder}", "optim.steps=6"])
    skips = SkippedFrames()
    source = open_source(recipe.data)
    pairs = find_pairs(source, recipe.data, skips=skips)
    (folder / "frame-000010.color.png").write_bytes(b"broken")
    pretrain.train(recipe, tmp_path / "out", source, pairs, ALONE, skips=skips)
    assert [Path(p).name for p in skips.reasons] == ["frame-000010.color.png"]


def slow_keys(pairs, batch, accumulate, rank, world, steps, seed):
    """The stream of samples written out, then dealt."""
    stream = []
    whole = MicroBatches(pairs, batch=1, accumulate=1, rank=0, world=1, start=0, steps=steps * batch, seed=seed)
    for (key,) in whole:
        stream.append(key)
    out = []
    for step in range(steps):
        mine = [key for k, key in enumerate(stream[step * batch : (step + 1) * batch]) if k % world == rank]
        out += [[key for k, key in enumerate(mine) if k % accumulate == part] for part in range(accumulate)]
    return stream, out


@pytest.mark.parametrize("rank, world, accumulate", [(0, 1, 1), (1, 2, 1), (2, 3, 2)])
def test_micro_batches_deal_one_stream_of_permutations(rank, world, accumulate):
    stream, want = slow_keys(7, 12, accumulate, rank, world, 5, seed=3)
    got = MicroBatches(7, batch=12, accumulate=accumulate, rank=rank, world=world, start=0, steps=5, seed=3)
    assert list(got) == want
    for epoch in range(8):
        assert sorted(index for e, index in stream if e == epoch) == list(range(7))
    later = MicroBatches(7, batch=12, accumulate=accumulate, rank=rank, world=world, start=2, steps=5, seed=3)
    assert list(later) == want[2 * accumulate :]


def test_schedules_are_the_released_ones():
    poly = OptimSpec(lr=0.1, steps=10)
    assert [learning_rate(poly, s, 10) for s in (0, 5)] == [0.1, pytest.approx(0.1 * (1 - 5 / 11) ** 0.9)]
    paper = OptimSpec(lr=0.1, schedule="exponential", steps=60000)
    assert learning_rate(paper, 59999, 60000) == pytest.approx(0.0553, abs=1e-3)  # methods.md 5.1: final 0.055
    code = OptimSpec(lr=0.05, schedule="exponential", every=250, first_decay=True, steps=60000)
    assert [learning_rate(code, s, 60000) / 0.05 for s in (0, 1, 249, 250, 59999)] == pytest.approx(
        [1, 0.99, 0.99, 0.99**2, 0.99**240]
    )  # the 241st decay comes after the last step
    assert [pri3d_bn_momentum(t) for t in (0, 19, 20, 179, 180, 5000)] == [0.5, 0.5, 0.25, 0.5**9, 0.001, 0.001]


def test_cosine_falls_each_step_and_moco_s_each_epoch():
    smooth = OptimSpec(lr=0.2, schedule="cosine", steps=8)
    assert [learning_rate(smooth, s, 8) for s in (0, 2, 4, 6)] == pytest.approx(
        [0.2, 0.1 * (1 + 0.5**0.5), 0.1, 0.1 * (1 - 0.5**0.5)]
    )
    moco = OptimSpec(lr=0.03, schedule="cosine_epoch", epochs=100)
    # main_moco.py: lr *= 0.5 * (1 + cos(pi * epoch / epochs)), 10 steps an epoch
    assert [learning_rate(moco, s, 1000) for s in (0, 9, 10, 505, 999)] == pytest.approx(
        [0.03, 0.03, 0.0149963 * 2, 0.015, 0.03 * 0.5 * (1 - 0.9995066)], rel=1e-3
    )
    with pytest.raises(RecipeError, match=r"optim\.epochs.*cosine_epoch"):
        load_recipe("pri3d_view_r18", ["optim.schedule=cosine_epoch", "optim.epochs=null", "optim.steps=5"])


def test_what_is_frozen_is_not_trained_by_either_optimizer(tmp_path, tiny_recipe, monkeypatch):
    build = pretrain.build_task

    def frozen(recipe, starts):
        task = build(recipe, starts)
        task.backbone.encoder.layer4.requires_grad_(False)
        return task

    fresh = build(load_recipe(str(tiny_recipe())))
    monkeypatch.setattr(pretrain, "build_task", frozen)
    for kind in ("sgd", "adam"):
        run_here(tiny_recipe(optim={"kind": kind, "steps": 2, "weight_decay": 0.1, "lr": 1e-3}), tmp_path / kind)
        after, before = load_file(tmp_path / kind / "encoder.safetensors"), fresh.backbone.encoder.state_dict()
        changed = {name for name in after if "conv" in name and not torch.equal(after[name], before[name])}
        assert not any(name.startswith("layer4") for name in changed)
        assert "layer1.0.conv1.weight" in changed


def test_adam_continues_exactly(tmp_path, tiny_recipe):
    path = tiny_recipe(optim={"kind": "adam", "lr": 1e-3, "steps": 6, "dampening": 0.0}, save_every=3)
    run_here(path, tmp_path / "straight")
    with pytest.raises(Stop):
        run_here(path, tmp_path / "resumed", on_step=stop_at(4))
    run_here(path, tmp_path / "resumed")
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_recipe_file_of_a_finished_run_can_be_trained_again(tmp_path, tiny_recipe):
    run_here(tiny_recipe(optim={"steps": 3}), tmp_path / "one")
    run_here(tmp_path / "one" / "recipe.yaml", tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())["optim"]["steps"] == 3


class OnePixel(TrainingTask):
    """A network whose BatchNorm sees a map of one pixel, as DeepLab's image pooling does."""

    def __init__(self, norm, batch):
        self.norm, self.module = norm, norm
        self.budget = Budget(steps=1, batch=batch)
        self.optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)

    def batches(self, start):
        while True:
            yield torch.rand(self.budget.batch, 4, 1, 1)

    def losses(self, batch):
        return {"loss": self.norm(batch).sum()}

    def schedule(self, step):
        return 0.1


class OneVoxel(OnePixel):
    def losses(self, batch):
        coords = torch.zeros(len(batch), 4, dtype=torch.int32)
        coords[:, 0] = torch.arange(len(batch))
        return {"loss": self.norm(SparseTensor(coords, batch[:, :, 0, 0])).feats.sum()}


@pytest.mark.parametrize("kind, norm", [(OnePixel, torch.nn.BatchNorm2d), (OneVoxel, BatchNorm)])
def test_one_value_a_channel_is_refused_before_the_first_step(kind, norm):
    with pytest.raises(
        RecipeError, match=r"At step 1 a BatchNorm .* 'optim.batch' 1 leaves 1 sample .* at least 2, or"
    ):
        fit(kind(norm(4), 1), ALONE)
    assert fit(kind(norm(4), 2), ALONE).finished
