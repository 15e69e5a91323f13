"""Photos with annotations and detections: matches as the evaluation counts them, the choice of the photos, boxes in the right places."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssld.pipelines.report import main
from ssld.pipelines.reports.budget import Budget
from ssld.pipelines.reports.photos import Evaluation, Photos, compare, draw_pair, match, read_evaluation
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.evaluation.analysis import analyse
from ssld.stage2_detect.models.batch import Detections

SIZE = (120, 90)
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": '<dog> & "owner"'}]


def box(draw: np.random.Generator) -> list[float]:
    """A box of COCO within the image."""
    left, top = draw.uniform(0, 60), draw.uniform(0, 40)
    return [round(float(v), 2) for v in (left, top, draw.uniform(10, 50), draw.uniform(10, 45))]


def write_run(run: Path, annotations: Path, images: Path, detections: list[dict[str, Any]], threshold: float) -> Path:
    """Run directory of an evaluation."""
    run.mkdir()
    settings = {"model": str(run / "d.safetensors"), "annotations": str(annotations), "images": str(images)}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "detections.json").write_text(json.dumps(detections))
    (run / "analysis.json").write_text(json.dumps({"score_threshold": threshold}))
    (run / "result.json").write_text(json.dumps({"metrics": {"AP": 0.5}, "seconds": 1.0}))
    return run


def write_data(folder: Path, boxes: list[list[tuple[int, list[float], int]]]) -> tuple[Path, Path]:
    """Annotation file and photos; `boxes` are (category, box, crowd) by image."""
    images = folder / "images"
    images.mkdir()
    annotations = [
        {"id": 10 * image + n, "image_id": image, "category_id": category, "bbox": one, "iscrowd": crowd, "area": 1.0}
        for image, objects in enumerate(boxes)
        for n, (category, one, crowd) in enumerate(objects)
    ]
    rows = []
    for image in range(len(boxes)):
        Image.new("RGB", SIZE, (image, 9, 9)).save(images / f"{image}.png")
        rows.append({"id": image, "file_name": f"{image}.png", "width": SIZE[0], "height": SIZE[1]})
    file = folder / "val.json"
    file.write_text(json.dumps({"images": rows, "annotations": annotations, "categories": CATEGORIES}))
    return file, images


def evaluation_of(run: Path) -> Evaluation:
    evaluation = read_evaluation(run)
    assert evaluation is not None
    return evaluation


def test_matches_and_errors_are_those_of_the_evaluation(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    ids = [7, 3]
    objects = [
        [(ids[draw.integers(2)], box(draw), int(draw.random() < 0.15)) for _ in range(draw.integers(0, 7))]
        for _ in range(60)
    ]
    file, images = write_data(tmp_path, objects)
    found: list[dict[str, Any]] = []
    for image, of_image in enumerate(objects):
        near = [[v + draw.normal(0, 2.5) for v in one] for _, one, _ in of_image if draw.random() < 0.8]
        near = [[left, top, max(wide, 4), max(high, 4)] for left, top, wide, high in near]
        for one in [*near, *(box(draw) for _ in range(draw.integers(0, 3)))]:
            score = float(draw.choice([0.2, 0.3, 0.5, 0.7, 0.9]))  # with equal ones, and some at the threshold
            found.append({"image_id": image, "category_id": ids[draw.integers(2)], "bbox": one, "score": score})
    evaluation = evaluation_of(write_run(tmp_path / "ap", file, images, found, 0.3))
    data = read_coco(file, images, training=False)
    number: dict[Any, int] = {category: label for label, category in enumerate(data.category_ids)}
    detections: dict[int | str, Detections] = {}
    for image in range(len(objects)):
        rows = [row for row in found if row["image_id"] == image]
        boxes_N4 = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
        boxes_N4[:, 2:] += boxes_N4[:, :2]
        labels_N = torch.tensor([number[row["category_id"]] for row in rows], dtype=torch.int64)
        detections[image] = Detections(boxes_N4, torch.tensor([row["score"] for row in rows]).double(), labels_N)
    expected = analyse(data, detections, score_threshold=0.3)
    for row, image_id in enumerate(expected.image_ids):
        outcome = match(evaluation.images[image_id], evaluation.of(image_id))
        assert [outcome.right, outcome.wrong, outcome.missed] == expected.counts_I3[row].tolist()
        if np.isnan(expected.lrp_I[row]):
            assert outcome.error is None
        else:
            assert outcome.error == pytest.approx(expected.lrp_I[row], abs=1e-9)
    assert expected.counts_I3.sum(0).min() > 20  # of each kind


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two evaluations of ten photos with one object each: the first detector finds it on 0 to 4, the second on 4 to 6, shifted on 5."""
    place = [20.0, 10.0, 40.0, 60.0]
    file, images = write_data(tmp_path, [[(7, place, 0)] for _ in range(10)])

    def rows(where: range) -> list[dict[str, Any]]:
        shift = {5: 10.0}
        return [
            {"image_id": n, "category_id": 7, "bbox": [place[0] + shift.get(n, 0.0), *place[1:]], "score": 0.9}
            for n in where
        ]

    more = [{"image_id": 0, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 0.8}]  # a wrong one
    write_run(tmp_path / "ap_better", file, images, rows(range(5)) + more, 0.5)
    write_run(tmp_path / "ap_base", file, images, rows(range(4, 7)), 0.5)
    return tmp_path / "ap_better", tmp_path / "ap_base"


