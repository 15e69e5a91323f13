"""Small detectors of every kind, a batch for them, and the two works whose waits are counted: on a simulated GPU here, on a real one by
benchmarks/gpu.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.distill_config import ADLConfig, LDConfig
from ssld.stage2_detect.distillation.dense import DistilledDense
from ssld.stage2_detect.distillation.rcnn import DistilledRCNN
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.build import Detector, build_detector
from ssld.stage2_detect.models.mask_targets import ImageMasks

CLASSES, HEIGHT, WIDTH = ("disc", "ring", "stripes"), 64, 96
_SMALL: dict[str, Any] = {
    "fpn_channels": 16,
    "rpn": {
        "anchor_sizes": [8, 16, 32, 64, 128],
        "samples_per_image": 32,
        "post_nms_top_n_train": 40,
        "post_nms_top_n_test": 30,
    },
    "roi": {"hidden": 32, "samples_per_image": 24},
    "mask": {"hidden": 8, "convolutions": 1},
    "dense": {"convolutions": 1, "score_threshold": 0.0, "candidates": 50},
}
# name -> settings beside the small ones
_OWN: dict[str, dict[str, Any]] = {
    "faster_rcnn": {},
    "cascade_rcnn": {},
    "mask_rcnn": {},
    "cascade_mask_rcnn": {},
    "pss_det": {
        "kind": "faster_rcnn",
        "dcn_strides": [8, 16, 32],
        "roi": _SMALL["roi"] | {"sampling": "libra", "box_loss": {"name": "ciou", "weight": 10}},
    },
    "soft_nms": {"kind": "faster_rcnn", "roi": _SMALL["roi"] | {"nms": {"kind": "soft_gaussian"}}},
    "retinanet": {},
    "gfl": {},
}
TAUGHT = {"pkd": "faster_rcnn", "ld": "gfl", "adl": "retinanet"}
"""distillations, and the kind of student and teacher"""
KINDS = [*_OWN, *TAUGHT]


def detector(kind: str, seed: int = 0) -> Detector:
    """A detector with random weights."""
    torch.manual_seed(seed)
    config = DetectorConfig.model_validate({"kind": kind} | _SMALL | _OWN[kind])
    body = timm.create_model("test_resnet", features_only=True)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.25,) * 3)
    return build_detector(config, classes=len(CLASSES), body=body, arch="test_resnet", inputs=inputs)


def in_training(kind: str, device: str) -> nn.Module:
    """A detector that trains, under a teacher where its kind is a distillation."""
    if kind not in TAUGHT:
        return detector(kind).to(device).train()
    student: Any = detector(TAUGHT[kind])
    teacher = FrozenDetector(detector(TAUGHT[kind], seed=1).to(device))
    if kind == "pkd":
        return DistilledRCNN(student, teacher).to(device).train()
    terms = LDConfig(kd_vlr_weight=1.0) if kind == "ld" else ADLConfig()
    return DistilledDense(student, teacher, terms).to(device).train()


def for_prediction(kind: str, device: str) -> LoadedDetector:
    """A detector as it comes out of its file."""
    sizes = ResizeConfig(train_short_sides=[HEIGHT], train_long_side=WIDTH, short_side=HEIGHT, long_side=WIDTH)
    model = detector(kind).to(device).eval()
    return LoadedDetector(model, CLASSES, tuple(range(len(CLASSES))), sizes, {})


def batch(images: int, device: str) -> tuple[ImageBatch, Targets]:
    """Noise, and two objects with their shapes on each image; the second image is smaller than the canvas."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, HEIGHT, WIDTH), generator=draw, dtype=torch.uint8)
    sizes = torch.tensor([[HEIGHT, WIDTH] if number != 1 else [HEIGHT - 4, WIDTH - 14] for number in range(images)])
    corners = torch.rand(images, 2, 2, generator=draw) * 30
    boxes = torch.cat((corners, corners + 8 + torch.rand(images, 2, 2, generator=draw) * 22), dim=-1)
    polygons = [[[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in one] for one in boxes.tolist()]
    targets = Targets(
        boxes,
        torch.randint(0, len(CLASSES), (images, 2), generator=draw),
        torch.arange(images) + 3,
        masks=tuple(ImageMasks(tuple(shapes)) for shapes in polygons),
    )
    batch = ImageBatch(pixels, sizes, torch.ones(images), sizes)
    return batch.to(device), targets.to(device)


def photos(images: int) -> list[np.ndarray]:
    """Noise as uint8 [HEIGHT, WIDTH, 3]."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(images)]


def training_step(kind: str, images: int, device: str) -> Callable[[], None]:
    """A step as the training loop takes it; the batch is on the device already."""
    model, given = in_training(kind, device), batch(images, device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def step() -> None:
        losses: dict[str, Tensor] = model(*given)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prediction(kind: str, images: int, device: str) -> Callable[[], None]:
    """From images in memory to objects on the host, in one batch."""
    loaded, given = for_prediction(kind, device), photos(images)
    return lambda: _predict(loaded, given)


def _predict(loaded: LoadedDetector, given: list[np.ndarray]) -> None:
    assert all(len(found) for found in loaded.predict(given, score_threshold=0.0, batch_size=len(given)))
