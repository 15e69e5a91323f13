"""Settings of detectors that do not go together, or that nothing reads."""

import pytest

from ssld.shared.config.validation import validate
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import Stage2OptimConfig
from ssld.stage2_detect.model_config import DetectorConfig


def test_ious_of_the_proposals_are_in_order() -> None:
    with pytest.raises(UserError, match=r"rpn: negative_iou 0.8 is above positive_iou 0.7"):
        validate(DetectorConfig, {"rpn": {"negative_iou": 0.8}}, source="c")
    assert validate(DetectorConfig, {"rpn": {"negative_iou": 0.7}}, source="c").rpn.negative_iou == 0.7


def test_milestones_come_one_after_the_other() -> None:
    common = {"lr": 1, "reference_batch": 1}
    for name in ("epochs", "steps"):
        with pytest.raises(UserError, match=rf"milestones_{name}: have to be in ascending order, but are \[8"):
            validate(Stage2OptimConfig, common | {f"milestones_{name}": [8, 5]}, source="c")
    assert validate(Stage2OptimConfig, common | {"milestones_steps": [5, 8]}, source="c").milestones(9, 10) == [5, 8]


def test_settings_of_other_kinds_of_detectors_are_told() -> None:
    groups = {
        "rpn": {"samples_per_image": 9},
        "cascade": {"score_rois": "last"},
        "mask": {"hidden": 8},
        "dense": {"convolutions": 1},
    }
    groups |= {"gfl": {"reg_max": 8}, "retinanet": {"gamma": 1.0}, "roi": {}}
    for kind, unread in (
        ("faster_rcnn", ["cascade", "mask", "dense", "gfl", "retinanet"]),
        ("cascade_mask_rcnn", ["dense", "gfl", "retinanet"]),
        ("gfl", ["rpn", "cascade", "mask", "retinanet"]),
    ):
        assert DetectorConfig.model_validate(groups | {"kind": kind}).unread == unread
        assert DetectorConfig.model_validate({"kind": kind}).unread == []
