"""The annotation cache returns the content of the file, detects every change, and ignores invalid files in its folder."""

import json
import os
import pickle
import stat
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.data import annotation_cache
from ssld.stage2_detect.data.annotation_cache import PackedShapes, cache_folder
from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.train import main

CONTENT: dict[str, Any] = {
    "images": [
        {"id": "a", "file_name": "a.png", "width": 64, "height": 48},
        {"id": 2, "file_name": "ü.png", "width": 30, "height": 20},
        {"id": 3.0, "file_name": "c.png", "width": 30, "height": 20},
    ],
    "annotations": [
        {"id": 9, "image_id": 2, "category_id": 5, "bbox": [1, 2, 3.25, 4], "segmentation": [[1, 2, 4, 2, 4, 6.5]]},
        {"id": "x", "image_id": "a", "category_id": 7, "bbox": [0, 0, 64, 48], "area": 7, "iscrowd": 1,
         "segmentation": {"size": [48, 64], "counts": [0, 48 * 64]}},
        {"id": 11, "image_id": "a", "category_id": 7, "bbox": [60, 40, 10, 10]},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 5, "name": "dög"}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the cache inside the test's folder; files of any size are cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "LEAST_BYTES", 0)
    return cache_folder()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / "train.json", CONTENT)


def write(path: Path, content: Any, age: float = 60) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return path


