"""Orientation of images: upright, unless the sideways images of a source show that its boxes refer to the stored pixels."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted_data import line
from PIL import Image
from turned_images import (
    SHAPES,
    STORED,
    WRITERS,
    Scene,
    coco_content,
    save_as,
    save_turned,
    scenes,
    write_coco,
    write_voc,
)

from ssld.shared.errors import UserError
from ssld.shared.images import ImageHeader
from ssld.stage2_detect import convert_data
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig, TrainConfig
from ssld.stage2_detect.data import annotation_cache, orientation
from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.data.loaders import TrainLoader, eval_loader, load_record
from ssld.stage2_detect.data.orientation import Orientation, fit_of, is_upright, orientation_of
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.data.training_data import TrainingData

Read = Callable[..., tuple[CocoData, CocoData]]


@pytest.fixture
def read(call: Callable[..., int], tmp_path: Path) -> Read:
    """Read a data set in one of three formats, two of them converted; returns it as (training, evaluation) reads it."""

    def read(form: str, folder: Path, images: Path, split: str = "train") -> tuple[CocoData, CocoData]:
        if form != "coco":
            output = folder.with_name(f"{folder.name}_run")
            if not output.exists():
                assert call(convert_data.main, line(folder, output)) == 0
            images = Path(json.loads((output / "result.json").read_text())["metrics"]["splits"][split]["image_folder"])
            folder = output
        return tuple(read_coco(folder / f"{split}.json", images, training=training) for training in (True, False))  # type: ignore[return-value]

    return read


def same_batches(actual: CocoData, expected: CocoData) -> bool:
    """Whether two augmented steps of training have equal pixels and boxes on two data sets."""
    resize = ResizeConfig(train_short_sides=[32, 40], train_long_side=64)
    options: dict[str, Any] = {"batch_size": len(actual.images), "seed": 1, "start_step": 0, "stop_step": 2}
    both = [TrainLoader(data, resize, AugmentConfig(), **options) for data in (actual, expected)]
    for a, b in zip(*both, strict=True):
        for name in ("pixels_BCHW", "sizes_B2"):
            if not torch.equal(getattr(a.images, name), getattr(b.images, name)):
                return False
        if not torch.allclose(a.targets.boxes_BG4, b.targets.boxes_BG4, atol=1e-3):
            return False
    return True


def same_evaluation(actual: CocoData, expected: CocoData) -> bool:
    both = [eval_loader(data, Sizing(32, 64), batch_size=2) for data in (actual, expected)]
    same = all(torch.equal(a.pixels_BCHW, b.pixels_BCHW) for (a, _), (b, _) in zip(*both, strict=True))
    first, second = (np.concatenate([record.file_boxes_N4 for record in data.images]) for data in (actual, expected))
    return same and np.allclose(first, second, atol=1e-3)


def write(form: str, folder: Path, some: Sequence[Scene], orientation: int) -> Path:
    images = WRITERS[form](folder, some)
    for one in some:
        save_turned(images / one.name, one.pixels, orientation)
    return images


@pytest.mark.parametrize("form", list(WRITERS))
@pytest.mark.parametrize("shapes", [list(SHAPES), ["square"]])
def test_equal_content_in_any_orientation_is_read_equal(
    form: str, shapes: list[str], tmp_path: Path, read: Read
) -> None:
    some = scenes(shapes * 2)
    reference = read(form, tmp_path / "plain", write(form, tmp_path / "plain", some, 1))
    for value in range(2, 9):
        folder = tmp_path / str(value)
        training, evaluation = read(form, folder, write(form, folder, some, value))
        assert same_batches(training, reference[0]), value
        assert same_evaluation(evaluation, reference[1]), value
        assert evaluation.orientation.convention == "upright"
    assert not same_batches(training, read("coco", tmp_path / "other", _as_stored(tmp_path / "other", some))[0])


def _as_stored(folder: Path, some: Sequence[Scene]) -> Path:
    """The same boxes on other pixels, so that the comparison above can fail."""
    images = write_coco(folder, some)
    for one in some:
        save_as(images / one.name, one.pixels[::-1], 1)
    return images


def stored_source(folder: Path, form: str = "coco") -> tuple[list[Scene], list[int], Path]:
    """A data set whose boxes refer to the stored pixels: three sideways images show it, six images have equal size in both forms."""
    values = [6, 8, 5, 3, 2, 4, 6, 8, 7]
    some = scenes(["landscape", "portrait"] * 3 + ["square"] * 3)
    images = WRITERS[form](folder, some)
    for one, value in zip(some, values, strict=True):
        save_as(images / one.name, one.pixels, value)
    return some, values, images


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_stored_pixels_if_sideways_images_match_them(form: str, tmp_path: Path, read: Read) -> None:
    some, _, images = stored_source(tmp_path / "a", form)
    plain = WRITERS[form](tmp_path / "b", some)
    for one in some:
        save_as(plain / one.name, one.pixels, 1)
    training, evaluation = read(form, tmp_path / "a", images)
    reference = read(form, tmp_path / "b", plain)
    assert same_batches(training, reference[0])
    assert same_evaluation(evaluation, reference[1])
    decided = evaluation.orientation
    assert (decided.convention, decided.upright, decided.stored, decided.both) == ("stored", 0, 3, 6)
    assert training.describe().endswith(
        "3 sideways images read as stored, by their sizes, 6 images that EXIF turns without a change of size read as stored, "
        + ("like these" if form == "coco" else "as the source states")
    )


def test_a_split_keeps_the_orientation_of_its_source(tmp_path: Path, read: Read) -> None:
    """The sideways images are all in one split, and one of them has no size."""
    folder = tmp_path / "voc"
    some, values, _ = stored_source(tmp_path / "coco")
    images = write_voc(folder, some, unsized=["1.png"])
    for one, value in zip(some, values, strict=True):
        save_as(images / one.name, one.pixels, value)
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(map(str, range(4))))
    (lists / "val.txt").write_text("\n".join(map(str, range(4, 9))))
    for split, number in (("train", range(4)), ("val", range(4, 9))):
        _, data = read("voc", folder, images, split)
        for index, record in zip(number, data.images, strict=True):
            assert np.array_equal(load_record(record).permute(1, 2, 0).numpy(), some[index].pixels), (split, index)
    record = json.loads((tmp_path / "voc_run" / "result.json").read_text())["metrics"]["orientation"]
    assert record == {"convention": "stored", "stated": False, "upright": 0, "stored": 2, "both": 6}


@pytest.mark.parametrize(("upright", "stored"), [(2, 1), (1, 2), (1, 1)])
def test_sideways_images_that_contradict_each_other(upright: int, stored: int, tmp_path: Path) -> None:
    some = scenes(["landscape"] * (upright + stored) + ["landscape", "square"])
    images = write_coco(tmp_path, some)
    most_stored = stored > upright
    for index, one in enumerate(some):
        sideways = index < upright + stored
        as_stored = index >= upright if sideways else most_stored
        save = save_as if as_stored else save_turned
        save(images / one.name, one.pixels, 6 if sideways or index == len(some) - 1 else 3)
    data = read_coco(tmp_path / "train.json", images, training=True)
    for record, one in zip(data.images, some, strict=True):
        assert np.array_equal(load_record(record).permute(1, 2, 0).numpy(), one.pixels), record.path
    decided = data.orientation
    assert (decided.upright, decided.stored, decided.both, decided.contradictory) == (upright, stored, 2, True)
    text = data.describe()
    assert f"{upright} sideways image" in text
    assert f"{stored} sideways image" in text
    way = "as stored" if most_stored else "upright"
    why = "without a majority of these" if upright == stored else "like most of these"
    assert text.endswith(f"2 images that EXIF turns without a change of size read {way}, {why}")


def test_undecided_images_are_upright_and_reported(tmp_path: Path) -> None:
    some = scenes(["landscape", "square", "portrait"])
    images = write_coco(tmp_path, some)
    for one, value in zip(some, (3, 5, 1), strict=True):
        save_turned(images / one.name, one.pixels, value)
    data = read_coco(tmp_path / "train.json", images, training=True)
    for record, one in zip(data.images, some, strict=True):
        assert np.array_equal(load_record(record).permute(1, 2, 0).numpy(), one.pixels)
    assert data.orientation.guessed
    assert data.describe().endswith(
        "2 images that EXIF turns without a change of size read upright, although the form that the boxes refer to is unknown"
    )
    for one in some:
        save_as(images / one.name, one.pixels, 1)
    plain = read_coco(tmp_path / "train.json", images, training=True)
    assert plain.orientation == Orientation()
    assert plain.describe().endswith("1 class")


def test_log_and_result_have_the_orientation_of_each_source(tmp_path: Path) -> None:
    for part, value in (("a", 6), ("b", 3)):
        write("coco", tmp_path / part, scenes(["landscape"]), value)
    train, val = (
        read_coco(tmp_path / part / "train.json", tmp_path / part / "images", training=part == "a") for part in "ab"
    )
    data = TrainingData(train, val)
    config = TrainConfig.model_construct(unlabeled=None)
    first, second = data.describe(config)
    assert first.endswith("1 sideways image turned upright by EXIF, by its size")
    assert second.startswith(f"{tmp_path / 'b' / 'train.json'}: 1 image, ")
    assert second.endswith(f", {val.orientation.describe()}")
    records = data.orientations()
    assert (records["train"]["upright"], records["val"]["both"]) == (1, 1)


def test_a_file_may_state_its_orientation(tmp_path: Path) -> None:
    some = scenes(["landscape", "square"])
    images = write_coco(tmp_path, some)
    for one in some:
        save_as(images / one.name, one.pixels, 3)
    content = coco_content(some)
    for value, stored in (("stored", True), ("upright", False)):
        (tmp_path / "train.json").write_text(json.dumps(content | {"info": {"image_orientation": value}}))
        data = read_coco(tmp_path / "train.json", images, training=True)
        for record, one in zip(data.images, some, strict=True):
            reference = one.pixels if stored else one.pixels[::-1, ::-1]
            assert np.array_equal(load_record(record).permute(1, 2, 0).numpy(), reference)
        assert "as the source states" in data.describe()
        assert not data.orientation.guessed
    (tmp_path / "train.json").write_text(json.dumps(content | {"info": {"image_orientation": "sideways"}}))
    with pytest.raises(UserError, match=r"info.image_orientation is 'sideways', expected one of upright, stored$"):
        read_coco(tmp_path / "train.json", images, training=True)
    others: list[Any] = [None, [], "text", {"year": 2020}]
    for other in others:
        (tmp_path / "train.json").write_text(json.dumps(content | {"info": other}))
        assert not read_coco(tmp_path / "train.json", images, training=True).orientation.stated


def test_a_size_that_fits_neither_way_is_an_error_before_training(tmp_path: Path) -> None:
    some = scenes(["landscape", "square", "portrait"])
    images = write_coco(tmp_path, some)
    for one in some:
        save_turned(images / one.name, one.pixels, 6)
    Image.new("RGB", (7, 9)).save(images / "1.png")
    with pytest.raises(UserError) as caught:
        read_coco(tmp_path / "train.json", images, training=True)
    assert (
        str(caught.value) == f"{tmp_path / 'train.json'}: image {images / '1.png'} is 7x9, but 40x40 in the annotations"
    )
    Image.new("RGB", (32, 48)).save(images / "0.png")  # width and height exchanged without EXIF
    with pytest.raises(UserError) as caught:
        read_coco(tmp_path / "train.json", images, training=True)
    assert str(caught.value) == (
        f"{tmp_path / 'train.json'}: image {images / '0.png'} is 32x48, but 48x32 in the annotations, and 1 others of its 3 images do not fit "
        "either"
    )


def test_unreadable_images_do_not_count(tmp_path: Path) -> None:
    images = write_coco(tmp_path, scenes(["landscape"] * 3))
    for one in scenes(["landscape"] * 3):
        save_turned(images / one.name, one.pixels, 6)
    (images / "0.png").write_bytes(b"no image")
    assert read_coco(tmp_path / "train.json", images, training=True).orientation.upright == 2


def test_every_fit() -> None:
    for value, (wide, high) in itertools.product(range(1, 9), [(4, 3), (3, 3)]):
        header = ImageHeader(high, wide, value)
        upright = STORED[value](np.zeros((high, wide))).shape  # swaps the sides for the same values
        for size in {(wide, high), (high, wide), (5, 5)}:
            stored_fits, upright_fits = size == (wide, high), size == upright[::-1]
            fit = fit_of(header, *size)
            if value == 1:
                assert fit == ("plain" if stored_fits else "neither")
            else:
                assert (fit in ("stored", "both"), fit in ("upright", "both")) == (stored_fits, upright_fits)
    assert [is_upright(fit, "stored") for fit in ("plain", "upright", "stored", "both")] == [False, True, False, False]
    assert [is_upright(fit, "upright") for fit in ("plain", "upright", "stored", "both")] == [False, True, False, True]


def test_the_majority_decides_and_a_tie_is_upright() -> None:
    assert orientation_of(["stored", "stored", "upright", "both"]).convention == "stored"
    assert orientation_of(["stored", "upright", "both"]).convention == "upright"
    assert orientation_of(["both", "plain"]).convention == "upright"
    assert orientation_of(["upright"] * 9, "stored").convention == "stored"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that is old enough to be cached; returns the folder of the cache's entries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(orientation, "LEAST_IMAGES", 1)
    stored_source(tmp_path / "set")
    for file in (tmp_path / "set" / "images").iterdir():
        os.utime(file, (1e9, 1e9))
    return annotation_cache.cache_folder()


def test_the_headers_are_read_once(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    headers = orientation.image_headers

    def counted(paths: Sequence[str]) -> list[ImageHeader | None]:
        calls.append(len(paths))
        return headers(paths)

    monkeypatch.setattr(orientation, "image_headers", counted)

    def decided(cache: bool = True) -> Orientation:
        folder = tmp_path / "set"
        return read_coco(folder / "train.json", folder / "images", training=True, cache_annotations=cache).orientation

    reference = decided(cache=False)
    assert not kept.exists()
    assert [decided(), decided(), decided()] == [reference] * 3
    assert calls == [9, 9]
    (entry,) = kept.iterdir()
    entry.write_bytes(entry.read_bytes().replace(b'"stored": 3', b'"stored": 0'))
    assert decided() == reference
    entry.write_bytes(b"{}")
    assert decided() == reference
    assert calls == [9] * 4
    # another image under the old name
    save_turned(tmp_path / "set" / "images" / "0.png", scenes(["landscape"])[0].pixels, 6)
    assert (decided().stored, decided().upright) == (2, 1)
    assert calls == [9] * 6  # an image changed just now could change again within the same time stamp
    os.utime(tmp_path / "set" / "images" / "0.png", (1e9 + 1, 1e9 + 1))
    assert decided() == decided() != reference
    assert calls == [9] * 7
