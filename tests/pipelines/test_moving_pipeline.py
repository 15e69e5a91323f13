"""The pipeline of the moving teacher: what its detectors differ in, and every stage at smoke size."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ssld.pipelines import toy_data
from ssld.pipelines.runner.stages import KINDS, ROOT, Stage, build_stages, read_pipeline
from ssld.shared.config.settings import identity
from ssld.shared.config.yaml_files import flatten
from ssld.shared.run_dir import read_result
from ssld.stage2_detect import train

FILE = ROOT / "pipelines" / "moving_toy.yaml"


def stages(output: Path, smoke: bool = False, **variables: str) -> dict[str, Stage]:
    pipeline = read_pipeline(FILE)
    return {
        stage.name: stage for stage in build_stages(pipeline, FILE, output=output, variables=variables, smoke=smoke)
    }


def test_detectors_differ_in_the_teacher_alone(tmp_path: Path) -> None:
    by_name = stages(tmp_path)
    settings = {name: dict(flatten(identity(by_name[name].config))) for name in ("alone", "moving")}
    changed = {
        key
        for key in settings["alone"] | settings["moving"]
        if settings["alone"].get(key) != settings["moving"].get(key)
    }
    assert {key.split(".")[0] for key in changed} == {"moving_teacher", "batch_size", "optim"}
    assert (
        settings["moving"]["batch_size"] * (1 - settings["moving"]["moving_teacher.ratio"])
        == settings["alone"]["batch_size"]
    )
    assert by_name["moving"].needs == {"all_scenes", "few_scenes"}


def test_every_stage_runs(tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    mains = {KINDS["toy_data"]: toy_data.main, KINDS["train"]: train.main}
    by_name = stages(tmp_path, smoke=True, scenes="24", labeled="8")
    del by_name["average"]
    for stage in by_name.values():
        quick = ["--threads", "1"] if stage.kind is KINDS["toy_data"] else ["--threads", "1", "--workers", "0"]
        assert call(mains[stage.kind], [*stage.arguments, *quick]) == 0, stage.name
        assert read_result(stage.run) is not None
    log = (tmp_path / "moving" / "log.txt").read_text()
    assert "16 unlabeled images of" in log
    assert "8 images skipped: 8 copies of labeled images (first: " in log  # the labeled fifth lies in another folder
    assert "loss_unlabeled_cls" in log
