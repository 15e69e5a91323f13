"""`ssld convert-detector` on weights of torchvision: older names, classes, epsilon of the norms, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from ssld.pipelines import cli
from ssld.shared.errors import UserError
from ssld.stage2_detect.convert_detector import main
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.foreign.coco_classes import coco_classes
from ssld.stage2_detect.foreign.torchvision_weights import choose, convert, find_weights, read_weights, recognize
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.published import PUBLISHED

State = dict[str, Tensor]
MOBILE = "fasterrcnn_mobilenet_v3_large"
UserErrorOf = Callable[..., str]


def state_of(name: str, classes: int = 91, **options: Any) -> State:
    """State dict of a torchvision detector on the meta device: names and shapes."""
    with torch.device("meta"):
        model = getattr(torchvision.models.detection, name)(
            weights=None, weights_backbone=None, num_classes=classes, **options
        )
    return dict(model.state_dict())


def older(state: State) -> State:
    """The same weights under the names of torchvision's published files of v1."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if "num_batches_tracked" in name:  # frozen norms count nothing
            continue
        if name.startswith(("backbone.fpn.inner", "backbone.fpn.layer")):
            del parts[4]
        elif name.startswith("rpn.head.conv."):
            del parts[3:5]
        elif name.startswith("roi_heads.mask_head."):
            parts[2:4] = [f"mask_fcn{int(parts[2]) + 1}"]
        elif name.startswith("head.") and parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        renamed[".".join(parts)] = tensor
    return renamed


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_architecture_is_recognized_by_its_names(name: str) -> None:
    """Names of both times of torchvision, and of a distributed run."""
    state = state_of(name)
    assert recognize(state, "s") == recognize(state, "t")
    assert recognize(state, "s").name == name.replace("_320", "")  # the same network, of other sizes
    assert recognize(state_of(name, classes=5), "s").labels == 5
    DetectorConfig.model_validate(PUBLISHED[name].model)
    assert len(PUBLISHED[name].sha256) == 8


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_older_names_are_read(name: str, tmp_path: Path) -> None:
    state = {key: torch.zeros(1) for key in state_of(name)}
    torch.save({"model": {f"module.{key}": tensor for key, tensor in older(state).items()}}, tmp_path / "old.pth")
    expected = {key for key in state if "num_batches_tracked" not in key}
    assert read_weights(tmp_path / "old.pth").keys() == expected


