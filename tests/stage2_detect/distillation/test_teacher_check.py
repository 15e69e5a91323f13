"""Whether the teacher is better than its student, on the same images."""

from typing import Any

import pytest
import torch

from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.distill_config import DistillConfig
from ssld.stage2_detect.distillation.teacher import FrozenDetector, TeacherCheck
from ssld.stage2_detect.models.batch import Detections
from tests.stage2_detect.conftest import TinyCoco


@pytest.fixture
def data(tiny_coco: TinyCoco) -> CocoData:
    return read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=False)


def detections_of(data: CocoData, *, right: bool) -> dict[Any, Detections]:
    """Every object, in its place or far outside of every image."""
    shift = 0.0 if right else 10_000.0
    return {
        one.image_id: Detections(
            torch.from_numpy(one.boxes_N4) + shift, torch.ones(len(one.labels_N)), torch.from_numpy(one.labels_N)
        )
        for one in data.images
    }


def check_of(data: CocoData, teacher_ap: float | None, images: int) -> TeacherCheck:
    config = DistillConfig(teacher="teacher.safetensors", check_images=images)
    check = TeacherCheck(FrozenDetector.__new__(FrozenDetector), data, Sizing(64, 64), config)
    check.__dict__["_ap"] = teacher_ap
    check._teacher.__dict__["facts"] = {"file": "t"}
    return check


def test_a_student_that_has_reached_its_teacher_is_told_once(data: CocoData) -> None:
    check = check_of(data, 0.5, 2)
    assert check.beside(detections_of(data, right=False)) is None
    warning = check.beside(detections_of(data, right=True))
    assert warning
    assert warning.startswith(
        f"warning: the teacher is no better than its student: AP 50.00 against 100.00 on 2 images of {data.file}; "
    )
    assert check.beside(detections_of(data, right=True)) is None


def test_only_the_images_that_the_teacher_saw_count(data: CocoData) -> None:
    """The first image right, all others wrong: 100 on a slice of that image alone, less on all."""
    mixed = detections_of(data, right=False) | {
        data.images[0].image_id: detections_of(data, right=True)[data.images[0].image_id]
    }
    assert check_of(data, 0.999, 1).beside(mixed)
    assert check_of(data, 0.999, len(data.images)).beside(mixed) is None


def test_images_without_objects_check_no_teacher(data: CocoData) -> None:
    check = check_of(data, None, 2)
    assert check.before_training() == f"teacher t: not checked: no objects in 2 images of {data.file}"
    assert check.beside(detections_of(data, right=True)) is None
