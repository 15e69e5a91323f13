"""GFL, RetinaNet and LD against the numbers of PaddleDetection@666f597f for the same weights, images and logits.

Where they come from stands in tests/golden/README.md. The detectors are compared end to end on our own tensors; LD's losses, on given logits.
"""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ssld.stage2_detect.convert_paddle import module_of
from ssld.stage2_detect.distill_config import LDConfig
from ssld.stage2_detect.distillation import regions
from ssld.stage2_detect.distillation.ld import LD
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.dense import DenseDetector, HeadPass, grids_of
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.retinanet import RetinaNet

GOLDEN = Path(__file__).parents[2] / "golden"
B = 3


def read(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file), json.loads((GOLDEN / f"{name}.json").read_text())


def targets_of(golden: dict[str, np.ndarray], images: int) -> Targets:
    most = max(len(golden[f"input.labels{i}"]) for i in range(images))
    boxes, labels = torch.zeros(images, most, 4), torch.full((images, most), -1)
    for i in range(images):
        count = len(golden[f"input.labels{i}"])
        boxes[i, :count] = torch.from_numpy(golden[f"input.boxes{i}"])
        labels[i, :count] = torch.from_numpy(golden[f"input.labels{i}"])
    return Targets(boxes, labels, torch.zeros(images, dtype=torch.int64))


def our_name(name: str, layers_of_a_convolution: int) -> tuple[str, int | None]:
    """Return our parameter for one of the reference, and the level where ours covers all levels."""
    layer, leaf = name.rsplit(".", 1)
    leaf = {"_mean": "running_mean", "_variance": "running_var"}.get(leaf, leaf)
    if name.startswith("backbone."):
        return f"{module_of(layer, deep_stem=False)}.{leaf}", None
    if match := re.fullmatch(r"neck\.fpn_(inner_)?res(\d)_sum(?:_lateral)?", layer):
        return f"pyramid.fpn.{'inner' if match[1] else 'layer'}_blocks.{int(match[2]) - 3}.0.{leaf}", None
    if match := re.fullmatch(r"neck\.fpn_(\d)", layer):
        return f"pyramid.fpn.extra_blocks.p{match[1]}.{leaf}", None
    if match := re.fullmatch(r"head\.conv_feat\.fcos_head_(cls|reg)_tower_conv_(\d)(?:\.(conv|norm))?", layer):
        place = int(match[2]) * layers_of_a_convolution + (match[3] == "norm")
        return f"dense.head.{'class' if match[1] == 'cls' else 'box'}_tower.{place}.{leaf}", None
    if match := re.fullmatch(r"head\.p(\d)_feat\.scale_reg", name):
        return "dense.head.scales", int(match[1]) - 3
    part = {"gfl_head_cls": "logits", "gfl_head_reg": "boxes", "retina_cls": "logits", "retina_reg": "boxes"}
    return f"dense.head.{part[layer.removeprefix('head.')]}.{leaf}", None


def load_weights(model: DenseDetector, about: dict[str, Any], layers_of_a_convolution: int) -> None:
    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN / "reference_weights.py")
    assert spec is not None
    assert spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    weights: dict[str, Tensor] = {}
    scales = {}
    for name, shape in about["parameters"].items():
        weight = torch.from_numpy(rule.reference_weight(name, shape, about["salt"]))
        actual, level = our_name(name, layers_of_a_convolution)
        if level is None:
            weights[actual] = weight
        else:
            scales[level] = weight
    if scales:
        weights["dense.head.scales"] = torch.cat([scales[level] for level in sorted(scales)])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


