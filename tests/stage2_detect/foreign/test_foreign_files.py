"""`ssld convert-detector` on files of detectron2 and mmdetection: reading without running code, classes, and every refusal."""

import json
import pickle
import random
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssld.pipelines import cli
from ssld.shared.errors import UserError
from ssld.stage2_detect.convert_detector import main
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.foreign.detectron2_weights import detectron2_detector
from ssld.stage2_detect.foreign.files import project_of, read_foreign
from ssld.stage2_detect.foreign.mmdetection_weights import mmdetection_detector
from tests.stage2_detect.foreign.others import CLASSES, State, detectron2_state, mmdetection_state

NAMES = [f"class {number}" for number in range(CLASSES)]
COCO_CONFIG = (
    "model = dict(backbone=dict(style='pytorch'), anchor_generator=dict(scales=[8], ratios=[0.5, 1.0, 2.0]))\n"
)
COCO_CONFIG += "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("classes") / "classes.json"
    categories = [{"id": 10 + number, "name": name} for number, name in enumerate(NAMES)]
    images = [{"id": 1, "file_name": "one.png", "height": 8, "width": 8}]
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    return file


@pytest.fixture(scope="module")
def zoo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as of detectron2's model zoo, with the buffers of older ones."""
    state = detectron2_state("faster_rcnn", arch="resnet18")
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    arrays["pixel_mean"] = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1).numpy()
    arrays["pixel_std"] = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1).numpy()
    sides = torch.tensor([[45.2548, 22.6274], [32, 32], [22.6274, 45.2548]])
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = torch.cat((-sides / 2, sides / 2), dim=1).numpy()
    file = tmp_path_factory.mktemp("zoo") / "model_final.pkl"
    file.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return file


