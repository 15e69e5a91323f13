"""Synchronizations of a training step with a GPU: only where a shape depends on the network's output and cannot be padded."""

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import boxes, kernels
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.mask_targets import ImageMasks

ROOT = Path(__file__).resolve().parents[3]
SHAPE = [[[5.0, 5.0, 30.0, 5.0, 30.0, 30.0, 5.0, 30.0]]]
# Two fill the shapes of masks in on the host. GFL's box losses are of its positives alone, a few of many thousand places.
WAITS = {
    "faster_rcnn": {"boxes.py": {"torchvision::nms"}},
    "cascade_rcnn": {"boxes.py": {"torchvision::nms"}},
    "mask_rcnn": {"boxes.py": {"torchvision::nms"}, "mask_head.py": {"aten::_local_scalar_dense", "aten::nonzero"}},
    "retinanet": {},
    "gfl": {"gfl.py": {"aten::index", "aten::index_put_"}},
}


class Waits(TorchDispatchMode):
    """Record of operations whose result's size or value the host has to know, by the file of this project that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_file: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(
            "aten::index"
        ):  # indexing by positions has a known size, by a bool mask a size that depends on its values
            indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
            waits = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices)
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if waits or name == "torchvision::nms":
            files = [Path(frame.filename).resolve() for frame in traceback.extract_stack()]
            own_files = [file.name for file in files if file.is_relative_to(ROOT / "stage2_detect")]
            if own_files:  # otherwise the backward pass of an operation that is recorded already
                self.by_file.setdefault(own_files[-1], set()).add(name)
        return func(*args, **(kwargs or {}))


def detector(kind: str) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "kind": kind,
        "fpn_channels": 16,
        "roi": {"hidden": 32, "samples_per_image": 24, "sampling": "libra"},
        "rpn": {"post_nms_top_n_train": 40, "anchor_sizes": [8, 16, 32, 64, 128]},
        "mask": {"hidden": 8},
        "dense": {"convolutions": 1},
    }
    body = timm.create_model("test_resnet", features_only=True)
    inputs = InputSettings((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (0, 0), "bilinear", False)
    config = DetectorConfig.model_validate(settings)
    return build_detector(config, classes=3, body=body, arch="test_resnet", inputs=inputs).train()


def batch() -> tuple[ImageBatch, Targets]:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([[64, 64], [60, 50]]), torch.ones(2))
    objects = torch.tensor([[[5.0, 5, 30, 30]], [[10, 10, 40, 40]]])
    shapes = tuple(ImageMasks(tuple(SHAPE), 64, 64) for _ in range(2))
    return images, Targets(objects, torch.tensor([[1], [2]]), torch.tensor([3, 4]), masks=shapes)


def step(model: nn.Module, images: ImageBatch, targets: Targets, optimizer: torch.optim.Optimizer) -> None:
    torch.stack(list(model(images, targets).values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """NMS in this thread, which is the one that is watched."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", WAITS)
def test_a_step_waits_for_nms_alone(kind: str, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_host", lambda tensor: False)  # as on a GPU
    model, (images, targets) = detector(kind), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step(model, images, targets, optimizer)  # anchors are made once
    with Waits() as noted:
        step(model, images, targets, optimizer)
    assert noted.by_file == WAITS[kind]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to wait for")
@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn", "retinanet"])
def test_cuda_sees_no_other_wait(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, targets) = detector(kind).cuda(), batch()
    images, targets = images.to("cuda"), targets.to("cuda")
    torchvisions = boxes.nms

    def nms(*arguments: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        kept: torch.Tensor = torchvisions(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        return kept

    monkeypatch.setattr(boxes, "nms", nms)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step(model, images, targets, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, images, targets, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
