"""Real processes of stage 2: killed at several moments, stopped, and split over two ranks."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ssld.shared.files import file_sha256
from ssld.shared.models.model_file import read_metadata, read_tensors, save_model_file
from ssld.stage2_detect import evaluate, train

pytestmark = pytest.mark.slow

TRAIN = "stage2_detect/train.py"


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the process did not get that far"
        time.sleep(0.002)


def test_killed_and_stopped_runs_resume_to_the_same_bits(
    train_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    scripts: Any,
    tmp_path: Path,
    metrics_of: Callable[[Path], Any],
) -> None:
    settings = train_settings | {"steps": 40, "save_every": 5, "workers": 1, "unit_scale": True}
    assert scripts.run(TRAIN, *arguments(settings, "whole")).returncode == 0
    argv = arguments(settings, "killed")
    run = tmp_path / "killed"

    process = scripts.start(TRAIN, *argv)  # before the first checkpoint
    wait_for(lambda: (run / "metrics.jsonl").exists())
    process.kill()
    process.communicate()

    process = scripts.start(TRAIN, *argv)  # while a checkpoint is being written, or just after
    wait_for(
        lambda: any((run / "checkpoints").glob(".writing_00000010")) or (run / "checkpoints" / "step_00000010").exists()
    )
    process.kill()
    process.communicate()

    process = scripts.start(TRAIN, *argv)  # a polite stop in the middle
    wait_for(lambda: (run / "checkpoints" / "step_00000020" / "COMPLETE").exists())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 143, err
    assert "the same command goes on from there" in err
    assert not (run / "result.json").exists()

    assert scripts.run(TRAIN, *argv).returncode == 0
    assert "resumed from step_" in (run / "log.txt").read_text()
    # Metadata names the run's folder, so the weights are compared by their content.
    outputs = [json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("whole", "killed")]
    assert outputs[0] == outputs[1]
    whole, killed = (load_file(tmp_path / name / "detector.safetensors") for name in ("whole", "killed"))
    assert all(whole[name].equal(killed[name]) for name in whole)
    assert metrics_of(tmp_path / "whole") == metrics_of(run)
    optimizer = "checkpoints/step_00000040/optimizer.safetensors"
    assert file_sha256(tmp_path / "whole" / optimizer) == file_sha256(run / optimizer)


def test_two_ranks_train_as_one(train_settings: dict[str, Any], on_one_and_two: Callable[..., Any]) -> None:
    settings = train_settings | {"steps": 5, "unit_scale": True}
    assert settings["model"].get("freeze_norm", True)
    _, lines = on_one_and_two(train.main, TRAIN, settings)
    assert sum("loss_rpn_cls" in line for line in lines) == 5


def test_two_ranks_evaluate_as_one(
    train_settings: dict[str, Any], detector_file: Path, scripts: Any, call: Callable[..., int], tmp_path: Path
) -> None:
    """A detector with detections in every image, so that lost or repeated images, or detections of another rank, would show."""
    data = train_settings["data"]
    metadata = read_metadata(detector_file, kind="detector")
    dense = metadata["model"]["dense"] | {"score_threshold": 0.0}
    unsure = tmp_path / "unsure.safetensors"
    save_model_file(unsure, read_tensors(detector_file), metadata | {"model": metadata["model"] | {"dense": dense}})
    flags = ["--model", str(unsure), "--workers", "0", "--device", "cpu"]
    flags += ["--annotations", data["val_annotations"], "--images", data["val_images"], "--threads", "1"]
    flags += ["--batch_size", "2"]  # 5 images: batches of 2, 2 and 1 for two ranks
    assert call(evaluate.main, [*flags, "--output", str(tmp_path / "one")]) == 0
    line = ["stage2_detect/evaluate.py", *flags, "--output", str(tmp_path / "two")]
    done = scripts.run(*line, ranks=2, new_python=True)
    assert done.returncode == 0, done.stderr

    runs = (tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((run / "result.json").read_text())["metrics"] for run in runs)
    assert two.pop("orientation") == one.pop("orientation")
    assert one["AP"] > 0
    assert one["AP50"] > 0.1
    for key in [key for key, value in one.items() if isinstance(value, dict)]:
        numbers, expected = two.pop(key), one.pop(key)
        assert numbers.keys() == expected.keys()
        for name, value in expected.items():
            assert numbers[name] == pytest.approx(value, abs=1e-6)
    confusions = [json.loads((run / "analysis.json").read_text())["confusions"] for run in runs]
    assert confusions[0] == confusions[1]
    assert two == pytest.approx(one, abs=1e-6)
    # The ranks' images follow each other; within an image the order is that of the scores.
    rows, others = (
        sorted(json.loads((run / "detections.json").read_text()), key=lambda row: row["image_id"]) for run in runs
    )
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in others]
    assert {row["image_id"] for row in rows} == {f"val-{number}" for number in range(5)}
    assert len({json.dumps(row) for row in others}) == len(others), "an image was counted twice"
    for row, other in zip(rows, others, strict=True):
        assert other["category_id"] == row["category_id"]
        assert other["score"] == pytest.approx(row["score"], abs=1e-4)
        # Rounded to three decimals in the file: a difference in the last bit can show as one of the last decimal.
        assert other["bbox"] == pytest.approx(row["bbox"], abs=1.1e-3)