def test_photos_with_the_largest_difference_come_first(pair: tuple[Path, Path]) -> None:
    photos = Photos(Budget())
    compared = compare(evaluation_of(pair[0]), evaluation_of(pair[1]), ("SSLD", "base"), photos)
    assert compared is not None
    assert (compared.gained, compared.lost, compared.images, compared.left_out) == (4, 2, 10, 0)
    # Four of six places, since only two photos got worse; the wrong detection halves the difference on photo 0.
    assert [one.name for one in compared.better] == ["3.png", "2.png", "1.png", "0.png"]
    assert [one.name for one in compared.worse] == ["6.png", "5.png"]
    assert compared.better[0].caption == "error 1.00 smaller with SSLD"
    assert compared.better[3].caption == "error 0.50 smaller with SSLD"
    # Shifted by a quarter of its width: IoU 30 / 50, error (1 - 0.6) / (1 - 0.5).
    assert compared.worse[1].caption == "error 0.20 larger with SSLD"
    assert [panel.title for panel in compared.better[0].panels] == ["Annotations", "base", "SSLD"]
    assert [panel.text for panel in compared.better[3].panels] == [
        "1 object",
        "0 right, 0 wrong, 1 missed, error 1.00",
        "1 right, 1 wrong, 0 missed, error 0.50",
    ]
    assert len(photos.embedded) == 6
    small = compare(evaluation_of(pair[0]), evaluation_of(pair[1]), ("SSLD", "base"), Photos(Budget(2000)))
    assert small is not None
    assert small.left_out == 6 - len(small.better) - len(small.worse)
    assert small.left_out > 0


def test_boxes_and_names_are_where_they_belong(pair: tuple[Path, Path]) -> None:
    drawn = draw_pair(evaluation_of(pair[0]), "0.png", Photos(Budget()))
    assert drawn is not None
    assert [name for name, _ in drawn.classes] == ["cat", '<dog> & "owner"']
    svg = ET.fromstring(drawn.panels[1].svg)
    assert svg.attrib["viewBox"] == "0 0 120 90"
    boxes = [
        (one.attrib["x"], one.attrib["y"], one.attrib["width"], one.attrib["height"], one.get("class"))
        for one in svg.iter("rect")
    ]
    assert boxes == [("20.0", "10.0", "40.0", "60.0", None), ("0.0", "0.0", "9.0", "9.0", "dashed")]
    assert [one.text for one in svg.iter("text")] == ["cat 0.90", '<dog> & "owner" 0.80']
    assert [one.attrib["href"] for one in svg.iter("use")] == ["#photo-0"]


def test_photos_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    objects = [[(7, [20.0, 10.0, 40.0, 60.0], 0)], [(3, [0.0, 0.0, 9.0, 9.0], 0)]]
    file, images = write_data(tmp_path, objects)
    content = json.loads(file.read_text())
    for row in content["images"]:
        folder = images / f"day {row['id']}"
        folder.mkdir()
        (images / row["file_name"]).rename(folder / "same.png")
        row["file_name"] = f"day {row['id']}/same.png"
    file.write_text(json.dumps(content))
    evaluation = evaluation_of(write_run(tmp_path / "ap", file, images, [], 0.5))
    assert draw_pair(evaluation, "same.png", Photos(Budget())) is None
    for row, name in zip(content["images"], ("cat", '<dog> & "owner"'), strict=True):
        drawn = draw_pair(evaluation, "same.png", Photos(Budget()), row["id"])
        assert drawn is not None
        assert (drawn.name, [one for one, _ in drawn.classes]) == (row["file_name"], [name])
    assert draw_pair(evaluation, "same.png", Photos(Budget()), 99) is None


