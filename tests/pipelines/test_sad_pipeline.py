"""The semi-supervised pipeline: the data of each stage, and every stage at smoke size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ssld.pipelines import toy_data
from ssld.pipelines.runner.stages import KINDS, ROOT, Stage, build_stages, read_pipeline
from ssld.shared.config.settings import identity
from ssld.shared.config.yaml_files import flatten
from ssld.shared.run_dir import read_result
from ssld.stage2_detect import predict, train

FILE = ROOT / "pipelines" / "sad_toy.yaml"
STUDENTS = ("alone", "adl", "pseudo_labels", "sad")


def stages(output: Path, smoke: bool = False, **variables: str) -> dict[str, Stage]:
    pipeline = read_pipeline(FILE)
    return {
        stage.name: stage for stage in build_stages(pipeline, FILE, output=output, variables=variables, smoke=smoke)
    }


def test_students_differ_in_what_teaches_them(tmp_path: Path) -> None:
    by_name = stages(tmp_path)
    settings = {name: dict(flatten(identity(by_name[name].config))) for name in STUDENTS}

    def changed(one: str, other: str) -> set[str]:
        pair = settings[one], settings[other]
        return {key for key in pair[0] | pair[1] if pair[0].get(key) != pair[1].get(key)}

    assert {key.split(".")[0] for key in changed("alone", "adl") | changed("pseudo_labels", "sad")} == {"distill"}
    assert changed("alone", "pseudo_labels") == {"unlabeled", "pseudo", "batch_size", "optim.reference_batch"}
    assert settings["sad"]["batch_size"] * settings["sad"]["labeled_ratio"] == settings["alone"]["batch_size"]
    assert by_name["sad"].needs == {"all_scenes", "few_scenes", "teacher", "pseudo"}
    assert by_name["pseudo"].needs == {"all_scenes", "few_scenes", "teacher"}


def test_every_stage_runs(tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    mains = {KINDS["toy_data"]: toy_data.main, KINDS["train"]: train.main, KINDS["predict"]: predict.main}
    by_name = stages(tmp_path, smoke=True, scenes="24", labeled="8")
    for stage in by_name.values():
        quick = ["--threads", "1"] if stage.kind is KINDS["toy_data"] else ["--threads", "1", "--workers", "0"]
        assert call(mains[stage.kind], [*stage.arguments, *quick]) == 0, stage.name
        assert read_result(stage.run) is not None
    written = json.loads((tmp_path / "pseudo" / "pseudo_labels.json").read_text())
    labeled = json.loads((tmp_path / "few_scenes" / "stage2" / "train.json").read_text())
    names = [{image["file_name"] for image in content["images"]} for content in (written, labeled)]
    assert len(names[1]) == 8
    assert 0 < len(names[0]) <= 16
    assert not names[0] & names[1], "a labeled scene has pseudo-labels"
    log = (tmp_path / "sad" / "log.txt").read_text()
    assert f"pseudo-boxes in {len(names[0])} of the 24 images" in log
    assert "loss_adl" in log