def content_of(data: CocoData) -> Any:
    rows = []
    for record in data.images:
        arrays = (record.boxes_N4, record.labels_N, record.crowd_N, record.areas_N, record.file_boxes_N4)
        facts = (record.image_id, record.path, record.width, record.height, record.annotation_ids)
        shapes = None if record.segmentations is None else list(record.segmentations)
        rows.append((*facts, [(array.dtype.str, array.tolist()) for array in arrays], shapes))
    return data.class_names, data.category_ids, data.counts, data.tally.record(), rows


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List of the files that were parsed."""
    files: list[str] = []
    real = annotation_cache.read_table

    def read_table(file: str, *, segmentations: bool) -> Any:
        files.append(file)
        return real(file, segmentations=segmentations)

    monkeypatch.setattr(annotation_cache, "read_table", read_table)
    return files


@pytest.mark.parametrize("segmentations", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("class_names", [None, ("dög", "cat")])
def test_the_cache_gives_what_the_file_gives(
    file: Path, parsed: list[str], segmentations: bool, training: bool, class_names: Any
) -> None:
    options: dict[str, Any] = {"training": training, "segmentations": segmentations, "class_names": class_names}
    expected = content_of(read_coco(file, None, **options))
    for _ in range(3):
        assert content_of(read_coco(file, None, **options, cache_annotations=True)) == expected
    assert len(parsed) == 1


def test_one_entry_serves_all_settings(file: Path, folder: Path, parsed: list[str]) -> None:
    read_coco(file, None, training=True, cache_annotations=True)
    read_coco(file, None, training=True, segmentations=True, cache_annotations=True)  # the entry has no shapes yet
    for training in (True, False):
        for segmentations in (True, False):
            read_coco(file, None, training=training, segmentations=segmentations, cache_annotations=True)
    assert len(parsed) == 2
    (entry,) = entries(folder)
    assert entry.suffix == ".safetensors"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in file.parent.iterdir()) == ["train.json"]


def test_a_changed_file_is_read_again(file: Path, folder: Path, parsed: list[str]) -> None:
    read_coco(file, None, training=False, cache_annotations=True)
    content = json.loads(json.dumps(CONTENT))
    content["annotations"][0]["bbox"][0] = 3  # as many bytes as before
    before = file.stat()
    write(file, content, age=50)
    assert file.stat().st_size == before.st_size
    data = read_coco(file, None, training=False, cache_annotations=True)
    assert data.images[1].boxes_N4[0, 0] == 3
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    read_coco(file, None, training=False, cache_annotations=True)
    assert len(parsed) == 3
    assert len(entries(folder)) == 1


def test_a_file_changed_a_moment_ago_is_not_kept(file: Path, folder: Path) -> None:
    write(file, CONTENT, age=0.5)
    read_coco(file, None, training=False, cache_annotations=True)
    assert entries(folder) == []


def test_a_small_file_is_not_kept(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_cache, "LEAST_BYTES", file.stat().st_size + 1)
    read_coco(file, None, training=False, cache_annotations=True)
    assert entries(folder) == []


def test_without_the_cache_nothing_is_kept(file: Path, folder: Path) -> None:
    read_coco(file, None, training=False)
    assert entries(folder) == []


def test_another_version_is_not_read(file: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read_coco(file, None, training=False, cache_annotations=True)
    monkeypatch.setattr(annotation_cache, "VERSION", 99)
    for _ in range(2):
        read_coco(file, None, training=False, cache_annotations=True)
    assert len(parsed) == 2


def damage(name: str, entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    if name == "cut":
        content = content[: len(content) // 2]
    elif name == "empty":
        content = bytearray()
    elif name == "text":
        content = bytearray(b"no such thing" * 50)
    elif name == "one bit":
        content[-20] ^= 4
    elif name == "pickle":
        content = bytearray(pickle.dumps({"boxes_N4": 1}))
    entry.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "text", "one bit", "pickle"])
def test_a_damaged_entry_is_replaced(file: Path, folder: Path, parsed: list[str], how: str) -> None:
    expected = content_of(read_coco(file, None, training=False, segmentations=True, cache_annotations=True))
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    damage(how, entry)
    assert entry.read_bytes() != whole
    assert content_of(read_coco(file, None, training=False, segmentations=True, cache_annotations=True)) == expected
    assert len(parsed) == 2
    assert entry.stat().st_size == len(whole)
    read_coco(file, None, training=False, segmentations=True, cache_annotations=True)
    assert len(parsed) == 2


def test_every_byte_of_the_numbers_is_checked(file: Path, folder: Path, parsed: list[str]) -> None:
    """A flipped bit anywhere after the header is detected."""
    read_coco(file, None, training=False, segmentations=True, cache_annotations=True)
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for number, place in enumerate(range(begin, len(whole), 7), 2):
        content = bytearray(whole)
        content[place] ^= 1
        entry.write_bytes(content)
        read_coco(file, None, training=False, segmentations=True, cache_annotations=True)
        assert len(parsed) == number


def test_a_folder_that_cannot_be_written_is_no_fault(file: Path, folder: Path) -> None:
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file where the folder should be")
    for _ in range(2):
        assert len(read_coco(file, None, training=False, cache_annotations=True).images) == 3


def test_missing_and_invalid_files_raise_the_usual_errors(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        read_coco(tmp_path / "none.json", None, training=False, cache_annotations=True)
    wrong = write(tmp_path / "data" / "wrong.json", CONTENT | {"annotations": [{"id": 1, "image_id": 9}]})
    for _ in range(2):
        with pytest.raises(UserError, match="annotation 1 has image_id 9"):
            read_coco(wrong, None, training=False, cache_annotations=True)
    assert entries(folder) == []


def test_missing_images_are_errors_with_the_cache_too(file: Path, tmp_path: Path) -> None:
    read_coco(file, None, training=False, cache_annotations=True)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"3 of the 3 images .* are missing"):
        read_coco(file, tmp_path / "images", training=False, cache_annotations=True)


def _read(file: Path) -> Any:
    annotation_cache.LEAST_BYTES = 0
    return content_of(read_coco(file, None, training=True, segmentations=True, cache_annotations=True))


def test_processes_that_read_at_once(file: Path, folder: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        results = list(pool.map(_read, [file] * 12))
    assert results == [content_of(read_coco(file, None, training=True, segmentations=True))] * 12
    assert len(entries(folder)) == 1


def test_packed_shapes() -> None:
    shapes = [[[1.5, 2, 3, 4, 5, 6]], None, {"size": [2, 2], "counts": "ü1"}, []]
    packed = annotation_cache._pack(shapes)
    assert list(packed) == shapes
    assert len(packed) == 4
    assert packed[-2] == shapes[2]
    assert list(packed[1:3]) == shapes[1:3]
    assert list(packed.pick(np.array([2, 0]))) == [shapes[2], shapes[0]]
    assert list(pickle.loads(pickle.dumps(packed))) == shapes  # pickled as for the workers of a loader
    assert list(annotation_cache._pack([])) == []
    with pytest.raises(IndexError):
        packed.pick(np.array([1]))[1]
    assert isinstance(packed.pick(np.array([], dtype=np.int64)), PackedShapes)


def test_training_uses_it_and_can_do_without(
    train_settings: dict[str, Any], arguments: Callable[..., list[str]], call: Any, folder: Path
) -> None:
    for key in ("train_annotations", "val_annotations"):
        os.utime(train_settings["data"][key], (time.time() - 60,) * 2)
    train_settings["steps"] = 1
    assert call(main, arguments(train_settings | {"cache_annotations": False})) == 0
    assert entries(folder) == []
    assert call(main, arguments(train_settings, "second")) == 0
    assert len(entries(folder)) == 2
