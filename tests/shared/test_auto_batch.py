"""`auto_batch`: the fewest passes that fit, the same run as with `accumulate` given, nothing changed by the trial; out of memory told in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.backbones import Classifier
from stage1_ssld.distill import main as distill

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def test_distillation_takes_the_passes_that_fit(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, small_memory: Any
) -> None:
    """Batches of 8 where 3 images fit: passes of 2, and weights bit for bit those of a run that was told so."""
    assert call(distill, arguments(distill_settings | {"accumulate": 4}, "told")) == 0
    sizes = small_memory(Classifier, 3)
    assert call(distill, arguments(distill_settings | {"auto_batch": True})) == 0
    assert sizes == [8, 4, 2, *[2] * 4 * 6]
    assert json.loads((tmp_path / "run" / "auto_batch.json").read_text()) == {"accumulate": 4, "processes": 1}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "auto_batch: 2 of 8 images a process and pass fit, so accumulate is 4\n" in log
    told, found = (load_file(tmp_path / name / "student.safetensors") for name in ("told", "run"))
    assert all(torch.equal(told[name], found[name]) for name in told)


def test_a_run_goes_on_with_what_it_found(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, small_memory: Any
) -> None:
    """More memory at the second start changes nothing: batch statistics are those of the passes."""
    settings = distill_settings | {"auto_batch": True}
    sizes = small_memory(Classifier, 4)
    assert call(distill, arguments(settings | {"steps": 2})) == 0
    sizes = small_memory(Classifier, 8)
    assert call(distill, arguments(settings)) == 0
    assert sizes == [4] * 2 * 4


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
        "error: auto_batch: not even one image a pass fits into memory; take smaller images, a smaller network, or --precision bf16\n"
    )
    assert not (tmp_path / "run" / "auto_batch.json").exists()


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
        "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. Set --auto_batch true, which takes the same batch in as many "
        "passes as fit (or --accumulate 2, 4, ...), smaller images, --precision bf16, or, in evaluation, a smaller batch\n"
    )


def test_auto_batch_and_accumulate_exclude_each_other(
    arguments: Arguments, distill_settings: Settings, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(distill, arguments(distill_settings | {"auto_batch": True, "accumulate": 2})) == 2
    assert "accumulate: auto_batch finds it; give one of the two" in capsys.readouterr().err
