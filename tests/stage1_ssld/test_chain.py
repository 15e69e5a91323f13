"""Provenance in file metadata, along the chain of teacher, student and further training; and run lengths that change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import create_classifier, input_settings, save_backbone
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.references import parse_reference
from ssld.shared.models.teacher import FrozenTeacher
from ssld.stage1_ssld import distill, teach

CLASSES = ["disc", "ring", "stripes"]


def backbone(path: Path, names: list[str], arch: str = "test_convnext", **facts: Any) -> str:
    torch.manual_seed(3)
    net = timm.create_model(arch, num_classes=len(names))
    save_backbone(path, net, arch=arch, inputs=input_settings(net, {}), classes=len(names), class_names=names, **facts)
    return str(path)


def test_licences_travel_along_the_chain(
    distill_settings: dict[str, Any], arguments: Callable[..., list[str]], call: Callable[..., int], tmp_path: Path
) -> None:
    start = backbone(tmp_path / "start.safetensors", CLASSES, licence="mit")
    strict = backbone(tmp_path / "strict.safetensors", CLASSES, "test_resnet", licence="cc-by-nc-4.0")
    for model, expected in (("random:test_convnext", "cc-by-nc-4.0"), (start, "mit AND cc-by-nc-4.0")):
        name = expected[:3]
        settings = distill_settings | {"steps": 1, "student": {"model": model}, "teacher": {"model": strict}}
        assert call(distill.main, arguments(settings, name)) == 0
        metadata = read_metadata(tmp_path / name / "student.safetensors")
        assert metadata["licence"] == expected
        assert metadata["teacher"]["licence"] == "cc-by-nc-4.0"


def test_a_network_that_starts_from_a_folder_writes_a_file_that_says_its_architecture(
    distill_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    call: Callable[..., int],
    tmp_path: Path,
    tiny: Any,
) -> None:
    net = timm.create_model("test_resnet", num_classes=5)
    timm.models.save_for_hf(net, str(tmp_path / "folder"), safe_serialization=True)
    settings = {key: value for key, value in distill_settings.items() if key not in ("student", "teacher")}
    settings |= {
        "steps": 1,
        "model": {"model": str(tmp_path / "folder")},
        "data": settings["data"] | {"train": [str(tiny.train)]},
    }
    assert call(teach.main, arguments(settings)) == 0
    reference = parse_reference(str(tmp_path / "run" / "teacher.safetensors"))
    assert reference.arch == "test_resnet"
    assert create_classifier(reference)[0].net.num_classes == 3


def test_the_baseline_needs_a_teacher_of_its_own_classes(
    distill_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    user_error: Callable[..., str],
    tmp_path: Path,
) -> None:
    settings = distill_settings | {"objective": "labels", "steps": 1}
    other = backbone(tmp_path / "other.safetensors", ["disc", "ring", "moon"])
    message = user_error(distill.main, arguments(settings | {"teacher": {"model": other}}))
    assert "its classes are not those of the training images: only one of them has 'moon'" in message
    nameless = backbone(tmp_path / "nameless.safetensors", ["a"] * 7)
    teacher = FrozenTeacher(nameless)
    teacher.class_names = None
    with pytest.raises(UserError, match="has 7 classes, the training images have 3"):
        teacher.match_classes(CLASSES, 3, "the training images")


def test_a_teacher_answers_in_the_order_of_the_names_it_is_given(tmp_path: Path) -> None:
    file = backbone(tmp_path / "teacher.safetensors", CLASSES)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    own, other = FrozenTeacher(file), FrozenTeacher(file)
    other.match_classes(["stripes", "disc", "ring"], 3, "somebody")
    assert torch.equal(other(pixels), own(pixels)[:, [2, 0, 1]])


def test_a_length_on_the_command_line_replaces_the_files_and_fewer_steps_than_done_are_refused(
    distill_settings: dict[str, Any],
    arguments: Callable[..., list[str]],
    call: Callable[..., int],
    user_error: Callable[..., str],
    tmp_path: Path,
) -> None:
    settings = distill_settings | {"steps": None, "train_epochs": 7, "data": distill_settings["data"] | {"val": None}}
    assert call(distill.main, arguments(settings, "run", "--steps", "3")) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["steps"] == 3
    message = user_error(distill.main, arguments(settings, "run", "--steps", "2"))
    assert "is at step 3 already, beyond the 2 requested" in message
