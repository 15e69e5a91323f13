"""Teachers that see nothing: whatever the image, the same outputs. Their files load whole, and they would teach noise that looks like soft labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from ssld.shared.errors import UserError
from ssld.shared.models import teacher
from ssld.shared.models.backbones import input_settings
from ssld.shared.models.constant_outputs import refuse_constant, two_images
from ssld.shared.models.teacher import FrozenTeacher
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.distillation.teacher import _refuse_constant as refuse_constant_detector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import build_detector


def file_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    torch.manual_seed(0)
    tensors = timm.create_model("test_resnet", num_classes=4).state_dict()
    change(tensors)
    save_file(tensors, folder / "t.safetensors")
    return folder / "t.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["fc.weight"].zero_(), "its outputs are the same for every image"),
        (lambda t: t["bn1.weight"].zero_(), "its outputs are the same for every image"),
        (lambda t: t["bn1.running_var"].fill_(1e30), "its outputs are the same for every image"),
        (lambda t: t["bn1.running_var"].fill_(-1), "its outputs are NaN or infinite for every image"),
    ],
)
def test_a_teacher_that_sees_nothing_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    file = file_of(tmp_path, change)
    for fold in (False, True):
        with pytest.raises(UserError) as caught:
            FrozenTeacher(str(file), arch="test_resnet", fold_batchnorm=fold)
        assert str(caught.value) == (
            f"{file}: {said}: its weights are zero or damaged, or of another arch; give another file"
        )


def test_features_alone_need_no_head(tmp_path: Path) -> None:
    file = str(file_of(tmp_path, lambda tensors: tensors["fc.weight"].zero_()))
    FrozenTeacher(file, arch="test_resnet", classes=False)
    blind = str(file_of(tmp_path, lambda tensors: tensors["bn1.weight"].zero_()))
    with pytest.raises(UserError, match="its outputs are the same for every image"):
        FrozenTeacher(blind, arch="test_resnet", classes=False)


def test_sound_weights_pass_and_random_ones_are_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(file_of(tmp_path, lambda tensors: None))
    FrozenTeacher(file, arch="test_resnet", size=64)
    checked: list[str] = []
    monkeypatch.setattr(teacher, "refuse_constant", lambda outputs, name: checked.append(str(name)))
    FrozenTeacher("random:test_vit")
    assert checked == []
    FrozenTeacher(file, arch="test_resnet", size=64)
    assert checked == [file]


def test_outputs_that_differ_by_rounding_are_the_same() -> None:
    outputs = torch.tensor([[1e3, -2.0, 0.0], [1e3, -2.0, 0.0]])
    for shift, refused in ((0.0, True), (1e-5, True), (1.0, False)):
        outputs[1, 1] = -2.0 + shift
        if refused:
            with pytest.raises(UserError, match=r"^x: its outputs are the same"):
                refuse_constant(outputs, "x")
        else:
            refuse_constant(outputs, "x")
    images = two_images(30, 45)
    assert images.shape == (2, 3, 30, 45)
    assert images[0].unique().numel() > 20
    assert images[1].unique().tolist() == [0]


def test_a_new_detector_whose_logits_are_nearly_its_bias_passes() -> None:
    """RetinaNet begins with a bias of -4.6 and weights so small that two images differ by a few steps of float32 in its narrowest heads."""
    torch.manual_seed(0)
    body = timm.create_model("test_resnet", features_only=True)
    config = DetectorConfig(kind="retinanet", fpn_channels=16)
    model = build_detector(config, classes=3, body=body, arch="test_resnet", inputs=input_settings(body, {}))
    teacher = FrozenDetector(model.eval(), {})
    refuse_constant_detector(teacher, Path("t"), torch.device("cpu"))
    torch.nn.init.zeros_(next(p for n, p in model.named_parameters() if "logits" in n and n.endswith("weight")))
    with pytest.raises(UserError, match="its outputs are the same for every image"):
        refuse_constant_detector(teacher, Path("t"), torch.device("cpu"))
