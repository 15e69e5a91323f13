"""Progress of a run: a bar on a terminal, lines elsewhere; and its speed follows from the clock."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssld.shared.run_dir import SPEED
from ssld.shared.training import progress
from ssld.shared.training.progress import Bar, Progress
from ssld.shared.training.progress import Clock as Pace
from ssld.shared.training.training_state import TrainingState


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def run() -> Any:
    lines: list[str] = []
    return SimpleNamespace(main=True, log=lines.append, write=print, lines=lines)


def test_numbers_follow_from_the_clock(clock: Clock, run: Any) -> None:
    state = Progress(run, torch.device("cpu"))
    with state.begin(4, 20):
        for _ in range(4):
            with state.waiting():
                clock.now += 0.5
            clock.now += 1.5
            state.step()
        numbers = state.read(lambda step: 8 * step)
        assert tuple(numbers) == SPEED
        assert numbers["seconds"] == 8
        assert numbers["data_wait"] == 0.25
        assert numbers["images_per_second"] == 4
        assert 0.05 < numbers["memory_gb"] < 100
        # Four of sixteen steps took 8 s: twelve more take 24 s.
        memory = f"{numbers['memory_gb']:.1f} GB"
        assert state.describe(numbers) == f"4 images/s, 25 % waiting for data, {memory}, 24 s to go"
        clock.now += 10
        state.step()
        assert state.read(lambda step: 8 * step)["data_wait"] == 0  # counts from the last reading
    assert run.lines == []


def test_images_per_second_count_the_images_of_each_step(clock: Clock, run: Any) -> None:
    state = Progress(run, torch.device("cpu"))
    with state.begin(0, 4):
        for _ in range(4):
            clock.now += 1
            state.step()
        numbers = state.read(lambda step: 2 * min(step, 3) + 14 * max(0, step - 3))  # a burn-in of three steps
    assert numbers["images_per_second"] == 5


def test_evaluations_do_not_count_as_training(clock: Clock, run: Any) -> None:
    state = Progress(run, torch.device("cpu"))
    with state.begin(0, 10):
        for _ in range(4):
            with state.waiting():
                clock.now += 1
            clock.now += 1
            state.step()
        with state.pausing():
            clock.now += 100
        numbers = state.read(lambda step: 8 * step)
    assert numbers["seconds"] == 108
    assert numbers["images_per_second"] == 4
    assert numbers["data_wait"] == 0.5


def test_a_long_silence_begins_with_an_estimate(clock: Clock, run: Any) -> None:
    state = Progress(run, torch.device("cpu"))
    with state.begin(0, 1000):
        clock.now += 5  # the first step is no measure of the others
        for _ in range(30):
            state.step()
            clock.now += 2
    assert run.lines == ["step 8: about 2 s per step, 33 min to go without evaluations"]


def test_a_short_run_has_its_estimate_before_its_end(clock: Clock, run: Any) -> None:
    state = Progress(run, torch.device("cpu"))
    with state.begin(0, 4):
        for _ in range(4):
            clock.now += 3
            state.step()
    assert run.lines == ["step 3: about 3 s per step, 3 s to go without evaluations"]


def test_slow_steps_have_their_estimate_earlier(clock: Clock, run: Any) -> None:
    state = Progress(run, torch.device("cpu"))
    with state.begin(0, 100):
        for _ in range(20):
            clock.now += 9
            state.step()
    assert run.lines == ["step 3: about 9 s per step, 15 min to go without evaluations"]


def test_no_estimate_where_the_log_has_spoken(clock: Clock, run: Any) -> None:
    state = Progress(run, torch.device("cpu"))
    with state.begin(0, 100):
        for step in range(20):
            clock.now += 1
            state.step()
            if step == 4:
                state.read(lambda step: 1 * step)
    assert run.lines == []


def test_a_terminal_has_a_bar_and_the_lines_stand_above_it(
    clock: Clock, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    state = Progress(run, torch.device("cpu"))
    with state.begin(5, 8):
        for _ in range(3):
            clock.now += 1
            state.step()
            state.describe(state.read(lambda step: 2 * step), loss=0.125, lr=0.5)
        run.write("a line")
    printed = terminal.getvalue()
    assert "8/8" in printed
    assert "5/8" in printed  # it goes on where the run does
    assert "loss=0.125" in printed
    assert "lr=0.5" in printed
    assert capsys.readouterr().out == "a line\n"
    assert run.write is print  # as before


def shown_losses(run: Any, monkeypatch: pytest.MonkeyPatch, device: str, losses: list[list[float]]) -> list[str]:
    """What stands beside the bar after each step, in a run without log lines; `losses` are those of the passes of each step."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    accelerator: Any = SimpleNamespace(device=torch.device(device))
    none: Any = None
    state = TrainingState(run, accelerator, {}, none, none, len(losses), 4, 2, 0.1, "fp32", Path("best"))
    shown = []
    monkeypatch.setattr(Bar, "show", lambda self, **values: shown.append(values["loss"]))
    with state.progress.begin(0, len(losses)) as progress:
        for step, passes in enumerate(losses):
            for loss in passes:
                state.watch.add(step, {"other": torch.tensor(9.0), "loss": torch.tensor(loss)}, [])
            progress.step()
    return shown


