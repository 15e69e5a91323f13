"""predict.py: the files it writes, what is in them, where a killed run goes on, users' mistakes; the same from Python."""

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filled_shapes import filled
from PIL import Image
from pycocotools.coco import COCO

from shared.errors import UserError
from shared.model_file import read_metadata, read_tensors, save_model_file
from stage2_detect import convert_data, evaluate, predict, prediction
from stage2_detect.coco import read_coco
from stage2_detect.detector_file import load_detector
from stage2_detect.models.batch import Detections
from stage2_detect.picture_files import folder_names
from stage2_detect.pictures import find_pictures
from stage2_detect.prediction_files import Parts
from stage2_detect.video import VideoFile

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., int]
Error = Callable[..., str]
Files = Callable[[Path], set[str]]
RECORDS = {".lock", "config.yaml", "environment.json", "log.txt", "result.json"}


@pytest.fixture
def folder(tiny_coco: Any, tmp_path: Path) -> Path:
    """The 12 training scenes, one of them deeper."""
    pictures = tmp_path / "photos"
    shutil.copytree(tiny_coco.train_images, pictures)
    (pictures / "deep").mkdir()
    (pictures / "3.png").rename(pictures / "deep" / "3.png")
    return pictures


@pytest.fixture
def line(detector_file: Path, folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a prediction; `images` and `output` may be others."""

    def flags(*more: str, images: Path | str = folder, output: str = "seen") -> list[str]:
        shown = ["--model", str(detector_file), "--images", str(images), "--output", str(tmp_path / output)]
        return [*shown, "--threads", "1", "--workers", "0", "--device", "cpu", "--threshold", "0.3", *more]

    return flags


def content(file: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(file.read_text())
    return read


# ---- what is written


def test_writes_exactly_these_files(call: Call, line: Any, folder: Path, tmp_path: Path, files_below: Files) -> None:
    assert call(predict.main, line("--write", "json,pictures,csv")) == 0
    run = tmp_path / "seen"
    drawn = {f"pictures/{name}.jpg" for name in files_below(folder)}
    assert files_below(run) == RECORDS | {"predictions.json", "predictions.csv"} | drawn
    found = content(run / "predictions.json")
    assert [image["file_name"] for image in found["images"]] == sorted(files_below(folder))
    assert [image["id"] for image in found["images"]] == list(range(1, 13))
    assert found["categories"] == [{"id": 3, "name": "wide"}, {"id": 7, "name": "tall"}]
    assert found["annotations"]
    assert all(row["score"] >= 0.3 for row in found["annotations"])
    metrics = content(run / "result.json")["metrics"]
    assert metrics["boxes"] == len(found["annotations"]) == sum(metrics["boxes_of_class"].values())
    assert metrics["images"] == metrics["pictures"] == 12
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    files = {image["id"]: image["file_name"] for image in found["images"]}
    assert [row["file_name"] for row in rows] == [files[row["image_id"]] for row in found["annotations"]]
    assert [float(row["width"]) for row in rows] == [row["bbox"][2] for row in found["annotations"]]
    # once more: nothing is computed
    before = (run / "predictions.json").stat().st_mtime_ns
    assert call(predict.main, line("--write", "json,pictures,csv")) == 0
    assert (run / "predictions.json").stat().st_mtime_ns == before


def test_finds_what_evaluation_finds(
    call: Call, line: Any, tiny_coco: Any, detector_file: Path, tmp_path: Path
) -> None:
    """Same sizes, same batches: the boxes of evaluate.py, from a threshold on; and pycocotools reads the file."""
    data = ["--annotations", str(tiny_coco.val_annotations), "--images", str(tiny_coco.val_images)]
    rest = ["--output", str(tmp_path / "ap"), "--threads", "1", "--workers", "0", "--device", "cpu"]
    assert call(evaluate.main, ["--model", str(detector_file), *data, *rest]) == 0
    assert call(predict.main, line(images=tiny_coco.val_images)) == 0
    name_of = {f"val-{number}": f"{number}.png" for number in range(5)}
    expected = sorted(
        (name_of[row["image_id"]], row["category_id"], row["score"], *row["bbox"])
        for row in json.loads((tmp_path / "ap" / "detections.json").read_text())
        if row["score"] >= 0.3
    )
    read = COCO(str(tmp_path / "seen" / "predictions.json"))
    files = {image["id"]: image["file_name"] for image in read.dataset["images"]}
    rows = read.dataset["annotations"]
    assert sorted((files[r["image_id"]], r["category_id"], r["score"], *r["bbox"]) for r in rows) == expected
    assert expected
    results = read.loadRes(list(rows))
    assert len(results.dataset["annotations"]) == len(expected)


def test_test_time_augmentation_and_classes(call: Call, line: Any, tmp_path: Path) -> None:
    assert call(predict.main, line()) == 0
    assert call(predict.main, line("--classes", "tall", output="tall")) == 0
    everything, tall = (content(tmp_path / name / "predictions.json")["annotations"] for name in ("seen", "tall"))
    boxes = [[row["score"], *row["bbox"]] for row in everything if row["category_id"] == 7]
    assert [[row["score"], *row["bbox"]] for row in tall] == boxes
    assert 0 < len(boxes) < len(everything)
    assert call(predict.main, line("--tta.short_sides", "64,96", output="tta")) == 0
    assert content(tmp_path / "tta" / "predictions.json")["annotations"] != everything


def test_masks_are_written_and_measured(call: Call, line: Any, mask_file: Path, tmp_path: Path) -> None:
    flags = line("--threshold", "0", "--model", str(mask_file))
    assert call(predict.main, flags) == 0
    rows = COCO(str(tmp_path / "seen" / "predictions.json")).dataset["annotations"]
    assert rows
    assert all(row["segmentation"]["size"] == [64, 64] for row in rows)
    assert [filled(row["segmentation"], 64, 64).sum() for row in rows] == [row["area"] for row in rows]
    assert (
        call(predict.main, [*line("--threshold", "0", "--model", str(mask_file), output="tta"), "--tta.flip", "true"])
        == 0
    )
    several = content(tmp_path / "tta" / "predictions.json")["annotations"]
    assert several != content(tmp_path / "seen" / "predictions.json")["annotations"]
    assert [filled(row["segmentation"], 64, 64).sum() for row in several] == [row["area"] for row in several]


# ---- pseudo-labels


def test_pseudo_labels_are_annotations_of_pictures_with_boxes(
    call: Call, line: Any, tiny_coco: Any, folder: Path, tmp_path: Path, files_below: Files
) -> None:
    assert call(predict.main, line()) == 0
    boxes = content(tmp_path / "seen" / "predictions.json")["annotations"]
    best = sorted(max(row["score"] for row in boxes if row["image_id"] == i) for i in {r["image_id"] for r in boxes})
    threshold = best[len(best) // 2]  # half of the pictures are below
    flags = line("--pseudo_labels", "true", "--threshold", repr(threshold), output="pseudo")
    assert call(predict.main, flags) == 0
    run = tmp_path / "pseudo"
    assert files_below(run) == RECORDS | {"pseudo_labels.json"}
    data = read_coco(run / "pseudo_labels.json", folder, training=True, class_names=("wide", "tall"))
    assert len(data.images) == sum(one >= threshold for one in best) < 12
    assert data.counts["empty"] == 0
    assert data.counts["boxes"] == sum(row["score"] >= threshold for row in boxes)


def test_the_threshold_of_pseudo_labels_is_sads(line: Any) -> None:
    from stage2_detect.predict_config import PredictConfig

    settings: dict[str, Any] = {"model": "m", "images": "i", "output": "o"}
    assert PredictConfig(**settings).least == 0.5
    assert PredictConfig(**settings, pseudo_labels=True).least == 0.4
    assert PredictConfig(**settings, pseudo_labels=True, threshold=0.0).least == 0.0


def test_labelled_pictures_are_left_out(call: Call, line: Any, tmp_path: Path, folder: Path) -> None:
    labelled = [{"id": 1, "file_name": "deep/3.png", "width": 64, "height": 64}]
    labelled += [{"id": 2, "file_name": "7.png", "width": 64, "height": 64}]
    file = tmp_path / "labelled.json"
    file.write_text(json.dumps({"images": labelled, "annotations": [], "categories": [{"id": 1, "name": "x"}]}))
    assert call(predict.main, line("--exclude", str(file), "--write", "json")) == 0
    names = {image["file_name"] for image in content(tmp_path / "seen" / "predictions.json")["images"]}
    assert names == {f"{number}.png" for number in range(12)} - {"3.png", "7.png"}
    assert f"10 pictures below {folder}, 2 more excluded" in (tmp_path / "seen" / "log.txt").read_text()


# ---- where to look


def test_a_picture_a_pattern_and_a_list(folder: Path, tmp_path: Path, files_below: Files) -> None:
    assert find_pictures(str(folder)).names == sorted(files_below(folder))
    assert find_pictures(str(folder / "5.png")) == (str(folder), ["5.png"])
    assert find_pictures(str(folder / "**" / "*.png")) == (str(folder), sorted(files_below(folder)))
    assert find_pictures(str(folder / "1*.png")).names == ["1.png", "10.png", "11.png"]
    (tmp_path / "list.txt").write_text("# mine\nphotos/5.png\n\nphotos/deep/3.png\nphotos/5.png\n")
    assert find_pictures(str(tmp_path / "list.txt")) == (str(folder), ["5.png", "deep/3.png"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photos/5.png\nphotos/99.png\n", "list.txt, line 2: photos/99.png: no such file"),
        ("# nothing\n", "list.txt: no path in it"),
    ],
)
def test_bad_lists(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        find_pictures(str(tmp_path / "list.txt"))


# ---- users' mistakes


def test_pictures_that_cannot_be_read_are_named_and_left_out(
    call: Call, line: Any, folder: Path, tmp_path: Path
) -> None:
    assert call(predict.main, line(output="whole")) == 0
    (folder / "0.png").write_bytes(b"no picture at all")
    damaged = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(damaged[: len(damaged) // 2])  # its header is sound
    # Batches of one picture, so that one holds nothing readable.
    assert call(predict.main, line("--batch_size", "1")) == 0
    run = tmp_path / "seen"
    assert (run / "quarantine.txt").read_text() == "0.png\n4.png\n"
    assert "listed in" in (run / "log.txt").read_text()
    found = content(run / "predictions.json")
    names = {image["id"]: image["file_name"] for image in found["images"]}
    assert set(names.values()) == {f"{n}.png" for n in (1, 2, 5, 6, 7, 8, 9, 10, 11)} | {"deep/3.png"}
    assert content(run / "result.json")["metrics"]["unreadable"] == 2
    whole = content(tmp_path / "whole" / "predictions.json")["annotations"]
    kept = [(r["image_id"], r["category_id"]) for r in whole if names.get(r["image_id"])]
    assert [(r["image_id"], r["category_id"]) for r in found["annotations"]] == kept  # ids are the listing's


def test_none_can_be_read(user_error: Error, line: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"no picture")
    message = user_error(predict.main, line(images=tmp_path / "bad"))
    assert message == f"nothing can be read in 2 files of {tmp_path / 'bad'}; the first is a.jpg"


def test_where_nothing_is_found_the_best_score_is_said(call: Call, line: Any, tmp_path: Path) -> None:
    assert call(predict.main, line("--threshold", "1.0")) == 0
    assert "; the best of all boxes has 0." in (tmp_path / "seen" / "log.txt").read_text()


def test_no_box_above_the_threshold(user_error: Error, call: Call, line: Any, folder: Path, tmp_path: Path) -> None:
    message = user_error(predict.main, line("--pseudo_labels", "true", "--threshold", "1.0"))
    assert message.startswith(f"{folder}: no box with a score of 1 or more in 12 pictures; the best has 0.")
    assert message.endswith("give a lower --threshold, or a detector that fits these pictures")
    assert not (tmp_path / "seen" / "pseudo_labels.json").exists()
    # The folder can be used again.
    assert call(predict.main, line("--pseudo_labels", "true", "--threshold", "0.1")) == 0


def test_mistakes(
    user_error: Error, line: Any, folder: Path, tmp_path: Path, teacher_file: Path, mask_file: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.bin").write_bytes(b"\xff\xfe\x00")
    later = tmp_path / "later.safetensors"
    metadata = read_metadata(mask_file, kind="detector")
    save_model_file(later, read_tensors(mask_file), metadata | {"model": metadata["model"] | {"hedas": 2}})
    everything = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    everything["images"] = [
        {"id": i, "file_name": n, "width": 1, "height": 1} for i, n in enumerate(os.listdir(folder))
    ]
    everything["images"] += [{"id": 99, "file_name": "deep/3.png", "width": 1, "height": 1}]
    (tmp_path / "all.json").write_text(json.dumps(everything))
    (tmp_path / "none.json").write_text(json.dumps({**everything, "images": []}))
    for flags, message in (
        (line(images=tmp_path / "empty"), f"no images in {tmp_path / 'empty'}"),
        (line(images=tmp_path / "absent"), f"{tmp_path / 'absent'}: no such picture, video, folder or list"),
        (line(images=tmp_path / "*.jpg"), f"no images match {tmp_path / '*.jpg'}"),
        (line(images=tmp_path / "notes.bin"), "neither a picture"),
        (line("--classes", "tal"), "does not know 'tal'; did you mean 'tall'?"),
        (line("--model", str(teacher_file)), "backbone"),
        (line("--model", str(later)), f"{later}, its metadata: hedas: unknown key"),
        (line("--exclude", str(tmp_path / "all.json")), "names all pictures of"),
        (line("--exclude", str(tmp_path / "none.json")), "has a file name of"),
        (line(output="photos/seen"), "is inside images"),
        (line("--threshold", "1.5"), "threshold"),
    ):
        shown = user_error(predict.main, flags)
        assert message in shown, (message, shown)


# ---- resume and ranks


def test_a_killed_run_goes_on(
    call: Call, line: Any, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage2_detect.prediction_files._PART", 4)
    assert call(predict.main, line(output="whole")) == 0
    write = Parts.write
    written: list[int] = []

    def killed(self: Parts, number: int, *args: Any) -> None:
        if len(written) == 2:
            raise SystemExit
        written.append(number)
        write(self, number, *args)

    monkeypatch.setattr(Parts, "write", killed)
    with pytest.raises(SystemExit):
        call(predict.main, line())
    run = tmp_path / "seen"
    assert not (run / "predictions.json").exists()
    assert sorted(path.name for path in (run / "parts").iterdir()) == ["000000.json", "000001.json"]
    seen: list[int] = []

    def counted(self: Parts, number: int, *args: Any) -> None:
        seen.append(number)
        write(self, number, *args)

    monkeypatch.setattr(Parts, "write", counted)
    assert call(predict.main, line()) == 0
    assert seen == [2]
    assert (run / "predictions.json").read_bytes() == (tmp_path / "whole" / "predictions.json").read_bytes()
    assert not (run / "parts").exists()


def test_a_run_begun_on_other_pictures_is_refused(
    call: Call, user_error: Error, line: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern is not watched for changes; its pictures are compared with those of the parts that are there."""
    pattern = f"{folder}/*.png"

    def killed(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "assemble", killed)
        with pytest.raises(SystemExit):
            call(predict.main, line(images=pattern))
    shutil.copy(folder / "5.png", folder / "55.png")
    assert "was begun on other pictures" in user_error(predict.main, line(images=pattern))


def test_two_processes_write_the_same_file(scripts: Any, call: Call, line: Any, folder: Path, tmp_path: Path) -> None:
    with VideoFile(folder / "clip.mp4", 64, 64, 10) as video:
        for number in range(3):
            video.add(np.array(Image.open(folder / f"{number}.png").convert("RGB")), number / 10)
    assert call(predict.main, line("--batch_size", "2")) == 0
    code = "import stage2_detect.prediction_files as files, stage2_detect.predict as predict, sys; files._PART = 4; "
    code += "sys.exit(predict.main(sys.argv[1:]))"
    script = tmp_path / "small_parts.py"
    script.write_text(f"import sys; sys.path[0] = {str(ROOT)!r}; {code}")
    done = scripts.run(str(script), *line("--batch_size", "2", output="two"), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ((tmp_path / name / "predictions.json").read_bytes() for name in ("seen", "two"))
    assert one == two
    log = (tmp_path / "two" / "log.txt").read_text()
    assert "part 1 of 3 done, 1 left: " in log  # the main process had two of them
    assert "a second, " in log
    assert content(tmp_path / "two" / "predictions.json")["videos"]
    assert (tmp_path / "two" / "pictures" / "clip.mp4").exists()


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Run:
        main, write = True, staticmethod(print)

    run: Any = Run()
    before = run.write
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    clock = prediction.PictureClock(run, 3)
    assert run.write is not before
    times = iter([clock._began + 1.0] * 2)
    with monkeypatch.context() as patch:
        patch.setattr(prediction.time, "perf_counter", lambda: next(times))
        clock._done = 2
        assert clock.describe() == "2 a second, 0.5 s to go"
        clock._done = 4
        assert clock.describe() == "4 a second"
    for _ in range(3):
        clock.seen()
    clock.close()
    assert "3/3" in screen.getvalue()
    assert run.write is before


# ---- from Python


def test_three_lines_find_what_the_command_finds(
    call: Call, line: Any, detector_file: Path, folder: Path, tmp_path: Path
) -> None:
    assert call(predict.main, line()) == 0
    found = content(tmp_path / "seen" / "predictions.json")
    detector = load_detector(str(detector_file))
    files = [folder / image["file_name"] for image in found["images"]]
    shown = detector.predict(files, threshold=0.3)
    assert len(shown) == 12
    for image, objects in zip(found["images"], shown, strict=True):
        rows = [row for row in found["annotations"] if row["image_id"] == image["id"]]
        assert len(rows) == len(objects) == len(list(objects))
        for row, (name, score, box) in zip(rows, objects, strict=True):
            assert name == {3: "wide", 7: "tall"}[row["category_id"]]
            assert score == pytest.approx(row["score"], abs=1e-5)
            x, y, width, height = row["bbox"]
            np.testing.assert_allclose(box, [x, y, x + width, y + height], atol=2e-3)


def test_kinds_of_pictures_and_a_batch_of_unequal_ones(detector_file: Path, folder: Path) -> None:
    detector = load_detector(detector_file)
    picture = Image.open(folder / "5.png")
    (one,) = detector.predict([folder / "5.png"], threshold=0.2)
    assert len(one)
    for other in (str(folder / "5.png"), picture, np.array(picture)):
        (same,) = detector.predict([other], threshold=0.2)
        np.testing.assert_array_equal(same.boxes_N4, one.boxes_N4)
    wide = Image.new("RGB", (90, 40), (30, 30, 30))
    wide.paste(picture.crop((0, 0, 40, 40)), (10, 0))
    pair = detector.predict([picture, wide], threshold=0.05)
    assert pair[1].boxes_N4[:, 2].max() <= 90
    assert pair[1].boxes_N4[:, 3].max() <= 40
    with pytest.raises(TypeError, match="takes a list"):
        detector.predict("photo.jpg")
    with pytest.raises(TypeError, match="uint8"):
        detector.predict([np.zeros((4, 4, 3))])
    with pytest.raises(UserError, match="cannot read image"):
        detector.predict([folder / "absent.png"])
    assert detector.predict([]) == []


def test_objects_are_drawn_as_the_command_draws_them(
    call: Call, line: Any, detector_file: Path, folder: Path, tmp_path: Path
) -> None:
    assert call(predict.main, line(images=folder / "5.png")) == 0
    (objects,) = load_detector(detector_file).predict([folder / "5.png"], threshold=0.3)
    assert len(objects)
    drawn = objects.draw(folder / "5.png")
    drawn.save(tmp_path / "mine.jpg", quality=92)
    assert (tmp_path / "mine.jpg").read_bytes() == (tmp_path / "seen" / "pictures" / "5.png.jpg").read_bytes()


# ---- YOLO labels and crops


def test_yolo_labels_are_read_back_as_the_boxes(call: Call, line: Any, folder: Path, tmp_path: Path) -> None:
    """By the reader of YOLO data sets, which knows nothing of this writer."""
    assert call(predict.main, line("--write", "json,yolo")) == 0
    run = tmp_path / "seen"
    shutil.copytree(folder, run / "images")
    flags = ["--source", str(run / "data.yaml"), "--splits", "val", "--output", str(tmp_path / "back")]
    assert call(convert_data.main, flags) == 0
    found = content(run / "predictions.json")
    (file,) = (path for path in (tmp_path / "back").glob("*.json") if path.name == "val.json")
    back = content(file)
    assert [category["name"] for category in back["categories"]] == ["wide", "tall"]
    label_of = {category["id"]: number for number, category in enumerate(found["categories"])}
    label_back = {category["id"]: number for number, category in enumerate(back["categories"])}

    def boxes(data: dict[str, Any], labels: dict[int, int]) -> list[tuple[Any, ...]]:
        names = {image["id"]: image["file_name"].removeprefix("images/") for image in data["images"]}
        rows = [(names[row["image_id"]], labels[row["category_id"]], row["bbox"]) for row in data["annotations"]]
        return sorted(rows, key=lambda row: (row[0], row[1], row[2]))

    expected, read = boxes(found, label_of), boxes(back, label_back)
    assert len(expected) == len(read) > 0
    for one, other in zip(expected, read, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(other[2], one[2], atol=1e-3)
    labels = {path.relative_to(run / "labels").as_posix() for path in (run / "labels").rglob("*.txt")}
    assert labels == {f"{n}.txt" for n in range(12) if n != 3} | {"deep/3.txt"}  # empty ones too
    assert (run / "classes.txt").read_text() == "wide\ntall\n"


def test_yolo_labels_with_scores(call: Call, line: Any, tmp_path: Path) -> None:
    assert call(predict.main, line("--write", "json,yolo_scores")) == 0
    found = content(tmp_path / "seen" / "predictions.json")
    names = {image["id"]: image["file_name"] for image in found["images"]}
    for image_id, name in names.items():
        scores = [row["score"] for row in found["annotations"] if row["image_id"] == image_id]
        lines = (tmp_path / "seen" / "labels" / name.replace(".png", ".txt")).read_text().splitlines()
        assert [len(one.split()) for one in lines] == [6] * len(scores)
        np.testing.assert_allclose([float(one.split()[5]) for one in lines], scores, atol=1e-6)


def test_crops_show_the_objects(call: Call, line: Any, folder: Path, tmp_path: Path, files_below: Files) -> None:
    assert call(predict.main, line("--write", "json,crops")) == 0
    run = tmp_path / "seen"
    found = content(run / "predictions.json")
    class_of = {category["id"]: category["name"] for category in found["categories"]}
    expected = {}
    for image in found["images"]:
        rows = [row for row in found["annotations"] if row["image_id"] == image["id"]]
        for number, row in enumerate(rows, 1):
            name = f"{class_of[row['category_id']]}/{image['file_name'].removesuffix('.png')}_{number}.jpg"
            expected[name] = (image["file_name"], row["bbox"])
    assert set(files_below(run / "crops")) == set(expected)
    assert expected
    for name, (file, (x, y, width, height)) in expected.items():
        crop = np.array(Image.open(run / "crops" / name), dtype=float)
        left, top = int(np.floor(x)), int(np.floor(y))
        right, bottom = int(np.ceil(x + width)), int(np.ceil(y + height))
        whole = np.array(Image.open(folder / file).convert("RGB"), dtype=float)
        assert crop.shape == (bottom - top, right - left, 3)
        assert np.abs(crop - whole[top:bottom, left:right]).mean() < 4  # JPEG


def test_class_folders_are_safe_and_differ() -> None:
    assert folder_names(("cat", "a/b", "a:b", "..", "Cat", "red blood cell")) == [
        "cat_0", "a_b_1", "a_b_2", "_", "Cat_4", "red blood cell",
    ]  # fmt: skip


def test_pictures_that_would_share_files_are_refused(user_error: Error, line: Any, folder: Path) -> None:
    shutil.copy(folder / "5.png", folder / "5.bmp")
    message = user_error(predict.main, line("--write", "crops"))
    assert "which 5.bmp and 5.png share" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--write", "yolo,yolo_scores"], "choose one"),
        (["--write", "jsn"], "write"),
        (["--write", "csv", "--pseudo_labels", "true"], "leave one of the two out"),
        (["--write", "[]"], "is empty"),
        (["--tile", "8"], "tile"),
        (["--overlap", "1"], "overlap"),
    ],
)
def test_settings_that_do_not_fit(user_error: Error, line: Any, flags: list[str], message: str) -> None:
    assert message in user_error(predict.main, line(*flags))


def test_the_readmes_example(detector_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(from stage2_detect.*?)```", readme, flags=re.DOTALL)
    assert snippet
    code = snippet[1].replace("runs/detector/detector.safetensors", str(detector_file))
    files = sorted(folder.glob("*.png"))
    counts = [len(objects) for objects in load_detector(detector_file).predict(files)]
    capsys.readouterr()
    exec(code.replace('"photo.jpg"', repr(str(files[np.argmax(counts)]))), {})
    assert len(capsys.readouterr().out.splitlines()) == max(counts) > 0


def test_chosen_detections_keep_their_masks() -> None:
    boxes_N4 = torch.arange(12.0).view(3, 4)
    found = Detections(boxes_N4, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 0]), ["a", "b", "c"])
    kept = found.where(found.labels_N == 0)
    assert kept.masks == ["a", "c"]
    assert kept.boxes_N4.equal(boxes_N4[[0, 2]])
