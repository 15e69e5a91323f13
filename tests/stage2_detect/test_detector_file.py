"""A detector's file: the backbone's own arguments are built again from it, and what it names reaches neither the hub nor other files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, create_body
from ssld.shared.models.references import ModelReference, parse_reference
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.detector_file import load_detector, save_detector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.training.init_weights import open_init

INPUTS = InputSettings((0.5,) * 3, (0.5,) * 3, (64, 64), "bilinear", False)


def write(path: Path, **facts: Any) -> Any:
    torch.manual_seed(0)
    config = DetectorConfig(fpn_channels=16, roi={"hidden": 8})
    body, _ = create_body(ModelReference("x", "test_resnet", metadata=facts))
    model = build_detector(config, classes=2, body=body, arch="test_resnet", inputs=INPUTS).eval()
    data: Any = SimpleNamespace(class_names=["a", "b"], category_ids=[3, 7])
    save_detector(
        path, model, config=config, resize=ResizeConfig(), arch="test_resnet", inputs=INPUTS, data=data, **facts
    )
    return model


def change(path: Path, **facts: Any) -> None:
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["ssld"]) | facts
    record.pop("metadata_sha256")
    save_file(load_file(path), path, metadata={"ssld": json.dumps(record)})


def test_arguments_of_the_backbone(tmp_path: Path) -> None:
    """A lost activation would change the outputs only."""
    model = write(tmp_path / "d.safetensors", model_args={"act_layer": "silu"})
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    again = load_detector(tmp_path / "d.safetensors").model
    plain, _ = create_body(parse_reference("random:test_resnet"))
    plain.load_state_dict(model.pyramid.body.state_dict())
    with torch.no_grad():
        expected = model.pyramid.body(x)[-1]
        assert torch.equal(again.pyramid.body(x)[-1], expected)
        assert not torch.allclose(plain.eval()(x)[-1], expected, rtol=1e-2)
    start = open_init(tmp_path / "d.safetensors").create_body()
    assert any(isinstance(module, torch.nn.SiLU) for module in start.module.modules())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"arch": "hf-hub:x/y"}, "hf-hub:x/y: timm has no such model"),
        ({"arch": "local-dir:/etc"}, "local-dir:/etc: timm has no such model"),
        ({"arch": "test_resnet.nonsense"}, "timm has no weights called 'nonsense'"),
        ({"model_args": {"pretrained": True}}, "'pretrained' is not a model argument"),
        ({"model_args": {"act_layer": "nothing"}}, "timm cannot build a test_resnet with act_layer=nothing"),
        ({"std": [0.0, 0.5, 0.5]}, "std.0: "),
        ({"category_ids": [3]}, "category_ids: 1 ids, but 2 class_names"),
        ({"model": {"fpn_channels": "wide"}}, "was written by an earlier version of this project"),
    ],
)
def test_metadata_that_would_do_harm(
    facts: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.safetensors"
    write(path)
    change(path, **facts)
    create = timm.create_model

    def watched(name: str, **options: Any) -> Any:
        assert name == "test_resnet"
        assert not options.get("pretrained")
        return create(name, **options)

    monkeypatch.setattr("timm.create_model", watched)
    with pytest.raises(UserError) as caught:
        load_detector(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_program_says_what_to_give(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(
        UserError, match=r"give the detector\.safetensors of a training, or convert .* with ssld convert-detector$"
    ):
        load_detector(tmp_path / "theirs.safetensors")
