"""The label audit: removed, moved and renamed labels are named first, contradictions are those counted by hand, and the files of the command."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssld.shared.run_dir import read_result
from ssld.stage2_detect import evaluate
from ssld.stage2_detect.data.coco import CocoData, Id, read_coco
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.evaluation.drawing import class_color
from ssld.stage2_detect.evaluation.label_audit import (
    FILE,
    REASONS,
    SHEET,
    audit_labels,
    describe,
    drawn_findings,
    write_audit,
)
from ssld.stage2_detect.models.batch import Detections

Row = dict[str, Any]
SIDE = 240


class Scenes:
    """Images of SIDE x SIDE pixels with labels and detections; two classes, ids as people have them."""

    def __init__(self, folder: Path, classes: int = 2) -> None:
        self._folder = folder
        self._categories = [{"id": 3 + 4 * k, "name": ("wide", "tall")[k]} for k in range(classes)]
        self.labels: list[Row] = []
        self._ids = itertools.count(1)
        self.images: list[Id] = []
        self._detected: dict[Id, list[list[float]]] = {}

    def image(self, image_id: Id) -> None:
        self.images.append(image_id)

    def label(self, image_id: Id, box: list[float], k: int = 0, crowd: int = 0) -> Row:
        row = {
            "id": f"label {next(self._ids)}",
            "image_id": image_id,
            "category_id": 3 + 4 * k,
            "bbox": box,
            "iscrowd": crowd,
        }
        self.labels.append(row | {"area": box[2] * box[3]})
        return self.labels[-1]

    def detect(self, image_id: Id, box: list[float], score: float, k: int = 0) -> None:
        x, y, w, h = box
        self._detected.setdefault(image_id, []).append([x, y, x + w, y + h, score, k])

    def data(self) -> CocoData:
        images = [{"id": one, "file_name": f"{one}.png", "width": SIDE, "height": SIDE} for one in self.images]
        for number, one in enumerate(self.images):
            Image.new("RGB", (SIDE, SIDE), (number, 90, 60)).save(self._folder / f"{one}.png")
        content = {"images": images, "annotations": self.labels, "categories": self._categories}
        (self._folder / "truth.json").write_text(json.dumps(content))
        return read_coco(self._folder / "truth.json", self._folder, training=False)

    def detections(self) -> dict[Id, Detections]:
        tables = {one: torch.tensor(rows, dtype=torch.float64) for one, rows in self._detected.items()}
        return {one: Detections(t[:, :4].float(), t[:, 4].float(), t[:, 5].long()) for one, t in tables.items()}

    def audit(self) -> dict[str, Any]:
        return audit_labels(self.data(), self.detections(), folder=self._folder, score_threshold=0.5)


def well_detected(folder: Path) -> Scenes:
    """Twelve scenes of three objects each, all found with high scores; nothing to look at."""
    scenes = Scenes(folder)
    draw = np.random.default_rng(5)
    for number in range(12):
        image_id: Id = f"photo-{number}" if number % 2 else number
        scenes.image(image_id)
        for place in range(3):
            w, h = (int(v) for v in draw.integers(30, 60, 2))
            box: list[float] = [10 + 75 * place, 20 + int(draw.integers(100)), w, h]
            scenes.label(image_id, box, int(w < h))
            shaken = [value + float(draw.uniform(-1, 1)) for value in box]
            scenes.detect(image_id, shaken, float(draw.uniform(0.91, 0.99)), int(w < h))
            scenes.detect(image_id, [*shaken[:2], 12, 12], float(draw.uniform(0.05, 0.3)), 0)  # parts, with low scores
    return scenes


def test_sound_labels(tmp_path: Path) -> None:
    audit = well_detected(tmp_path).audit()
    assert audit["counts"] == dict.fromkeys(REASONS, 0)
    assert (audit["images"], audit["labels"], audit["detections"]) == (12, 36, 36)
    assert (audit["findings"], audit["image_ids"], audit["drawn"]) == ([], [], 0)
    assert describe(audit, tmp_path) == "label audit: no label contradicts the detections"


def test_a_removed_and_a_moved_label_are_named_first(tmp_path: Path) -> None:
    """Before the detector's own mistakes, which are less certain, and after which the labels are listed that it misses."""
    scenes = well_detected(tmp_path)
    removed, moved = scenes.labels.pop(10), scenes.labels[20]
    at = list(moved["bbox"])
    moved["bbox"] = [at[0], 180, 40, 30]
    scenes.image("hard")
    for number in range(4):
        scenes.detect("hard", [50 * number, 100, 30, 30], 0.55)  # wrong, and none with such a score is right
        scenes.label("hard", [50 * number, 10, 30, 30], 1)  # a class that is often missed
    audit = scenes.audit()
    assert audit["counts"] == {"no_label": 6, "other_class": 0, "other_box": 0, "not_found": 5}
    first = audit["findings"][:3]
    assert {(one["image_id"], one["reason"]) for one in first} == {
        (removed["image_id"], "no_label"),
        (moved["image_id"], "no_label"),
        (moved["image_id"], "not_found"),
    }
    assert {one["image_id"] for one in audit["findings"][3:]} == {"hard"}
    assert audit["image_ids"][-1] == "hard"
    assert set(audit["image_ids"][:2]) == {removed["image_id"], moved["image_id"]}
    for one in first:
        if one["reason"] == "not_found":
            assert (one["label_id"], one["label_box"], one["label_class"]) == (
                moved["id"],
                moved["bbox"],
                one["label_class"],
            )
            assert (one["box"], one["score"], one["class"]) == (None, None, None)
        else:
            truth = removed["bbox"] if one["image_id"] == removed["image_id"] else at
            np.testing.assert_allclose(one["box"], truth, atol=2.1)
            assert (one["label_id"], one["label_box"]) == (None, None)
        assert one["file_name"] == f"{one['image_id']}.png"
    agreements = [one["agreement"] for one in audit["findings"]]
    assert agreements == sorted(agreements, reverse=True)
    assert [one["agreement"] for one in first if one["box"]] == pytest.approx([34 / 36] * 2, abs=1e-4)
    assert agreements[-1] == 0  # none of the detections at 0.55 is on a label
    assert describe(audit, tmp_path / SHEET) == (
        f"label audit: 11 objects to look at, of {audit['labels']} labels and {audit['detections']} detections on "
        f"{audit['images']} images: 6 detected without a label, 5 labeled but not found; the first are in {tmp_path / SHEET}"
    )


