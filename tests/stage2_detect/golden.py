"""R-CNN detectors against the numbers of PaddleDetection@666f597f for the same weights and images, end to end: what the tests of each share.

Where the numbers come from stands in tests/golden/README.md. A detector is built from its recipe with what the reference overrode, gets its weights
through the project's converter, and everything is compared on our own tensors from the images on; no tensor of the reference is fed into a later
stage.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.ops import roi_align

from ssld.shared.config.settings import parse_config
from ssld.shared.models.backbones import InputSettings
from ssld.shared.models.paddle_weights import LEAVES, to_torch
from ssld.stage2_detect.config import ConvertPaddleConfig
from ssld.stage2_detect.convert_paddle import module_of
from ssld.stage2_detect.models import pooling
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.rcnn import RCNN

FOLDER = Path(__file__).parents[1] / "golden"
RECIPES = Path(__file__).parents[2] / "stage2_detect" / "configs"
RECIPE = {
    "faster": "faster_rcnn_r50vd_ssld_1x.yaml",
    "mask": "mask_rcnn_r50vd_ssld_1x.yaml",
    "cascade": "cascade_rcnn_r50vd_ssld_1x.yaml",
    "cascade_mask": "cascade_mask_rcnn_r50vd_ssld_1x.yaml",
    "pss_det": "pss_faster_dcn_r50vd.yaml",
}
# As "overrides" in the json files: every anchor and every RoI is in the losses.
OVERRIDES = {
    "rpn.samples_per_image": 100_000,
    "rpn.sampling": "first",
    "roi.samples_per_image": 4096,
    "roi.positive_fraction": 1.0,
    "roi.sampling": "first",
}
# Ours -> the reference's.
LOSSES = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_box": "loss_rpn_reg"}
BOX_LOSSES = {"loss_cls": "loss_bbox_cls", "loss_box": "loss_bbox_reg"}
STAGE_LOSSES = {
    f"{name}_{stage}": f"{reference}_stage{stage}" for name, reference in BOX_LOSSES.items() for stage in range(3)
}


def read(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the numbers and their description in the json file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file), json.loads((FOLDER / f"{name}.json").read_text())


def build(name: str, **settings: object) -> RCNN:
    """The recipe's detector, overridden as the reference was and by `settings` (`__` for a dot), with the reference's weights."""
    flags = ["--config", str(RECIPES / RECIPE[name]), "--weights", "none"]
    for key, value in (OVERRIDES | {key.replace("__", "."): value for key, value in settings.items()}).items():
        flags += [f"--model.{key}", str(value)]
    config = parse_config(ConvertPaddleConfig, flags, program="golden.py").model
    inputs = InputSettings.of_detector(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    body = timm.create_model("resnet50d", features_only=True, pretrained=False)
    model = build_detector(config, classes=80, body=body, arch="resnet50d", inputs=inputs)
    assert isinstance(model, RCNN)
    model.load_state_dict(_weights(name))
    return model


def our_name(name: str, *, deep_stem: bool = True) -> str | None:
    """Our name of one of the reference's parameters, None for one that the converter does not know; `deep_stem` as of `module_of`."""
    layer, _, leaf = name.rpartition(".")
    module = module_of(layer, deep_stem=deep_stem)
    return f"{module}.{LEAVES[leaf]}" if module and leaf in LEAVES else None


def by_rule(shapes: Mapping[str, list[int]], salt: int) -> dict[str, np.ndarray]:
    """The reference's weights under its names."""
    spec = importlib.util.spec_from_file_location("reference_weights", FOLDER / "reference_weights.py")
    assert spec is not None
    assert spec.loader is not None
    rule: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    return {parameter: rule.reference_weight(parameter, shape, salt) for parameter, shape in shapes.items()}


