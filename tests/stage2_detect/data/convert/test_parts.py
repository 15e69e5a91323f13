"""`data: PATH`: every format gives the same images and boxes; the cache is used again, follows changes, and never holds half a conversion."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted_data import write
from many_formats import BOX, BOXES, FORMATS, NAMES, coco, parquet, picture, roboflow_coco, yolo, yolo_file
from PIL import Image

from ssld.shared.errors import UserError
from ssld.stage2_detect import check_data
from ssld.stage2_detect.config import EvaluateConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.convert import parts as parts_module
from ssld.stage2_detect.data.convert.cache import cache_folder
from ssld.stage2_detect.data.convert.parts import DataSet, choose, evaluated_part, find_data
from ssld.stage2_detect.data_config import DetectionDataConfig
from ssld.stage2_detect.layouts.coco import part_kind


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ssld" / "data"


def entries(cache: Path) -> dict[str, int]:
    """Time stamp of every visible file of the cache."""
    return {str(file): file.stat().st_mtime_ns for file in cache.rglob("[!.]*") if file.is_file()}


def found(source: Path | str) -> DataSet:
    return find_data(DetectionDataConfig(source=str(source)))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_images_and_boxes(name: str, tmp_path: Path, cache: Path) -> None:
    data = found(FORMATS[name](tmp_path / "set"))
    assert data.val is not None
    for part, its in (("train", data.train), ("valid", data.val)):
        coco = read_coco(its.annotations, its.images, training=True, class_names=NAMES)
        assert len(coco.images) == BOXES[part]
        by_pixels = {Image.open(record.path).tobytes(): record for record in coco.images}
        for number in range(BOXES[part]):
            record = by_pixels[picture(part, number).tobytes()]
            assert record.file_boxes_N4.tolist() == [BOX]
            assert [coco.class_names[label] for label in record.labels_N] == [NAMES[number % 2]]
    before = entries(cache)
    assert bool(before) == data.converted
    assert found(tmp_path / "set" / ("data.yaml" if name == "yolo_file" else "")) == data
    assert entries(cache) == before


def test_a_changed_label_file_makes_a_new_conversion(tmp_path: Path, cache: Path) -> None:
    source = yolo_file(tmp_path / "set")
    first = found(source).train.annotations
    write(tmp_path / "set" / "train" / "labels" / "0.txt", "1 0.5 0.5 0.5 0.5\n")
    os.utime(tmp_path / "set" / "train" / "labels" / "0.txt", ns=(1, 1))  # of the same length, but another time
    second = found(source).train.annotations
    assert second != first
    labels = [json.loads(file.read_text())["annotations"][0]["category_id"] for file in (first, second)]
    assert labels == [1, 2]


def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path) -> None:
    data = found(yolo(tmp_path / "set"))
    content = data.train.annotations.read_text()
    data.train.annotations.write_text(content[:-30])
    assert found(tmp_path / "set").train.annotations.read_text() == content


def test_a_lost_image_of_the_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    data = found(parquet(tmp_path / "set"))
    image = next(data.train.images.rglob("*.png"))
    content = image.read_bytes()
    image.write_bytes(content[:-1])
    assert found(tmp_path / "set") == data
    assert image.read_bytes() == content


def test_a_cache_that_cannot_be_locked(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = found(yolo(tmp_path / "set"))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert found(tmp_path / "set") == data
    data.train.annotations.unlink()
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\).*set XDG_CACHE_HOME"):
        found(tmp_path / "set")


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache" / "ssld" / "data"


def _killed(source: str) -> None:
    original = parts_module.convert

    def half(config: Any, folder: Path, **options: Any) -> Any:
        original(config, folder, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    parts_module.convert = half
    found(source)


def test_a_killed_conversion_leaves_nothing_that_is_used(tmp_path: Path, cache: Path) -> None:
    source = yolo(tmp_path / "set")
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(str(source),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(cache.rglob("train.json"))  # written, but not in its place
    assert not entries(cache) or all("/." in name for name in entries(cache))
    data = found(source)
    assert len(json.loads(data.train.annotations.read_text())["images"]) == BOXES["train"]
    assert [one.name for one in cache.iterdir() if one.is_dir()] == [data.train.annotations.parent.name]


def test_processes_at_once_convert_once(tmp_path: Path, cache: Path) -> None:
    source = yolo(tmp_path / "set")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        one, other = pool.map(found, [source, source])
    assert one == other
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 1


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (["test", "valid", "train"], ("train", "valid")),
        (["train2017", "val2017"], ("train2017", "val2017")),
        (["Train", "Test"], ("Train", "Test")),
        (["trainval", "train", "test"], ("train", "test")),
        (["trainval", "test"], ("trainval", "test")),
        (["photos"], ("photos", None)),
    ],
)
def test_choice_of_parts(splits: list[str], chosen: tuple[str, str | None]) -> None:
    assert choose("x", splits) == chosen


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (["test"], "has no part to train on, called train (it has test)"),
        (["a", "b"], "has no part to train on, called train (it has a, b)"),
        (["train2014", "train2017"], "train2014 and train2017 may both be meant for train"),
    ],
)
def test_no_choice(splits: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        choose("x", splits)


def test_words_of_parts() -> None:
    names = ("instances_train2017", "Validation", "dev", "testing", "contrast", "training_set")
    assert [part_kind(name) for name in names] == ["train", "val", "val", "test", None, "train"]


def test_without_a_part_to_evaluate_on(tmp_path: Path) -> None:
    data = found(roboflow_coco(tmp_path / "set") / "train")
    assert data.val is None
    assert "trained on train, without a part called val, valid or test to evaluate on" in data.notes[0]


def test_a_test_part_without_objects_is_no_evaluation(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set")
    write(root / "data.yaml", f"train: train/images\ntest: test/images\nnames: {NAMES}\n")
    (root / "test" / "labels" / "0.txt").unlink()
    data = found(root)
    assert data.val is None
    assert any("test: no image has an object" in note for note in data.notes)


def test_the_part_to_evaluate_on(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set")
    sizes = {}
    for split in (None, "test"):
        part, _ = evaluated_part(EvaluateConfig(model="m", output="o", data=str(root), split=split))
        sizes[part.split] = len(json.loads(part.annotations.read_text())["images"])
    assert sizes == {"val": BOXES["valid"], "test": BOXES["test"]}
    with pytest.raises(UserError, match="has no part 'other'"):
        evaluated_part(EvaluateConfig(model="m", output="o", data=str(root), split="other"))


def test_the_interface_for_other_programs(tmp_path: Path, user_error: Callable[..., str]) -> None:
    record = tmp_path / "parts.json"
    root = roboflow_coco(tmp_path / "set")
    assert check_data.main(["--data", str(root), "--parts", str(record)]) == 0
    content = json.loads(record.read_text())
    assert content["train"] == {
        "split": "train",
        "annotations": str(root / "train" / "_annotations.coco.json"),
        "images": str(root / "train"),
    }
    assert (content["kind"], content["converted"], content["val"]["split"]) == ("COCO", False, "valid")
    other = tmp_path / "other"
    write(other / "notes.md", "")
    line = user_error(check_data.main, ["--data", str(other), "--parts", str(tmp_path / "none.json")])
    assert line.startswith(f"data: {other}: neither YOLO (data.yaml")
    assert line.endswith("it holds notes.md")
    assert not (tmp_path / "none.json").exists()
    line = user_error(check_data.main, ["--data", "cppe/five", "--parts", str(record)])
    assert line == "data: cppe/five: no such file or folder; for a data set of the Hugging Face hub write hub:cppe/five"


def test_images_in_no_usual_place(tmp_path: Path) -> None:
    root = roboflow_coco(tmp_path / "set")
    (root / "train").rename(root / "elsewhere")
    write(root / "train.json", (root / "elsewhere" / "_annotations.coco.json").read_text())
    (root / "elsewhere" / "_annotations.coco.json").unlink()
    with pytest.raises(UserError, match=r"train.json: its first image, 0.png, is neither beside it nor in train/"):
        found(root / "train.json")


@pytest.mark.parametrize(
    "prefix", ["images\\", "../../media/upload/1/", "C:\\work\\export\\images\\", "https://host/d/"]
)
def test_names_of_another_machine_lead_to_their_folder(tmp_path: Path, prefix: str) -> None:
    """As Label Studio writes them; the reader names the correction."""
    root = tmp_path / "export"
    write(root / "result.json", json.dumps(coco("train", prefix=prefix)))
    (root / "images").mkdir()
    for number in range(4):
        picture("train", number).save(root / "images" / f"{number}.png")
    part = found(root).train
    with pytest.raises(
        UserError, match=r"4 of the 4 images .*did you mean '(images/)?0.png'\?; `ssld doctor --fix DIR`"
    ):
        read_coco(part.annotations, part.images, training=True)


def test_a_part_may_be_called_data(tmp_path: Path) -> None:
    """As FiftyOne's folder of images and labels is: its file must not be that of the cache's own record."""
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    picture("train", 0).save(folder / "a.png")
    write(folder / "a.txt", "0 0.5 0.5 0.25 0.5\n")
    write(tmp_path / "set" / "obj.names", "cat\n")
    for _ in range(2):
        train = found(tmp_path / "set").train
        assert (train.split, len(read_coco(train.annotations, train.images, training=True).images)) == ("data", 1)
