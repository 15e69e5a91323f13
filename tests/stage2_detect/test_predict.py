"""predict.py: the files it writes and what is in them, pseudo-labels, images that are left out."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filled_shapes import filled
from pycocotools.coco import COCO
from run_files import content

from ssld.stage2_detect import evaluate, predict
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.prediction.files import drawn_names

Call = Callable[..., int]
Files = Callable[[Path], set[str]]
RECORDS = {".lock", "config.yaml", "environment.json", "log.txt", "result.json"}


# ---- what is written


def test_names_of_drawn_images() -> None:
    """A JPEG keeps its name, others get the suffix in place of theirs, unless inputs would share a file."""
    given = {
        "a.png": "a.jpg",
        "night/b.JPEG": "night/b.JPEG",
        "night/a.webp": "night/a.jpg",
        "c.png": "c.png.jpg",
        "c.jpg": "c.jpg",
        "D.png": "D.png.jpg",
        "d.bmp": "d.bmp.jpg",
        "e.png": "e.png_2.jpg",
        "e.bmp": "e.bmp.jpg",
        "e.png.jpg": "e.png.jpg",
    }
    assert drawn_names(given, ".jpg", (".jpg", ".jpeg")) == given
    assert drawn_names(["a.mov", "b.MP4", "b.avi"], ".mp4", (".mp4",)) == {
        "a.mov": "a.mp4",
        "b.MP4": "b.MP4",
        "b.avi": "b.avi.mp4",
    }


def test_writes_exactly_these_files(
    call: Call, predict_line: Any, photos: Path, tmp_path: Path, files_below: Files
) -> None:
    assert call(predict.main, predict_line("--write", "json,images,csv")) == 0
    run = tmp_path / "predicted"
    drawn = {f"pictures/{Path(name).with_suffix('.jpg')}" for name in files_below(photos)}
    assert files_below(run) == RECORDS | {"predictions.json", "predictions.csv"} | drawn
    predictions = content(run / "predictions.json")
    assert [image["file_name"] for image in predictions["images"]] == sorted(files_below(photos))
    assert [image["id"] for image in predictions["images"]] == list(range(1, 13))
    assert predictions["categories"] == [{"id": 3, "name": "wide"}, {"id": 7, "name": "tall"}]
    assert predictions["annotations"]
    assert all(row["score"] >= 0.3 for row in predictions["annotations"])
    metrics = content(run / "result.json")["metrics"]
    assert metrics["boxes"] == len(predictions["annotations"]) == sum(metrics["boxes_of_class"].values())
    assert metrics["images"] == metrics["pictures"] == 12
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    files = {image["id"]: image["file_name"] for image in predictions["images"]}
    assert [row["file_name"] for row in rows] == [files[row["image_id"]] for row in predictions["annotations"]]
    assert [float(row["width"]) for row in rows] == [row["bbox"][2] for row in predictions["annotations"]]
    # once more: nothing is computed
    before = (run / "predictions.json").stat().st_mtime_ns
    assert call(predict.main, predict_line("--write", "json,images,csv")) == 0
    assert (run / "predictions.json").stat().st_mtime_ns == before


def test_finds_what_evaluation_finds(
    call: Call, predict_line: Any, tiny_coco: Any, detector_file: Path, tmp_path: Path
) -> None:
    """Same sizes, same batches: the boxes of evaluate.py, from a threshold on; and pycocotools reads the file."""
    data = ["--annotations", str(tiny_coco.val_annotations), "--images", str(tiny_coco.val_images)]
    rest = ["--output", str(tmp_path / "ap"), "--threads", "1", "--workers", "0", "--device", "cpu"]
    assert call(evaluate.main, ["--model", str(detector_file), *data, *rest]) == 0
    assert call(predict.main, predict_line(images=tiny_coco.val_images)) == 0
    name_of = {f"val-{number}": f"{number}.png" for number in range(5)}
    expected = sorted(
        (name_of[row["image_id"]], row["category_id"], row["score"], *row["bbox"])
        for row in json.loads((tmp_path / "ap" / "detections.json").read_text())
        if row["score"] >= 0.3
    )
    read = COCO(str(tmp_path / "predicted" / "predictions.json"))
    files = {image["id"]: image["file_name"] for image in read.dataset["images"]}
    rows = read.dataset["annotations"]
    assert sorted((files[r["image_id"]], r["category_id"], r["score"], *r["bbox"]) for r in rows) == expected
    assert expected
    results = read.loadRes(list(rows))
    assert len(results.dataset["annotations"]) == len(expected)


def test_test_time_augmentation_and_classes(call: Call, predict_line: Any, tmp_path: Path) -> None:
    assert call(predict.main, predict_line()) == 0
    assert call(predict.main, predict_line("--classes", "tall", output="tall")) == 0
    everything, tall = (content(tmp_path / name / "predictions.json")["annotations"] for name in ("predicted", "tall"))
    boxes = [[row["score"], *row["bbox"]] for row in everything if row["category_id"] == 7]
    assert [[row["score"], *row["bbox"]] for row in tall] == boxes
    assert 0 < len(boxes) < len(everything)
    assert call(predict.main, predict_line("--tta.short_sides", "64,96", output="tta")) == 0
    assert content(tmp_path / "tta" / "predictions.json")["annotations"] != everything


def test_masks_are_written_and_measured(call: Call, predict_line: Any, mask_file: Path, tmp_path: Path) -> None:
    flags = predict_line("--score_threshold", "0", "--model", str(mask_file))
    assert call(predict.main, flags) == 0
    rows = COCO(str(tmp_path / "predicted" / "predictions.json")).dataset["annotations"]
    assert rows
    assert all(row["segmentation"]["size"] == [64, 64] for row in rows)
    assert [filled(row["segmentation"], 64, 64).sum() for row in rows] == [row["area"] for row in rows]
    assert (
        call(
            predict.main,
            [*predict_line("--score_threshold", "0", "--model", str(mask_file), output="tta"), "--tta.flip", "true"],
        )
        == 0
    )
    several = content(tmp_path / "tta" / "predictions.json")["annotations"]
    assert several != content(tmp_path / "predicted" / "predictions.json")["annotations"]
    assert [filled(row["segmentation"], 64, 64).sum() for row in several] == [row["area"] for row in several]


def test_without_detections_the_highest_score_is_logged(call: Call, predict_line: Any, tmp_path: Path) -> None:
    assert call(predict.main, predict_line("--score_threshold", "1.0")) == 0
    assert "; the highest score is 0." in (tmp_path / "predicted" / "log.txt").read_text()


# ---- pseudo-labels


def test_pseudo_labels_are_annotations_of_pictures_with_boxes(
    call: Call, predict_line: Any, tiny_coco: Any, photos: Path, tmp_path: Path, files_below: Files
) -> None:
    assert call(predict.main, predict_line()) == 0
    boxes = content(tmp_path / "predicted" / "predictions.json")["annotations"]
    best = sorted(max(row["score"] for row in boxes if row["image_id"] == i) for i in {r["image_id"] for r in boxes})
    threshold = best[len(best) // 2]  # half of the images are below
    flags = predict_line("--pseudo_labels", "true", "--score_threshold", repr(threshold), output="pseudo")
    assert call(predict.main, flags) == 0
    run = tmp_path / "pseudo"
    assert files_below(run) == RECORDS | {"pseudo_labels.json"}
    data = read_coco(run / "pseudo_labels.json", photos, training=True, class_names=("wide", "tall"))
    assert len(data.images) == sum(one >= threshold for one in best) < 12
    assert data.counts["empty"] == 0
    assert data.counts["boxes"] == sum(row["score"] >= threshold for row in boxes)


def test_the_threshold_of_pseudo_labels_is_sads(predict_line: Any) -> None:
    from ssld.stage2_detect.predict_config import PredictConfig

    settings: dict[str, Any] = {"model": "m", "images": "i", "output": "o"}
    assert PredictConfig(**settings).least == 0.5
    assert PredictConfig(**settings, pseudo_labels=True).least == 0.4
    assert PredictConfig(**settings, pseudo_labels=True, score_threshold=0.0).least == 0.0


def test_labeled_pictures_are_left_out(call: Call, predict_line: Any, tmp_path: Path, photos: Path) -> None:
    labeled = [{"id": 1, "file_name": "deep/3.png", "width": 64, "height": 64}]
    labeled += [{"id": 2, "file_name": "7.png", "width": 64, "height": 64}]
    file = tmp_path / "labeled.json"
    file.write_text(json.dumps({"images": labeled, "annotations": [], "categories": [{"id": 1, "name": "x"}]}))
    assert call(predict.main, predict_line("--exclude", str(file), "--write", "json")) == 0
    names = {image["file_name"] for image in content(tmp_path / "predicted" / "predictions.json")["images"]}
    assert names == {f"{number}.png" for number in range(12)} - {"3.png", "7.png"}
    assert f"10 images below {photos}, 2 more excluded" in (tmp_path / "predicted" / "log.txt").read_text()
