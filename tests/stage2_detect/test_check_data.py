"""The data check on deliberately damaged data: every fault is reported by name, and dropped boxes are counted as in training."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from turned_images import coco_content, save_as, save_turned, scenes

from ssld.shared.errors import UserError
from ssld.stage2_detect.check_data import main
from ssld.stage2_detect.data.check.images import difference_hash, near_duplicates
from ssld.stage2_detect.data.coco import read_coco, require_masks
from tests.stage2_detect.checked_data import Content, DataSet, data, texts

__all__ = ["data"]


def test_sound_data_has_no_faults(data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    content = data.read()
    code, findings, facts = data.check(val=True)
    assert code == 0
    assert {finding["level"] for finding in findings} <= {"note"}
    assert any("1 image without objects (1.png)" in text for text in texts(findings, "note"))
    counts = {
        name: sum(row["category_id"] == key for row in content["annotations"])
        for key, name in ((3, "wide"), (7, "tall"))
    }
    assert facts["train"]["classes"] == counts
    sides = sorted((row["area"] ** 0.5) / 64 for row in content["annotations"])
    middle = len(sides) // 2
    median = sides[middle] if len(sides) % 2 else (sides[middle - 1] + sides[middle]) / 2
    assert facts["train"]["object_sizes"][2] == pytest.approx(median, abs=1e-4)
    assert facts["train"]["short_side"] == 64
    assert "12 images, 2 classes, " in capsys.readouterr().out


def test_counts_are_those_of_training(data: DataSet) -> None:
    content = data.read()
    rows = content["annotations"]
    rows[0]["bbox"][2] = 0  # degenerate
    rows[1]["bbox"] = [70, 0, 9, 9]  # outside
    rows[2]["bbox"] = [-9, -9, 9, 20]
    rows[3]["bbox"] = [50, 50, 30, 5]  # clipped
    rows[4]["bbox"], rows[4]["iscrowd"] = [0, 0, 0, 0], 1  # boxes of crowd regions are not checked
    data.write(content)
    code, findings, facts = data.check()
    trained = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    assert (trained.counts["degenerate"], trained.counts["outside"], trained.counts["clipped"]) == (1, 2, 1)
    assert facts["train"]["boxes"] == trained.counts["boxes"] == len(rows) - 4
    assert facts["train"]["dropped"] == 4
    assert code == 0
    warnings = texts(findings, "warning")
    assert any(text.startswith(f"1 box without width or height (id {rows[0]['id']})") for text in warnings)
    assert any(text.startswith("2 boxes outside the image (first ids: ") for text in warnings)
    assert any(text.startswith("1 box reaching over the border") for text in texts(findings, "note"))


Damage = Callable[[Content], None]
FAULTS: list[tuple[str, Damage, str]] = [
    ("image gone from the list", lambda c: c["annotations"][0].update(image_id="unknown"), "of an image that is not in"),
    ("unknown category", lambda c: c["annotations"][0].update(category_id=99), "of a category that is not in the file"),
    ("NaN", lambda c: c["annotations"][0].update(bbox=[float("nan"), 1, 2, 3]), "without a bbox of four finite numbers"),
    ("no box", lambda c: c["annotations"][0].pop("bbox"), "without a bbox of four finite numbers"),
    ("same id", lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]), "1 annotation with an id that is given before (id 1)"),
    ("crowd of 5", lambda c: c["annotations"][0].update(iscrowd=5), "an iscrowd that is neither 0 nor 1"),
    ("no width", lambda c: c["images"][0].pop("width"), "1 image without a width and height (0.png)"),
    ("image twice", lambda c: c["images"].append(c["images"][0]), "1 image with an id that is given before (0.png)"),
    ("no name", lambda c: c["images"][0].pop("file_name"), "1 image without a file_name"),
    ("wrong size", lambda c: c["images"][2].update(width=32), "1 image of another size than in the file (2.png is 64 x 64, not 32 x 64)"),
    ("file gone", lambda c: c["images"][2].update(file_name="gone.png"), "1 image of 12 not in"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_faults_are_reported_where_training_stops_and_repaired(data: DataSet, damage: Damage, message: str) -> None:
    content = data.read()
    damage(content)
    data.write(content)
    before = (data.folder / "train.json").read_bytes()
    with pytest.raises(UserError):
        read_coco(data.folder / "train.json", data.folder / "train", training=True)
    code, findings, _ = data.check("--fix", str(data.folder / "clean"))
    assert code == 1
    assert any(message in text for text in texts(findings, "fault")), findings
    assert (data.folder / "train.json").read_bytes() == before
    shutil.copy(data.folder / "clean" / "train.json", data.folder / "train.json")
    assert data.check()[0] == 0
    kept = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    assert len(kept.images) >= 11


@pytest.mark.parametrize(
    "shape",
    [[[1, 2, float("nan"), 4, 5, 6]], "x", [], None, [[1, 2, 3]], {"size": [9, 9], "counts": [81]}, [["a"] * 6]],
)
def test_segmentations_are_checked_as_in_training_with_masks(data: DataSet, shape: Any) -> None:
    content = data.read()
    rows = content["annotations"]
    assert data.check()[0] == 0  # boxes alone: nothing to report
    for row in rows:
        x, y, width, height = row["bbox"]
        row["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
    data.write(content)
    for flags in ([], ["--masks"]):
        assert "segmentation" not in str(data.check(*flags)[1])
    rows[2]["segmentation"] = shape
    data.write(content)
    trained = read_coco(data.folder / "train.json", data.folder / "train", training=True, segmentations=True)
    with pytest.raises(UserError, match=f"1 of {len(rows)} objects have no usable segmentation"):
        require_masks(trained)
    message = f"1 box without a usable segmentation (id {rows[2]['id']}): training a detector with masks stops"
    code, findings, _ = data.check()
    assert code == 0
    assert f"{message}; other kinds do not read it" in texts(findings, "note")
    code, findings, _ = data.check("--masks")
    assert code == 1
    assert message in texts(findings, "fault")


def test_unreadable_images_count_as_in_training(data: DataSet) -> None:
    first = data.folder / "train" / "0.png"
    first.write_bytes(first.read_bytes()[:100])
    code, findings, _ = data.check()
    assert code == 0  # training leaves out a single unreadable image
    assert any(text.startswith("1 image of 12 cannot be read (0.png;") for text in texts(findings, "warning"))
    (data.folder / "train" / "3.png").write_text("not a image")
    code, findings, _ = data.check()
    assert code == 1
    assert any("2 images of 12 cannot be read" in text for text in texts(findings, "fault"))


def test_leakage_and_unlisted_images(data: DataSet, tmp_path: Path) -> None:
    shutil.copy(data.folder / "val" / "2.png", data.folder / "train" / "5.png")
    shutil.copy(data.folder / "train" / "7.png", data.folder / "train" / "8.png")
    shutil.copy(data.folder / "train" / "7.png", data.folder / "train" / "stray.png")
    shutil.copy(data.folder / "train" / "7.png", data.folder / "train" / "._7.png")
    code, findings, facts = data.check("--fix", str(tmp_path / "clean"), val=True)
    assert code == 1
    assert any(
        "1 image also in val.json (5.png = 2.png): scores would be too good" in text
        for text in texts(findings, "fault")
    )
    assert any(
        "1 image stored more than once under other names (7.png = 8.png)" in text for text in texts(findings, "warning")
    )
    assert any("1 image in" in text and "without annotations (stray.png)" in text for text in texts(findings, "note"))
    assert facts["train"]["together"] == [["train-7", "train-8"]]
    clean = json.loads((tmp_path / "clean" / "train.json").read_text())
    assert [row["id"] for row in clean["images"]] == [f"train-{number}" for number in range(12) if number != 5]


def test_classes_of_both_files(data: DataSet, tmp_path: Path) -> None:
    content = data.read("val")
    content["categories"] = [{"id": 7, "name": "Tall"}, {"id": 3, "name": "wide"}, {"id": 8, "name": "other"}]
    data.write(content, "val")
    code, findings, _ = data.check("--fix", str(tmp_path / "clean"), val=True)
    assert code == 1
    assert any("'Tall' is 'tall' in train.json; unknown: other" in text for text in texts(findings, "fault"))
    clean = read_coco(
        tmp_path / "clean" / "val.json", data.folder / "val", training=False, class_names=("wide", "tall")
    )
    assert clean.category_ids == (3, 7)


def test_near_duplicates() -> None:
    draw = np.random.default_rng(5)
    cells = draw.integers(0, 256, (2, 8, 9), dtype=np.uint8)
    one, other = (Image.fromarray(cell).resize((90, 80), Image.Resampling.NEAREST).convert("RGB") for cell in cells)
    buffer = io.BytesIO()
    one.resize((180, 160)).save(buffer, "JPEG", quality=60)
    hashes = [difference_hash(image) for image in (one, Image.open(buffer), other)]
    expected = "".join("1" if row[x + 1] > row[x] else "0" for row in cells[0].tolist() for x in range(8))
    assert hashes[0] == int(expected, 2)
    assert near_duplicates(hashes[:1], hashes[1:]) == [(0, 0)]
    assert difference_hash(Image.new("RGB", (64, 48), (9, 9, 9))) == 0
    assert near_duplicates([0], [0, 1]) == []  # images of one color are not compared
    ramp = Image.fromarray(np.tile(np.arange(0, 180, 2, dtype=np.uint8), (80, 1)))  # dark to light, left to right
    assert difference_hash(ramp) == 2**64 - 1


def test_frames_of_a_video_are_a_warning_without_an_evaluation_file(data: DataSet) -> None:
    draw = np.random.default_rng(6)
    scenes = [draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(2)]
    for number, file in enumerate(sorted((data.folder / "train").iterdir())):
        pixels = np.asarray(Image.fromarray(scenes[number // 6]).resize((64, 64))).copy()
        pixels[20:24, 4 * number : 4 * number + 4] = 255  # something small moves
        Image.fromarray(pixels).save(file)
    assert len(list((data.folder / "train").iterdir())) == 12

    def frames(*flags: str, val: bool = False) -> list[str]:
        return [text for text in texts(data.check(*flags, val=val)[1], "warning") if "frames of videos?" in text]

    (warning,) = frames()
    assert warning.startswith("10 of its 12 images resemble the one before them (0.png ~ 1.png)")
    assert not frames(val=True)  # already split
    assert not frames("--quick")
    for file in (data.folder / "train").iterdir():
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(file)
    assert not frames()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--images", "nowhere"), "nowhere: no such folder"),
        (("--val_annotations", "val.json"), "give both --val_annotations and --val_images"),
        (("--fix", "x", "--quick"), "--fix needs to read the images"),
        (("--annotation", "y"), "--annotation: unknown flag; did you mean '--annotations'?"),
        (("--annotations", "broken.json"), "broken.json is not JSON"),
        (("--annotations", "other.json"), "other.json is not a COCO data set: expected an object, got a list"),
        (("--annotations", "gone.json"), "gone.json: no such file"),
    ],
)
def test_mistakes(
    data: DataSet,
    flags: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(data.folder)
    Path("broken.json").write_text("{")
    Path("other.json").write_text("[]")
    assert main(["--annotations", "train.json", "--images", "train", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_augmented_copies_on_both_sides(data: DataSet) -> None:
    for part, number in (("train", 3), ("train", 5), ("val", 2)):
        content = data.read(part)
        name = f"cat_jpg.rf.{number:032x}.png"
        (data.folder / part / f"{number}.png").rename(data.folder / part / name)
        content["images"][number]["file_name"] = name
        data.write(content, part)
    code, findings, facts = data.check(val=True)
    assert code == 0
    assert any(
        text.startswith("2 images of which val.json has an augmented copy by its name (cat_jpg.rf.0")
        for text in texts(findings, "warning")
    )
    assert any(text.startswith("2 images that are augmented copies of 1 photo") for text in texts(findings, "note"))
    assert facts["train"]["together"] == [["train-3", "train-5"]]


def test_quick_looks_at_names_only(data: DataSet) -> None:
    (data.folder / "train" / "0.png").write_text("not a image")
    shutil.rmtree(data.folder / "val")
    shutil.copytree(data.folder / "train", data.folder / "val")
    assert data.check("--quick", val=True)[0] == 0  # in two folders only the images' content could show it
    (data.folder / "val" / "2.png").unlink()
    code, findings, _ = data.check("--quick", val=True)
    assert code == 1
    assert any("1 image of 5 not in" in text for text in texts(findings, "fault"))


# ---- orientation of the images


def _orientation_finding(
    data: DataSet, values: list[int], sideways_stored: int, *flags: str
) -> tuple[list[Content], Content]:
    """Findings on squares that EXIF rotates by `values` beside three sideways images, `sideways_stored` of them with their stored size."""
    some = scenes(["landscape"] * 3 + ["square"] * len(values))
    shutil.rmtree(data.folder / "train")
    for number, (one, value) in enumerate(zip(some, [6] * 3 + values, strict=True)):
        (save_as if number < sideways_stored else save_turned)(data.folder / "train" / one.name, one.pixels, value)
    data.write(coco_content(some))
    code, findings, facts = data.check(*flags)
    assert code == 0
    return [one for one in findings if "sideways image" in one["text"]], facts["train"]["orientation"]


@pytest.mark.parametrize(
    ("stored", "level", "text"),
    [
        (0, "note", "3 sideways images turned upright by EXIF, by their sizes, 2 images that EXIF turns without a change of size read "
         "upright, like these"),
        (3, "note", "3 sideways images read as stored, by their sizes, 2 images that EXIF turns without a change of size read as stored, like "
         "these"),
        (1, "warning", "2 sideways images turned upright by EXIF, by their sizes, 1 sideways image read as stored, by its size, 2 images "
         "that EXIF turns without a change of size read upright, like most of these: look at some"),
    ],
)  # fmt: skip
def test_orientation_of_images(data: DataSet, stored: int, level: str, text: str) -> None:
    (finding,), facts = _orientation_finding(data, [3, 8, 1], stored, "--fix", str(data.folder / "clean"))
    assert (finding["level"], finding["text"]) == (level, text)
    convention = "stored" if stored == 3 else "upright"
    assert facts == {"convention": convention, "stated": False, "upright": 3 - stored, "stored": stored, "both": 2}
    # the copy may lack the images that decided it, so it states the orientation
    assert json.loads((data.folder / "clean" / "train.json").read_text())["info"] == {"image_orientation": convention}
    trained = read_coco(data.folder / "train.json", data.folder / "train", training=True)
    assert trained.orientation.record() == facts


def test_images_of_undecided_orientation_are_counted(data: DataSet) -> None:
    some = scenes(["landscape", "square", "portrait"])
    for one, value in zip(some, (3, 6, 1), strict=True):
        save_turned(data.folder / "train" / one.name, one.pixels, value)
    data.write(coco_content(some))
    text = "2 images that EXIF turns without a change of size read upright, although the form that the boxes refer to is unknown: look at some"
    assert texts(data.check()[1], "warning") == [text]
    data.write(coco_content(some) | {"info": {"image_orientation": "upright"}})
    assert not texts(data.check()[1], "warning")
    data.write(coco_content(some) | {"info": {"image_orientation": "up"}})
    code, findings, _ = data.check("--fix", str(data.folder / "clean"))
    assert code == 1
    assert texts(findings, "fault") == [
        "info.image_orientation is 'up', expected one of upright, stored: training stops"
    ]
    assert json.loads((data.folder / "clean" / "train.json").read_text())["info"] == {"image_orientation": "upright"}


def test_a_missing_size_follows_the_orientation_of_the_other_images(data: DataSet) -> None:
    some = scenes(["landscape"] * 4)
    for one in some:
        save_as(data.folder / "train" / one.name, one.pixels, 6)
    content = coco_content(some)
    del content["images"][2]["width"]
    data.write(content)
    assert data.check("--fix", str(data.folder / "clean"))[0] == 1
    images = json.loads((data.folder / "clean" / "train.json").read_text())["images"]
    assert [(row["width"], row["height"]) for row in images] == [(48, 32)] * 4


def test_files_of_one_name_are_named_with_their_folders(data: DataSet, tmp_path: Path) -> None:
    """As Roboflow's `_annotations.coco.json` of every part."""
    content = data.read()
    content["categories"].append({"id": 99, "name": "unused"})
    places = []
    for part, flag in (("train", ""), ("val", "val_")):
        file = data.folder / part / "_annotations.coco.json"
        file.write_text(json.dumps(content))
        places += [f"--{flag}annotations", str(file), f"--{flag}images", str(data.folder / "train")]
    report = tmp_path / "report.json"
    main([*places, "--report", str(report)])
    findings = json.loads(report.read_text())["findings"]
    assert {one["file"] for one in findings} == {f"{part}/_annotations.coco.json" for part in ("train", "val")}
    assert any("also in val/_annotations.coco.json" in one["text"] for one in findings)


def test_segmentations_that_no_detector_can_use_are_no_finding_for_boxes(data: DataSet) -> None:
    """Some tools write a list of empty lists for every box."""
    content = data.read()
    for row in content["annotations"]:
        row["segmentation"] = [[]]
    data.write(content)
    assert "segmentation" not in str(data.check()[1])
    assert "without a usable segmentation" in str(texts(data.check("--masks")[1], "fault"))