def test_a_file_of_the_model_zoo(zoo_file: Path, classes: Path, tmp_path: Path) -> None:
    words = [
        "--weights",
        str(zoo_file),
        "--annotations",
        str(classes),
        "--caffe",
        "false",
        "--output",
        str(tmp_path / "run"),
    ]
    assert cli.main(["convert-detector", *words]) == 0
    detector = load_detector(tmp_path / "run" / "detector.safetensors")
    assert (detector.class_names, detector.category_ids) == (tuple(NAMES), tuple(range(10, 10 + CLASSES)))
    assert detector.metadata["source"]["project"] == "detectron2"
    assert detector.metadata["arch"] == "resnet18"
    assert detector.resize.interpolation == "bilinear"
    state = detectron2_state("faster_rcnn", arch="resnet18")
    weight = detector.model.get_parameter("pyramid.body.layer2.0.conv1.weight")
    assert torch.equal(weight, state["backbone.bottom_up.res3.0.conv1.weight"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "detectron2: faster_rcnn on resnet18 with FPN, 5 classes" in log


def test_a_checkpoint_of_mmdetection(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration and the names of its classes are compared; what pickles run is not run."""
    state, file = mmdetection_state("faster_rcnn", arch="resnet18"), tmp_path / "epoch_12.pth"
    run = ["--weights", str(file), "--annotations", str(classes), "--output", str(tmp_path / "run")]

    def written(meta: dict[str, Any], *words: str) -> str:
        torch.save({"meta": meta, "state_dict": state}, file)
        assert main([*(words or run)]) == 2
        return capsys.readouterr().err

    meta = {"mmdet_version": "2.25.0", "config": COCO_CONFIG, "CLASSES": tuple(NAMES)}
    assert "has 5 classes, COCO 2017 has 80; give --annotations" in written(meta, *run[:2], *run[4:])
    other = written(meta | {"CLASSES": tuple(NAMES[::-1])})
    assert f"names a class 'class 4' where {classes} has 'class 0'" in other
    anchors = written(meta | {"config": COCO_CONFIG.replace("scales=[8]", "scales=[\n 4,\n ]")})
    assert "its configuration has scales 4, the base configuration 8" in anchors
    colors = written(meta | {"config": COCO_CONFIG.replace("std=[58.395, 57.12, 57.375]", "std=[1.0, 1.0, 1.0]")})
    assert "its configuration has std 1 1 1, the base configuration 58.395 57.12 57.375" in colors
    assert "written by mmdetection 1.2.0, whose boxes are a pixel wider" in written(meta | {"mmdet_version": "1.2.0"})
    caffe = written(meta | {"config": COCO_CONFIG.replace("'pytorch'", "'caffe'")})
    assert "its configuration has mean 123.675 116.28 103.53, the base configuration 103.53 116.28 123.675" in caffe
    assert "norm_eps: is for weights of torchvision" in written(meta, *run, "--norm_eps", "0")
    assert "architecture: is for weights of torchvision" in written(
        meta, *run, "--architecture", "retinanet_resnet50_fpn"
    )
    history = written({"hub": Path("x")})
    assert "cannot be read as a plain state dict of tensors (it asks for pathlib." in history
    assert "keep its weights alone, in an environment that has its project: python -c" in history
    assert not (tmp_path / "run" / "result.json").exists()

    torch.save({"meta": meta, "state_dict": state}, file)
    assert main(run) == 0
    assert load_detector(tmp_path / "run" / "detector.safetensors").class_names == tuple(NAMES)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_reading_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps({"model": {"backbone.bottom_up.stem.conv1.weight": _Runs()}}))
    with pytest.raises(
        UserError, match=r"evil\.pkl: asks for builtins\.print while being opened, which could run code"
    ):
        read_foreign(file)
    assert capsys.readouterr().out == ""
    file.write_bytes(pickle.dumps({"blobs": {}}))
    with pytest.raises(UserError, match="has no arrays by name below `model`, as files of detectron2 have"):
        read_foreign(file)
    file.write_bytes(pickle.dumps({"model": {"conv1.weight": 3}}))
    with pytest.raises(UserError, match=r"'conv1\.weight' is a int, an array is expected"):
        read_foreign(file)
    with pytest.raises(
        UserError, match=r"s: no detector with FPN of torchvision, detectron2 or mmdetection \(first of 1 tensors: x\)"
    ):
        project_of({"x": torch.zeros(1)}, "s")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda file: file.write_bytes(b"\x80\x02}\x99\x99."),
            r"a plain state dict of tensors \(the pickle is damaged, or holds other objects than tensors\)",
        ),
        (lambda file: file.write_bytes(bytes(range(1, 200))), r"\(the pickle is damaged, or holds other objects"),
        (
            lambda file: save_file({"x": torch.zeros(3)}, file),
            r"is a safetensors file named \.pth: rename it to weights\.safetensors",
        ),
    ],
    ids=["damaged", "no pickle", "safetensors"],
)
def test_a_file_that_is_no_pickle_of_tensors(write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises(UserError, match=rf"weights\.pth: .*{message}") as caught:
        read_foreign(file)
    assert "weights_only" not in str(caught.value)


def empty(make: Callable[..., State], *args: Any, **options: Any) -> State:
    """The same names and shapes without values."""
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in make(*args, **options).items()}


@pytest.fixture(scope="module")
def theirs() -> dict[str, State]:
    """Names and shapes of R50 detectors."""
    return {
        "d2": empty(detectron2_state, "mask_rcnn"),
        "d2 cascade": empty(detectron2_state, "cascade_mask_rcnn"),
        "d2 retinanet": empty(detectron2_state, "retinanet"),
        "mm": empty(mmdetection_state, "mask_rcnn"),
        "mm cascade": empty(mmdetection_state, "cascade_rcnn"),
        "mm retinanet": empty(mmdetection_state, "retinanet"),
    }


def zeros(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)


REFUSED: list[tuple[str, dict[str, Tensor], str, str]] = [
    # (weights, tensors added or replaced, part of the names dropped, message)
    ("d2", {"sem_seg_head.p2.0.weight": zeros(1)}, "", "it segments surfaces too"),
    ("d2", {"roi_heads.keypoint_head.conv_fcn1.weight": zeros(1)}, "", "it finds keypoints"),
    ("d2", {"roi_heads.mask_head.coarse_head.fc1.weight": zeros(1)}, "", "its masks are PointRend's"),
    ("d2", {"roi_heads.res5.0.conv1.weight": zeros(1)}, "", "it has no feature pyramid"),
    ("d2", {"backbone.net.pos_embed": zeros(1)}, "", "its backbone is no ResNet"),
    ("d2", {}, "fpn_output5", "without a feature pyramid"),
    ("d2", {}, "bottom_up", "its backbone is no ResNet"),
    ("d2", {}, "box_predictor", "without box heads"),
    ("d2", {}, "fc1", "has no fully connected layer"),
    ("d2", {}, "objectness_logits", "objectness_logits.weight is missing"),
    ("d2", {"extra.weight": zeros(1)}, "", "extra.weight has no place in this project's detectors"),
    ("d2", {"backbone.bottom_up.res3.0.conv2_offset.weight": zeros(18)}, "", "has deformable convolutions"),
    ("d2", {"backbone.bottom_up.res2.0.conv2.weight": zeros(256, 8, 3, 3)}, "", "is a ResNeXt or a wide ResNet"),
    ("d2", {}, "res5.2", r"is a resnet of \(3, 4, 6, 2\) blocks, which timm does not have"),
    ("d2", {"backbone.bottom_up.stem.conv1.weight": zeros(64, 3, 3, 3)}, "", "stem is not one convolution of 7 x 7"),
    ("d2", {}, "stem.conv1.norm.running_mean", "the norms of its backbone are not BatchNorm"),
    (
        "d2",
        {"proposal_generator.rpn_head.objectness_logits.weight": zeros(15, 64, 1, 1)},
        "",
        "its RPN has other anchors",
    ),
    (
        "d2",
        {"proposal_generator.anchor_generator.cell_anchors.1": zeros(3, 4)},
        "",
        "has other anchors than detectron2's base",
    ),
    (
        "d2",
        {"pixel_std": zeros(3)},
        "",
        "pixel_std is 0 0 0, that of torchvision's ResNet is 58.395 57.12 57.375; check --caffe",
    ),
    (
        "d2",
        {"roi_heads.mask_head.mask_fcn1.norm.weight": zeros(32)},
        "",
        "is a GroupNorm of 32 groups with one channel each",
    ),
    ("d2 cascade", {}, "box_predictor.2", "a cascade of 2 stages; cascades of 3 are converted"),
    ("d2 retinanet", {"head.bbox_pred.weight": zeros(12, 64, 3, 3)}, "", "a RetinaNet of 3 anchors per cell"),
    (
        "d2 retinanet",
        {"head.cls_subnet.1.weight": zeros(64)},
        "",
        "a RetinaNet with norms behind convolutions with a bias",
    ),
    (
        "mm",
        {"roi_head.mask_head.0.conv_logits.weight": zeros(1)},
        "",
        "it has a mask head for each stage of its cascade",
    ),
    ("mm", {"bbox_head.fc_cls.weight": zeros(1)}, "", "its names are those of mmdetection 1.x"),
    ("mm", {"roi_head.semantic_head.x.weight": zeros(1)}, "", "it has a head that this project does not have"),
    ("mm", {"roi_head.bbox_head.cls_convs.0.conv.weight": zeros(1)}, "", "branches of their own for classes and boxes"),
    ("mm", {}, "fpn_convs", "without a feature pyramid"),
    ("mm", {"backbone.stem.0.weight": zeros(1)}, "backbone.conv1", "stem is not one convolution of 7 x 7"),
    ("mm", {"backbone.layer2.0.conv2.conv_offset.weight": zeros(1)}, "", "has deformable convolutions"),
    ("mm", {}, "fc_cls", "without box heads"),
    ("mm", {}, "shared_fcs", "has no fully connected layer"),
    ("mm", {"rpn_head.rpn_cls.weight": zeros(5, 64, 1, 1)}, "", "its RPN has other anchors"),
    ("mm cascade", {}, "bbox_head.2.", "a cascade of 2 stages"),
    ("mm retinanet", {"bbox_head.retina_reg.weight": zeros(12, 64, 3, 3)}, "", "a RetinaNet of 3 anchors per cell"),
    ("mm retinanet", {"bbox_head.scales.0.scale": zeros(2)}, "", r"scales\.0\.scale is \(2,\), one number is expected"),
    (
        "mm retinanet",
        {"bbox_head.retina_cls.weight": zeros()},
        "",
        "retina_cls.weight is a single number, without rows",
    ),
    ("mm retinanet", {"bbox_head.reg_conf.0.weight": zeros(1)}, "", "it is a GFLv2"),
    (
        "mm retinanet",
        {},
        "retina",
        r"a detector of mmdetection that this project does not have \(tensor bbox_head.cls_convs",
    ),
]


@pytest.mark.parametrize(
    ("kind", "added", "dropped", "message"), REFUSED, ids=[f"{case[0]}: {case[3][:30]}" for case in REFUSED]
)
def test_what_is_refused(kind: str, added: State, dropped: str, message: str, theirs: dict[str, State]) -> None:
    state = {name: one for name, one in theirs[kind].items() if not dropped or dropped not in name} | added
    convert = (
        partial(detectron2_detector, caffe=False)
        if kind.startswith("d2")
        else partial(mmdetection_detector, meta={}, caffe=None)
    )
    with pytest.raises(UserError, match=f"^file.pth: .*{message}"):
        convert(state, source="file.pth")


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_rcnn", "retinanet", "gfl"])
def test_a_tensor_that_is_missing_or_of_no_shape_is_a_mistake_of_the_user(kind: str) -> None:
    """Or is found by the comparison with the detector, later."""
    projects: list[tuple[Callable[..., State], Callable[..., Any]]] = [
        (mmdetection_state, partial(mmdetection_detector, meta={}, caffe=None))
    ]
    if kind != "gfl":
        projects.append((detectron2_state, partial(detectron2_detector, caffe=False)))
    for make, convert in projects:
        state = empty(make, kind, arch="resnet18")
        heads = [name for name in state if not re.match(r"backbone\.(bottom_up\.res|layer)", name)]
        for name in random.Random(0).sample(heads, 5):
            for changed in ({}, {name: torch.zeros(())}):
                with suppress(UserError):
                    convert({key: one for key, one in state.items() if key != name} | changed, source="file.pth")


def test_the_style_of_detectron2_is_recognized_or_asked_for() -> None:
    def caffe(state: State, given: bool | None = None) -> bool:
        detector = detectron2_detector(state, caffe=given, source="s")
        assert detector.std == pytest.approx(
            [1 / 255] * 3 if detector.model["stride_in_1x1"] else [0.229, 0.224, 0.225]
        )
        return bool(detector.model["stride_in_1x1"])

    merged, unmerged = detectron2_state("retinanet", merged=True), detectron2_state("retinanet")
    assert caffe(merged)
    assert not caffe(unmerged, given=False)
    assert caffe(unmerged, given=True)
    assert caffe(merged | {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]), "pixel_std": torch.ones(3)})
    with pytest.raises(
        UserError, match="does not show how its ResNet reads images; give --caffe true for detectron2's default"
    ):
        caffe(unmerged)
    with pytest.raises(
        UserError, match=r"pixel_mean is 123.675 116.28 103.53, that of Caffe's ResNet is 103.53 116.28 123.675"
    ):
        caffe(merged | {"pixel_mean": torch.tensor([123.675, 116.28, 103.53])})
    broken = unmerged | {"head.cls_score.bias": torch.full((9 * CLASSES,), torch.nan)}
    with pytest.raises(UserError, match=r"s: dense\.head\.logits\.bias has values that are not finite"):
        caffe(broken, given=False)


def test_caffe_needs_bottlenecks(
    zoo_file: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = detectron2_state("faster_rcnn", arch="resnet18", merged=True)
    file = tmp_path / "small.pkl"
    file.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}}))
    assert main(["--weights", str(file), "--annotations", str(classes), "--output", str(tmp_path / "bad")]) == 2
    assert "stride_in_1x1: backbone resnet18 has no bottlenecks with a stride" in capsys.readouterr().err