def _weights(name: str) -> dict[str, Tensor]:
    _, about = read(name)
    arrays = by_rule(about["parameters"], about["salt"])
    modules = {layer: module_of(layer) for layer in (parameter.rpartition(".")[0] for parameter in arrays)}
    assert None not in modules.values()
    return to_torch(arrays, modules, name)  # type: ignore[arg-type]


def inputs(golden: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> tuple[ImageBatch, Targets]:
    """The batch and its objects, without masks."""
    B = len(about["sizes"])
    pixels = torch.zeros(B, 3, *about["padded"], dtype=torch.uint8)
    most = max(len(golden[f"input.labels{i}"]) for i in range(B))
    boxes, labels = torch.zeros(B, most, 4), torch.full((B, most), -1)
    for i, (height, width) in enumerate(about["sizes"]):
        pixels[i, :, :height, :width] = torch.from_numpy(golden[f"input.image{i}"])
        count = len(golden[f"input.labels{i}"])
        boxes[i, :count] = torch.from_numpy(golden[f"input.boxes{i}"])
        labels[i, :count] = torch.from_numpy(golden[f"input.labels{i}"])
    images = ImageBatch(pixels, torch.tensor(about["sizes"]), torch.tensor(about["scale_factor"]))
    return images, Targets(boxes, labels, torch.zeros(B, dtype=torch.int64))


def _roi_align_as_reference(feature: Tensor, rois: Tensor, size: int, scale: float, **options: Any) -> Tensor:
    """The same values, with the gradient of PaddlePaddle's CPU kernel.

    That kernel (paddle/phi/kernels/cpu/roi_align_grad_kernel.cc at 03c243c4) widens RoIs to one cell of the map in the backward pass, and not in the
    forward pass; RoIs below 4 px then give other gradients, by up to 1.3e-3 in the norms of the backbone. Ours are the true ones
    (test_roi_pooling.py), so they are compared with the reference's fault put in.
    """
    sides = (rois[:, 3:] - rois[:, 1:3]).clamp(min=1 / scale)
    widened = torch.cat((rois[:, :3], rois[:, 1:3] + sides), dim=1)
    value = roi_align(feature.detach(), rois, size, scale, **options)
    slope = roi_align(feature, widened, size, scale, **options)
    return value + (slope - slope.detach())


def run(model: RCNN, name: str, targets: Targets | None = None) -> SimpleNamespace:
    """One evaluation and one training step, with everything that is looked at.

    Args:
        targets: in place of those of `inputs`, where masks belong to them.
    """
    golden, about = read(name)
    images, boxes_only = inputs(golden, about)
    detected: dict[str, list] = {"body": [], "pyramid": [], "rpn": [], "maps": []}
    model.pyramid.body.register_forward_hook(
        lambda _module, _args, out: detected["body"].append([t.detach() for t in out])
    )
    model.pyramid.register_forward_hook(
        lambda _module, _args, out: detected["pyramid"].append([t.detach() for t in out])
    )
    model.rpn.register_forward_hook(lambda _module, _args, out: detected["rpn"].append(out[0]))
    model.rpn.head.register_forward_hook(lambda _module, _args, out: detected["maps"].append([t.detach() for t in out]))
    model.eval()
    detections = model(images)
    model.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "roi_align", _roi_align_as_reference)
        losses = model(images, targets or boxes_only)
    sum(losses.values()).backward()
    return SimpleNamespace(golden=golden, about=about, model=model, detections=detections, losses=losses, **detected)


def close(actual: Tensor, reference: np.ndarray, relative: float) -> None:
    """Largest difference relative to the reference's largest value."""
    difference = (actual - torch.from_numpy(reference)).abs().max() / np.abs(reference).max()
    assert difference < relative


def same_set(actual: np.ndarray, reference: np.ndarray, tolerance: float) -> list[int]:
    """Every row has its own counterpart in the other set within `tolerance` in every column; returns their numbers."""
    assert actual.shape == reference.shape
    difference = np.abs(actual[:, None] - reference[None]).max(axis=2)
    counterparts: list[int] = []
    for row in difference:
        # The nearest that is left: rows of one set may lie closer together than the tolerance.
        row[counterparts] = np.inf
        counterparts.append(int(row.argmin()))
        assert row[counterparts[-1]] < tolerance
    return counterparts


