"""Conversion of PaddleDetection's files: names of every golden parameter list, a whole Faster R-CNN, and unsupported files.

The weights are made by rule under the reference's names (tests/golden/README.md), so the detections of the converted file are known.
"""

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden import FOLDER, RECIPE, RECIPES, by_rule, check_detections, our_name, read
from golden import inputs as network_inputs

from ssld.pipelines import cli
from ssld.shared.config.settings import parse_config
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.config import ConvertPaddleConfig
from ssld.stage2_detect.convert_paddle import check_recipe, main, recognize
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import build_detector

Arrays = dict[str, np.ndarray]


def about(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def write(path: Path, arrays: Arrays) -> Path:
    record = {"StructuredToParameterName@@": {name: f"parameter_{name}" for name in arrays}}
    path.write_bytes(pickle.dumps(arrays | record, protocol=2))
    return path


def recipe_of(name: str) -> DetectorConfig:
    recipe = str(RECIPES / RECIPE[name])
    return parse_config(ConvertPaddleConfig, ["--config", recipe, "--weights", "x"], program="convert_paddle.py").model


def small(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """A Faster R-CNN whose pyramid and head are narrow: 16 channels, 8 hidden, the classes of COCO."""
    narrow = {}
    for name, shape in shapes.items():
        if not name.startswith("backbone."):
            widths = {256: 16, 12544: 16 * 49, 1024: 8}
            inner = "fpn_inner" in name and len(shape) == 4
            shape = [16, *shape[1:]] if inner else [widths.get(size, size) for size in shape]
        narrow[name] = shape
    return narrow


SMALL = ["--config", str(RECIPES / RECIPE["faster"]), "--model.fpn_channels", "16", "--model.roi.hidden", "8"]


@pytest.mark.parametrize("name", RECIPE)
def test_every_parameter_of_the_reference_has_its_place(name: str) -> None:
    """Names and shapes match those of the whole detector of the recipe, without a rest on either side."""
    import timm

    shapes = about(name)["parameters"]
    arch = recognize(shapes, "file")
    assert arch == "resnet50d"
    body = timm.create_model(arch, features_only=True)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
    model = build_detector(recipe_of(name), classes=80, body=body, arch=arch, inputs=inputs)
    expected = {key: list(value.shape) for key, value in model.state_dict().items() if "tracked" not in key}
    mapped = {our_name(key): shape[::-1] if len(shape) == 2 else shape for key, shape in shapes.items()}
    assert mapped == expected
    assert len(mapped) == len(shapes)


@pytest.mark.parametrize(("arch", "third", "fourth"), [("resnet101d", 4, 23), ("resnet152d", 8, 36)])
def test_names_of_deeper_backbones(arch: str, third: int, fourth: int) -> None:
    """A stage of more than ten blocks counts them a, b1, b2, ...; checked on the shapes of timm's network."""
    import timm

    shapes = {name: shape for name, shape in about("faster")["parameters"].items() if name.startswith("backbone.")}
    for stage, count in ((3, third), (4, fourth)):
        block = {name: shape for name, shape in shapes.items() if f".res{stage}b." in name}
        shapes = {name: shape for name, shape in shapes.items() if not re.search(rf"\.res{stage}[b-z]\.", name)}
        for number in range(1, count):
            letter = f"b{number}" if count > 10 else chr(ord("a") + number)
            shapes |= {name.replace(f"res{stage}b", f"res{stage}{letter}"): shape for name, shape in block.items()}
    assert recognize(shapes, "file") == arch
    with torch.device("meta"):
        state = timm.create_model(arch, features_only=True).state_dict()
    expected = {f"pyramid.body.{key}": list(value.shape) for key, value in state.items() if "tracked" not in key}
    assert {our_name(name): shape for name, shape in shapes.items()} == expected
    assert our_name("backbone.res4.res4a.branch2a.conv.weight") == "pyramid.body.layer3.0.conv1.weight"
    assert our_name("backbone.res4.res4b22.branch2c.norm._mean") == "pyramid.body.layer3.22.bn3.running_mean"
    assert our_name("backbone.res3.res3d.branch2b.conv_offset.bias") == "pyramid.body.layer2.3.conv2.offset.bias"


def test_names_of_a_backbone_without_deep_stem() -> None:
    """ResNet50 itself: one stem convolution, shortcuts that do not pool."""
    import timm

    shapes = {}
    for name, shape in about("faster")["parameters"].items():
        if name.startswith("backbone.res"):
            shapes[name.replace(".short.conv.conv.", ".short.conv.").replace(".short.conv.norm.", ".short.norm.")] = (
                shape
            )
    shapes["backbone.conv1.conv1.conv.weight"] = [64, 3, 7, 7]
    shapes |= {f"backbone.conv1.conv1.norm.{leaf}": [64] for leaf in ("weight", "bias", "_mean", "_variance")}
    assert recognize(shapes, "file") == "resnet50"
    with torch.device("meta"):
        state = timm.create_model("resnet50", features_only=True).state_dict()
    expected = {f"pyramid.body.{key}": list(value.shape) for key, value in state.items() if "tracked" not in key}
    assert {our_name(name, deep_stem=False): shape for name, shape in shapes.items()} == expected


def test_both_names_of_a_shortcut() -> None:
    assert our_name("backbone.res2.res2a.short.norm._variance") == our_name(
        "backbone.res2.res2a.short.conv.norm._variance"
    )
    assert our_name("backbone.res2.res2a.short.conv.weight") == "pyramid.body.layer1.0.downsample.1.weight"
    assert our_name("backbone.res2.res2a.short.conv.conv.weight") == "pyramid.body.layer1.0.downsample.1.weight"
    assert our_name("backbone.res2.res2a.branch2d.conv.weight") is None
    assert our_name("neck.fpn_res2_sum.running_mean") is None


@pytest.mark.slow
def test_a_converted_faster_rcnn_detects_what_the_reference_does(call: Any, tmp_path: Path) -> None:
    facts = about("faster")
    arrays = by_rule(facts["parameters"], facts["salt"])
    weights = write(tmp_path / "faster_rcnn_r50_vd_fpn_ssld_1x_coco.pdparams", arrays)
    output = tmp_path / "run"
    recipe = str(RECIPES / RECIPE["faster"])
    argv = ["--weights", str(weights), "--config", recipe, "--output", str(output), "--threads", "1"]
    assert call(main, argv) == 0
    log = (output / "log.txt").read_text()
    assert "faster_rcnn on resnet50d, 80 classes, 305 arrays, all in use" in log
    assert call(main, argv) == 0
    assert (output / "log.txt").read_text().endswith("this run is finished; nothing to do\n")

    loaded = load_detector(output / "detector.safetensors")
    coco = dict(zip(loaded.category_ids, loaded.class_names, strict=True))
    assert (len(coco), coco[1], coco[11], coco[13], coco[90]) == (
        80,
        "person",
        "fire hydrant",
        "stop sign",
        "toothbrush",
    )
    assert (loaded.resize.short_side, loaded.resize.interpolation) == (800, "bicubic")
    assert loaded.metadata["source"]["file"] == weights.name
    assert loaded.metadata["licence"] == "apache-2.0"
    golden, _ = read("faster")
    images, _ = network_inputs(golden, facts)
    with torch.inference_mode():
        check_detections(SimpleNamespace(golden=golden, detections=loaded.model(images)))


@pytest.mark.slow
def test_other_classes_come_from_an_annotation_file(call: Any, tiny_coco: Any, capsys: Any, tmp_path: Path) -> None:
    shapes = small(about("faster")["parameters"])
    for name, size in (("score", 3), ("delta", 8)):
        shapes |= {f"bbox_head.bbox_{name}.weight": [8, size], f"bbox_head.bbox_{name}.bias": [size]}
    weights = write(tmp_path / "two_classes.pdparams", by_rule(shapes, 0))
    argv = [
        "convert-paddle-detector",
        "--weights",
        str(weights),
        *SMALL,
        "--output",
        str(tmp_path / "run"),
        "--threads",
        "1",
    ]
    assert call(cli.main, argv) == 2
    assert "has 2 classes, COCO 2017 has 80; give --annotations with a COCO JSON" in capsys.readouterr().err
    assert call(cli.main, [*argv, "--annotations", str(tiny_coco.train_annotations)]) == 0
    loaded = load_detector(tmp_path / "run" / "detector.safetensors")
    assert loaded.class_names == ("wide", "tall")
    assert loaded.category_ids == (3, 7)
    state = loaded.model.state_dict()
    name = "bbox_head.bbox_delta.weight"
    assert np.array_equal(state["roi_heads.heads.0.deltas.weight"].numpy(), by_rule(shapes, 0)[name].T)


def refused(arrays: Arrays, tmp_path: Path, call: Any, capsys: Any, *flags: str) -> str:
    """The error line; nothing may have been written."""
    weights = write(tmp_path / "file.pdparams", arrays)
    argv = ["--weights", str(weights), *(flags or SMALL), "--output", str(tmp_path / "run"), "--threads", "1"]
    assert call(main, argv) == 2
    assert not (tmp_path / "run").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return str(line).removeprefix(f"error: {weights}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rpn_head.rpn_rois_delta.bias": None}, "rpn.head.deltas.bias is missing"),
        ({"bbox_head.bbox_score.weight": None}, r"has no classifier \(bbox_head.bbox_score\)"),
        ({"rpn_head.rpn_rois_score.weight": [5, 16, 1, 1]}, r"rpn.head.objectness.weight is \(5, 16, 1, 1\) instead of \(3, 16, 1, 1\)"),
        ({"neck.fpn_res6_sum.weight": [16, 16, 3, 3]}, "pyramid.fpn.layer_blocks.4.0.weight is left over"),
        ({"neck.fpn_res2_extra.weight": [16]}, "1 unknown, 0 layers missing: neck.fpn_res2_extra.weight unknown"),
    ],
)  # fmt: skip
def test_missing_extra_and_misshapen_parameters_are_named(
    change: dict[str, Any], message: str, tmp_path: Path, call: Any, capsys: Any
) -> None:
    shapes = small(about("faster")["parameters"]) | change
    arrays = by_rule({name: shape for name, shape in shapes.items() if shape is not None}, 0)
    assert re.search(message, refused(arrays, tmp_path, call, capsys))