def test_crowded_names_wait_for_the_full_size(tmp_path: Path) -> None:
    boxes = [(7, [10.0 + n, 20.0 + n, 30.0, 40.0], 0) for n in range(20)]
    file, images = write_data(tmp_path, [boxes])
    drawn = draw_pair(evaluation_of(write_run(tmp_path / "ap", file, images, [], 0.5)), "0.png", Photos(Budget()))
    assert drawn is not None
    texts = [one.get("class") for one in ET.fromstring(drawn.panels[0].svg).iter("text")]
    assert texts[0] is None
    assert texts.count("more") > 10


def test_turned_photos_are_read_as_annotated(tmp_path: Path) -> None:
    """A photo that EXIF turns by 90 degrees is upright where its size is annotated so, and as stored otherwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    places = {"upright": (40, 60), "stored": (60, 40), "neither": (61, 40)}
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30] = 255  # upper left as stored, upper right as upright
    rows = []
    for number, (name, (width, height)) in enumerate(places.items()):
        Image.fromarray(pixels).save(images / f"{name}.jpg", exif=exif)
        rows.append({"id": number, "file_name": f"{name}.jpg", "width": width, "height": height})
    (tmp_path / "a.json").write_text(json.dumps({"images": rows, "annotations": [], "categories": CATEGORIES}))
    evaluation = evaluation_of(write_run(tmp_path / "ap", tmp_path / "a.json", images, [], 0.5))
    photos = Photos(Budget())
    assert [photos.add(evaluation, truth) for truth in evaluation.images.values()] == ["photo-0", "photo-1", None]
    corners = []
    for _, source, width, height in photos.embedded:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.size == (width, height)
            assert not image.getexif()
            corners.append([np.array(image)[y, x].max() > 128 for y, x in ((2, 2), (2, width - 3))])
    assert corners == [[False, True], [True, False]]


def test_no_photo_outside_the_folder(tmp_path: Path) -> None:
    file, images = write_data(tmp_path, [[]])
    Image.new("RGB", SIZE).save(tmp_path / "private.png")
    for name in ("../private.png", str(tmp_path / "private.png")):
        content = json.loads(file.read_text())
        content["images"][0]["file_name"] = name
        file.write_text(json.dumps(content))
        run = tmp_path / f"ap{len(name)}"
        evaluation = evaluation_of(write_run(run, file, images, [], 0.5))
        assert Photos(Budget()).add(evaluation, evaluation.images[0]) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("detections.json", "{"),
        ("detections.json", '[{"image_id": 0, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]'),
        ("detections.json", '[{"image_id": 0, "category_id": 7, "bbox": [0, 0, 1], "score": 1}]'),
        ("detections.json", '[{"image_id": 0, "category_id": 7, "bbox": [0, 0, 1, NaN], "score": 1}]'),
        ("analysis.json", "[]"),
        ("config.yaml", "a: 1"),
    ],
)
def test_damaged_or_missing_files_leave_the_photos_out(name: str, content: str, pair: tuple[Path, Path]) -> None:
    (pair[0] / name).write_text(content)
    assert read_evaluation(pair[0]) is None
    assert read_evaluation(pair[0].parent / "gone") is None


def test_a_page_with_the_same_photos_three_times(pair: tuple[Path, Path], tmp_path: Path) -> None:
    stages = {name: {"command": "evaluate_detector"} for name in ("ap_better", "ap_base")}
    rows = {"SSLD": {"detector": "ap_better"}, "without stage 1": {"detector": "ap_base"}}
    content = {"output": "unused", "stages": stages, "table": {"rows": rows, "gain": list(rows)}}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["--pipeline", str(tmp_path / "all.yaml"), "--runs", str(tmp_path)]) == 0
    html = (tmp_path / "report/report.html").read_text()
    assert "Smaller error with SSLD: 4 of 10 photos" in html
    assert "Larger error with SSLD: 2 of 10 photos" in html
    assert len(re.findall(r'<image id="photo-\d"', html)) == 6  # each photo once
    assert html.count('<use href="#photo-') == 18  # and drawn three times
