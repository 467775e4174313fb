"""Progress: estimates against the truth for the usual shapes of work, lines that fit, displays off stdout."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest

from geo_pretrain import progress as shown
from geo_pretrain.progress import Display, Lines, already, duration, fitted, of_bytes, progress, stage_of
from geo_pretrain.remaining import KEPT, Remaining
from geo_pretrain.training.loop import StepInfo

RANDOM = random.Random(0)


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def around(seconds: float, count: int, spread: float = 0.15) -> list[float]:
    return [seconds * RANDOM.lognormvariate(-(spread**2) / 2, spread) for _ in range(count)]


def estimates(items: Sequence[float], begin: int = 0) -> list[tuple[int, float | None, float]]:
    """After each item: items done, the seconds that are said to be left, and those that are."""
    clock = Clock()
    rest = Remaining(clock)
    rest.report(begin, begin + len(items))
    found = []
    for number, seconds in enumerate(items, 1):
        clock.now += seconds
        rest.report(begin + number, begin + len(items))
        found.append((number, rest.seconds(), sum(items[number:])))
    return found


SHAPES = {  # seconds of each item, and the first item by which the estimate has to be right
    "steady": (around(0.5, 100), 6),
    "quick": (around(0.01, 1000), 230),  # which is after two seconds
    "uneven": (around(1, 100, 0.4), 8),
    "slow first item": ([30, *around(0.4, 150)], 8),
    "first training step": ([2.4, *around(0.8, 150)], 5),
    "two that warm up": ([20, 5, *around(0.4, 150)], 12),
    "cached prefix": ([*around(0.01, 91), *around(0.36, 165)], 99),
    "slow cached prefix": ([*around(0.1, 91), *around(1, 60)], 95),
    "slower by load": ([*around(0.5, 100), *around(1.5, 100)], 106),
    "quicker again": ([*around(1.5, 60), *around(0.5, 140)], 70),
    "eight workers": ([5 if n % 8 == 0 else 1e-4 for n in range(160)], 40),
    "few long ones": (around(40, 8, 0.1), 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_left_is_right_within_30_percent(name):
    items, known = SHAPES[name]
    checked = [(n, said, left) for n, said, left in estimates(items)[known - 1 :] if left > 0.2 * sum(items)]
    assert len(checked) > 0.1 * len(items)
    assert all(said is not None for _, said, _ in checked), name
    worst = max(checked, key=lambda found: abs(found[1] / found[2] - 1))
    assert worst[1] == pytest.approx(worst[2], rel=0.3), f"after {worst[0]} items"


def test_nothing_is_said_before_it_can_be_known():
    for name in ("slow first item", "two that warm up", "cached prefix"):
        items, known = SHAPES[name]
        first = next((number, said, left) for number, said, left in estimates(items) if said is not None)
        assert first[1] == pytest.approx(first[2], rel=0.3), (name, first)
        assert first[0] <= known
    assert next(said for _, said, _ in estimates([1, 0.5])) is None


def test_a_run_that_goes_on_is_judged_by_this_sitting():
    _, said, left = estimates([1.0] * 100, begin=9_900)[10]
    assert said == pytest.approx(left)


def test_what_was_there_before_is_left_out():
    clock = Clock()
    rest = Remaining(clock)
    for done in range(101):  # checked at 0.1 s each, which takes long enough to mislead
        clock.now += 0.1
        rest.report(done, 200, already=True)
        assert rest.seconds() is None
    for done in range(101, 104):
        clock.now += 2
        rest.report(done, 200)
    assert rest.seconds() == pytest.approx(97 * 2)
    for done in range(104, 107):  # from here on, half of them
        clock.now += 0.1
        rest.report(done, 200, already=True)
    assert rest.seconds() == pytest.approx(94 * 2 / 2)


def test_between_reports_time_goes_by_and_a_long_item_is_not_explained_by_short_ones():
    clock = Clock()
    rest = Remaining(clock)
    for done in range(31):
        clock.now = 0.1 * done
        rest.report(done, 100)
    assert rest.seconds() == pytest.approx(7)
    clock.now += 0.05
    assert rest.seconds() == pytest.approx(6.95)
    clock.now += 10
    assert rest.seconds() is None


def test_long_runs_are_remembered_in_little():
    clock = Clock()
    rest = Remaining(clock)
    for done in range(20_001):
        clock.now += 0.01
        rest.report(done, 40_000)
    assert len(rest.spans) <= KEPT
    assert rest.seconds() == pytest.approx(200, rel=0.01)
    assert sum(items for items, _ in rest.spans) == 20_000


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "1.7 min"),
        (600, "10 min"),
        (3600, "60 min"),
        (6000, "1.7 h"),
        (86400, "24 h"),
        (2e5, "2.3 days"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_a_line_of_training_fits_80_columns():
    name = "training pri3d_view_geo_r50.scannet_and_more"
    losses = {"view": 4.2, "depth": -0.3, "geometry": 3.21}
    detail = "loss 7.11, 14.3 images/s, view 4.20, depth -0.30, geometry 3.21"
    assert str(StepInfo(12000, 60000, losses, 14.31, "images")) == detail
    line = fitted(name, "12000/60000", detail, "3.4 h left", 80)
    assert line == "training pri3d_...: 12000/60000, loss 7.11, 14.3 images/s, view 4.20, 3.4 h left"
    bare = fitted(name, "12000/60000", detail, "3.4 h left", 50)
    assert bare == "training pri3d_...: 12000/60000, 3.4 h left"
    assert str(StepInfo(1, 2, {"nce": 5.0}, 3.0, "clouds")) == "loss 5.00, 3 clouds/s"
    narrow = fitted("predicting", "1/20", "a_room_with_a_long_name.ply, loss 1e-05", "2 s left", 50)
    assert narrow == "predicting: 1/20, a_room_..., loss 1e-05, 2 s left"
    assert fitted("a", "1/2", "loss 1.00, 3 images/s", "2 s left", 80) == "a: 1/2, loss 1.00, 3 images/s, 2 s left"
    assert fitted("a", "1/2", "", "2 s left", 80) == "a: 1/2, 2 s left"


def lines_of(work: Callable[[Display, Clock], None]) -> list[str]:
    clock, lines = Clock(), []
    work(Lines(lines.append, clock), clock)
    return lines


def test_a_log_has_lines_now_and_then_and_long_work_is_announced():
    def render(display: Display, clock: Clock) -> None:
        stage = display.stage("rendering rooms")
        for done in range(1, 257):
            clock.now += 0.01 if done <= 91 else 2
            stage.already(done, 256) if done <= 91 else stage(done, 256)

    lines = lines_of(render)
    assert lines[0] == "rendering rooms: 1/256, estimating..."
    assert re.fullmatch(r"rendering rooms: will take about 5\.4 min, until \d\d:\d\d", lines[1]), lines[1]
    assert lines[2] == "rendering rooms: 94/256, 5.4 min left"
    assert lines[-1] == "rendering rooms: 256/256, took 5.5 min"
    assert len(lines) < 60
    assert " ," not in "".join(lines)


def test_lines_grow_rare_and_the_next_run_begins_anew():
    def train(display: Display, clock: Clock) -> None:
        for _ in range(2):
            for step in range(1, 5001):
                clock.now += 1
                display("training", step, 5000, "loss 1.00, 8 images/s")

    lines = lines_of(train)
    assert 100 < len(lines) < 500
    assert sum("will take about" in line for line in lines) == 1
    assert sum(line == "training: 5000/5000, loss 1.00, 8 images/s, took 83 min" for line in lines) == 2


def test_one_display_for_all_and_silence_reaches_downloads(capsys):
    with progress() as outer:
        with progress() as inner, of_bytes("weights") as download:
            assert inner is outer
            assert download is not None
            download(2_000_000, 96_000_000)
        with progress(show=False) as silent, of_bytes("weights") as quiet:
            silent("matching", 1, 2, "")
            quiet(1, 2)
    with of_bytes("weights") as nobody:
        assert nobody is None
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "weights: 2.0/96.0 MB, estimating...\n"
    assert not shown._open


def test_any_callable_can_be_reported_to():
    calls: list[tuple[object, ...]] = []
    stage_of(lambda *at: calls.append(at), "matching", "all")(1, 2)
    already(lambda *at: calls.append(at), 3, 4)
    already(None, 3, 4)
    assert calls == [("matching", 1, 2, "all"), (3, 4)]
    assert isinstance(stage_of(Display(), "matching"), shown.Stage)


def test_a_terminal_has_a_live_line_of_its_width(monkeypatch):
    from io import StringIO

    import rich.console

    class Terminal(StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    assert rich.console.Console(stderr=True).width == 80
    with progress() as display:
        display("training pri3d_view_geo_r50.scannet_and_more", 60, 120, "view 4.20 depth -0.30, 14.3 images/s")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "\u2501\u2501\u2501 training" in text
    assert "60/120" in text
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80


def test_bytes_from_hugging_face_are_shown_in_the_same_style(capsys):
    from geo_pretrain.hub.sources import _bars_of

    with progress() as display:
        bars = _bars_of(display.stage("lab/net/encoder.safetensors", bytes=True))
        with bars(total=10_000_000, initial=2_000_000, desc="encoder", unit="B", unit_scale=True, name="hub") as bar:
            bar.update(8_000_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "lab/net/encoder.safetensors: 10.0/10.0 MB, took 0 s\n"


def test_progress_does_not_mix_with_answers(capsys):
    with progress() as report:
        report("matching", 1, 4, "a\x1b[2J")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "matching: 1/4, a\\x1b[2J, estimating...\n"


def test_items_far_below_a_command_are_counted_in_its_display(capsys, monkeypatch):
    with progress():
        assert list(shown.shown_items("abc", "fusing surfaces", "room", 4)) == ["a", "b", "c"]
        monkeypatch.setattr("os.getpid", lambda: -1)  # a fork of the process: silent
        assert list(shown.shown_items("abc", "fusing surfaces", "room", 3)) == ["a", "b", "c"]
        monkeypatch.undo()
    assert capsys.readouterr().err.splitlines() == [
        "fusing surfaces: 0/4, room, estimating...",
        "fusing surfaces: 4/4, room, took 0 s",
    ]


def test_what_is_over_stays_as_long_as_it_took():
    clock = Clock()
    display = Display(clock)
    stage = display.stage("matching")
    stage(0, 2)
    clock.now = 7
    stage(2, 2)
    clock.now = 50
    assert display.states["matching"].line() == "matching: 2/2, took 7 s"
