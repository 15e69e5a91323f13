"""Paths of a pipeline begin in the folder of its YAML file, those that the user types in the folder where the command is typed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.pipelines import doctor, init, report
from ssld.pipelines.checks import data as checked_data
from ssld.pipelines.folder import folder_of, inside, left_behind, missing_text, rebased, rebased_value, shown
from ssld.pipelines.inspecting import inspect_text
from ssld.pipelines.run import main
from ssld.pipelines.runner.stages import ROOT, build_stages, read_pipeline
from ssld.shared.config.settings import CommandConfig
from ssld.shared.config.words import takes_path
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect import check_data
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.predict_config import PredictConfig
from tests.docs_sandbox import write_coco
from tests.pipelines.test_init import photos as photos  # a fixture

SOUND: dict[str, Any] = {"broken": {}, "cuda": None, "threads": 2, "devices": [], "groups": ["gloo"], "mps": False}
STAGES = {
    "a": {"command": "teach", "set": {"source": "in.txt", "text": "a"}},
    "b": {"command": "distill", "config": "b.yaml", "set": {"source": "${a}/out.txt", "sources": ["${more}"]}},
    "report": {"command": "report", "set": {"pipeline": "${pipeline}", "runs": "${output}"}},
}


@pytest.fixture
def sub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline in the folder `sub` with its files beside it; the current folder is the one above."""
    folder = tmp_path / "sub"
    folder.mkdir()
    for name in ("in.txt", "more.txt"):
        (folder / name).write_text(name[0])
    (folder / "b.yaml").write_text("text: b\n")
    content = {"output": "runs/first", "variables": {"more": "more.txt"}, "stages": STAGES}
    (folder / "first.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return folder


def recorded(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return content


def test_one_run_from_three_folders(sub: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert main(["sub/first.yaml"]) == 0
    assert started == ["a", "b", "report"]
    out = capfd.readouterr().out
    assert "the stages run in sub: their paths are relative to it\n[1/3] a: ssld teach --source in.txt" in out
    assert "results: sub/runs/first, sub/runs/first/report/report.html\n" in out
    assert Path.cwd() == sub.parent
    assert [path.name for path in sub.parent.iterdir()] == ["sub"]
    run = sub / "runs/first/b"
    assert (run / "out.txt").read_text() == "iab"
    assert recorded(run)["source"] == "runs/first/a/out.txt"
    assert recorded(run)["sources"] == ["more.txt"]
    assert recorded(sub / "runs/first/report")["pipeline"] == "first.yaml"
    record = sub / "runs/first/pipeline.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({key: content[key] for key in ("name", "smoke", "pipeline")}))  # as by version 0.2
    monkeypatch.chdir(sub)
    assert main(["first.yaml"]) == 0
    assert "[2/3] b: finished earlier\n" in (out := capfd.readouterr().out)
    assert "relative to it" not in out
    assert "results: " not in out
    (sub / "runs/deeper").mkdir()
    monkeypatch.chdir(sub / "runs/deeper")
    assert main(["../../first.yaml", "--dry-run"]) == 0
    assert f"3 stages in {sub}/runs/first: nothing to run" in capfd.readouterr().out
    assert started == ["a", "b", "report"]


def test_what_is_typed_belongs_to_the_current_folder(
    sub: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.txt", "y.txt"):
        Path(name).write_text(name[0])
    flags = ["--stages.a.source", "x.txt", "--variables.more", "y.txt", "--output", "out"]
    assert main(["sub/first.yaml", *flags]) == 0
    assert recorded(Path("out/a"))["source"] == "../x.txt"
    assert recorded(Path("out/b"))["sources"] == ["../y.txt"]
    assert recorded(Path("out/b"))["source"] == "../out/a/out.txt"
    assert not (sub / "runs").exists()
    started.clear()
    monkeypatch.chdir(sub)
    assert (
        main(
            [
                "first.yaml",
                *(word.replace("x.txt", "../x.txt").replace("y.t", "../y.t") for word in flags[:5]),
                "../out",
            ]
        )
        == 0
    )
    assert started == []
    monkeypatch.chdir(sub.parent)
    assert (
        main(
            [
                "sub/first.yaml",
                "--output",
                "many",
                "--stages.a.sources",
                "x.txt,y.txt",
                "--stages.b.sources",
                '["x.txt"]',
            ]
        )
        == 0
    )
    assert recorded(Path("many/a"))["sources"] == ["../x.txt", "../y.txt"]
    assert recorded(Path("many/b"))["sources"] == ["../x.txt"]


def test_several_paths_in_one_value(sub: Path, started: list[str]) -> None:
    """Below the same folder, in one with a comma, quotes and a backslash, and in a folder of runs that does not exist yet."""
    odd = 'b, "c\\d'
    for folder in ("photos", odd):
        Path(folder).mkdir()
        for name in ("x.txt", "y.txt"):
            (Path(folder) / name).write_text(name[0])
    content = yaml.safe_load((sub / "first.yaml").read_text())
    content["stages"]["b"]["set"] = {"sources": "${more}", "text": "null"}
    (sub / "first.yaml").write_text(yaml.safe_dump(content))
    start, both, listed = "sub/first.yaml", "photos/x.txt,photos/y.txt", json.dumps([f"{odd}/x.txt", "photos/y.txt"])
    assert main([start, "--variables.more", both, "--stages.a.sources", both, "--output", "one"]) == 0
    for run in ("one/a", "one/b"):
        assert recorded(Path(run))["sources"] == ["../photos/x.txt", "../photos/y.txt"]
    assert main([start, "--variables.more", f"{odd}/x.txt", "--stages.a.sources", listed, "--output", "two"]) == 0
    assert recorded(Path("two/a"))["sources"] == [f"../{odd}/x.txt", "../photos/y.txt"]
    assert recorded(Path("two/b"))["sources"] == [f"../{odd}/x.txt"]
    content["stages"]["b"]["set"] = {"sources": "${a}/out.txt", "text": "null"}
    (sub / "first.yaml").write_text(yaml.safe_dump(content))
    assert main([start, "--output", f"{odd}/runs"]) == 0
    assert recorded(Path(odd) / "runs/b")["sources"] == [f"../{odd}/runs/a/out.txt"]
    assert recorded(Path(odd) / "runs/b")["text"] == "null"


def test_values_are_paths_if_their_first_part_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("300", "2024", "resnet18d", "labels", "photos", "sub", "a,b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert rebased_value("photos") == "photos"
    with inside(tmp_path / "sub"):
        values = [
            "300",
            "random:resnet18d",
            "photos",
            "photos/x",
            "a,b",
            "/x",
            "",
            "nowhere",
            "${a}/photos",
            ".",
            "pho*",
            "*.nothing",
            "2024",
        ]
        expected = [
            "../300",
            "random:resnet18d",
            "../photos",
            "../photos/x",
            "../a,b",
            "/x",
            "",
            "nowhere",
            "${a}/photos",
            "..",
            "../pho*",
            "*.nothing",
            "../2024",
        ]
        assert list(map(rebased_value, values)) == expected
        assert rebased_value([{"path": "photos", "weight": 2}]) == [{"path": "../photos", "weight": 2}]
    kinds: list[tuple[type[CommandConfig], str]] = [
        (DistillConfig, "data.train"),
        (DistillConfig, "student.model"),
        (TrainConfig, "data.train_images"),
        (TrainConfig, "data"),
    ]
    assert all(takes_path(kind, key.split(".")) for kind, key in kinds)
    assert not takes_path(PredictConfig, ["classes"])
    for key in ("objective", "steps", "optim.lr", "nothing", "data.nothing", "channels_last"):
        assert not takes_path(DistillConfig, key.split(".")), key
    set_: dict[str, Any] = {
        "student.model": "random:${net}",
        "teacher.model": "${net}",
        "data.train": ["${photos}/x", "y"],
        "steps": "${n}",
    }
    set_ |= {"batch_size": 2, "optim": {"lr": 1, "reference_batch": 2}}
    content = {
        "output": "runs",
        "variables": dict.fromkeys(("net", "photos", "n")),
        "stages": {"a": {"command": "distill", "set": set_}},
    }
    (tmp_path / "sub/p.yaml").write_text(yaml.safe_dump(content))
    with inside(tmp_path / "sub"):
        variables = {"net": "resnet18d", "photos": "photos", "n": "300"}
        (stage,) = build_stages(read_pipeline(Path("p.yaml")), Path("p.yaml"), output=Path("runs"), variables=variables)
    assert isinstance(stage.config, DistillConfig)
    assert (stage.config.student.model, stage.config.steps) == ("random:resnet18d", 300)
    assert stage.config.teacher
    assert stage.config.teacher.model == "../resnet18d"
    assert [source.path for source in stage.config.data.train] == ["../photos/x", "y"]


def test_translation_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a symbolic link too, whose `..` leads elsewhere than its name suggests."""
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "user").mkdir()
    (tmp_path / "user/link").symlink_to(tmp_path / "real/deep")
    (tmp_path / "user/x.txt").touch()
    monkeypatch.chdir(tmp_path / "user")
    assert folder_of(Path("link/p.yaml")) == tmp_path / "real/deep"
    assert (rebased(Path("x.txt")), shown(Path("x.txt"))) == (Path("x.txt"), Path("x.txt"))
    with inside(folder_of(Path("link/p.yaml"))) as moved:
        assert moved
        assert rebased(Path("x.txt")).read_text() == ""
        assert left_behind(Path("x.txt")) == tmp_path / "user/x.txt"
        assert shown(Path("y.txt")) == tmp_path / "real/deep/y.txt"
        with inside(Path.cwd()) as again:
            assert not again
    with inside(tmp_path):
        assert shown(Path("user/y.txt")) == Path("y.txt")
        assert shown(Path("z/y.txt")) == tmp_path / "z/y.txt"
    with pytest.raises(KeyError), inside(tmp_path):
        raise KeyError
    assert Path.cwd() == tmp_path / "user"
    assert left_behind(Path("x.txt")) is None


def test_shipped_pipelines_have_no_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", str(ROOT / "pipelines/quickstart.yaml")):
        assert main([name, "--dry-run"]) == 0
        out = capfd.readouterr().out
        assert " --output runs/quickstart/data\n" in out
        assert "11 stages in runs/quickstart: " in out


# ---- pipelines of older versions


def test_paths_that_were_relative_to_the_current_folder(sub: Path, started: list[str], capfd: Any) -> None:
    shutil.move(sub / "in.txt", "in.txt")
    (sub / "more.txt").unlink()
    assert main(["sub/first.yaml"]) == 2
    reason = "does not exist (paths in a pipeline are relative to its folder, sub)"
    advice = "it exists in the current folder: move the pipeline's file there, or write ../in.txt in it"
    assert capfd.readouterr().err.splitlines() == [
        f"error: stage a: source: in.txt {reason}; {advice}",
        f"error: stage b: sources.0: more.txt {reason}",
    ]
    shutil.move(sub / "b.yaml", "b.yaml")
    assert main(["sub/first.yaml"]) == 2
    assert capfd.readouterr().err == (
        f"error: stage b: config: b.yaml {reason}; {advice.replace('in.txt', 'b.yaml')}\n"
    )
    assert started == []


def test_runs_that_older_versions_wrote_into_the_current_folder(sub: Path, started: list[str], capfd: Any) -> None:
    assert main(["sub/first.yaml"]) == 0
    record = sub / "runs/first/pipeline.json"
    content = json.loads(record.read_text())
    assert content["folder"] == "../.."
    shutil.move(sub / "runs", "runs")
    capfd.readouterr()
    assert main(["sub/first.yaml", "--dry-run"]) == 0  # those of another pipeline
    del content["folder"]
    Path("runs/first/pipeline.json").write_text(json.dumps(content))
    assert main(["sub/first.yaml"]) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: sub/first.yaml: output: runs/first has runs in the current folder, ")
    assert "move the pipeline's file here to go on with them" in line


# ---- the other commands


def test_a_report_from_elsewhere(sub: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert main(["sub/first.yaml"]) == 0
    page = sub / "runs/first/report/report.html"
    settings = recorded(page.parent)
    page.unlink()
    capfd.readouterr()
    assert report.main(["--runs", "sub/runs/first", "--pipeline", "sub/first.yaml"]) == 0
    assert "wrote sub/runs/first/report/report.html\n" in capfd.readouterr().out
    assert recorded(page.parent) == settings  # the pipeline takes it for its own
    started.clear()
    assert main(["sub/first.yaml"]) == 0
    assert started == []
    assert report.main(["--runs", "sub/runs/first/b", "--output", "page"]) == 0
    assert Path("page/report.html").is_file()
    assert f"paths begin in     {sub}" in inspect_text(Path("sub/runs/first/b"))
    monkeypatch.chdir(sub)
    assert "paths begin in" not in inspect_text(Path("runs/first/b"))
    shutil.copytree(sub, sub.parent / "moved/with its runs")
    monkeypatch.chdir(sub.parent)
    assert report.main(["--runs", "moved/with its runs/runs/first"]) == 0
    assert f"{sub.parent}/moved/with its runs" in inspect_text(Path("moved/with its runs/runs/first/a"))
    shutil.copytree(sub / "runs/first", "moved/the runs alone")
    assert report.main(["--runs", "moved/the runs alone"]) == 0
    assert "paths begin in" not in inspect_text(Path("moved/the runs alone/a"))


def test_doctor_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(doctor, "ask_torch", lambda: SOUND)
    monkeypatch.setattr(checked_data, "run_script", check_data.main)
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "sub/train.json", tmp_path / "sub/photos", 0)
    data = {"train_annotations": "train.json", "train_images": "${photos}"}
    settings = {"backbone": "random:test_resnet", "data": data, "steps": 2, "batch_size": 2}
    optim = {"lr": 0.1, "reference_batch": 2}
    teach = {"model.model": "random:test_resnet", "data.train": ["photos"], "steps": 2, "batch_size": 2, "optim": optim}
    stages = {
        "a": {"command": "train", "set": settings | {"optim": optim | {"milestones_steps": [1]}}},
        "b": {"command": "teach", "set": teach},
    }
    content = {
        "output": "runs/x",
        "variables": {"photos": "photos"},
        "stages": stages,
    }
    Path("sub/p.yaml").write_text(yaml.safe_dump(content))
    assert doctor.main(["sub/p.yaml"]) == 0, capfd.readouterr().out
    out = capfd.readouterr().out
    assert "sub/train.json" in out
    assert "sub/photos: 4 images" in out
    assert "ssld run sub/p.yaml --dry-run --estimate measures it" in out
    assert doctor.main(["sub/p.yaml", "--variable", "photos=sub/photos", "--fix", "clean"]) == 0
    assert Path("clean/train.json").is_file()
    assert not Path("sub/clean").exists()
    shutil.move("sub/photos", "photos")
    assert doctor.main(["sub/p.yaml", "--quick"]) == 1
    assert "a: data.train_images: photos does not exist (paths in a pipeline" in capfd.readouterr().out
    assert doctor.main(["sub/p.yaml", "--quick", "--variable", "photos=photos"]) == 1  # for b has no variable
    out = capfd.readouterr().out
    assert "data.train_images" not in out
    assert "b: data.train.0: photos does not exist (paths in a pipeline" in out
    assert Path.cwd() == tmp_path


def test_init_writes_paths_for_the_folder_of_its_file(photos: Path, capfd: Any) -> None:
    Path("weights").mkdir()
    line = ["--images", "photos", "--annotations", "all.json", "--unlabeled", "more photos", "--distill", "yes"]
    line += ["--backbone", "random:test_resnet", "--teacher", "timm:resnet50d", "--output", "deep/sub/mine.yaml"]
    assert init.main(line) == 0
    assert "read deep/sub/mine.yaml, then start it: ssld run deep/sub/mine.yaml\n" in capfd.readouterr().out
    content = yaml.safe_load(Path("deep/sub/mine.yaml").read_text())
    data = content["stages"]["detector_random"]["set"]["data"]
    assert [data[key] for key in ("train_annotations", "train_images")] == ["mine_train.json", "../../photos"]
    assert content["stages"]["ssld"]["set"]["data"]["train"][0] == {
        "path": "mine_unlabeled.txt",
        "root": "../../more photos",
    }
    assert Path("deep/sub/runs/mine/estimate.json").is_file()
    assert not Path("runs").exists()
    assert main(["deep/sub/mine.yaml", "--dry-run"]) == 0
    assert "ssld: " in capfd.readouterr().out
    Path("deep/sub/runs/mine/pipeline.json").touch()
    Path("deep/sub/mine.yaml").rename("deep/sub/other.yaml")
    assert init.main(line) == 2
    assert "deep/sub/runs/mine: has runs of another pipeline" in capfd.readouterr().err


def test_an_input_that_was_deleted_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "ssld" / "data" / "0123" / "images"
    assert missing_text(path) == (
        f"{path}: no such file or folder; it was made from other files and has been deleted from the cache: "
        "the same ssld init, with another --output, makes it again"
    )
    assert missing_text(tmp_path / "images") == f"{tmp_path / 'images'}: no such file or folder"
