"""Waits of the host for a GPU in a training step: only where what is done next depends on values, and each once for the whole batch."""

import collections
import traceback
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.distill_config import ADLConfig, LDConfig
from ssld.stage2_detect.distillation.dense import DistilledDense
from ssld.stage2_detect.distillation.rcnn import DistilledRCNN
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import kernels, rpn
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.mask_targets import ImageMasks

ROOT = Path(__file__).resolve().parents[3]
SHAPE = [[[5.0, 5.0, 30.0, 5.0, 30.0, 30.0, 5.0, 30.0]]]
B = 4
# NMS ends when a round changes nothing; masks are rasterized on the host.
NMS_ALONE = {"nms.py": 1}
WAITS = {
    "faster_rcnn": NMS_ALONE,
    "pss_det": NMS_ALONE,
    "cascade_rcnn": NMS_ALONE,
    "mask_rcnn": {"nms.py": 1, "mask_head.py": 1},
    "retinanet": {},
    "gfl": {},
    "faster_rcnn under pkd": NMS_ALONE,
    "gfl under ld": {},
    "retinanet under adl": {},
}
PSS_DET = {"box_loss": {"name": "ciou", "weight": 10.0}, "sampling": "libra"}


class Waits(TorchDispatchMode):
    """Counts, by file of the project, the operations whose result's size or value the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.by_file: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("aten::index"):  # the size of the result is known, unless the indices are truth values
            indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
            waits = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices)
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if waits or name == "torchvision::nms":
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        files = [Path(frame.filename).resolve() for frame in traceback.extract_stack()]
        own = [file.name for file in files if file.is_relative_to(ROOT / "stage2_detect")]
        if own:  # else it is the backward pass of an operation that is counted already
            self.by_file[own[-1]] += 1


def detector(kind: str, device: str = "cpu") -> nn.Module:
    """A detector of a kind, or such a student under a teacher of its own kind on `device`."""
    own_kind, _, terms = kind.partition(" under ")
    student = plain_detector(own_kind)
    if not terms:
        return student
    teacher = FrozenDetector(plain_detector(own_kind).to(device))
    if terms == "pkd":
        return DistilledRCNN(student, teacher).train()
    config = ADLConfig() if terms == "adl" else LDConfig(imitation_weight=1.0, imitated_cells="gi")
    return DistilledDense(student, teacher, config, pkd_weight=1.0).train()


def plain_detector(kind: str) -> Any:
    torch.manual_seed(0)
    settings = {
        "kind": "faster_rcnn" if kind == "pss_det" else kind,
        "fpn_channels": 16,
        "roi": {"hidden": 32, "samples_per_image": 24, **(PSS_DET if kind == "pss_det" else {})},
        "rpn": {"post_nms_top_n_train": 40, "anchor_sizes": [8, 16, 32, 64, 128]},
        "mask": {"hidden": 8},
        "dense": {"convolutions": 1},
        "dcn_strides": [16] if kind == "pss_det" else [],
    }
    body = timm.create_model("test_resnet", features_only=True)
    inputs = InputSettings.of_detector((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    config = DetectorConfig.model_validate(settings)
    return build_detector(config, classes=3, body=body, arch="test_resnet", inputs=inputs).train()


def batch() -> tuple[ImageBatch, Targets]:
    pixels = torch.randint(0, 256, (B, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([[64, 64], [60, 50]] * 2), torch.ones(B))
    objects = torch.tensor([[[5.0, 5, 30, 30]], [[10, 10, 40, 40]]]).repeat(2, 1, 1)
    shapes = tuple(ImageMasks(tuple(SHAPE)) for _ in range(B))
    return images, Targets(objects, torch.tensor([[1], [2]] * 2), torch.arange(B), masks=shapes)


def step(model: nn.Module, images: ImageBatch, targets: Targets, optimizer: torch.optim.Optimizer) -> None:
    torch.stack(list(model(images, targets).values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", WAITS)
def test_waits_of_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_host", lambda tensor: False)  # as on a GPU
    model, (images, targets) = detector(kind), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with Waits() as waits, monkeypatch.context() as patch:
        copy = torch.Tensor.cpu

        def cpu(tensor: torch.Tensor) -> torch.Tensor:
            waits.note()
            return copy(tensor)

        patch.setattr(torch.Tensor, "cpu", cpu)
        step(model, images, targets, optimizer)
    assert waits.by_file == WAITS[kind]


@pytest.mark.parametrize("kind", ["pss_det", "gfl"])
def test_no_product_along_a_dimension_is_differentiated(kind: str) -> None:
    """The backward pass of `prod` asks for the number of zeros inside C++, where no dispatch mode sees that the host waits."""
    model, (images, targets) = detector(kind), batch()
    losses = torch.stack(list(model(images, targets).values())).sum()
    waiting: list[Any] = [losses.grad_fn]
    nodes: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    kinds = {node.name() for node in nodes}
    assert "MulBackward0" in kinds
    assert not any(name.startswith("ProdBackward") for name in kinds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [kind for kind in WAITS if kind != "mask_rcnn"])
def test_cuda_sees_no_other_wait(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, targets) = detector(kind, "cuda").cuda(), batch()
    images, targets = images.to("cuda"), targets.to("cuda")
    nms_masks = rpn.nms_masks

    def watched(*arguments: Any) -> list[torch.Tensor]:
        torch.cuda.set_sync_debug_mode("default")
        kept = nms_masks(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        return kept

    monkeypatch.setattr(rpn, "nms_masks", watched)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step(model, images, targets, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, images, targets, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