def test_a_label_of_another_class_and_a_shifted_one(tmp_path: Path) -> None:
    """Each is one finding with both boxes, not a missing label and one that is not found."""
    scenes = well_detected(tmp_path)
    renamed, shifted = scenes.labels[4], scenes.labels[30]
    renamed["category_id"] = 10 - renamed["category_id"]
    shifted["bbox"] = [shifted["bbox"][0] + 0.6 * shifted["bbox"][2], *shifted["bbox"][1:]]  # IoU 0.25
    audit = scenes.audit()
    assert audit["counts"] == {"no_label": 0, "other_class": 1, "other_box": 1, "not_found": 0}
    by_reason = {one["reason"]: one for one in audit["findings"]}
    assert by_reason["other_class"]["label_id"] == renamed["id"]
    assert {by_reason["other_class"]["class"], by_reason["other_class"]["label_class"]} == {"wide", "tall"}
    assert by_reason["other_box"]["label_id"] == shifted["id"]
    assert by_reason["other_box"]["class"] == by_reason["other_box"]["label_class"]
    assert audit["tide"]["counts"]["Cls"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_counts_by_hand(seed: int, tmp_path: Path) -> None:
    """Objects that do not touch each other, each with one of these fates, so that the reasons can be counted as they are drawn."""
    draw = np.random.default_rng(seed)
    scenes, expected = Scenes(tmp_path), dict.fromkeys(REASONS, 0)
    for image in range(9):
        scenes.image(image)
        for place in range(16):
            x, y = 60 * (place % 4) + 4, 60 * (place // 4) + 4
            box, k = [float(x), float(y), 40.0, 40.0], int(draw.integers(2))
            score = float(draw.uniform(0.5, 1))
            fate = str(
                draw.choice(
                    [
                        "found",
                        "twice",
                        "weak",
                        "missed",
                        "no label",
                        "two classes",
                        "class",
                        "box",
                        "both",
                        "crowd",
                        "empty",
                    ]
                )
            )
            if fate not in ("no label", "two classes", "empty"):
                scenes.label(image, box, k, crowd=int(fate == "crowd"))
            if fate in ("found", "twice", "crowd", "no label", "two classes", "both"):
                scenes.detect(image, box, score, k)
            if fate == "twice":
                scenes.detect(image, [x + 5, y, 40, 40], score * 0.99, k)
            if fate == "weak":
                scenes.detect(image, box, 0.1, k)
            if fate in ("class", "two classes", "both"):
                scenes.detect(image, [x + 1, y, 40, 40], max(0.5, score - 0.01), 1 - k)
            if fate == "box":
                scenes.detect(image, [x + 20, y, 40, 40], score, k)  # IoU 1/3
            reason = {
                "missed": "not_found",
                "no label": "no_label",
                "two classes": "no_label",
                "class": "other_class",
                "box": "other_box",
            }
            if fate in reason:
                expected[reason[fate]] += 1
    audit = scenes.audit()
    assert audit["counts"] == expected
    assert min(expected.values()) > 3
    listed = audit["findings"]
    assert len(listed) == min(100, sum(expected.values()))
    assert audit["drawn"] == 12
    detected = [(*one["box"], one["image_id"]) for one in listed if one["box"]]
    assert len(detected) == len(set(detected))


def test_errors_and_calibration_against_numpy(tmp_path: Path) -> None:
    """Detections on a label with the probability that their score states, or a tenth below it."""
    draw = np.random.default_rng(8)
    scenes = Scenes(tmp_path, classes=1)
    scores, right = [], []
    for image in range(30):
        scenes.image(image)
        for place in range(9):
            box = [80.0 * (place % 3), 80.0 * (place // 3), 50.0, 50.0]
            scores.append(float(np.float32(draw.uniform(0.02, 0.98))))
            right.append(bool(draw.uniform() < scores[-1] - 0.1))
            if right[-1]:
                scenes.label(image, box)
            scenes.detect(image, box, scores[-1])
    data, detections = scenes.data(), scenes.detections()
    audit = audit_labels(data, detections, folder=tmp_path, score_threshold=0.5)
    bins_D, gaps = (np.array(scores) * 10).astype(int), 0.0
    for number, one in enumerate(audit["calibration"]["bins"]):
        inside = bins_D == number
        assert one["detections"] == inside.sum()
        assert one["score"] == pytest.approx(np.array(scores)[inside].mean(), abs=1e-6)
        assert one["precision"] == pytest.approx(np.array(right)[inside].mean())
        gaps += abs(np.array(scores)[inside].mean() - np.array(right)[inside].mean()) * inside.mean()
    assert audit["calibration"]["error"] == pytest.approx(gaps, abs=1e-6)
    assert 0.05 < gaps < 0.2
    assert audit["tide"]["AP50"] == pytest.approx(coco_ap(data, detections, "pycocotools")["AP50"], abs=1e-9)
    assert audit["tide"]["counts"]["Bkg"] == right.count(False)
    assert audit["tide"]["AP50"] + audit["tide"]["gains"]["Bkg"] == pytest.approx(1)  # no other kind of error
    assert audit["counts"]["no_label"] == sum(
        score >= 0.5 and not hit for score, hit in zip(scores, right, strict=True)
    )
    assert audit["counts"]["not_found"] == 0
    for one in audit["findings"]:
        similar = bins_D == int(one["score"] * 10)
        assert one["agreement"] == pytest.approx(np.array(right)[similar].mean(), abs=1e-4)


def test_without_detections_labels_or_both(tmp_path: Path) -> None:
    scenes = Scenes(tmp_path, classes=1)
    scenes.image(1)
    scenes.image(2)
    assert scenes.audit() | {"findings": []} == audit_labels(scenes.data(), {}, folder=tmp_path, score_threshold=0.5)
    scenes.detect(1, [5, 5, 20, 20], 0.9)
    audit = scenes.audit()
    assert (audit["counts"]["no_label"], audit["labels"], audit["tide"]) == (1, 0, None)
    assert audit["calibration"]["bins"][0] == {
        "low": 0.0,
        "high": 0.1,
        "score": None,
        "precision": None,
        "detections": 0,
    }
    scenes.label(2, [0, 0, 30, 30])
    scenes.label(2, [100, 100, 90, 90])
    scenes.label(1, [0, 0, 60, 60], crowd=1)  # the detection lies on it
    audit = audit_labels(scenes.data(), {}, folder=tmp_path, score_threshold=0.5)
    assert [one["label_box"][2] for one in audit["findings"]] == [90, 30]  # the larger one is easier to find
    assert (audit["calibration"], audit["tide"]["counts"]["Miss"]) == (None, 2)
    assert scenes.audit()["counts"] == {"no_label": 0, "other_class": 0, "other_box": 0, "not_found": 2}


def test_the_sheet_shows_box_and_label_where_they_are(tmp_path: Path) -> None:
    scenes = Scenes(tmp_path)
    scenes.image("a")
    scenes.label("a", [150, 150, 40, 40], 1)
    scenes.detect("a", [170, 150, 40, 40], 0.9, 1)
    ((drawn, caption),) = drawn_findings(scenes.data(), scenes.audit()["findings"])
    assert caption == "a.png: detected with another box"
    assert max(drawn.size) == 480
    pixels = np.asarray(drawn.crop((0, 0, 480, 480)))
    # Three times the 60 pixels of both together, around their middle: 180 pixels on 480, whose right edge is the image's.
    zoom = 480 / 180
    for k, (left, right) in ((1, (110, 150)), (3, (90, 130))):
        colored = np.asarray((np.abs(pixels.astype(int) - class_color(k)) < 12).all(-1))
        columns = np.flatnonzero(colored.sum(0) > 60)
        assert abs(columns.min() - left * zoom) < 3
        assert abs(columns.max() - right * zoom) < 3


def test_files_of_an_earlier_audit_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        path = tmp_path
        lines: list[str] = []

        def log(self, line: str) -> None:
            self.lines.append(line)

    run: Any = Run()
    scenes = Scenes(tmp_path)
    scenes.image(1)
    scenes.detect(1, [5, 5, 20, 20], 0.9)
    assert write_audit(run, scenes.data(), scenes.detections(), folder=tmp_path, score_threshold=0.5) == [
        tmp_path / FILE,
        tmp_path / SHEET,
    ]
    with Image.open(tmp_path / SHEET) as sheet:
        assert sheet.size[0] == 480
    assert write_audit(run, scenes.data(), {}, folder=tmp_path, score_threshold=0.5) == [tmp_path / FILE]
    assert not (tmp_path / SHEET).exists()
    assert run.lines[0].endswith(f"1 detected without a label; the first are in {tmp_path / SHEET}")


def test_evaluate_writes_the_audit(
    tiny_coco: Any, detector_file: Path, call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "--model",
        str(detector_file),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--score_threshold",
        "0",
    ]
    line += ["--annotations", str(tiny_coco.val_annotations), "--images", str(tiny_coco.val_images)]
    assert call(evaluate.main, [*line, "--output", str(tmp_path / "ap")]) == 0
    audit = json.loads((tmp_path / "ap" / FILE).read_text())
    result = read_result(tmp_path / "ap")
    assert result
    assert audit["tide"]["AP50"] == pytest.approx(result["metrics"]["AP50"], abs=1e-9)
    assert (audit["images"], audit["score_threshold"]) == (5, 0)
    assert sum(audit["counts"].values()) >= len(audit["findings"]) > 0
    assert {FILE, SHEET} <= result["outputs"].keys()
    assert "label audit: " in capsys.readouterr().out
