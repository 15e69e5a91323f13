"""Numbers in place of null, which depend on the kind of detector and the length of the run."""

from typing import Any

import pytest

from ssld.stage2_detect.config import TrainConfig

BASE = {
    "output": "run",
    "backbone": "random:resnet18",
    "data": {"train_annotations": "a.json", "train_images": "a"},
    "optim": {"lr": 0.01, "reference_batch": 16},
    "batch_size": 8,
    "steps": 200,
    "save_every": 0.25,
}


@pytest.mark.parametrize(("kind", "weight", "threshold"), [("faster_rcnn", 1.0, 0.7), ("gfl", 0.25, 0.3)])
def test_a_moving_teacher(kind: str, weight: float, threshold: float) -> None:
    settings: Any = BASE | {"model": {"kind": kind}, "moving_teacher": {"unlabeled": "more", "burn_in": 0.1}}
    moving = TrainConfig(**settings).in_steps(200).moving_teacher
    assert moving is not None
    assert (moving.burn_in, moving.weight, moving.score_threshold) == (20, weight, threshold)
    settings["moving_teacher"] |= {"weight": 0.5, "score_threshold": 0.4}
    moving = TrainConfig(**settings).in_steps(200).moving_teacher
    assert moving is not None
    assert (moving.weight, moving.score_threshold) == (0.5, 0.4)


@pytest.mark.parametrize(("kind", "pkd", "roi"), [("cascade_rcnn", 6.0, 1.0), ("retinanet", 0.0, 0.0)])
def test_a_teacher(kind: str, pkd: float, roi: float) -> None:
    settings: Any = BASE | {"model": {"kind": kind}, "distill": {"teacher": "teacher.safetensors"}}
    config = TrainConfig(**settings).in_steps(200)
    assert config.distill is not None
    assert (config.distill.pkd_weight, config.distill.roi_weight, config.save_every) == (pkd, roi, 50)
    settings["distill"]["pkd_weight"] = 2.0
    config = TrainConfig(**settings).in_steps(200)
    assert config.distill is not None
    assert config.distill.pkd_weight == 2.0
