"""Marks of training images: an evaluation on the same images says so, whatever they are called."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import evaluate
from ssld.stage2_detect.data import trained_images
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.trained_images import images_with_marks, marks_of


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