@pytest.fixture(scope="module", params=["gfl", "retinanet"])
def run(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One evaluation and one training step of our model in the form that PaddleDetection has."""
    kind = request.param
    golden, about = read(kind)
    body = timm.create_model("resnet50", features_only=True, pretrained=False)
    pyramid = TimmPyramid(body, name="resnet50", freeze_stages=2, freeze_norm=True, p3_p7=True, relu_before_p7=True)
    dense: GFL | RetinaNet
    if kind == "gfl":
        dense = GFL(classes=80, tower_bias=True, unbiased_std=False, ignore_padding=False, weight_floor=1.0)
        options: dict[str, Any] = {"candidates": None, "score_threshold": 0.025, "nms_iou": 0.6}
    else:
        dense = RetinaNet(classes=80)
        options = {"score_threshold": 0.05, "nms_iou": 0.5}
    model = DenseDetector(
        pyramid=pyramid, dense=dense, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), clip_boxes=False, **options
    )
    layers = 3 if kind == "gfl" else 2
    load_weights(model, about, layers)
    pixels = torch.zeros(B, 3, *about["padded"], dtype=torch.uint8)
    for i, (height, width) in enumerate(about["sizes"]):
        pixels[i, :, :height, :width] = torch.from_numpy(golden[f"input.image{i}"])
    images = ImageBatch(pixels, torch.tensor(about["sizes"]), torch.tensor(about["scale_factor"]))
    targets = targets_of(golden, B)
    model.eval()
    with torch.no_grad():
        features, detections = model.features(images), model(images)
    model.train()
    losses = model(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    return SimpleNamespace(
        kind=kind, golden=golden, model=model, features=features, detections=detections, losses=losses,
        images=images, targets=targets, layers=layers,
    )  # fmt: skip


def test_pyramid_features(run: SimpleNamespace) -> None:
    for level, feature in enumerate(run.features, start=3):
        reference = run.golden[f"feature.P{level}.probe"]
        actual = feature[:, :8, ::2, ::2].numpy()
        assert np.abs(actual - reference).max() <= 1e-5 * np.abs(reference).max()


def test_detections_are_the_same_sets(run: SimpleNamespace) -> None:
    start = 0
    for detections, count in zip(run.detections, run.golden["test.bbox_num"], strict=True):
        reference = run.golden["test.bbox"][start : start + count]
        start += count
        assert len(detections.scores_N) == count
        actual = torch.column_stack([detections.labels_N, detections.scores_N, detections.boxes_N4]).numpy()
        left = list(range(count))
        for label, score, *box in reference:
            same = [
                k
                for k in left
                if actual[k, 0] == label
                and abs(actual[k, 1] - score) < 1e-4
                and np.abs(actual[k, 2:] - box).max() < 0.01
            ]
            assert same, f"class {label}, score {score}, {box} is not among the detections"
            left.remove(same[0])


def test_losses(run: SimpleNamespace) -> None:
    reference = {"loss_cls": "loss_qfl", "loss_box": "loss_bbox", "loss_dfl": "loss_dfl"}
    if run.kind == "retinanet":
        reference = {"loss_cls": "loss_cls", "loss_box": "loss_reg"}
    assert {name: loss.item() for name, loss in run.losses.items()} == {
        actual: pytest.approx(run.golden[f"train.{name}"].item(), rel=1e-4) for actual, name in reference.items()
    }


def test_gradient_norms(run: SimpleNamespace) -> None:
    parameters = dict(run.model.named_parameters())
    compared = 0
    for key, norm in run.golden.items():
        if key.startswith("grad_norm."):
            name, level = our_name(key.removeprefix("grad_norm."), run.layers)
            gradient = parameters[name].grad
            assert gradient is not None
            part = gradient if level is None else gradient[level]
            # 4e-9 off without vector instructions, 1e-4 with AVX-512: a ReLU near zero lets a gradient through or not.
            assert part.double().norm().item() == pytest.approx(norm.item(), rel=1e-3), name
            compared += 1
    assert compared > 30


def test_targets_of_gfl(run: SimpleNamespace) -> None:
    if run.kind != "gfl":
        pytest.skip("the file of RetinaNet has no targets")
    grids = grids_of(run.features)
    assigned, _ = run.model.dense.assign(grids, run.images.sizes_B2, run.targets)
    positive_BA = assigned.labels_BA == 1
    counts = positive_BA.sum(dim=1).clamp(min=1)  # the reference counts an image without objects as one
    assert counts.tolist() == run.golden["target.pos_num"].tolist()
    labels_BA = torch.where(positive_BA, run.targets.labels_BG.gather(1, assigned.objects_BA), 80)
    np.testing.assert_array_equal(labels_BA.numpy(), run.golden["target.labels"])
    boxes_BA4 = run.targets.boxes_BG4[torch.arange(B)[:, None], assigned.objects_BA]
    actual, reference = boxes_BA4[positive_BA].numpy(), run.golden["target.bbox_targets"][positive_BA.numpy()]
    np.testing.assert_array_equal(actual, reference)
    cells = run.golden["target.grid_cells"]
    anchors = run.model.dense.anchors(grids, torch.device("cpu")).numpy()
    np.testing.assert_array_equal(np.broadcast_to(anchors, cells.shape), cells)


def test_localization_distillation_on_given_logits() -> None:
    """The released normalization, plain sums and means a level, in value and gradient; and the released region."""
    golden, about = read("gfl_ld")
    images = len(about["sizes"])
    targets = targets_of(golden, images)
    maps = {
        name: torch.from_numpy(golden[name].astype(np.float32)).requires_grad_(name.startswith("student"))
        for name in golden
        if name.startswith(("student.", "teacher."))
    }
    grids = [(maps[f"student.cls{level}"].shape[-2], maps[f"student.cls{level}"].shape[-1]) for level in range(5)]

    def flat(who: str, part: str, values: int) -> Tensor:
        levels = [maps[f"{who}.{part}{level}"].view(images, values, -1).transpose(1, 2) for level in range(5)]
        return torch.cat(levels, dim=1)

    logits_BAK, bins_BA4E = flat("student", "cls", 80), flat("student", "reg", 68).unflatten(-1, (4, 17))
    teacher_BAK, teacher_BA4E = flat("teacher", "cls", 80), flat("teacher", "reg", 68).unflatten(-1, (4, 17))
    gfl = GFL(classes=80, tower_bias=True, unbiased_std=False, ignore_padding=False, weight_floor=1.0)
    sizes_B2 = torch.tensor(about["sizes"])
    _, thresholds = gfl.assign(grids, sizes_B2, targets)
    anchors_A4 = gfl.anchors(grids, torch.device("cpu"))
    region_BA = regions.valuable_region(anchors_A4, targets.boxes_BG4, thresholds.region_BG)
    np.testing.assert_allclose(region_BA.numpy(), golden["target.vlr_regions"], atol=1e-6)
    paper_BA = regions.valuable_region(anchors_A4, targets.boxes_BG4, thresholds.region_BG, overlap="union")
    assert ((region_BA > 0).sum(dim=1).tolist(), (paper_BA > 0).sum(dim=1).tolist()) == ([332, 330], [296, 269])

    terms = LDConfig(normalization="reference")
    features = [torch.empty(images, 1, *grid) for grid in grids]
    student, teacher = HeadPass(features, (logits_BAK, bins_BA4E)), HeadPass(features, (teacher_BAK, teacher_BA4E))
    losses = LD(terms, gfl).losses(student, teacher, sizes_B2, targets)
    assert set(losses) == {"loss_cls", "loss_box", "loss_dfl", "loss_ld", "loss_ld_vlr", "loss_kd"}
    reference = {"loss_cls": "loss_qfl", "loss_box": "loss_bbox"}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden[f"loss.{reference.get(name, name)}"].item(), rel=1e-5), name
    torch.stack(list(losses.values())).sum().backward()
    for part in ("cls", "reg"):
        for level in range(5):
            gradient = maps[f"student.{part}{level}"].grad
            assert gradient is not None
            norm = golden[f"grad_norm.{part}{level}"].item()
            assert gradient.double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-9)
