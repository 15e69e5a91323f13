"""The commands of stage 1 with models from elsewhere: any is evaluated, and one that is offline or does not fit ends before data are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ssld.shared.models.backbones import create_classifier
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.references import parse_reference
from ssld.stage1_ssld import evaluate
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.distill import main as distill

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a source of images fails."""
    monkeypatch.setattr(ImageSource, "__init__", lambda *_: pytest.fail("images were opened"))


def evaluation(tiny: Any, output: Path, **flags: str) -> list[str]:
    given = {"data.path": str(tiny.val), "output": str(output), "threads": "1", "workers": "0", "device": "cpu"}
    return [part for key, value in (given | flags).items() for part in (f"--{key}", value)]


def test_a_folder_and_a_state_dict_are_evaluated_like_their_file(
    tiny: Any, teacher_file: Path, call: Any, tmp_path: Path
) -> None:
    """The class names of the folder decide which class is which: in it they stand in another order than those of the images."""
    metadata = read_metadata(teacher_file)
    net: Any = create_classifier(parse_reference(str(teacher_file)))[0].net
    head = net.get_classifier()
    turned = [2, 0, 1]
    with torch.no_grad():
        head.weight.copy_(head.weight[turned].clone())
        head.bias.copy_(head.bias[turned].clone())
    names = [metadata["class_names"][number] for number in turned]
    timm.models.save_for_hf(
        net,
        str(tmp_path / "folder"),
        safe_serialization=True,
        model_config={"label_names": names},
        data_config={"mean": metadata["mean"], "std": metadata["std"], "interpolation": "bilinear", "crop_pct": 0.875},
    )
    torch.save({"net": net.state_dict()}, tmp_path / "state.pth")
    results = {}
    for name, flags in {
        "file": {"model": str(teacher_file), "image_size": "32"},
        "folder": {"model": str(tmp_path / "folder"), "image_size": "32"},
        "state": {"model": str(tmp_path / "state.pth"), "arch": "test_resnet", "image_size": "32"},
    }.items():
        assert call(evaluate.main, evaluation(tiny, tmp_path / f"run_{name}", **flags)) == 0
        results[name] = json.loads((tmp_path / f"run_{name}" / "result.json").read_text())["metrics"]
    assert results["folder"] == pytest.approx(results["file"])
    assert results["state"]["images"] == results["file"]["images"]
    assert "read from 'net'" in (tmp_path / "run_state" / "log.txt").read_text()


def test_what_is_not_here_is_said_before_anything_else(
    unread: None, distill_settings: Settings, arguments: Arguments, user_error: Any, tiny: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for teacher in ("timm:test_resnet", "hf-hub:org/name"):
        line = user_error(distill, arguments(distill_settings | {"teacher": {"model": teacher}}))
        assert line.startswith(f"teacher.model: {teacher}: not on this machine, ")
        assert "HF_HUB_OFFLINE is set" in line
        line = user_error(evaluate.main, evaluation(tiny, tmp_path / "run", model=teacher))
        assert line.startswith(f"model: {teacher}: not on this machine, ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": {"model": ""}}, "teacher.model: names no model; give timm:NAME"),
        ({"teacher": {"model": " "}}, "teacher.model: names no model"),
        ({"student": {"model": ""}}, "student.model: names no model"),
        ({"student": {"model": "x" * 2000}}, "student.model: not a model name"),
        ({"student": {"model": "random:test_resnet.nonsense"}}, "timm has no weights called 'nonsense' for test_resnet; it has r160_in1k"),
        ({"teacher": {"model": "random:test_maxvit", "size": 50}}, "teacher.model: random:test_maxvit: test_maxvit cannot work at 50 pixels"),
        ({"teacher": {"model": "random:vit_small_patch16_dinov3", "size": 100}}, "vit_small_patch16_dinov3 cannot work at 100 pixels (Input"),
    ],
)  # fmt: skip
def test_mistakes_before_data_are_read(
    change: Settings, message: str, unread: None, distill_settings: Settings, arguments: Arguments, user_error: Any, tmp_path: Path
) -> None:  # fmt: skip
    assert message in user_error(distill, arguments(distill_settings | change))
    assert not (tmp_path / "run").exists()


def test_a_vit_student_at_the_size_of_the_views(
    distill_settings: Settings, arguments: Arguments, call: Any, tmp_path: Path
) -> None:
    """From a folder whose arguments go into its file, which opens again, also at another size."""
    small: dict[str, Any] = {"img_size": 64, "depth": 1, "embed_dim": 12, "num_heads": 1, "dynamic_img_size": False}
    timm.models.save_for_hf(timm.create_model("test_vit", **small), str(tmp_path / "vit"), safe_serialization=True)
    data = distill_settings["data"] | {"val": None}
    settings = distill_settings | {"student": {"model": str(tmp_path / "vit")}, "steps": 1, "data": data}
    assert call(distill, arguments(settings)) == 0
    metadata = read_metadata(tmp_path / "run" / "student.safetensors")
    assert metadata["model_args"].items() >= {**small, "img_size": [32, 32]}.items()
    reference = parse_reference(str(tmp_path / "run" / "student.safetensors"))
    for size in (None, 48):
        classifier, inputs = create_classifier(reference, image_size=size)
        assert inputs.size == ((48, 48) if size else (32, 32))
        assert classifier.eval()(torch.zeros(1, 3, *inputs.size)).shape == (1, 3)