def test_an_epsilon_of_zero_goes_into_the_weight() -> None:
    """Channels of tiny variance too: with an epsilon of 0 in torchvision, the norm's output is that of 1e-5 with the new weight."""
    torch.manual_seed(0)
    prefix = "backbone.body.bn1"
    state = {
        f"{prefix}.weight": torch.rand(4),
        f"{prefix}.bias": torch.randn(4),
        f"{prefix}.running_mean": torch.randn(4),
        f"{prefix}.running_var": torch.tensor([1e-9, 1e-5, 0.3, 20.0]),
    }
    maps = torch.randn(2, 4, 3, 3) * state[f"{prefix}.running_var"].sqrt()[:, None, None]
    frozen = torchvision.ops.FrozenBatchNorm2d(4, eps=0.0)
    frozen.load_state_dict({key.rpartition(".")[2]: value for key, value in state.items()})
    norm = nn.BatchNorm2d(4).eval()
    converted = convert(state, (), norm_eps=0.0, source="s")
    norm.load_state_dict({key.rpartition(".")[2]: value for key, value in converted.items()})
    torch.testing.assert_close(norm(maps), frozen(maps), rtol=1e-4, atol=1e-5)
    same = convert(state, (), norm_eps=1e-5, source="s")
    assert torch.equal(same["pyramid.body.bn1.weight"], state[f"{prefix}.weight"])
    state[f"{prefix}.running_var"][0] = -1
    with pytest.raises(
        UserError, match=r"s: pyramid\.body\.bn1\.running_var has variances below 0; the file is damaged"
    ):
        convert(state, (), norm_eps=0.1, source="s")
    state[f"{prefix}.running_var"][0] = 0
    with pytest.raises(UserError, match=r"s: pyramid\.body\.bn1\.weight has values that are not finite"):
        convert(state, (), norm_eps=0.0, source="s")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RetinaNet weights of three labels with finite values."""
    file = tmp_path_factory.mktemp("torchvision") / "retina.pth"
    state = state_of("retinanet_resnet50_fpn", classes=3)
    torch.save({key: torch.ones(value.shape, dtype=value.dtype) for key, value in state.items()}, file)
    return file


def annotations(folder: Path, *ids: int) -> Path:
    file = folder / f"classes_{len(ids)}_{max(ids)}.json"
    categories = [{"id": number, "name": f"class {number}"} for number in ids]
    images = [{"id": 1, "file_name": "one.png", "height": 8, "width": 8}]
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    return file


def test_the_command_writes_a_detector_file(small_file: Path, tmp_path: Path) -> None:
    classes = annotations(tmp_path, 3, 7)
    words = ["--weights", str(small_file), "--annotations", str(classes), "--output", str(tmp_path / "run")]
    assert cli.main(["convert-detector", *words]) == 0
    detector = load_detector(tmp_path / "run" / "detector.safetensors")
    assert detector.class_names == ("class 3", "class 7")
    assert detector.category_ids == (3, 7)
    assert detector.metadata["model"]["retinanet"]["anchor_grid"] == "torchvision"
    assert detector.resize.interpolation == "bilinear"
    assert detector.metadata["source"]["architecture"] == "retinanet_resnet50_fpn"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "rows of 1 labels without a class dropped (0" in log
    assert "epsilon of the backbone's BatchNorm 1e-05" in log


@pytest.fixture(scope="module")
def mobile_state() -> State:
    """The tensors of both detectors on MobileNetV3, of two labels."""
    return {
        key: torch.ones(value.shape, dtype=value.dtype)
        for key, value in state_of("fasterrcnn_mobilenet_v3_large_fpn", classes=2).items()
    }


@pytest.mark.parametrize(
    ("file_name", "words", "short_side", "line"),
    [
        ("own.pth", (), 800, "settings of fasterrcnn_mobilenet_v3_large_fpn, assumed (--architecture "),
        ("own.pth", ("--architecture", f"{MOBILE}_320_fpn"), 320, ""),
        (f"{MOBILE}_320_fpn-own.pth", (), 320, f"settings of {MOBILE}_320_fpn, as in the file's name (--architecture "),
    ],
)
def test_two_detectors_on_mobilenet_differ_in_settings_alone(
    mobile_state: State, file_name: str, words: tuple[str, ...], short_side: int, line: str, tmp_path: Path
) -> None:
    torch.save(mobile_state, tmp_path / file_name)
    classes = ("--annotations", str(annotations(tmp_path, 1)))
    assert main(["--weights", str(tmp_path / file_name), *classes, *words, "--output", str(tmp_path / "run")]) == 0
    detector = load_detector(tmp_path / "run" / "detector.safetensors")
    rpn = detector.metadata["model"]["rpn"]
    small = short_side == 320
    assert (detector.resize.short_side, detector.resize.long_side) == ((320, 640) if small else (800, 1333))
    assert (rpn["score_threshold"], rpn["post_nms_top_n_test"]) == (0.05, 150 if small else 1000)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert line in log
    assert ("--architecture" in log) == bool(line)


@pytest.mark.parametrize(
    ("file_name", "small", "told"),
    [
        ("FasterRCNN_MobileNet_V3_Large_320_FPN.pth", True, "as in the file's name"),
        ("faster-rcnn-mobilenet-v3-large-320-fpn.pth", True, "as in the file's name"),
        ("FasterRCNN-MobileNet-V3-Large-FPN.pth", False, "as in the file's name"),
        (f"{MOBILE}_320_fpn_or_{MOBILE}_fpn.pth", False, "assumed, since the file's name has both"),
    ],
)
def test_names_of_files(mobile_state: State, file_name: str, small: bool, told: str) -> None:
    chosen = choose(recognize(mobile_state, "s"), None, file=Path(file_name), digest=64 * "0")
    assert chosen.name == f"{MOBILE}{'_320' if small else ''}_fpn"
    given = choose(recognize(mobile_state, "s"), f"coco:{MOBILE}_320_fpn", file=Path(file_name), digest=64 * "0")
    assert (given.name, given.chosen_by) == (f"{MOBILE}_320_fpn", "")
    assert chosen.chosen_by.startswith(f"settings of {chosen.name}, {told} (--architecture ")


ROI, RPN, RETINA = "roi_heads.box_predictor.", "rpn.head.", "head.classification_head.cls_logits."
WRONG = [
    # (detector, tensor, shape, message), of two labels
    ("fasterrcnn", f"{ROI}bbox_pred.weight", (7, 1024), "has 7 rows instead of 8 of 2 labels"),
    ("fasterrcnn", f"{ROI}bbox_pred.weight", (4, 1024), "has 4 rows instead of 8 of 2 labels"),
    ("fasterrcnn", f"{ROI}bbox_pred.weight", (12, 1024), "has 12 rows instead of 8 of 2 labels"),
    ("fasterrcnn", f"{ROI}bbox_pred.bias", (), "is a single number"),
    ("fasterrcnn", f"{ROI}cls_score.bias", (1,), "has 1 rows instead of 2 of 2 labels"),
    ("fasterrcnn", f"{ROI}cls_score.bias", (3,), "has 3 rows instead of 2 of 2 labels"),
    ("fasterrcnn", f"{ROI}cls_score.weight", (), "is a single number"),
    ("fasterrcnn", f"{RPN}cls_logits.bias", (), "is a single number"),
    ("fasterrcnn", f"{RPN}bbox_pred.weight", (), "is a single number"),
    ("retinanet", f"{RETINA}weight", (20, 256, 3, 3), "has 20 rows, no multiple of 9"),
    ("retinanet", f"{RETINA}weight", (), "is a single number"),
    ("retinanet", f"{RETINA}bias", (20,), "has 20 rows instead of 18 of 2 labels"),
    ("retinanet", "head.regression_head.bbox_reg.bias", (20,), "has 20 rows instead of 36;"),
]


@pytest.fixture(scope="module")
def head_states() -> dict[str, State]:
    """Detectors of two labels with the shapes of their heads' last layers; all other tensors have one value."""
    return {
        kind: {
            key: torch.zeros(value.shape if re.search("cls_|bbox_", key) else 1)
            for key, value in state_of(f"{kind}_resnet50_fpn", classes=2).items()
        }
        for kind in ("fasterrcnn", "retinanet")
    }


