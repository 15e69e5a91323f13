"""Start from weights that torchvision publishes: settings that follow them, rows by class name, another backbone below their heads.

A small published detector stands in: its state dict is written under torchvision's names, with COCO's labels, into a torch hub's cache.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ssld.shared.models.backbones import InputSettings
from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import published, train
from ssld.stage2_detect.foreign.coco_classes import coco_classes
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import build_detector

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]
LABELS = tuple(coco_classes())
MODEL: Settings = {
    "kind": "faster_rcnn",
    "fpn_channels": 16,
    "fpn_norm": "batch",
    "freeze_norm": False,
    "rpn": {
        "anchor_sizes": [8, 12, 16, 24, 32],
        "anchor_grid": "torchvision",
        "convolutions": 2,
        "post_nms_top_n_train": 40,
    },
    "roi": {
        "hidden": 32,
        "convolutions": 1,
        "fully_connected": 1,
        "norm": "batch",
        "sampling_ratio": 2,
        "samples_per_image": 24,
    },
}
# Names of this project -> names of torchvision.
NAMES = (
    (r"pyramid\.(.+)", r"backbone.\1"),
    (r"rpn\.head\.conv\.(\w+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn\.head\.more_convs\.0\.(\w+)", r"rpn.head.conv.1.0.\1"),
    (r"rpn\.head\.objectness\.(\w+)", r"rpn.head.cls_logits.\1"),
    (r"rpn\.head\.deltas\.(\w+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_heads\.heads\.0\.convs\.0\.(\w+)", r"roi_heads.box_head.0.0.\1"),
    (r"roi_heads\.heads\.0\.norms\.0\.(\w+)", r"roi_heads.box_head.0.1.\1"),
    (r"roi_heads\.heads\.0\.fc1\.(\w+)", r"roi_heads.box_head.5.\1"),
    (r"roi_heads\.heads\.0\.logits\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_heads\.heads\.0\.deltas\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Weights of `coco:tiny` under the names of this project, for all of torchvision's 91 labels; the file is in the cache."""
    torch.manual_seed(5)
    body = timm.create_model("test_resnet", features_only=True)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
    config = DetectorConfig.model_validate(MODEL)
    state = build_detector(config, classes=90, body=body, arch="test_resnet", inputs=inputs).state_dict()
    theirs = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor))
        new = next(re.sub(pattern, there, name) for pattern, there in NAMES if re.fullmatch(pattern, name))
        if "heads.0.logits" in name:
            tensor = torch.cat((tensor[-1:], tensor[:-1]))  # background first
        if "heads.0.deltas" in name:
            tensor = torch.cat((torch.zeros_like(tensor[:4]), tensor))
        theirs[new] = tensor
    torch.save(theirs, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    file = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    cache = tmp_path / "home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / file).write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(
        published.PUBLISHED,
        "tiny",
        published.Published(file, MODEL, 1.0, arch="test_resnet", resize={"interpolation": "bilinear"}),
    )
    return state


@pytest.fixture
def settings(train_settings: Settings, tmp_path: Path) -> Settings:
    """A run that changes nothing, of a class of COCO and a new one; without a group `model`."""
    changed = {key: value for key, value in train_settings.items() if key not in ("backbone", "model")}
    data = dict(changed["data"])
    for part in ("train", "val"):
        content = json.loads(Path(data[f"{part}_annotations"]).read_text())
        content["categories"] = [{"id": 7, "name": "tall"}, {"id": 3, "name": "stop sign"}]
        file = tmp_path / f"signs_{part}.json"
        file.write_text(json.dumps(content))
        data[f"{part}_annotations"] = str(file)
    optim = changed["optim"] | {"lr": 1e-30}
    return changed | {"data": data, "steps": 1, "init": "coco:tiny", "optim": optim}


def test_settings_and_weights_follow_the_published_ones(
    weights: dict[str, Tensor], settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    assert call(train.main, arguments(settings | {"model": {"freeze_stages": 1}})) == 0
    file = tmp_path / "run" / "detector.safetensors"
    metadata, tensors = read_metadata(file, kind="detector"), load_file(file)
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for model in (metadata["model"], resolved["model"]):
        assert model["rpn"]["anchor_sizes"] == [8, 12, 16, 24, 32]
        assert (model["fpn_norm"], model["roi"]["convolutions"], model["freeze_stages"]) == ("batch", 1, 1)
    assert resolved["resize"]["interpolation"] == "bilinear"
    assert metadata["arch"] == "test_resnet"
    assert metadata["licence"] == "bsd-3-clause"
    assert metadata["init"] == "coco:tiny"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "rows of 1 classes kept (stop sign), 1 new, at random (tall), 79 dropped (person" in log
    sign = 13 - 1  # row of the label 13
    for name, tensor in tensors.items():
        if ".logits." in name:
            assert torch.equal(tensor[1], weights[name][sign])
            assert torch.equal(tensor[2], weights[name][-1])
        elif "heads.0.deltas" in name:
            assert torch.equal(tensor[4:], weights[name][4 * sign : 4 * sign + 4])
        elif "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, weights[name]), name


def test_another_backbone_goes_below_the_heads(
    weights: dict[str, Tensor], settings: Settings, arguments: Arguments, call: Call, tmp_path: Path
) -> None:
    assert call(train.main, arguments(settings | {"backbone": "random:test_resnet"})) == 0
    tensors = load_file(tmp_path / "run" / "detector.safetensors")
    log = (tmp_path / "run" / "log.txt").read_text()
    body = {name for name in tensors if name.startswith("pyramid.body.")}
    assert (
        f"coco:tiny: loaded {len(tensors) - len(body)}/{len(tensors)} tensors, all but the {len(body)} of the backbone"
        in log
    )
    assert "random:test_resnet: random weights" in log
    assert "is unused" not in log
    assert torch.equal(tensors["rpn.head.conv.weight"], weights["rpn.head.conv.weight"])
    kernels = [name for name in body if tensors[name].ndim == 4]
    assert kernels
    assert not any(torch.equal(tensors[name], weights[name]) for name in kernels)


def test_user_errors(
    weights: dict[str, Tensor], settings: Settings, arguments: Arguments, user_error: Callable[..., str], tmp_path: Path
) -> None:
    def message(**changes: Any) -> str:
        return user_error(train.main, arguments(settings | changes, "bad"))

    unknown = message(init="coco:tinny")
    assert "init: coco:tinny: no published detector of torchvision" in unknown
    assert "known: fasterrcnn_resnet50_fpn, " in unknown
    assert "model.rpn.anchor_grid is exact, the weights of coco:tiny have torchvision; leave it out" in message(
        model={"rpn": {"anchor_grid": "exact"}}
    )
    assert "model.kind is retinanet, the weights of coco:tiny have faster_rcnn" in message(model={"kind": "retinanet"})
    other = message(backbone="random:test_efficientnet")
    assert "backbone: random:test_efficientnet is a test_efficientnet" in other
    assert "the heads of coco:tiny belong to a test_resnet" in other
    (file,) = (tmp_path / "home" / "hub" / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: its sha256 begins with" in message()
    without = {key: value for key, value in settings.items() if key != "init"} | {"backbone": "random:test_resnet"}
    assert "model.fpn_norm: batch: its new BatchNorm layers would stay as they are" in user_error(
        train.main, arguments(without | {"model": {"fpn_norm": "batch"}}, "bad")
    )
    assert not (tmp_path / "bad" / "result.json").exists()
