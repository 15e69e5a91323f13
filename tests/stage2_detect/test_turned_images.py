"""Images of equal content with any EXIF orientation: equal AP, and equal boxes by every way into a detector."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted_data import line
from PIL import Image
from run_files import content
from turned_images import WRITERS, Scene, save_turned

from ssld.stage2_detect import convert_data, evaluate, predict
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.deploy.check import images_of
from ssld.stage2_detect.detector_file import LoadedDetector, load_detector
from ssld.stage2_detect.evaluation.scoring import score
from ssld.stage2_detect.export_config import ExportDetectorConfig

SIZES = Sizing(64, 128)


@pytest.fixture(scope="module")
def loaded(detector_file: Path) -> LoadedDetector:
    return load_detector(detector_file)


@pytest.fixture(scope="module")
def drawn(tiny_coco: Any) -> list[Scene]:
    """A landscape, a portrait and two square images of the drawn scenes, with their wide objects."""
    source = json.loads(tiny_coco.train_annotations.read_text())
    boxes = {
        row["id"]: [
            tuple(one["bbox"])
            for one in source["annotations"]
            if one["image_id"] == row["id"] and one["category_id"] == 3
        ]
        for row in source["images"]
    }
    pixels = {row["id"]: np.array(Image.open(tiny_coco.train_images / row["file_name"])) for row in source["images"]}
    first, second, *others = [image_id for image_id, some in boxes.items() if some][:4]
    shifted = [(x + 64, y, w, h) for x, y, w, h in boxes[second]], [(x, y + 64, w, h) for x, y, w, h in boxes[second]]
    return [
        Scene("0.png", np.concatenate([pixels[first], pixels[second]], 1), boxes[first] + shifted[0]),
        Scene("1.png", np.concatenate([pixels[first], pixels[second]], 0), boxes[first] + shifted[1]),
        *(Scene(f"{number}.png", pixels[one], boxes[one]) for number, one in enumerate(others, 2)),
    ]


def ap_of(loaded: LoadedDetector, file: Path, images: Path, info: dict[str, str]) -> list[float]:
    """AP, AP50 and APs."""
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 1, "name": "wide"}, {"id": 2, "name": "tall"}]
    file.write_text(json.dumps(content | ({"info": info} if info else {})))
    data = read_coco(file, images, training=False, class_names=loaded.class_names)
    device, dtype = torch.device("cpu"), torch.float32
    metrics, _ = score(
        loaded.model, data, SIZES, batch_size=2, workers=0, device=device, dtype=dtype, backend="pycocotools"
    )
    return [metrics[name] for name in ("AP", "AP50", "APs")]


@pytest.mark.parametrize("form", list(WRITERS))
def test_equal_ap(
    form: str, loaded: LoadedDetector, drawn: Sequence[Scene], call: Callable[..., int], tmp_path: Path
) -> None:
    def ap(value: int, **info: str) -> list[float]:
        folder = tmp_path / f"{value}{len(info)}"
        images = WRITERS[form](folder, drawn)
        for one in drawn:
            save_turned(images / one.name, one.pixels, value)
        if form != "coco":
            assert call(convert_data.main, line(folder, tmp_path / f"run{folder.name}")) == 0
            folder = tmp_path / f"run{folder.name}"
        return ap_of(loaded, folder / "train.json", images, info)

    expected = ap(1)
    assert expected[1] > 0.05
    for value in (
        range(2, 9) if form == "coco" else (3, 6)
    ):  # the batches of all are compared in data/test_orientation.py
        assert ap(value) == expected, value
    assert ap(3, image_orientation="stored") != expected


def test_evaluation_reports_the_orientation(
    call: Callable[..., int], detector_file: Path, drawn: Sequence[Scene], tiny_coco: Any, tmp_path: Path
) -> None:
    images = WRITERS["coco"](tmp_path / "set", drawn)
    for one in drawn:
        save_turned(images / one.name, one.pixels, 6)
    content_of = json.loads((tmp_path / "set" / "train.json").read_text())
    content_of["categories"] = [{"id": 1, "name": "wide"}, {"id": 2, "name": "tall"}]
    (tmp_path / "set" / "train.json").write_text(json.dumps(content_of))
    rest = ["--output", str(tmp_path / "ap"), "--threads", "1", "--workers", "0", "--device", "cpu"]
    data = ["--annotations", str(tmp_path / "set" / "train.json"), "--images", str(images)]
    assert call(evaluate.main, ["--model", str(detector_file), *data, *rest]) == 0
    expected = {"convention": "upright", "stated": False, "upright": 2, "stored": 0, "both": 2}
    assert content(tmp_path / "ap" / "result.json")["metrics"]["orientation"] == {"val": expected}
    assert "2 sideways images turned upright by EXIF" in (tmp_path / "ap" / "log.txt").read_text()


@pytest.mark.parametrize("tile", [None, 48])
def test_a_file_has_the_same_boxes_in_the_command_and_in_the_call(
    tile: int | None,
    call: Callable[..., int],
    predict_line: Any,
    loaded: LoadedDetector,
    drawn: Sequence[Scene],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "turned"
    for number, one in enumerate(drawn[:3]):
        for value in (1, 3, 5, 6) if tile is None else (1, 2, 8):
            save_turned(folder / f"{number}_{value}.png", one.pixels, value)
    flags = ["--batch_size", "1", "--write", "json,images", *(["--tile", str(tile)] if tile else [])]
    assert call(predict.main, predict_line(*flags, images=folder)) == 0
    written = content(tmp_path / "predicted" / "predictions.json")
    assert written["info"]["image_orientation"] == "upright"
    total = 0
    drawings: dict[str, list[np.ndarray]] = {}
    for image in written["images"]:
        path = folder / image["file_name"]
        scene = drawn[int(path.name[0])]
        (called,) = loaded.predict([path], score_threshold=0.3, batch_size=1, tile=tile)
        (plain,) = loaded.predict([scene.pixels], score_threshold=0.3, batch_size=1, tile=tile)
        rows = [row for row in written["annotations"] if row["image_id"] == image["id"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)]
        assert np.array_equal(called.boxes_N4, plain.boxes_N4)
        np.testing.assert_allclose(np.reshape(corners, (-1, 4)), called.boxes_N4, atol=2e-3)
        assert (image["height"], image["width"]) == scene.pixels.shape[:2]
        total += len(rows)
        with Image.open(tmp_path / "predicted" / "pictures" / f"{path.stem}.jpg") as drawing:
            drawings.setdefault(path.name[0], []).append(np.array(drawing))
    assert all(np.array_equal(one, several[0]) for several in drawings.values() for one in several)
    assert total > 3


def test_the_check_of_an_export_sees_images_upright(drawn: Sequence[Scene], tmp_path: Path) -> None:
    for value in range(1, 9):
        save_turned(tmp_path / "a" / f"{value}.png", drawn[0].pixels, value)
    config = ExportDetectorConfig(model=Path("m"), output=tmp_path / "x", images=str(tmp_path / "a"), check_images=8)
    for image_CHW in images_of(config, print):
        assert np.array_equal(image_CHW.permute(1, 2, 0).numpy(), drawn[0].pixels)