NO_BOTTLENECK = [f"backbone.res{s}.res{s}{b}.branch2b.conv.weight" for s, bs in ((2, "abc"), (3, "abcd")) for b in bs]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["conv1_1_weights", "res2a_branch2a_weights", "fc6_w", "bbox_pred_w"],
            "comes from PaddleDetection's static-graph releases, whose boxes are a pixel wider",
        ),
        (["backbone_conv_velocity_0", "fc_velocity_0"], "contains the state of an optimizer (.pdopt)"),
        (
            ["stem.0.conv.weight", "blocks.0.conv0.conv.weight"],
            "not a detector of PaddleDetection (first of 2 parameters: stem.0.conv.weight); a backbone of PaddleClas",
        ),
        (NO_BOTTLENECK, "no equivalent timm backbone: timm's ResNets with basic blocks"),
        (["backbone.stage1.conv.weight"], "no equivalent timm backbone: detectors on a ResNet50, 101"),
        ([], "not a detector of PaddleDetection (first of 0 parameters: no parameters)"),
    ],
)
def test_other_files_are_refused_with_the_reason(
    names: list[str], message: str, tmp_path: Path, call: Any, capsys: Any
) -> None:
    assert refused({name: np.zeros(2, np.float32) for name in names}, tmp_path, call, capsys).startswith(message)


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("faster", "pss_det", "model.fpn_channels is 64, the file has 256; model.dcn_strides is [8, 16, 32], the file has []"),
        ("pss_det", "faster", "model.fpn_channels is 256, the file has 64; model.dcn_strides is [], the file has [8, 16, 32]"),
        ("mask", "faster", "model.kind is faster_rcnn, the file has mask_rcnn"),
        ("cascade", "mask", "model.kind is mask_rcnn, the file has cascade_rcnn"),
        ("cascade_mask", "cascade", "model.kind is cascade_rcnn, the file has cascade_mask_rcnn"),
    ],
)  # fmt: skip
def test_another_recipe_is_refused(name: str, recipe: str, message: str) -> None:
    arrays = {key: np.broadcast_to(np.float32(0), shape) for key, shape in about(name)["parameters"].items()}
    check_recipe(arrays, recipe_of(name), "file")
    with pytest.raises(UserError) as error:
        check_recipe(arrays, recipe_of(recipe), "file")
    assert (
        str(error.value) == f"file: the recipe is for another detector: {message}; docs/detectors.md lists the recipes"
    )


def test_a_detector_without_pyramid_is_refused(tmp_path: Path, call: Any, capsys: Any) -> None:
    shapes = about("faster")["parameters"]
    arrays = by_rule({name: shape for name, shape in shapes.items() if name.startswith("backbone.res")}, 0)
    line = refused(arrays, tmp_path, call, capsys)
    assert (
        line
        == "has no feature pyramid with a head of two fully connected layers; only detectors with FPN can be converted"
    )
