"""One process and two processes (gloo, started by torch's launcher) train and evaluate alike."""

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ssld.shared.models.model_file import read_tensors
from ssld.shared.run_dir import read_metrics
from ssld.shared.training.checkpoint_folders import newest_checkpoint
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.evaluate import main as evaluate
from tests.float64 import in_float64

pytestmark = pytest.mark.slow


def _same_parts(folder: Path, step: int, *parts: str) -> None:
    for part in parts:
        one, two = (
            read_tensors(folder / run / "checkpoints" / f"step_{step:08d}" / f"{part}.safetensors")
            for run in ("one", "two")
        )
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-12)


def test_two_ranks_equal_one(distill_settings: Any, on_one_and_two: Any, tmp_path: Path, files_below: Any) -> None:
    """LayerNorm student, no drop-path, equal sizes: only the order of summation differs. The trial of `auto_batch` is every rank's own, the
    statistics of the teacher's features are those of both.
    """
    settings = distill_settings | {"steps": 5, "log_every": 1, "optim": {"lr": 0.05, "reference_batch": 8}}
    settings |= {"auto_batch": True, "losses": ["symmetric_kl", "pooled", "spatial"]}
    output, _ = on_one_and_two(distill, "stage1_ssld/distill.py", settings)
    assert "(2 processes x 1 accumulated)" in output
    assert output.count("step 5/5") == 1  # only one rank logs
    assert "standardized with 40 views" in output
    _same_parts(tmp_path, 5, "heads")
    assert "auto_batch: 4 of 8 images per process and pass fit, so accumulate is 1\n" in output
    one, two = tmp_path / "one", tmp_path / "two"
    assert files_below(one) == files_below(two)
    metrics = [json.loads((run / "result.json").read_text())["metrics"] for run in (one, two)]
    assert metrics[0]["images"] == metrics[1]["images"] == 15  # 15 images in batches of 4: no image is counted twice
    start = read_tensors(one / "checkpoints" / "step_00000004" / "model.safetensors")
    after = read_tensors(one / "student.safetensors")
    assert max((start[name] - after[name]).abs().max().item() for name in after) > 1e-4
    for name, tensor in read_tensors(two / "student.safetensors").items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-9, atol=1e-12)


def test_two_ranks_of_one_term_of_features_equal_one(
    distill_settings: Any, on_one_and_two: Any, tmp_path: Path
) -> None:
    """No rank waits for gradients of layers that no loss term depends on."""
    settings = distill_settings | {"steps": 4, "log_every": 1, "losses": [{"name": "spatial", "levels": ["c3", "c4"]}]}
    settings |= {"optim": {"lr": 0.05, "reference_batch": 8}, "data": distill_settings["data"] | {"val": None}}
    output, _ = on_one_and_two(distill, "stage1_ssld/distill.py", settings)
    assert "are not trained: no loss term depends on them" in output
    _same_parts(tmp_path, 4, "model", "heads")


def test_two_ranks_stop_go_on_and_evaluate_the_saved_model(
    arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, scripts: Any, teacher_file: Path, tiny: Any
) -> None:
    """SIGTERM to the launcher reaches the ranks, which agree on a step; then the metrics are those of the file that was written.

    A BatchNorm student: each rank has running statistics of its own, and those of the main rank are saved.
    """
    settings = distill_settings | {"steps": 60, "log_every": 1, "student": {"model": "random:test_resnet"}}
    settings |= {"save_every": 100, "optim": {"lr": 0.1, "reference_batch": 8}}
    command, run = ("stage1_ssld/distill.py", *arguments(settings)), tmp_path / "run"
    process = scripts.start(*command, ranks=2)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    stopped = re.search(r"stopped: checkpoint of step (\d+) written to .*; the same command goes on from there\n", err)
    assert stopped, err
    newest = newest_checkpoint(run / "checkpoints")
    assert newest
    assert newest.name == f"step_{int(stopped[1]):08d}"
    assert not (run / "result.json").exists()
    assert not (run / "student.safetensors").exists()

    process = scripts.run(*command, ranks=2)
    assert process.returncode == 0, process.stderr
    assert f"resumed from {newest.name}" in process.stdout
    assert [line["step"] for line in read_metrics(run)] == [*range(1, 61), 60]

    argv = ["--model", str(run / "student.safetensors"), "--teacher.model", str(teacher_file), "--threads", "1"]
    argv += ["--data.path", str(tiny.val), "--output", str(tmp_path / "eval"), "--workers", "0", "--device", "cpu"]
    assert call(evaluate, argv) == 0
    trained, evaluated = (
        json.loads((path / "result.json").read_text())["metrics"] for path in (run, tmp_path / "eval")
    )
    assert evaluated["kl"] > 1e-3
    assert {name: trained[name] for name in evaluated} == pytest.approx(evaluated, rel=1e-5)


def test_a_mistake_under_a_launcher_is_left_in_the_run_directory(
    arguments: Any, distill_settings: Any, tmp_path: Path, scripts: Any
) -> None:
    """The launcher changes the exit code and buries the line: the run directory keeps it."""
    settings = distill_settings | {"accumulate": 3}
    process = scripts.run("stage1_ssld/distill.py", *arguments(settings), ranks=2)
    assert process.returncode != 0
    error = json.loads((tmp_path / "run" / "error.json").read_text())
    assert error["exit_code"] == 2
    assert error["error"] == "batch_size: 8 is not a multiple of 2 processes x accumulate 3"


def test_checkpoints_of_two_ranks_and_of_one_go_on_with_the_other(
    arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, scripts: Any, tiny: Any
) -> None:
    """Weighted streams: four steps on two ranks and four on one, and the other way round, equal eight on one."""
    sources = [{"path": str(tiny.parquet), "weight": 3}, {"path": str(tiny.unlabeled), "weight": 1}]
    settings = distill_settings | {"data": {"train": sources, "streaming": True, "image_size": 32}, "save_every": 2}
    settings |= {"optim": {"lr": 0.05, "reference_batch": 8}, "keep_checkpoints": 9}
    with in_float64():
        assert call(distill, arguments(settings | {"steps": 8}, "whole")) == 0
    expected = read_tensors(tmp_path / "whole" / "student.safetensors")
    # A run of eight steps that stopped after four: its later checkpoints and its result are taken away.
    for first, second in ((2, 1), (1, 2)):
        name = f"first{first}"
        for ranks in (first, second):
            words = arguments(settings | {"steps": 8}, name)
            if ranks == 2:
                process = scripts.run("tests/float64.py", "stage1_ssld/distill.py", *words, ranks=2)
                assert process.returncode == 0, process.stderr
            else:
                with in_float64():
                    assert call(distill, words) == 0
            run = tmp_path / name
            if ranks == first:
                for later in ("step_00000006", "step_00000008"):
                    shutil.rmtree(run / "checkpoints" / later)
                (run / "result.json").unlink()
        assert "resumed from step_00000004" in (run / "log.txt").read_text()
        for tensor_name, tensor in read_tensors(run / "student.safetensors").items():
            torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-9, atol=1e-12)
