"""Detectors built from Python train in your own loop, and their file is the commands' detector file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ssld
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect import train
from ssld.stage2_detect.data.padding import pad_images, pad_targets
from ssld.stage2_detect.training.new_detector import KINDS

SMALL: dict[str, Any] = {
    "fpn_channels": 16,
    "freeze_norm": False,
    "rpn": {"anchor_sizes": [8, 16, 32, 64, 128], "post_nms_top_n_train": 40, "post_nms_top_n_test": 30},
    "roi": {"hidden": 32, "samples_per_image": 24},
    "dense": {"convolutions": 1},
}


def scene() -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """A dark image with one bright box, its corners and its label."""
    pixels = torch.full((3, 64, 64), 20, dtype=torch.uint8)
    pixels[:, 16:44, 12:40] = 220
    return pixels, np.array([[12, 16, 40, 44]], np.float32), np.array([1])


def test_kinds() -> None:
    assert set(KINDS) == {"faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "gfl", "retinanet"}


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_it_trains_and_its_file_predicts(kind: str, teacher_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = ssld.build_detector(kind, backbone=teacher_file, classes=["wide", "tall"], **SMALL)
    weights = load_file(teacher_file)
    body = detector.model.pyramid.body.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in body.items())
    pixels, boxes, labels = scene()
    images, targets = pad_images([pixels] * 2, [1.0] * 2), pad_targets([(boxes, labels)] * 2, [0, 1])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    totals = []
    for _ in range(30):
        losses = detector(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < totals[0] / 2
    detector.save(tmp_path / "own.safetensors", step=30)
    loaded = ssld.load_detector(tmp_path / "own.safetensors")
    assert loaded.class_names == ("wide", "tall")
    assert loaded.category_ids == (1, 2)
    metadata = read_metadata(tmp_path / "own.safetensors", kind="detector")
    assert (metadata["step"], metadata["licence"]) == (30, "apache-2.0")
    with torch.no_grad():
        expected, actual = detector.eval()(images)[0], loaded.model(images)[0]
    assert torch.equal(actual.boxes_N4, expected.boxes_N4)
    assert torch.equal(actual.scores_N, expected.scores_N)


def test_a_recipe_gives_the_architecture_of_the_command(
    train_settings: dict[str, Any], arguments: Callable[..., list[str]], call: Callable[..., int], tmp_path: Path
) -> None:
    assert call(train.main, arguments(train_settings | {"steps": 1}, "run")) == 0
    built = ssld.build_detector(tmp_path / "run.yaml", backbone="random:test_resnet", classes=2)
    built.save(tmp_path / "built.safetensors")
    files = [
        read_metadata(file, kind="detector")
        for file in (tmp_path / "run/detector.safetensors", tmp_path / "built.safetensors")
    ]
    for key in ("model", "resize", "arch", "mean", "std"):
        assert files[0][key] == files[1][key]
    shapes = [{name: tensor.shape for name, tensor in load_file(file).items()} for file in
              (tmp_path / "run/detector.safetensors", tmp_path / "built.safetensors")]  # fmt: skip
    assert shapes[0] == shapes[1]
    shipped = ssld.build_detector("gfl_r18_1x", backbone="random:test_resnet", classes=1, fpn_channels=16)
    assert (shipped.config.kind, shipped.config.fpn_channels) == ("gfl", 16)
    assert shipped.resize.short_side == 800


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("faster_rcnnn", {}, "faster_rcnnn: no such file, and no recipe of this name; did you mean 'faster_rcnn'?"),
        ("gfl", {"freeze": 1}, "model of gfl: freeze: unknown key; did you mean 'freeze_stages'?"),
        ("gfl", {"classes": 0}, "classes: expected a number from 1 on, or a list of different names (given: 0)"),
        ("gfl", {"classes": True}, "classes: expected a number from 1 on, or a list of different names (given: True)"),
        ("gfl", {"classes": ["a", "a"]}, "classes: expected"),
        ("gfl", {"classes": "cat"}, "classes: expected"),
        *(
            ("gfl", {"classes": classes}, "classes: expected")
            for classes in (True, 2.0, None, {"a", "b"}, {"a": 1}, (n for n in "ab"), [["a"]], [1, "a"], ["", "b"], -1)
        ),
        ("gfl", {"kind": "retinanet"}, "kind: gfl is already named as the first argument; leave kind='retinanet' out"),
        ("gfl", {"backbone": None}, "backbone: a reference is needed"),
        ("gfl", {"backbone": "nowhere.safetensors"}, "nowhere.safetensors: no such file or folder"),
    ],
)
def test_a_mistake_raises(recipe: str, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"backbone": "random:test_resnet", "classes": 2} | changes
    with pytest.raises(UserError) as raised:
        ssld.build_detector(recipe, **given)
    assert str(raised.value).startswith(message)


def test_train_is_the_command(
    train_settings: dict[str, Any], arguments: Callable[..., list[str]], call: Callable[..., int], tmp_path: Path
) -> None:
    assert call(train.main, arguments(train_settings, "command")) == 0
    result = ssld.train(tmp_path / "command.yaml", output=tmp_path / "function")
    files = [load_file(tmp_path / name / "detector.safetensors") for name in ("command", "function")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0] | files[1])
    assert 0.0 <= result["metrics"]["AP"] <= result["metrics"]["AP50"] <= 1.0
    with pytest.raises(UserError, match=r"optim\.lrr: unknown key"):
        ssld.train("faster_rcnn", output=tmp_path / "other", **{"optim.lrr": 1})
    with pytest.raises(UserError) as raised:
        ssld.train(output=tmp_path / "other")
    assert str(raised.value).splitlines() == [
        f"the given settings: {key}: missing; give it in the YAML file or pass {argument}"
        for key, argument in (
            ("batch_size", "batch_size=..."),
            ("data", "data=..."),
            ("optim", "optim={'lr': ..., 'reference_batch': ...}"),
        )
    ]


def test_a_yaml_without_a_model_is_refused_and_a_path_names_a_kind(tmp_path: Path) -> None:
    given: dict[str, Any] = {"backbone": "random:test_resnet", "classes": np.int64(2), "fpn_channels": 16}
    for text in ("", "resize: {short_side: 64}\n", "model: [1]\n"):
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"x\.yaml: has no group `model`"):
            ssld.build_detector(tmp_path / "x.yaml", **given)
    detector = ssld.build_detector(Path("gfl"), **given)
    assert (detector.config.kind, detector.class_names) == ("gfl", ("class 0", "class 1"))
    for facts, message in (
        ({"kind": "x"}, "save: kind: set by the detector itself; give it another name"),
        ({"data": 1, "class_names": []}, "save: class_names, data: set by"),
        ({"x": torch.zeros(2)}, "save: Object of type Tensor is not JSON serializable"),
    ):
        with pytest.raises(UserError) as raised:
            detector.save(tmp_path / "out.safetensors", **facts)
        assert str(raised.value).startswith(message)
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        detector.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.yaml"]
