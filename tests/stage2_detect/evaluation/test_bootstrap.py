"""Bootstrap intervals of AP: equal to pycocotools on resampled data sets, correct percentiles, and intervals that separate real from random gains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssld.shared.errors import UserError
from ssld.shared.files import file_sha256
from ssld.shared.run_identity import input_digest
from ssld.stage2_detect.data.coco import CocoData, Id, read_coco
from ssld.stage2_detect.data.coco_json import write_results
from ssld.stage2_detect.evaluation import analysis, bootstrap
from ssld.stage2_detect.evaluation.bootstrap import (
    average_precision,
    bootstrap_metrics,
    draw_ap,
    draw_weights,
    interval,
    match_detections,
    read_detections,
)
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.models.batch import Detections

CLASSES = {7: "cat", 2: "dog", 5: "owl"}


def random_content(images: int, seed: int) -> dict[str, Any]:
    """A COCO file with 0 to 5 objects per image, a tenth of them crowd regions."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 6)):
            box = [*rng.uniform(0, 150, 2).round(1).tolist(), *rng.uniform(10, 60, 2).round(1).tolist()]
            row = {"image_id": image, "category_id": int(rng.choice(list(CLASSES))), "bbox": box}
            annotations.append(row | {"id": len(annotations) + 1, "iscrowd": int(rng.random() < 0.1)})
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 220, "height": 220} for n in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CLASSES.items()],
    }


def random_detections(content: dict[str, Any], seed: int, noise: float, extra: int = 6) -> dict[Id, Detections]:
    """Objects with displaced boxes and some wrong classes, and random boxes; scores are distinct."""
    rng = np.random.default_rng(seed)
    scores = (0, 0.7) if extra < 100 else (0.5, 1)  # so that some objects come after 100 random boxes
    labels = {category["id"]: label for label, category in enumerate(content["categories"])}
    result: dict[Id, Detections] = {}
    for image in content["images"]:
        rows = []
        for row in content["annotations"]:
            if row["image_id"] == image["id"]:
                x, y, width, height = np.array(row["bbox"]) + noise * rng.normal(size=4)
                label = labels[row["category_id"]] if rng.random() < 0.85 else int(rng.integers(3))
                rows.append([x, y, x + max(width, 1), y + max(height, 1), rng.uniform(0.2, 1), label])
        for _ in range(extra):
            x, y, width, height = rng.uniform(5, 100, 4)
            rows.append([x, y, x + width, y + height, rng.uniform(*scores), int(rng.integers(3))])
        table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
        table = table[table[:, 4].argsort(descending=True)]
        result[image["id"]] = Detections(table[:, :4], table[:, 4], table[:, 5].long())
    return result


def read(folder: Path, content: dict[str, Any], name: str = "truth") -> CocoData:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content))
    return read_coco(file, None, training=False)