def check_features(run: SimpleNamespace) -> None:
    """Backbone and pyramid, to 1e-5."""
    for level, index in zip("2345", run.model.pyramid.level_indices, strict=True):
        close(run.body[0][index][:, :8, ::3, ::3], run.golden[f"feature.C{level}.probe"], 1e-5)
    for level, feature in zip("23456", run.pyramid[0], strict=True):
        close(feature[:, :8, ::2, ::2], run.golden[f"feature.P{level}.probe"], 1e-5)


def check_rpn_maps(run: SimpleNamespace) -> None:
    """Objectness and deltas of every level, to 1e-5."""
    for level in range(5):
        logits, deltas = run.maps[level]
        close(logits, run.golden[f"rpn.score{level}"], 1e-5)
        close(deltas, run.golden[f"rpn.delta{level}"], 1e-5)


def check_proposals(run: SimpleNamespace, mode: str) -> None:
    """The same sets to 0.01 px; `mode` is test or train."""
    proposals = run.rpn[0 if mode == "test" else 1]
    for i in range(3):
        actual = proposals.boxes_BR4[i][proposals.valid_BR[i]]
        same_set(actual.numpy(), run.golden[f"{mode}.proposals{i}"], 0.01)


def check_losses(run: SimpleNamespace, names: Mapping[str, str]) -> None:
    """Each loss and their sum to 1e-4; `names` are those other than the RPN's, our name -> the reference's."""
    names = LOSSES | dict(names)
    assert set(run.losses) == set(names)
    assert {f"train.{name}" for name in (*names.values(), "loss")} == {
        k for k in run.golden if k.startswith("train.loss")
    }
    for actual, reference in names.items():
        assert run.losses[actual].item() == pytest.approx(run.golden[f"train.{reference}"].item(), rel=1e-4), actual
    assert sum(run.losses.values()).item() == pytest.approx(run.golden["train.loss"].item(), rel=1e-4)


def check_gradient_norms(run: SimpleNamespace, count: int) -> None:
    """To 1e-4; `count` is how many the file holds."""
    parameters = dict(run.model.named_parameters())
    checked = [key.removeprefix("grad_norm.") for key in run.golden if key.startswith("grad_norm.")]
    assert len(checked) == count
    for name in checked:
        gradient = parameters[our_name(name)].grad
        assert gradient is not None, name
        assert gradient.double().norm().item() == pytest.approx(run.golden[f"grad_norm.{name}"].item(), rel=1e-4), name


def check_frozen(run: SimpleNamespace) -> None:
    """Parameters that the reference freezes have no gradient, all others have one."""
    for name, parameter in run.model.named_parameters():
        frozen = name.startswith("pyramid.body.") and (
            name.startswith(("pyramid.body.conv1", "pyramid.body.layer1")) or ".bn" in name or ".downsample.2" in name
        )
        assert (parameter.grad is None) == frozen, name


def check_detections(run: SimpleNamespace) -> list[list[int]]:
    """The same sets to 0.01 px and 1e-4 in score; returns, image by image, the row of the reference that each detection equals."""
    ends = np.cumsum(run.golden["test.bbox_num"])
    counterparts = []
    for one, reference in zip(run.detections, np.split(run.golden["test.bbox"], ends[:-1]), strict=True):
        actual = torch.cat((one.labels_N[:, None], one.scores_N[:, None], one.boxes_N4), dim=1).numpy()
        # Labels are apart by 1, scores by what the classes differ in: weigh the columns so that one tolerance serves.
        weight = np.array([1, 100, 1, 1, 1, 1])
        counterparts.append(same_set(actual * weight, reference * weight, 0.01))
    return counterparts
