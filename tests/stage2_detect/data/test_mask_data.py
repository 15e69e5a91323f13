"""Masks of objects from the annotation file to a trained detector and its results; unusable ones are errors."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_codec

from ssld.pipelines.toy_data import ToySizes, write_toy_data
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata
from ssld.shared.run_dir import read_result
from ssld.stage2_detect import evaluate, train
from ssld.stage2_detect.data.coco import read_coco, require_masks
from ssld.stage2_detect.data.segmentations import shape_box
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.evaluation.scoring import score
from ssld.stage2_detect.models.mask_targets import decode_rle

TRIANGLE = [4.0, 4.0, 36.0, 8.0, 20.0, 30.0]
DISC = np.hypot(*(np.indices((40, 64)) - np.array([20, 30]).reshape(2, 1, 1))) < 15


def rle_of(bitmap: np.ndarray) -> dict[str, Any]:
    return mask_codec.encode(np.asfortranarray(bitmap.astype(np.uint8)))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_data(
        folder, sizes=ToySizes(labeled=30, unlabeled=1, teacher_train=30, val=30, train_scenes=8, val_scenes=4)
    )
    return folder / "stage2"


def arguments(toy: Path, run: Path, *more: str) -> list[str]:
    flags = {
        "backbone": "random:test_resnet", "model.kind": "mask_rcnn", "model.fpn_channels": 16, "model.roi.hidden": 32,
        "model.roi.samples_per_image": 24, "model.mask.hidden": 16, "model.rpn.post_nms_top_n_train": 40, "model.rpn.post_nms_top_n_test": 20,
        "model.rpn.anchor_sizes": "8,16,32,64,128", "resize.train_short_sides": "64,96", "resize.train_long_side": 96,
        "resize.short_side": 80, "resize.long_side": 80, "optim.lr": 0.01, "optim.reference_batch": 4,
        "steps": 3, "batch_size": 4, "workers": 0, "threads": 1, "device": "cpu", "val_loss": "true",
        "data.train_annotations": toy / "train.json", "data.train_images": toy / "train",
        "data.val_annotations": toy / "val.json", "data.val_images": toy / "val", "output": run,
    }  # fmt: skip
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))] + list(more)


def test_mask_rcnn_from_training_to_a_results_file(toy: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    assert call(train.main, arguments(toy, run)) == 0
    result = read_result(run)
    assert result
    assert {"AP", "AP_segm", "AP50_segm", "AR100_segm"} <= set(result["metrics"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("loss_mask" in line for line in lines)
    assert any("val_loss_mask" in line or "val_AP_segm" in line for line in lines)
    assert read_metadata(run / "detector.safetensors", kind="detector")["model"]["kind"] == "mask_rcnn"
    words = [f"--model={run / 'detector.safetensors'}", f"--annotations={toy / 'val.json'}", f"--images={toy / 'val'}"]
    assert call(evaluate.main, [*words, f"--output={evaluation}", "--workers=0", "--device=cpu"]) == 0
    scored = read_result(evaluation)
    assert scored
    assert scored["metrics"]["AP_segm"] == result["metrics"]["AP_segm"]
    rows = json.loads((evaluation / "detections.json").read_text())
    assert rows
    sizes = {
        image["id"]: [image["height"], image["width"]] for image in json.loads((toy / "val.json").read_text())["images"]
    }
    for row in rows:
        assert row["segmentation"]["size"] == sizes[row["image_id"]]
        assert isinstance(row["segmentation"]["counts"], str)

    # On data read without masks, as for the check of a box detector's teacher: only boxes are scored.
    options: dict[str, Any] = {"batch_size": 4, "workers": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    metrics, detections = score(
        load_detector(run / "detector.safetensors").model,
        read_coco(toy / "val.json", toy / "val", training=False),
        Sizing(80, 80),
        backend="pycocotools",
        **options,
    )
    assert any(one.masks for one in detections.values())
    assert metrics["AP"] == pytest.approx(result["metrics"]["AP"], abs=1e-9)
    assert not any("segm" in name for name in metrics)


@pytest.mark.slow
def test_views_of_masks_are_evaluated_on_two_processes_as_on_one(
    toy: Path, tmp_path: Path, call: Callable[..., int], scripts: Any
) -> None:
    run = tmp_path / "run"
    assert call(train.main, arguments(toy, run, "--model.roi.score_threshold", "0")) == 0
    words = ["--model", str(run / "detector.safetensors"), "--annotations", str(toy / "val.json"), "--threads", "1"]
    words += ["--images", str(toy / "val"), "--workers", "0", "--device", "cpu", "--batch_size", "2"]
    assert call(evaluate.main, [*words, "--output", str(tmp_path / "plain")]) == 0
    words += ["--tta.short_sides", "[64, 80]"]
    assert call(evaluate.main, [*words, "--output", str(tmp_path / "one")]) == 0
    done = scripts.run("stage2_detect/evaluate.py", *words, "--output", str(tmp_path / "two"), ranks=2)
    assert done.returncode == 0, done.stderr
    results = [read_result(tmp_path / name) for name in ("one", "two")]
    one, two = (result["metrics"] for result in results if result)
    assert one["AP_segm"] is not None
    assert two["AP_segm"] == pytest.approx(one["AP_segm"], abs=1e-6)
    plain, rows, others = (
        sorted(json.loads((tmp_path / name / "detections.json").read_text()), key=lambda row: row["image_id"])
        for name in ("plain", "one", "two")
    )
    assert [row["segmentation"] for row in rows] == [row["segmentation"] for row in others]
    assert {row["image_id"] for row in rows} == {row["image_id"] for row in plain}
    assert [row["segmentation"] for row in rows] != [row["segmentation"] for row in plain]


def test_boxes_alone_are_refused_with_their_ids(
    toy: Path, tmp_path: Path, call: Callable[..., int], capsys: Any
) -> None:
    content = json.loads((toy / "train.json").read_text())
    for annotation in content["annotations"]:
        annotation.pop("segmentation")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    given = arguments(toy, tmp_path / "run")
    given = [word.replace(str(toy / "train.json"), str(tmp_path / "boxes.json")) for word in given]
    assert call(train.main, given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "boxes.json" in error
    assert "have no usable segmentation (first annotation ids: 1, 2, " in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "shape",
    [
        None,
        [],
        [[1.0, 2.0, 3.0, 4.0]],
        [[1.0, 2, 3, 4, 5, 6, 7]],
        {"size": [40, 63], "counts": [2560]},
        {"size": [40, 64], "counts": ""},
        {"size": [40, 64], "counts": "zzzz"},
        {"size": [40, 64], "counts": rle_of(DISC)["counts"].decode()[:-1]},
        {"size": [40, 64], "counts": rle_of(DISC)["counts"].decode() + "1"},
        {"size": None, "counts": [2560]},
        {"size": [40, 64], "counts": [2570, -10]},
        {"size": [40, 64], "counts": ["2560"]},
        {"size": [40, 64]},
        [[1.0, 2, 3, 4, 5, "6"]],
        [[1.0, 2, 3, 4, 5, math.nan]],
        [[1.0, 2, 3, 4, 5, 1e300]],
        [[-1e9, 2, 3, 4, 5, 6]],
        {"size": [40, 64], "counts": [1280.0, 1280.0]},
        {
            "size": [40, 64],
            "counts": rle_of(DISC)["counts"].decode().translate({48 + low: 112 + low for low in range(16)}),
        },
        [1.0, 2, 3, 4, 5, 6],
        "polygon",
    ],
)
def test_shapes_that_cannot_be_used(tmp_path: Path, shape: Any) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 40}],
        "annotations": [
            {"id": "x7", "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": shape},
            {"id": "x8", "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": [TRIANGLE]},
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"1 of 2 objects have no usable segmentation \(first annotation ids: 'x7'\)"):
        require_masks(read_coco(tmp_path / "a.json", None, training=True, segmentations=True))


def test_compressed_run_lengths_of_any_shape_are_accepted(tmp_path: Path) -> None:
    """Random bitmaps, from empty to full, as pycocotools encodes them; checked without decoding."""
    draw = np.random.default_rng(0)
    shapes = [draw.random((40, 64)) < share for share in np.linspace(0, 1, 21)] + [DISC]
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
        | {"segmentation": {"size": [40, 64], "counts": rle_of(shape)["counts"].decode()}}
        for number, shape in enumerate(shapes)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 40}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = require_masks(read_coco(tmp_path / "a.json", None, training=True, segmentations=True))
    assert data.images[0].segmentations is not None
    for segmentation, shape in zip(data.images[0].segmentations, shapes, strict=True):
        np.testing.assert_array_equal(decode_rle(segmentation), shape)


def test_photos_with_every_kind_of_mask_train(
    shared_data: Callable[[str], Path], tmp_path: Path, call: Callable[..., int]
) -> None:
    """COCO photos: polygons of several parts, RLE, crowds, images without objects."""
    folder = shared_data("coco-mini")
    places = {f"{part}.json": folder / "annotations" / "instances_val.json" for part in ("train", "val")}
    places |= dict.fromkeys(("train", "val"), folder / "images")
    given = {str(tmp_path / name): str(place) for name, place in places.items()}
    assert call(train.main, [given.get(word, word) for word in arguments(tmp_path, tmp_path / "run")]) == 0
    result = read_result(tmp_path / "run")
    assert result
    assert result["metrics"]["AP_segm"] is not None


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_box_of_a_mask_is_that_of_coco(seed: int, compressed: bool) -> None:
    draw = np.random.default_rng(seed)
    mask = np.zeros((7, 9), dtype=np.uint8, order="F")
    top, left = draw.integers(0, 6), draw.integers(0, 8)
    mask[top : top + draw.integers(1, 7), left : left + draw.integers(1, 9)] = draw.integers(0, 2)
    mask[draw.integers(7), draw.integers(9)] = 1
    code = mask_codec.encode(mask)
    column = mask.flatten(order="F")
    edges = [0, *(np.flatnonzero(np.diff(column)) + 1), len(column)]
    runs = ([0] if column[0] else []) + np.diff(edges).tolist()
    shape = {"size": [7, 9], "counts": code["counts"].decode() if compressed else runs}
    assert shape_box(shape, 7, 9) == mask_codec.toBbox(code).tolist()
    assert shape_box(shape, 9, 7) is None
    assert shape_box({"size": [7, 9], "counts": [63]}, 7, 9) is None