def resampled(
    content: dict[str, Any], detections: dict[Id, Detections], weights_I: np.ndarray
) -> tuple[dict[str, Any], dict[Id, Detections]]:
    """The data set in which each image occurs as often as its weight, copies beside each other."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    copies: dict[Id, Detections] = {}
    for image, weight in zip(content["images"], weights_I, strict=True):
        for _ in range(weight):
            number = len(images) + 1
            images.append(image | {"id": number, "file_name": f"{number}.jpg"})
            for row in content["annotations"]:
                if row["image_id"] == image["id"]:
                    annotations.append(row | {"id": len(annotations) + 1, "image_id": number})
            copies[number] = detections[image["id"]]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}, copies


@pytest.mark.parametrize("extra", [0, 6, 130], ids=["few", "some", "more than 100 of a class"])
def test_ap_of_a_draw_is_that_of_pycocotools_on_the_drawn_data_set(extra: int, tmp_path: Path) -> None:
    images = 14 if extra < 100 else 4
    content = random_content(images, seed=extra)
    detections = random_detections(content, seed=1, noise=3, extra=3 * extra if extra > 100 else extra)
    weights_BI = np.concatenate([np.ones((1, images), dtype=np.int64), draw_weights(images, draws=4, seed=extra)])
    ap_BTK = average_precision(match_detections(read(tmp_path, content), detections), weights_BI)
    for ap_TK, weights_I in zip(ap_BTK, weights_BI, strict=True):
        drawn, copies = resampled(content, detections, weights_I)
        expected = coco_ap(read(tmp_path, drawn, "drawn"), copies, "pycocotools")
        assert np.nanmean(ap_TK) == pytest.approx(expected["AP"], abs=1e-12)
        assert np.nanmean(ap_TK[0]) == pytest.approx(expected["AP50"], abs=1e-12)
        assert 0 < expected["AP"] < 1
        for label, name in enumerate(CLASSES.values()):
            value = None if np.isnan(ap_TK[:, label]).any() else ap_TK[:, label].mean()
            assert value == pytest.approx(expected["per_class"][name], abs=1e-12)


def test_blocks_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random_content(9, seed=3)
    matches = match_detections(read(tmp_path, content), random_detections(content, seed=4, noise=3))
    weights_BI = draw_weights(9, draws=23)
    whole = average_precision(matches, weights_BI)
    monkeypatch.setattr(bootstrap, "_VALUES_AT_ONCE", 100)
    monkeypatch.setattr(analysis, "_CHUNK", 2)
    again = match_detections(read(tmp_path, content), random_detections(content, seed=4, noise=3))
    np.testing.assert_array_equal(average_precision(again, weights_BI), whole)


def test_percentiles_of_the_paired_draws(tmp_path: Path) -> None:
    content = random_content(30, seed=5)
    data = read(tmp_path, content)
    good, bad = (match_detections(data, random_detections(content, seed=6, noise=noise)) for noise in (2, 6))
    good_B, bad_B = (draw_ap(matches, draws=200, seed=8)["AP"] for matches in (good, bad))
    weights_BI = draw_weights(30, draws=200, seed=8)
    for matches, value_B in ((good, good_B), (bad, bad_B)):
        assert value_B[1:] == pytest.approx(np.nanmean(average_precision(matches, weights_BI), axis=(1, 2)))
    assert interval(good_B - bad_B) == pytest.approx(np.percentile((good_B - bad_B)[1:], [2.5, 97.5]))
    low, high = interval(good_B - bad_B)
    assert 0 < low < good_B[0] - bad_B[0] < high
    unpaired = np.subtract(*np.meshgrid(good_B[1:], bad_B[1:])).ravel()
    assert high - low < np.subtract(*np.percentile(unpaired, [97.5, 2.5]))


def test_two_detectors_of_one_quality_do_not_differ(tmp_path: Path) -> None:
    """For detectors that differ only by random noise, about one pair in twenty lies outside its interval."""
    content = random_content(40, seed=11)
    data = read(tmp_path, content)
    drawn = [draw_ap(match_detections(data, random_detections(content, seed=100 + n, noise=4)), 200) for n in range(16)]
    pairs = [interval(a["AP"] - b["AP"]) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    assert sum(low <= 0 <= high for low, high in pairs) >= 6


def test_metrics_and_log(tmp_path: Path) -> None:
    content = random_content(30, seed=5)
    data = read(tmp_path, content)
    file = tmp_path / "detections.json"
    write_results(random_detections(content, seed=6, noise=9), data.category_ids, file)
    detections = random_detections(content, seed=6, noise=1)
    metrics, lines = bootstrap_metrics(data, detections, read_detections(file, data), file)
    compared = metrics["compared"]
    objects = sum(not row["iscrowd"] for row in content["annotations"])
    assert (compared["images"], compared["objects"]) == (30, objects)
    assert 0 < compared["AP"]["low"] < compared["AP"]["difference"] < compared["AP"]["high"]
    low, high = metrics["intervals"]["AP"]
    assert low < coco_ap(data, detections, "pycocotools")["AP"] < high
    assert lines[1].endswith("better")
    assert lines[-1].startswith("the intervals cover the choice of the images, not the training")
    same, lines = bootstrap_metrics(data, read_detections(file, data), read_detections(file, data), file)
    assert same["compared"]["AP"] == {"difference": 0, "low": 0, "high": 0}
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["identical detections"] * 2
    content["annotations"] = []
    assert bootstrap_metrics(read(tmp_path, content, "empty"), detections, None, None) == ({}, [])


def test_few_images_give_no_verdict(tmp_path: Path) -> None:
    """The same two detectors as in `test_metrics_and_log`: the interval of the difference on these images does not contain 0."""
    for images, end in ((29, ": evaluated on 29 images: too few to tell"), (30, ": better")):
        content = random_content(images, seed=5)
        data = read(tmp_path, content, f"of_{images}")
        file = tmp_path / f"{images}.json"
        write_results(random_detections(content, seed=6, noise=9), data.category_ids, file)
        metrics, lines = bootstrap_metrics(
            data, random_detections(content, seed=6, noise=1), read_detections(file, data), file
        )
        assert metrics["compared"]["AP"]["low"] > 0
        assert lines[1].endswith(end)
        assert lines[0].endswith("too narrow to be relied on, since there are only 29 images") is (images == 29)


def test_stored_detections_read_back(tmp_path: Path) -> None:
    content = random_content(5, seed=1)
    data = read(tmp_path, content)
    detections = random_detections(content, seed=2, noise=3)
    file = tmp_path / "detections.json"
    write_results(detections, data.category_ids, file)
    again = read_detections(file, data)
    assert again.keys() == detections.keys()
    for image_id, stored in again.items():
        assert torch.allclose(stored.boxes_N4, detections[image_id].boxes_N4, atol=2e-3)
        assert torch.allclose(stored.scores_N, detections[image_id].scores_N, atol=1e-8)
        assert torch.equal(stored.labels_N, detections[image_id].labels_N)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image_id": 99, "category_id": 7, "bbox": [1, 1, 2, 2], "score": 1}]', "image 99 is not in"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1}]', "category 1 is not in"),
        ('[{"image_id": 1}]', "not a file of detections; give the detections.json"),
        ("{", "not a file of detections; give the detections.json"),
        ('{"images": []}', "not a file of detections; give the detections.json"),
        ("{}", "not a file of detections; give the detections.json"),
        ("null", "not a file of detections; give the detections.json"),
        *(
            (
                f'[{{"image_id": 1, "category_id": 7, "bbox": {box}, "score": {score}}}]',
                "detection 0: expected a finite score",
            )
            for box, score in (
                ("[1, 1, 2, 2]", "NaN"),
                ("[1, 1, 2, 2]", "1e999"),
                ("[1, 1, 2, 2]", "true"),
                ("[1, NaN, 2, 2]", "0.5"),
                ("[1, 1, -2, 2]", "0.5"),
                ('[1, 1, "2", 2]', "0.5"),
            )
        ),
    ],
)
def test_files_of_other_data_are_refused(text: str, message: str, tmp_path: Path) -> None:
    data = read(tmp_path, random_content(5, seed=1))
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_detections(file, data)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_evaluations_of_another_annotation_file_are_refused(tmp_path: Path) -> None:
    content = random_content(4, seed=1)
    data = read(tmp_path, content)
    run = tmp_path / "run"
    run.mkdir()
    file = run / "detections.json"
    image = data.images[0].image_id
    file.write_text(
        json.dumps([{"image_id": image, "category_id": 7, "bbox": [1, 1, 2, 2], "score": 1}]), encoding="utf-8"
    )
    detections = read_detections(file, data)
    assert bootstrap_metrics(data, detections, detections, file)[1][-1] == (
        f"{file}: no result.json of an evaluation is beside it; 3 of 4 images have no detections in it and count as evaluated"
    )
    result: dict[str, Any] = {"metrics": {}, "outputs": {"detections.json": file_sha256(file)}}
    for annotations in (data.file, __file__):
        result["inputs"] = {"annotations": input_digest(Path(annotations))}
        (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
        if annotations == data.file:
            assert not any("result.json" in line for line in bootstrap_metrics(data, detections, detections, file)[1])
    with pytest.raises(UserError, match="is an evaluation of another annotation file than"):
        read_detections(file, data)
    file.write_text("[]", encoding="utf-8")  # no longer the file that result.json describes
    assert read_detections(file, data) == {}
