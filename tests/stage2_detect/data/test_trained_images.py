"""Marks of training images: an evaluation on the same images says so, whatever they are called."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssld.shared.errors import UserError
from ssld.shared.models.metadata import checked
from ssld.shared.models.model_file import read_metadata, read_tensors, save_model_file
from ssld.stage2_detect import evaluate
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data import trained_images
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.trained_images import images_with_marks, marks_of
from ssld.stage2_detect.training.trained_detector import TrainedDetector


def test_copies_are_recognized_and_other_images_are_not(tiny_coco: Any, tmp_path: Path, monkeypatch: Any) -> None:
    train = read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=True).images
    others = read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=False).images
    marks = marks_of(train)
    assert len(marks) == len(train)
    copied = replace(train[1], path=str(tmp_path / "renamed.bin"))
    shutil.copy(train[1].path, copied.path)
    same_size = replace(train[0], path=str(tmp_path / "same_size"))
    content = Path(train[0].path).read_bytes()
    Path(same_size.path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    gone = replace(train[2], path=str(tmp_path / "gone"))
    assert images_with_marks([*others, copied, same_size, gone], marks) == [copied.path]
    assert marks_of([gone]) == []
    monkeypatch.setattr(trained_images, "MOST", 2)
    assert set(marks_of(train)) < set(marks)
    assert len(marks_of(train)) == 2


def test_an_evaluation_on_training_images_says_so(
    detector_file: Path, tiny_coco: Any, call: Callable[..., int], tmp_path: Path
) -> None:
    assert len(read_metadata(detector_file)["trained_images"]) > 0

    def log(part: str) -> str:
        annotations, images = (getattr(tiny_coco, f"{part}_{what}") for what in ("annotations", "images"))
        flags = ["--model", detector_file, "--annotations", annotations, "--images", images]
        flags += ["--output", tmp_path / part, "--workers", "0", "--device", "cpu", "--threads", "1"]
        assert call(evaluate.main, [str(flag) for flag in flags]) == 0
        return (tmp_path / part / "log.txt").read_text()

    assert "warning: the scores are too good" not in log("val")
    images = len(read_coco(tiny_coco.train_annotations, tiny_coco.train_images, training=False).images)
    assert (
        f"too good: {images} of {images} evaluation images at least are images that the detector was trained on"
        in log("train")
    )


@pytest.mark.parametrize("marks", [5, "1-ab", [1], {"1-ab": 1}])
def test_marks_of_a_wrong_type_are_refused(marks: Any) -> None:
    with pytest.raises(UserError, match="trained_images"):
        checked({"kind": "detector", "trained_images": marks}, "d.safetensors")


@pytest.mark.parametrize("without", [{}, {"trained_images": None}])
def test_a_detector_without_marks_is_evaluated(
    without: dict[str, Any], detector_file: Path, tiny_coco: Any, call: Callable[..., int], tmp_path: Path
) -> None:
    metadata = {key: value for key, value in read_metadata(detector_file).items() if key != "trained_images"}
    save_model_file(tmp_path / "d.safetensors", read_tensors(detector_file), metadata | without)
    flags = ["--model", tmp_path / "d.safetensors", "--annotations", tiny_coco.train_annotations]
    flags += ["--images", tiny_coco.train_images, "--output", tmp_path / "run"]
    assert call(evaluate.main, [*map(str, flags), "--workers", "0", "--device", "cpu", "--threads", "1"]) == 0
    assert "too good" not in (tmp_path / "run" / "log.txt").read_text()


def test_a_detector_keeps_the_marks_of_the_detector_that_it_starts_from(
    detector_file: Path, train_settings: dict[str, Any], tiny_coco: Any, tmp_path: Path
) -> None:
    other = read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=True)
    settings = {key: value for key, value in train_settings.items() if key != "backbone"}
    settings |= {"output": str(tmp_path), "init": str(detector_file), "model": read_metadata(detector_file)["model"]}
    config = TrainConfig.model_validate(settings)
    TrainedDetector(config, other, device=torch.device("cpu")).save(tmp_path / "d.safetensors")
    earlier = read_metadata(detector_file)["trained_images"]
    assert read_metadata(tmp_path / "d.safetensors")["trained_images"] == sorted({*earlier, *marks_of(other.images)})
