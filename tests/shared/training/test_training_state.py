"""What a run has after a death in the middle: the updates before an evaluation, before a batch that never came, and no best file of another run."""

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ssld.shared.checksums import write_folder_sums
from ssld.shared.config.settings import CommandConfig
from ssld.shared.distributed.stop import WorkerDeaths
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import save_model_file
from ssld.shared.run_dir import RunDir
from ssld.shared.training.checkpoint import load_checkpoint
from ssld.shared.training.checkpoint_folders import complete_checkpoints, newest_checkpoint
from ssld.shared.training.quarantine import Quarantine
from ssld.shared.training.training_state import TrainingState


class Settings(CommandConfig):
    """Settings of a test."""


class Start:
    """One start of a run of 100 steps whose only weight counts the steps."""

    def __init__(self, folder: Path, *, steps: int = 100, scaler: Any = None) -> None:
        self.run = RunDir(Settings(output=folder), "test")
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.net.weight)
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, scaler=scaler)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0)
        none = Quarantine(self.run, None)
        best = folder / "best.safetensors"
        self.state = TrainingState(
            self.run, accelerator, {"model": self.net}, optimizer, none, steps, 4, 2, 0.1, "fp16", best
        )
        self.step = self.state.restore()

    def train(self, step: int) -> None:
        nn.init.constant_(self.net.weight, step)
        self.step = step

    def evaluate(self, score: float) -> None:
        with self.state.evaluating(self.step):
            if self.state.improved(score):
                facts = {"kind": "detector", "step": self.step, "metrics": {"AP": score}}
                save_model_file(self.state.best_file, {"w": torch.ones(1)}, facts)

    def update(self, gradient: float) -> None:
        """As the loop does, with this gradient before it is unscaled."""
        self.step += 1
        self.net.weight.grad = torch.full_like(self.net.weight, gradient)
        self.state.update(self.step, None, measure=False)

    def die(self) -> None:
        self.run.close()

    @property
    def saved(self) -> list[int]:
        return [int(path.name[5:]) for path in complete_checkpoints(self.run.checkpoints)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_death_in_an_evaluation_costs_the_evaluation_alone(folder: Path) -> None:
    one = Start(folder)
    one.train(7)
    evaluation = one.state.evaluating(7)
    evaluation.__enter__()  # and never left
    one.die()
    two = Start(folder)
    assert two.step == 7
    assert two.net.weight.item() == 7
    assert two.state.owes_evaluation
    two.evaluate(0.3)
    two.state.save(7)  # due at this step too, and there already
    two.die()
    three = Start(folder)
    assert not three.state.owes_evaluation
    assert (three.state.best, three.state.stale) == (0.3, 0)
    three.die()
    (newest_checkpoint(folder / "checkpoints") / "evaluation.json").write_text('{"best": 0.9}')  # type: ignore[operator]
    assert Start(folder).state.owes_evaluation  # damaged, so it is repeated


def test_a_checkpoint_of_an_earlier_version_owes_nothing(folder: Path) -> None:
    one = Start(folder)
    one.state.save(5)
    one.die()
    file = folder / "checkpoints" / "step_00000005" / "state.json"
    state = json.loads(file.read_text())
    del state["evaluated"]
    file.write_text(json.dumps(state))
    (file.parent / "SHA256SUMS").unlink()
    write_folder_sums(file.parent)
    assert not Start(folder).state.owes_evaluation


def test_a_checkpoint_before_an_evaluation_has_to_be_cheap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    one = Start(folder)
    write = TrainingState._write

    def slow(state: TrainingState, step: int) -> None:
        clock[0] += 10
        write(state, step)

    monkeypatch.setattr(TrainingState, "_write", slow)
    for step, seconds in ((1, 1), (2, 100), (3, 110)):  # 210 seconds after the first one, 10 are 5 %
        clock[0] += seconds
        one.train(step)
        one.evaluate(0.1)
    assert one.saved == [1, 3]


@pytest.mark.parametrize("error", [RuntimeError("DataLoader worker (pid 7) is killed"), MemoryError(), EOFError()])
def test_where_no_batch_comes_the_steps_before_are_saved(folder: Path, error: Exception) -> None:
    one = Start(folder)
    one.train(4)
    for micro, saved in ((1, []), (0, [4])):  # in the middle of a step the statistics are those of a part of it
        with pytest.raises(type(error)), one.state.fetching(5, micro):
            raise error
        assert one.saved == saved
    assert load_checkpoint(folder / "checkpoints" / "step_00000004")[0]["model"]["weight"].item() == 4


@pytest.mark.parametrize("place", ["fetching", "evaluating"])
@pytest.mark.parametrize(("ranks", "saved"), [(1, [4, 5]), (2, [4])])
def test_one_of_several_ranks_saves_nothing_alone(
    place: str, ranks: int, saved: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint needs all ranks, and the others know nothing of the failure: this one would wait for them in vain."""
    one = Start(folder)
    one.train(4)
    one.state.save(4)
    one.train(5)
    monkeypatch.setattr("ssld.shared.training.training_state.world_size", lambda: ranks)
    monkeypatch.setattr("ssld.shared.training.training_state._WORTH", math.inf)  # none before the evaluation
    inside = one.state.fetching(6, 0) if place == "fetching" else one.state.evaluating(5)
    with pytest.raises(MemoryError), inside:
        raise MemoryError
    assert one.saved == saved
    one.die()
    assert Start(folder).step == saved[-1]


def test_a_failed_evaluation_leaves_the_score_before_it(folder: Path) -> None:
    one = Start(folder)
    one.train(2)
    one.evaluate(0.2)
    one.train(4)

    def fail() -> None:
        one.state.improved(0.5)
        raise MemoryError

    with pytest.raises(MemoryError), one.state.evaluating(4):
        fail()
    one.die()
    two = Start(folder)
    assert (two.step, two.state.best, two.state.owes_evaluation) == (4, 0.2, True)


def test_a_best_file_of_steps_that_were_taken_back_goes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Start(folder)
    for step, score in ((10, 0.4), (20, 0.3), (30, 0.6)):
        one.train(step)
        one.evaluate(score)
        one.state.save(step)
    assert one.saved == [10, 20, 30]
    one.die()
    two = Start(folder)
    assert two.state.best_file.exists()
    assert two.state.best == 0.6
    two.die()
    (folder / "checkpoints" / "step_00000030" / "COMPLETE").unlink()
    capsys.readouterr()
    three = Start(folder)
    assert three.step == 20
    said = "of step 30, after step 20, from which this run continues; deleted"
    assert f"{three.state.best_file}: {said}\n" in capsys.readouterr().out
    assert not three.state.best_file.exists()
    three.train(30)
    three.evaluate(0.1)  # the best of what this run still has
    assert three.state.best_file.exists()
    assert (three.state.best, three.state.stale) == (0.1, 0)


def test_a_best_file_that_is_damaged_or_gone_is_no_best(folder: Path) -> None:
    one = Start(folder)
    one.train(10)
    one.evaluate(0.4)
    one.die()
    one.state.best_file.write_bytes(b"half")
    two = Start(folder)
    assert not two.state.best_file.exists()
    assert two.state.best == float("-inf")


def fp16() -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.ones(1))  # as of a loss: the scaler begins with the first one
    return scaler


def test_steps_that_fp16_skips_are_counted_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Start(folder, scaler=fp16())
    for gradient in (math.inf, math.nan, 1.0, math.inf, 1.0):
        one.update(gradient)
    one.state.watch.add(4, {"loss": torch.tensor(1.0)}, [])
    means = one.state.log(5, 0.1)
    assert means["skipped_steps"] == 3
    assert "step 5: 3 steps changed no weights: the gradient was not finite in fp16" in capsys.readouterr().out
    one.state.save(5)
    one.die()
    two = Start(folder, scaler=fp16())
    two.update(math.inf)
    assert two.state.skipped == 4
    two.state.finish({}, 6, [])
    assert json.loads((folder / "result.json").read_text())["metrics"]["skipped_steps"] == 4


def test_a_run_in_fp16_that_only_skips_stops(folder: Path) -> None:
    one = Start(folder, scaler=fp16())
    for _ in range(39):
        one.update(math.inf)
    one.update(1.0)
    one.state.save(40)
    for step in range(41, 80):
        one.update(math.nan)
        if step == 60:
            one.state.save(60)  # of weights that are those of step 40
    with pytest.raises(UserError) as caught:
        one.update(math.inf)
    message = str(caught.value)
    assert message.startswith(
        "fp16: no gradient after step 40 was finite, at any scale, so that 40 steps changed nothing"
    )
    assert message.endswith("or --precision fp32 continues from step_00000040")


@pytest.mark.parametrize(("steps", "stops"), [(17, True), (16, False)])
def test_a_short_run_that_only_skips(folder: Path, steps: int, stops: bool) -> None:
    one = Start(folder, steps=steps, scaler=fp16())
    for _ in range(steps - 1):
        one.update(math.inf)
    with pytest.raises(UserError, match="no gradient after step 0") if stops else nullcontext():
        one.update(math.inf)


@pytest.fixture
def failing_handler() -> Iterator[None]:
    """As torch's: it raises wherever the main process is."""

    def fail(*_: Any) -> None:
        raise RuntimeError("worker died")

    before = signal.signal(signal.SIGCHLD, fail)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_dies_in_a_step_is_told_after_it(failing_handler: None) -> None:
    handler, done = signal.getsignal(signal.SIGCHLD), []
    with WorkerDeaths() as deaths:
        with deaths.told():
            pass
        os.kill(os.getpid(), signal.SIGCHLD)
        done.append("the step")
        with pytest.raises(RuntimeError, match="worker died"), deaths.told():
            done.append("a batch")
        with deaths.told():  # once
            done.append("another")
        with pytest.raises(RuntimeError, match="worker died"), deaths.told():
            os.kill(os.getpid(), signal.SIGCHLD)  # where the loop waits for a batch
    assert done == ["the step", "another"]
    assert signal.getsignal(signal.SIGCHLD) is handler
    with deaths.told():  # the last evaluation, after the loop
        pass
    assert signal.getsignal(signal.SIGCHLD) is handler
