"""The list of shipped recipes, against their settings and the words in their files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssld.pipelines.runner.recipes import describe, recipe_list
from ssld.pipelines.runner.stages import ROOT, find_pipeline
from ssld.shared.config.settings import CommandConfig, parse_config
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage2_detect.config import TrainConfig

FILES = sorted(
    [
        *(ROOT / "stage1_ssld/configs").glob("*.yaml"),
        *(ROOT / "stage2_detect/configs").glob("*.yaml"),
        *(ROOT / "pipelines").glob("*.yaml"),
        *(ROOT / "pipelines/recipes").glob("*.yaml"),
    ]
)
# Read off the files by eye.
PUBLISHED = {
    "faster_rcnn_r50vd_ssld_1x": ("41.4 AP", "800 px", "41 V100 h"),
    "cascade_mask_rcnn_r50vd_ssld_2x": ("45.7 / 39.7 AP", "800 px", "124 V100 h"),
    "cascade_rcnn_r50vd_1x": ("", "800 px", "52 V100 h"),  # its cost is said to be that of another recipe
    "pss_cascade_dcn_r50vd": ("47.8 AP", "1000 px", "208 V100 h"),
    "mask_rcnn_r50_lsj_100e": ("44.6 AP", "800 px", "608 V100 h"),
    "retinanet_r50_600_adl_3x": ("", "600 px", ""),  # published only with unlabeled images in addition
    "gfl_r50_cwd_2x": ("44.0 AP", "800 px", ""),
    "gfl_r18_ld_1x": ("37.5 AP", "800 px", ""),
    "toy_gfl": ("", "128 px", ""),
    "resnet50d": ("82.07 top-1", "224 px", ""),
    "ssld_hgnetv2_b4": ("83.57 top-1", "224 px", ""),
    "ssld_convnext_atto": ("", "224 px", ""),  # a score with labels, not of SSLD
    "ssld_resnet50d": ("82.07 top-1", "224, 320 px", ""),
    "quickstart": ("", "48, 128 px", ""),
}


def test_every_shipped_file_has_one_line() -> None:
    lines = [line for line in recipe_list().splitlines() if line.startswith("  ")]
    names = [line.split()[0] for line in lines]
    assert sorted(names) == sorted(file.stem for file in FILES)
    for file in FILES:
        line = next(line for line in lines if line.split()[0] == file.stem)
        assert line.endswith(f"  {describe(file).purpose}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_purpose_is_the_beginning_of_the_comment(file: Path) -> None:
    purpose = describe(file).purpose
    assert len(purpose) > 25
    assert "\n" not in purpose
    comment = re.sub(r"\s+", " ", file.read_text(encoding="utf-8").replace("\n# ", " ").replace(".yaml", ""))
    assert comment.startswith(f"# {purpose}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_score_size_and_cost(name: str) -> None:
    file = next(file for file in FILES if file.stem == name)
    assert describe(file)[1:4] == PUBLISHED[name]


def test_score_and_size_are_those_of_the_resolved_settings() -> None:
    for file in (file for file in FILES if "stage2_detect" in str(file)):
        given = ["--backbone", "random:x", "--data.train_annotations", "a", "--data.train_images", "b", "--output", "c"]
        config = parse_config(TrainConfig, ["--config", str(file), *given, "--steps", "1"], program="train.py")
        line = describe(file)
        assert line.size == f"{config.resize.short_side} px"
        if config.expected:
            assert line.score.split()[0] == str(config.expected.AP)


def test_every_name_is_taken_by_the_command_of_its_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    commands: dict[str, type[CommandConfig]] = {"detectors": TrainConfig, "backbones": DistillConfig}
    group = ""
    for line in recipe_list().splitlines()[2:]:
        name = line.split()[0] if line.startswith("  ") else ""
        if not name:
            group = line.split(":")[0] or group
        elif group == "pipelines":
            assert find_pipeline(name).stem == name
        else:
            kind = TeachConfig if name == "toy_teacher" else commands[group]
            assert kind.recipes == next(file.parent for file in FILES if file.stem == name)


def test_the_list_does_not_import_torch() -> None:
    code = "import sys; from ssld.pipelines.cli import main; main(['recipes']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
