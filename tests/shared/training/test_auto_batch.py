"""`auto_batch`: the fewest passes that fit, the same run as with `accumulate` given, nothing changed by the trial; out of memory told in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssld.shared.config.command import run_command
from ssld.shared.config.settings import CommandConfig
from ssld.shared.distributed import ranks
from ssld.shared.errors import is_out_of_memory
from ssld.shared.models.backbones import Classifier
from ssld.shared.training import auto_batch
from ssld.shared.training.auto_batch import find_passes
from ssld.stage1_ssld.distill import main as distill

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def test_distillation_takes_the_passes_that_fit(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, small_memory: Any
) -> None:
    """Batches of 8 where 3 images fit: passes of 2, and weights bit for bit those of a run with `accumulate` given.

    The student has BatchNorm, whose running statistics the trial changes, and has to put back.
    """
    settings = distill_settings | {"student": {"model": "random:test_resnet"}}
    assert call(distill, arguments(settings | {"accumulate": 4}, "given")) == 0
    sizes = small_memory(Classifier, 3)
    assert call(distill, arguments(settings | {"auto_batch": True})) == 0
    assert sizes == [8, 4, 2, *[2] * 4 * 6, 2]  # and once more after the last update
    assert json.loads((tmp_path / "run" / "auto_batch.json").read_text()) == {"accumulate": 4, "processes": 1}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "auto_batch: 2 of 8 images per process and pass fit, so accumulate is 4\n" in log
    given, chosen = (load_file(tmp_path / name / "student.safetensors") for name in ("given", "run"))
    assert all(torch.equal(given[name], chosen[name]) for name in given)


def test_a_run_goes_on_with_what_it_found(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, small_memory: Any
) -> None:
    """More memory at the second start changes nothing: batch statistics are those of the passes."""
    settings = distill_settings | {"auto_batch": True}
    sizes = small_memory(Classifier, 4)
    assert call(distill, arguments(settings | {"steps": 2})) == 0
    sizes = small_memory(Classifier, 8)
    assert call(distill, arguments(settings)) == 0
    assert sizes == [4] * 2 * 4 + [4]


def test_not_even_one_image(
    arguments: Arguments,
    distill_settings: Settings,
    call: Call,
    tmp_path: Path,
    small_memory: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_memory(Classifier, 0)
    assert call(distill, arguments(distill_settings | {"auto_batch": True})) == 2
    assert capsys.readouterr().err == (
        "error: auto_batch: not even one image per pass fits into memory; use smaller images, a smaller network, or --precision bf16\n"
    )
    assert not (tmp_path / "run" / "auto_batch.json").exists()


def test_too_few_passes_after_all(
    arguments: Arguments,
    distill_settings: Settings,
    call: Call,
    tmp_path: Path,
    small_memory: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A later step that does not fit although the trial did: the next start goes on with more passes."""
    settings = distill_settings | {"auto_batch": True}
    small_memory(Classifier, 8)
    assert call(distill, arguments(settings | {"steps": 2})) == 0
    small_memory(Classifier, 3)
    assert call(distill, arguments(settings)) == 2
    assert capsys.readouterr().err == (
        "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. auto_batch found too few passes: the same command tries more of them\n"
    )
    # Switching it off is reported, and the recorded number stays.
    small_memory(Classifier, 0)
    assert call(distill, arguments(settings, "run", "--auto_batch", "false", "--accumulate", "4")) == 2
    assert "The run goes on with --auto_batch true" in capsys.readouterr().err
    sizes = small_memory(Classifier, 3)
    assert call(distill, arguments(settings)) == 0
    assert sizes == [4, 2, *[2] * 4 * 4, 2]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_any_rank_notes_that_passes_were_too_few(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    """The others wait for the one that ran out of memory until the launcher ends them, and note nothing."""

    class Batched(CommandConfig):
        auto_batch: bool = True

    def work(config: Batched) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "auto_batch.json").write_text('{"accumulate": 2, "processes": 2}')
    assert run_command(Batched, work, ["--output", str(tmp_path)], program="x") == 2
    assert json.loads((tmp_path / "auto_batch.json").read_text()) == {"too_few": 2, "processes": 2}
    assert "auto_batch found too few passes: the same command tries more of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "notes", [[{"too_few": 2, "processes": 2}, {}], [{"accumulate": 2, "processes": 2}, {"too_few": 2, "processes": 2}]]
)
def test_the_note_of_any_rank_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, notes: list[Settings]) -> None:
    """Where ranks have folders of their own, the main rank's still has the recorded number."""

    class Run:
        path, main = tmp_path, True

        def log(self, text: str) -> None:
            pass

    tried: list[int] = []
    net = torch.nn.Linear(1, 1)
    monkeypatch.setattr(auto_batch, "gather_lists", lambda items: notes)
    options: Settings = {"networks": {}, "optimizer": torch.optim.SGD(net.parameters()), "device": torch.device("cpu")}
    assert find_passes(Run(), 16, 2, tried.append, **options) == 4  # type: ignore[arg-type]
    assert tried == [2]
    assert json.loads((tmp_path / "auto_batch.json").read_text()) == {"accumulate": 4, "processes": 2}


