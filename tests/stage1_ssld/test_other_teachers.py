"""A run that continues under a teacher which its files and settings do not tell from the one that it began with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

from ssld.shared.models.backbones import InputSettings, save_backbone
from ssld.shared.models.model_file import read_metadata
from ssld.stage1_ssld.curate import main as curate
from ssld.stage1_ssld.data.labels import prototype_names
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.prototypes import main as prototypes
from ssld.stage1_ssld.write_soft_labels import main as write_soft_labels

Settings = dict[str, Any]


def edit(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a run has recorded of its start, and take its end away."""
    record = json.loads((run / "environment.json").read_text())
    change(record)
    (run / "environment.json").write_text(json.dumps(record))
    (run / "result.json").unlink()


@pytest.fixture
def commands(distill_settings: Settings, teacher_file: Path, tiny: Any) -> dict[str, tuple[Any, Settings]]:
    """Commands with a teacher or an encoder, each with small settings."""
    common = {key: distill_settings[key] for key in ("threads", "workers", "device")}
    data = distill_settings["data"] | {"val": None}
    teacher = {"teacher": {"model": str(teacher_file), "size": 48}}
    pool = common | {"pool": [str(tiny.unlabeled)], "image_size": 40}
    return {
        "distill": (distill, distill_settings | teacher | {"steps": 2, "save_every": 1}),
        "soft": (write_soft_labels, common | teacher | {"data": data, "views": 1, "top": 2}),
        "curate": (curate, pool | teacher | {"keep": 2, "examples": 1}),
        "prototypes": (prototypes, pool | {"encoder": str(teacher_file), "prototypes": 3, "perplexity": 1.5}),
    }


@pytest.mark.parametrize("name", ["distill", "soft", "curate", "prototypes"])
def test_a_network_that_sees_images_otherwise_is_refused(
    name: str,
    commands: Any,
    arguments: Any,
    call: Any,
    user_error: Any,
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, settings = commands[name]
    assert call(main, arguments(settings)) == 0
    (key, facts), *others = json.loads((tmp_path / "run" / "environment.json").read_text())["networks"].items()
    metadata = read_metadata(teacher_file)
    assert others == []
    assert facts["weights"] == metadata["content_sha256"][:16]
    assert facts["mean"] == metadata["mean"]
    assert facts["size"] == (40 if key == "encoder" else [48, 48])

    edit(tmp_path / "run", lambda record: None)
    assert call(main, arguments(settings)) == 0  # nothing has changed
    edit(tmp_path / "run", lambda record: record["networks"][key].update(size=[99, 99], std=[1.0] * 3))
    line = user_error(main, arguments(settings))
    assert f"run: began with another {key}: size [99, 99], now " in line
    assert "; std [1.0, 1.0, 1.0], now [" in line
    edit_again = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert edit_again["networks"][key]["size"] == [99, 99]  # refused again at the next start
    assert not (tmp_path / "run" / "result.json").exists()

    record = tmp_path / "run" / "environment.json"
    record.write_text(json.dumps({k: v for k, v in edit_again.items() if k != "networks"}))
    capsys.readouterr()
    assert call(main, arguments(settings)) == 0
    lines = [one for one in capsys.readouterr().out.splitlines() if "did not record" in one]
    assert len(lines) == 1
    assert lines[0].startswith(f"{key}: this run began with a version that did not record")


def test_a_precision_may_change_under_a_teacher(commands: Any, arguments: Any, call: Any, tmp_path: Path) -> None:
    """It is the way out that the message on a loss that is not finite names."""
    main, settings = commands["distill"]
    assert call(main, arguments(settings | {"precision": "bf16"})) == 0
    edit(tmp_path / "run", lambda record: None)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    assert call(main, arguments(settings | {"precision": "fp32"})) == 0
    assert 'changed since the last start: precision: "bf16" -> "fp32"' in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("own", "warns"), [(64, True), (32, False)])
def test_a_run_of_an_earlier_version_under_prototypes_is_warned(
    own: int, warns: bool, distill_settings: Settings, arguments: Any, call: Any, tmp_path: Path
) -> None:
    """Earlier versions showed such a teacher the views as they are: the same at the size of its prototypes."""
    net = timm.create_model("test_resnet", num_classes=4)
    inputs = InputSettings((0.5,) * 3, (0.5,) * 3, (own, own), "bicubic", False)
    facts: Settings = {"class_names": prototype_names(4), "prototypes": {"prototypes": 4}}
    save_backbone(tmp_path / "p.safetensors", net, arch="test_resnet", inputs=inputs, classes=4, **facts)
    settings = distill_settings | {"steps": 2, "teacher": str(tmp_path / "p.safetensors")}
    assert call(distill, arguments(settings)) == 0
    assert "earlier versions" not in (tmp_path / "run" / "log.txt").read_text()
    edit(tmp_path / "run", lambda record: record.pop("networks"))
    assert call(distill, arguments(settings)) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert ("warning: earlier versions gave a teacher of prototypes views of 32 px as they are" in log) == warns