@pytest.mark.parametrize(("kind", "name", "shape", "message"), WRONG, ids=[f"{one[1]} {one[2]}" for one in WRONG])
def test_rows_of_another_number(
    kind: str,
    name: str,
    shape: tuple[int, ...],
    message: str,
    head_states: dict[str, State],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "wrong.pth"
    assert name in head_states[kind]
    torch.save(head_states[kind] | {name: torch.zeros(shape)}, file)
    words = ["--weights", str(file), "--annotations", str(annotations(tmp_path, 1)), "--output", str(tmp_path / "run")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{file}: {name} {message}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_norm_of_another_shape_is_left_to_the_comparison(shape: tuple[int, ...]) -> None:
    """Broadcast, a weight without dimensions would become one of the right shape."""
    weight = torch.ones(shape)
    state = {"backbone.body.bn1.weight": weight, "backbone.body.bn1.running_var": torch.ones(4)}
    assert torch.equal(convert(state, (), norm_eps=0.0, source="s")["pyramid.body.bn1.weight"], weight)


def test_a_published_file_is_known_by_its_sha256(mobile_state: State) -> None:
    published, recognized = f"{MOBILE}_320_fpn", recognize(mobile_state, "s")
    digest = f"{PUBLISHED[published].sha256}{56 * '0'}"
    chosen = choose(recognized, None, file=Path("renamed.pth"), digest=digest)
    assert (chosen.name, chosen.about, chosen.chosen_by) == (published, PUBLISHED[published], "")
    with pytest.raises(
        UserError, match=rf"architecture: {MOBILE}_fpn: a\.pth is torchvision's published file of {published}"
    ):
        choose(recognized, f"{MOBILE}_fpn", file=Path("a.pth"), digest=digest)


def test_user_errors(
    small_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(weights: object, *more: object) -> str:
        words = ["--weights", str(weights), "--output", str(tmp_path / "bad"), *map(str, more)]
        assert main(words) == 2
        return capsys.readouterr().err

    unknown = message("fasterrcnn_resnet_50")
    assert (
        "no such file, and no published detector; known: fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2" in unknown
    )
    assert "has 3 labels, COCO has 91; give --annotations" in message(small_file)
    assert "has 3 labels; " in message(small_file, "--annotations", annotations(tmp_path, 1, 2, 3, 9))

    state: State = torch.load(small_file)
    cut = tmp_path / "cut.pth"
    torch.save({key: value for key, value in state.items() if key != "backbone.fpn.layer_blocks.1.0.bias"}, cut)
    three = ("--annotations", annotations(tmp_path, 1, 2))
    assert (
        "does not fit the detector (names as in this project): pyramid.fpn.layer_blocks.1.0.bias is missing"
        in message(cut, *three)
    )
    torch.save(state | {"extra.weight": torch.zeros(1)}, cut)
    assert "extra.weight has no place in this project's detectors" in message(cut, *three)
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, cut)
    assert (
        "no detector with FPN of torchvision, detectron2 or mmdetection (first of 1 tensors: layer1.0.conv1.weight)"
        in message(cut)
    )

    assert "caffe: is for weights of detectron2 and mmdetection" in message(small_file, *three, "--caffe", "true")

    assert f"architecture: {MOBILE}_320_fpn: {small_file} has the tensors of retinanet_resnet50_fpn\n" in message(
        small_file, *three, "--architecture", f"{MOBILE}_320_fpn"
    )
    assert (
        f"architecture: is empty; {small_file} has the tensors of retinanet_resnet50_fpn: give that name, or leave it out"
        in message(small_file, *three, "--architecture", "")
    )

    # A published file that is not the published one.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / PUBLISHED["retinanet_resnet50_fpn"].file).write_bytes(small_file.read_bytes())
    wrong = message("retinanet_resnet50_fpn")
    assert "its sha256 begins with" in wrong
    assert "in place of eeacb38b" in wrong
    assert not (tmp_path / "bad" / "result.json").exists()
    with pytest.raises(UserError, match=r"init: coco:fasterrcnn_resnet50: no published detector of torchvision"):
        find_weights("coco:fasterrcnn_resnet50", "init")


def test_classes_of_coco_are_eighty_with_holes() -> None:
    classes = coco_classes()
    assert len(classes) == 80
    assert (classes[1], classes[13], classes[90]) == ("person", "stop sign", "toothbrush")
    assert 12 not in classes
