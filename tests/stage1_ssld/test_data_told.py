"""Reports of the commands on images that they leave out, and changes that make a source a different one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.config.settings import parse_config
from ssld.stage1_ssld.config import CurateConfig, EvaluateConfig
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.evaluate import main as evaluate

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


@pytest.fixture
def images(tmp_path: Path, jpeg: Any) -> Path:
    """Two classes of three images, and names that lead to none."""
    folder = tmp_path / "images"
    for name in ("disc", "ring"):
        (folder / name).mkdir(parents=True)
        for seed in range(3):
            (folder / name / f"{seed}.jpg").write_bytes(jpeg(seed=seed))
    (folder / "ring" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "disc" / "pipe.jpg")
    return folder


@pytest.fixture
def settings(distill_settings: Settings, images: Path) -> Settings:
    return distill_settings | {"steps": 2, "batch_size": 2, "data": {"train": [str(images)], "image_size": 32}}


LINE = "2 images dropped: 1 that are no files (first: disc/pipe.jpg), 1 behind broken links (first: ring/gone.jpg)"


def test_what_is_left_out_is_in_the_log_and_in_the_result(
    arguments: Arguments, settings: Settings, call: Call, tmp_path: Path, images: Path
) -> None:
    settings["data"]["val"] = str(images)
    assert call(distill, arguments(settings)) == 0
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert log.count(f"{images}: {LINE}\n") == 2
    read = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["read"]
    assert list(read) == ["data.train.0", "data.val"]
    assert read["data.train.0"]["image"]["kept"] == 6
    assert read["data.train.0"]["image"]["dropped"]["that are no files"] == {"count": 1, "first": "disc/pipe.jpg"}


def test_a_stream_tells_the_same(arguments: Arguments, settings: Settings, call: Call, tmp_path: Path) -> None:
    settings["data"]["streaming"] = True
    assert call(distill, arguments(settings)) == 0
    assert LINE in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("streaming", [False, True])
def test_bulk_loss_stops_the_run_and_may_be_allowed(
    arguments: Arguments, settings: Settings, call: Call, images: Path, user_error: Any, streaming: bool
) -> None:
    (images / "bird").mkdir()
    (images / "bird" / "0.jpg").symlink_to(images / "nowhere.jpg")
    settings["data"]["streaming"] = streaming
    line = user_error(distill, arguments(settings))
    assert line == (
        f"data.train: {images}: all images of class 'bird' would be left out: 1 behind broken links (first: bird/0.jpg); correct the source, or set "
        "data.allow_loss: true to continue with the remaining images"
    )
    settings["data"]["allow_loss"] = True
    assert call(distill, arguments(settings)) == 0


def test_evaluation_stops_on_bulk_loss_too(
    arguments: Arguments, call: Call, images: Path, user_error: Any, teacher_file: Path, tmp_path: Path
) -> None:
    (images / "stripes").mkdir()
    (images / "stripes" / "0.jpg").symlink_to(images / "nowhere.jpg")
    settings = {"model": str(teacher_file), "data": str(images), "device": "cpu", "threads": 1, "workers": 0}
    line = user_error(evaluate, arguments(settings))
    assert line.startswith(f"data: {images}: all images of class 'stripes' would be left out")
    assert line.endswith("or set allow_loss: true to continue with the remaining images")
    assert call(evaluate, arguments(settings | {"allow_loss": True})) == 0
    read = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["read"]
    assert read["data"]["image"]["dropped"]["behind broken links"]["count"] == 2


def test_the_same_images_are_the_same_run(
    arguments: Arguments,
    settings: Settings,
    call: Call,
    images: Path,
    user_error: Any,
    monkeypatch: Any,
    capsys: Any,
    jpeg: Any,
) -> None:
    assert call(distill, arguments(settings)) == 0
    (images / "Thumbs.db").write_bytes(b"made by a file manager")
    (images / "notes.txt").write_text("my photos")
    os.utime(images / "disc" / "0.jpg", (1, 1))
    monkeypatch.chdir(images.parent)
    for spelling in (f"{images}/", "images", "./images/", str(images)):
        capsys.readouterr()
        settings["data"]["train"] = [spelling]
        assert call(distill, arguments(settings)) == 0
        assert "this run is finished; nothing to do" in capsys.readouterr().out
    content = (images / "disc" / "0.jpg").read_bytes()
    (images / "disc" / "0.jpg").write_bytes(content[:-3] + b"\0" + content[-2:])
    os.utime(images / "disc" / "0.jpg", (1, 1))
    assert "data.train.0 has other content" in user_error(distill, arguments(settings))
    settings["data"]["train"] = [str(images / "disc")]
    line = user_error(distill, arguments(settings))
    assert f'"{images / "disc"}"; data.train.0 has other content' in line


def test_a_run_inside_its_own_data_goes_on(
    arguments: Arguments, settings: Settings, call: Call, images: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--output", str(images / "run")]
    assert call(distill, [*arguments(settings), *flags]) == 0
    assert (images / "run" / "curves.png").exists()
    assert call(distill, [*arguments(settings | {"steps": 3}), *flags]) == 0
    read = json.loads((images / "run" / "result.json").read_text(encoding="utf-8"))["read"]["data.train.0"]
    assert read["image"]["kept"] == 6
    assert read["folder"]["skipped"] == {"written by a run": {"count": 1, "first": "run"}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batchnorm_of_one_image_is_refused_before_the_run(
    arguments: Arguments, settings: Settings, user_error: Any, accumulate: int, call: Call
) -> None:
    settings |= {"batch_size": accumulate, "accumulate": accumulate, "student": {"model": "random:test_resnet"}}
    assert user_error(distill, arguments(settings)) == (
        f"batch_size: {accumulate} is one image per process and pass, and BatchNorm of the network needs at least two; raise batch_size, or lower "
        "accumulate or the number of processes"
    )
    if accumulate == 1:
        assert call(distill, arguments(settings | {"student": {"model": "random:test_convnext"}})) == 0


def test_running_statistics_need_no_second_image(
    arguments: Arguments, settings: Settings, teacher_file: Path, call: Call
) -> None:
    student = {"model": str(teacher_file), "batchnorm": "eval"}
    assert call(distill, arguments(settings | {"batch_size": 1, "student": student})) == 0


def test_one_class_teaches_nothing_by_labels(
    arguments: Arguments, settings: Settings, user_error: Any, images: Path
) -> None:
    settings |= {"objective": "labels", "data": {"train": [f"{images}"], "image_size": 32}}
    for name in ("0.jpg", "1.jpg", "2.jpg", "gone.jpg"):
        (images / "ring" / name).unlink()
    assert "all images are of one class, 'disc': at least two classes are needed" in user_error(
        distill, arguments(settings)
    )


@pytest.mark.parametrize("name", ["2024", "null", "[old]", "a,b", "2024-01-01"])
def test_paths_that_look_like_yaml(name: str, images: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).symlink_to(images)
    more = ["--output", "run", "--teacher.model", "x", "--keep", "1"]
    (source,) = parse_config(CurateConfig, ["--pool", name, *more], program="").pool
    assert len(ImageSource(source, 0)) == 6
    more = ["--output", "run", "--model", "x"]
    assert len(ImageSource(parse_config(EvaluateConfig, ["--data.path", name, *more], program="").data, 0)) == 6


def test_paths_that_yaml_takes_for_something_else(arguments: Arguments, settings: Settings, user_error: Any) -> None:
    assert SourceConfig.model_validate(2024).path == SourceConfig.model_validate({"path": 2024}).path == "2024"
    settings["data"]["train"] = [" "]
    assert "the path is empty; name a folder or a file" in user_error(distill, arguments(settings))
    for value, expected in ((None, "null"), (True, "true"), (["old"], '["old"]'), (1e3, "1000.0")):
        settings["data"]["train"] = [{"path": value}]
        assert f"the path is {expected} to YAML; put a name like that in quotes" in user_error(
            distill, arguments(settings)
        )
    settings["data"]["train"] = [""]
    assert "data.train.0: the path is empty" in user_error(distill, arguments(settings))