def test_a_run_without_memory_goes_on_in_more_passes(
    arguments: Arguments,
    distill_settings: Settings,
    call: Call,
    tmp_path: Path,
    small_memory: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(distill, arguments(distill_settings | {"steps": 2})) == 0
    small_memory(Classifier, 4)
    assert call(distill, arguments(distill_settings)) == 2
    capsys.readouterr()
    sizes = small_memory(Classifier, 4)
    assert call(distill, arguments(distill_settings, "run", "--accumulate", "2")) == 0
    assert "changed since the last start: accumulate: 1 -> 2" in capsys.readouterr().out
    assert sizes == [4] * 2 * 4 + [4]


def test_the_trial_evaluates_as_many_images_as_the_run(
    arguments: Arguments, distill_settings: Settings, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = Classifier.forward

    def watched(self: Classifier, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if not self.training:
            shapes.append(tuple(pixels_BCHW.shape))
        return forward(self, pixels_BCHW)

    monkeypatch.setattr(Classifier, "forward", watched)
    assert call(distill, arguments(distill_settings | {"auto_batch": True})) == 0
    tried = next(shape for shape in shapes if shape[0] == distill_settings["batch_size"])
    # Two drawn images at the teacher's own size show that it sees something.
    shapes = [shape for shape in shapes if shape != (2, 3, 160, 160)]
    assert all(shape[0] <= tried[0] and shape[2] * shape[3] <= tried[2] * tried[3] for shape in shapes)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_out_of_memory_says_what_to_set(
    arguments: Arguments,
    distill_settings: Settings,
    call: Call,
    small_memory: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_memory(Classifier, 4)
    assert call(distill, arguments(distill_settings)) == 2
    assert capsys.readouterr().err == (
        "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. The run goes on with --auto_batch true, which takes the "
        "same batch in as many passes as fit, or with --accumulate 2, 4, ... (in evaluation with a smaller --val_batch_size); smaller images or "
        "--precision bf16 are another run\n"
    )


def test_a_trial_asks_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has run out of memory does not answer: the others would wait for ever."""

    def reduced(*_: Any) -> None:
        raise AssertionError("all_reduce was called")

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", reduced)
    with ranks.alone():
        assert ranks.total_over_ranks(torch.tensor(3.0)) == 3
    with pytest.raises(AssertionError, match="all_reduce was called"):
        ranks.total_over_ranks(torch.tensor(3.0))


def test_auto_batch_and_accumulate_exclude_each_other(
    arguments: Arguments, distill_settings: Settings, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(distill, arguments(distill_settings | {"auto_batch": True, "accumulate": 2})) == 2
    assert "accumulate: auto_batch finds it; give one of the two" in capsys.readouterr().err