def test_the_bar_has_the_loss_before_the_first_log_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_losses(run, monkeypatch, "cpu", [[0.5, 1.5], [3.0, 1.0], [0.0, 1.0]])
    weights = [0.95**2, 0.95, 1.0]
    expected = [2.0, (0.95 * 2 + 4) / 1.95, (weights[0] * 2 + weights[1] * 4 + 1) / sum(weights)]
    assert shown == pytest.approx(expected, rel=1e-6)


def test_on_a_gpu_only_the_first_step_is_waited_for(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_losses(run, monkeypatch, "cuda", [[2.0], [4.0], [1.0]]) == [2.0]


def test_a_bar_without_log_lines_prints_the_loss(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(run, torch.device("cpu"), lambda: 0.75).begin(0, 3) as state:
        for _ in range(3):
            state.step()
    assert "3/3" in terminal.getvalue()
    assert "loss=0.75" in terminal.getvalue()


def test_a_clock_tells_rate_and_time_left(clock: Clock) -> None:
    pace = Pace(3)
    assert (pace.left, pace.due()) == (0.0, False)
    clock.now += 1
    pace.add(2)
    assert pace.describe() == "2 per second, 0.5 s to go"
    assert not pace.due()
    clock.now += progress.SILENCE
    assert pace.due()
    assert not pace.due()  # it has just been heard
    pace.add()
    clock.now += progress.SILENCE
    assert not pace.due()  # nothing is left
    assert pace.describe() == f"{3 / 41:.3g} per second"
    unknown = Pace()
    unknown.add(5)
    clock.now += 1
    assert unknown.describe() == "5 per second"


def test_a_bar_of_its_own(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Bar(run, 3, "image")
    assert run.write is not print
    for _ in range(3):
        bar.add()
    bar.close()
    assert "3/3" in terminal.getvalue()
    assert run.write is print


@pytest.mark.parametrize("main", [True, False])
def test_no_bar_in_a_pipe_or_on_another_rank(
    run: Any, main: bool, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    stream = io.StringIO() if main else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    run.main = main
    with Progress(run, torch.device("cpu")).begin(0, 2) as state:
        state.step()
    assert stream.getvalue() == ""


def test_a_run_logs_its_speed(
    distill_settings: dict[str, Any], arguments: Any, call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ssld.stage1_ssld.distill import main

    assert call(main, arguments(distill_settings)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(SPEED) <= set(lines[0])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log in capsys.readouterr().out.replace("\r", "")
    assert f"recipe {tmp_path / 'run.yaml'}; all settings are in {tmp_path / 'run' / 'config.yaml'}\n" in log
    assert "a checkpoint every 4 steps and at the end, the newest 2 are kept; evaluation at the end\n" in log
    assert " images/s, " in next(line for line in log.splitlines() if line.startswith("step 2/6"))
