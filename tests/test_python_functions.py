"""`import ssld`: functions, imported at their first use, that run the same code as the commands."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file

import ssld
from ssld.shared.config.command import call_command
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, save_backbone
from ssld.stage1_ssld import distill
from ssld.stage1_ssld.config import DistillConfig

Settings = dict[str, Any]


@pytest.mark.process
def test_the_import_does_not_wait_for_torch() -> None:
    code = "import ssld, sys; assert 'torch' not in sys.modules; ssld.load_backbone; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names() -> None:
    assert set(ssld.__all__) <= set(dir(ssld))
    for name in ssld.__all__:
        function = getattr(ssld, name)
        assert inspect.isfunction(function)
        assert inspect.getdoc(function)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        ssld.distil  # type: ignore[attr-defined] # noqa: B018


def test_distill_is_the_command(
    distill_settings: Settings, arguments: Callable[..., list[str]], call: Callable[..., int], tmp_path: Path
) -> None:
    assert call(distill.main, arguments(distill_settings, "command")) == 0
    threads = torch.get_num_threads()
    file = tmp_path / "command.yaml"
    result = ssld.distill(file, output=tmp_path / "function", **{"data.train": distill_settings["data"]["train"]})
    assert torch.get_num_threads() == threads
    assert list(result["outputs"]) == ["student.safetensors"]
    files = [load_file(tmp_path / name / "student.safetensors") for name in ("command", "function")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert 0.0 <= result["metrics"]["agreement"] <= 1.0
    assert ssld.distill(file, output=tmp_path / "function") == result, "a finished run is not repeated"


def test_what_a_configuration_leaves_out_follows_from_the_settings_over_it(
    distill_settings: Settings, tmp_path: Path
) -> None:
    given = distill_settings | {"student": {"model": "timm:resnet18"}, "output": tmp_path}
    config = DistillConfig(**given)
    assert config.student.batchnorm == "eval"
    used: list[DistillConfig] = []
    for settings in ({}, {"student.model": "random:resnet18"}, {"student.model": "timm:resnet34"}):
        call_command(DistillConfig, used.append, config, settings)
    call_command(DistillConfig, used.append, used[1], {"student.model": "timm:resnet34"})
    assert [one.student.batchnorm for one in used] == ["eval", "batch", "eval", "eval"]


def test_settings_lie_on_a_configuration_and_replace_an_alternative(distill_settings: Settings, tmp_path: Path) -> None:
    config = DistillConfig(**distill_settings, output=tmp_path / "one")
    result = ssld.distill(config, **{"optim.lr": 0.003}, train_images=16, output=tmp_path / "two", log_every=1)
    assert result["config"]["optim"] == config.model_dump(mode="json")["optim"] | {"lr": 0.003}
    assert (result["config"]["steps"], result["config"]["train_images"]) == (None, 16)
    assert not (tmp_path / "one").exists()


def test_accelerate_is_as_it_was(distill_settings: Settings, tmp_path: Path) -> None:
    """One precision after the other, which accelerate refuses in one process, and what the caller had set up stays."""
    AcceleratorState._reset_state(True)
    own = Accelerator(cpu=True, mixed_precision="no")
    for precision in ("bf16", "fp32"):
        ssld.distill(**distill_settings | {"steps": 1, "precision": precision}, output=tmp_path / precision)
    assert own.mixed_precision == "no"
    assert PartialState().device.type == "cpu"


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (None, {"stepz": 3}, "the given settings: stepz: unknown key; did you mean 'steps'?"),
        ("resnet50e", {}, "resnet50e: no such file, and no recipe of this name; did you mean 'resnet50d'?"),
        (None, {"teacher": {"model": "nowhere.safetensors"}}, "nowhere.safetensors: no such file or folder"),
    ],
)
def test_a_mistake_raises(
    config: str | None, settings: Settings, message: str, distill_settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        ssld.distill(config, **distill_settings | settings, output=tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_by_name_and_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        ssld.distill("resnet50d", data={"train": "nothing"}, output=tmp_path / "run", optim={"lr": "fast"})
    line = str(raised.value)
    assert "stage1_ssld/configs/resnet50d.yaml with the given settings: optim.lr: " in line
    with pytest.raises(TypeError, match="expected a DistillConfig"):
        ssld.distill(3)  # type: ignore[arg-type]


def test_memory_that_ran_out_raises_the_line_of_the_command(
    distill_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(config: DistillConfig) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(distill, "distill", work)
    with pytest.raises(UserError, match=r"out of memory: CUDA .* --auto_batch true"):
        ssld.distill(**distill_settings, output=tmp_path / "run")

    def bug(config: DistillConfig) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(distill, "distill", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        ssld.distill(**distill_settings, output=tmp_path / "run")


def test_a_backbone_is_a_plain_timm_network(teacher_file: Path) -> None:
    net: Any = ssld.load_backbone(teacher_file)
    expected: Any = timm.create_model("test_resnet", num_classes=3).eval()
    expected.load_state_dict(load_file(teacher_file))
    pixels = torch.rand(2, 3, 64, 64)
    assert not net.training
    assert type(net) is type(expected)
    assert torch.equal(net(pixels), expected(pixels))
    assert net.pretrained_cfg["label_names"] == ["disc", "ring", "stripes"]
    body: Any = ssld.load_backbone(str(teacher_file), features_only=True)
    last: Any = expected.forward_features(pixels)
    assert torch.allclose(body(pixels)[-1], last, atol=1e-6)


def test_a_backbone_brings_its_normalization(teacher_file: Path, tmp_path: Path) -> None:
    """timm's own transform, made from the network, gives the metadata of the file: its mean and std, not those of timm's name."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    inputs = InputSettings(mean, std, (160, 160), "bicubic", False)
    changed = tmp_path / "other.safetensors"
    save_backbone(changed, load_file(teacher_file), arch="test_resnet", inputs=inputs, classes=3)
    net = ssld.load_backbone(changed)
    data = timm.data.resolve_model_data_config(net)
    transform: Any = timm.data.create_transform(**data | {"crop_pct": 1.0})
    grey = transform(Image.fromarray(np.full((200, 200, 3), 128, np.uint8)))
    assert grey.mean((1, 2)).tolist() == pytest.approx(
        ((128 / 255 - np.array(mean)) / np.array(std)).tolist(), abs=1e-5
    )


def test_a_backbone_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        ssld.load_backbone(tmp_path / "student.safetensors")


def test_another_type_than_a_path_is_named() -> None:
    number: Any = 3
    with pytest.raises(UserError, match=r"^load_backbone: expected a model reference as text, or a path, got int$"):
        ssld.load_backbone(number)
    with pytest.raises(UserError, match=r"^load_detector: expected the path of a detector file, got int$"):
        ssld.load_detector(number)
