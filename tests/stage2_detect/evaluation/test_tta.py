"""Test-time augmentation: mirror images are mirror images, boxes come back to where they were, and views are merged."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_dense
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from ssld.shared.models.model_file import read_metadata, read_tensors, save_model_file
from ssld.shared.training import progress
from ssld.stage2_detect import evaluate, train
from ssld.stage2_detect.config import TTAConfig
from ssld.stage2_detect.data.coco import CocoData, read_coco
from ssld.stage2_detect.data.loaders import eval_loader
from ssld.stage2_detect.data.sizing import MultiScaleBatch, Sizing
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.evaluation.tta import detect_views, merged, mirrored, unmirrored
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.models.boxes import area
from ssld.stage2_detect.models.mask_targets import decode
from ssld.stage2_detect.models.rcnn import RCNN


def batch(sizes: list[tuple[int, int]], scale: float = 1.0) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.zeros(len(sizes), 3, 64, 96, dtype=torch.uint8)
    for canvas, (height, width) in zip(pixels, sizes, strict=True):
        canvas[:, :height, :width] = torch.randint(1, 255, (3, height, width), generator=generator, dtype=torch.uint8)
    return ImageBatch(pixels, torch.tensor(sizes), torch.full((len(sizes),), scale))


def test_the_mirror_image_is_mirrored_inside_its_size() -> None:
    images = batch([(64, 96), (40, 33), (1, 1)])
    outputs = mirrored(images)
    for before, after, (height, width) in zip(
        images.pixels_BCHW, outputs.pixels_BCHW, images.sizes_B2.tolist(), strict=True
    ):
        assert torch.equal(after[:, :height, :width], before[:, :height, :width].flip(2))
        assert not after[:, height:].any()
        assert not after[:, :, width:].any()
    assert torch.equal(mirrored(outputs).pixels_BCHW, images.pixels_BCHW)
    assert torch.equal(outputs.sizes_B2, images.sizes_B2)


class BrightBox:
    """Finds the box around all pixels above 250, in pixels of the original; counts what it was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, images: ImageBatch) -> list[Detections]:
        self.given.append(images.pixels_BCHW)
        detections = []
        for pixels, scale in zip(images.pixels_BCHW, images.scales_B.tolist(), strict=True):
            rows, columns = (pixels.amax(0) > 250).nonzero().T
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            boxes = torch.tensor([[float(v) / scale for v in corners]])
            detections.append(Detections(boxes, torch.tensor([0.75]), torch.tensor([2])))
        return detections


def marked(scale: float = 1.0) -> ImageBatch:
    """Two images of unequal width with one bright box each, at the left of the first and in the middle of the second."""
    images = ImageBatch(
        torch.zeros(2, 3, 64, 96, dtype=torch.uint8), torch.tensor([(64, 96), (50, 61)]), torch.full((2,), scale)
    )
    images.pixels_BCHW[0, :, 10:20, 3:30] = 255
    images.pixels_BCHW[1, :, 5:50, 20:34] = 255
    return images


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_boxes_of_the_mirror_image_come_back(scale: float) -> None:
    detector = BrightBox()
    images = marked(scale)
    plain = detector(images)
    for outputs, expected in zip(
        detect_views(detector, MultiScaleBatch((images,)), flip=True, nms_iou=0.5, most=100), plain, strict=True
    ):
        torch.testing.assert_close(outputs.boxes_N4, expected.boxes_N4)
        assert outputs.scores_N.tolist() == [0.75]
        assert outputs.labels_N.tolist() == [2]
    assert len(detector.given) == 3
    assert torch.equal(detector.given[2], mirrored(images).pixels_BCHW)
    assert not torch.equal(detector.given[2], images.pixels_BCHW)


def test_without_flip_the_detector_sees_each_size_once() -> None:
    detector = BrightBox()
    first, second = marked(1.0), marked(2.0)
    detections = detect_views(detector, MultiScaleBatch((first, second)), flip=False, nms_iou=0.5, most=100)
    assert [len(one.scores_N) for one in detections] == [2, 2]  # the boxes differ by a factor of 2
    assert [id(given) for given in detector.given] == [id(first.pixels_BCHW), id(second.pixels_BCHW)]


def test_a_mirrored_box() -> None:
    detections = Detections(
        torch.tensor([[10.0, 5, 30, 9], [0, 0, 100, 9]]), torch.tensor([0.9, 0.8]), torch.tensor([1, 0])
    )
    assert unmirrored(detections, 100).boxes_N4.tolist() == [[70, 5, 90, 9], [0, 0, 100, 9]]
    assert unmirrored(detections, 99.5).boxes_N4.tolist() == [[69.5, 5, 89.5, 9], [0, 0, 99.5, 9]]


def test_views_are_merged_by_nms_within_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count in (70, 0, 90):
        corners = torch.rand(count, 4, generator=generator) * 60
        corners[:, 2:] += corners[:, :2] + 10
        scores, labels = torch.rand(count, generator=generator), torch.randint(0, 3, (count,), generator=generator)
        parts.append(Detections(corners, scores, labels))
    boxes, scores, labels = (torch.cat([getattr(p, n) for p in parts]) for n in ("boxes_N4", "scores_N", "labels_N"))
    for iou, most in ((0.5, 100), (0.5, 7), (0.9, 100)):
        expected = batched_nms(boxes, scores, labels, iou)[:most]
        detections = merged(parts, nms_iou=iou, most=most)
        assert torch.equal(detections.boxes_N4, boxes[expected])
        assert torch.equal(detections.scores_N, scores[expected])
        assert torch.equal(detections.labels_N, labels[expected])
    assert 7 < len(merged(parts, nms_iou=0.5, most=100).scores_N) < 160
    assert len(merged(parts, nms_iou=1.0, most=100).scores_N) == 100


def test_boxes_without_area_are_dropped_before_the_best_are_kept() -> None:
    """The image ends at 3 px; a box at the left edge of a wider mirror image lies beyond it."""
    corners = torch.tensor([[0.0, 5, 0.4, 9], [0.6, 5, 2, 9], [1, 7, 2, 7]])
    found = Detections(corners, torch.tensor([0.9, 0.5, 0.8]), torch.tensor([0, 0, 1]))
    turned = unmirrored(found, 3.4, 3)
    assert turned.boxes_N4[0].tolist() == [3, 5, 3, 9]
    (box,) = merged([turned, found.where(torch.zeros(3, dtype=torch.bool))], nms_iou=0.5, most=1).boxes_N4.tolist()
    assert box == pytest.approx([1.4, 5, 2.8, 9])
    assert merged([turned.where(torch.tensor([True, False, True]))], nms_iou=0.5, most=9).boxes_N4.shape == (0, 4)


@pytest.mark.parametrize("kind", ["gfl", "retinanet"])
def test_narrow_images_have_no_boxes_without_area(kind: str) -> None:
    """Of one-stage detectors, whose input is wider than an original of a single pixel of width."""
    model = tiny_dense.detector(kind, 0).eval()
    model.score_threshold = 0.0
    size = batch([(64, 32)])
    narrow = replace(size, scales_B=torch.tensor([10.0]), originals_B2=torch.tensor([[7, 1]]))
    (one,) = detect_views(model, MultiScaleBatch((narrow,)), flip=True, nms_iou=0.9, most=1000)
    assert len(one.scores_N) > 1
    assert (one.boxes_N4[:, 2:] > one.boxes_N4[:, :2]).all()


# ---- masks


@pytest.fixture
def mask_model(mask_file: Path) -> RCNN:
    """With shapes that depend on the place: every pixel of a random head is otherwise about as likely as the next."""
    model = load_detector(mask_file).model.eval()
    assert isinstance(model, RCNN)
    assert model.mask_head is not None
    with torch.no_grad():
        model.mask_head.logits.weight.mul_(1000)
    return model


def shapes(detections: Detections) -> Any:
    """[H, W, N] of one image's masks."""
    return decode(detections.masks or [])


def test_one_view_of_masks_is_the_detector_itself(mask_model: RCNN) -> None:
    for scale in (1.0, 1.5):
        images = batch([(64, 96), (40, 33)], scale)
        plain, outputs = (
            mask_model(images),
            detect_views(mask_model, MultiScaleBatch((images,)), flip=False, nms_iou=0.999, most=100),
        )
        for one, other in zip(plain, outputs, strict=True):
            assert len(one.scores_N) > 5
            torch.testing.assert_close(other.boxes_N4, one.boxes_N4)
            assert shapes(other).shape == shapes(one).shape
            assert (shapes(other) != shapes(one)).mean() < 1e-4


def test_views_of_the_mirror_image_are_those_of_the_image_mirrored(mask_model: RCNN) -> None:
    """Whichever of the two comes first: boxes and masks, in images narrower than their canvas, of two sizes."""
    sizes = [batch([(64, 96), (40, 33)]), batch([(32, 48), (20, 17)], 0.5)]
    sizes[1] = replace(sizes[1], scales_B=sizes[1].sizes_B2[:, 1] / sizes[0].sizes_B2[:, 1])
    sizes = [replace(images, originals_B2=sizes[0].sizes_B2) for images in sizes]
    one = detect_views(mask_model, MultiScaleBatch(tuple(sizes)), flip=True, nms_iou=0.5, most=100)
    other = detect_views(
        mask_model, MultiScaleBatch(tuple(mirrored(images) for images in sizes)), flip=True, nms_iou=0.5, most=100
    )
    for outputs, turned, (_, width) in zip(one, other, sizes[0].sizes_B2.tolist(), strict=True):
        back = unmirrored(turned, width)
        torch.testing.assert_close(back.boxes_N4, outputs.boxes_N4, rtol=0, atol=1e-3)
        assert torch.equal(back.labels_N, outputs.labels_N)
        assert 0.01 < shapes(outputs).sum() / area(outputs.boxes_N4).sum().item() < 0.9
        assert (shapes(turned)[:, ::-1] != shapes(outputs)).mean() < 1e-3


def test_masks_are_averaged_over_views(mask_model: RCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image and mirror image see the same box, and say something else of the left and the right half of its shape."""
    boxes = [[10.0, 10, 30, 40], [66.0, 10, 86, 40]]
    halves = [(0.9, 0.2), (0.9, 0.05)]
    views: list[Tensor] = []

    def detect_boxes(images: ImageBatch) -> Any:
        views.append(images.pixels_BCHW)
        box_14 = torch.tensor([boxes[len(views) - 1]])
        return [images.pixels_BCHW], [Detections(box_14, torch.tensor([0.9]), torch.tensor([0]))]

    def mask_maps(features: list[Tensor], images: ImageBatch, detections: list[Detections]) -> Tensor:
        view = next(n for n, pixels in enumerate(views) if features[0] is pixels)
        assert images.pixels_BCHW is views[view]
        assert detections[0].boxes_N4.tolist() == [boxes[view]]
        left, right = halves[view]
        return torch.cat([torch.full((1, 1, 8, 4), left), torch.full((1, 1, 8, 4), right)], 3)

    monkeypatch.setattr(mask_model, "detect_boxes", detect_boxes)
    monkeypatch.setattr(mask_model, "mask_maps", mask_maps)
    outputs = detect_views(mask_model, MultiScaleBatch((batch([(64, 96)]),)), flip=True, nms_iou=0.5, most=100)[0]
    assert outputs.boxes_N4.tolist() == boxes[:1]
    full_HW = shapes(outputs)[..., 0]
    # left (0.9 + 0.05) / 2 = 0.475; right (0.2 + 0.9) / 2 = 0.55. At the rim a map falls to zero.
    assert not full_HW[:, :19].any()
    assert full_HW[15:35, 21:27].all()


def test_masks_stay_with_their_boxes(mask_model: RCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror image has a box beyond the border, which comes first, and one at the left of the image."""

    def detect_boxes(images: ImageBatch) -> Any:
        boxes = torch.tensor([[0.0, 10, 1, 40], [10, 10, 40, 40]])
        return [images.pixels_BCHW], [Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))]

    def mask_maps(features: list[Tensor], images: ImageBatch, detections: list[Detections]) -> Tensor:
        widths_N = detections[0].boxes_N4[:, 2] - detections[0].boxes_N4[:, 0]
        return torch.where(widths_N > 2, 0.9, 0.1)[None, :, None, None].expand(1, -1, 8, 8)

    monkeypatch.setattr(mask_model, "detect_boxes", detect_boxes)
    monkeypatch.setattr(mask_model, "mask_maps", mask_maps)
    images = replace(batch([(64, 96)]), originals_B2=torch.tensor([[64, 95]]))
    outputs = detect_views(mask_model, MultiScaleBatch((images,)), flip=True, nms_iou=0.5, most=100)[0]
    assert outputs.boxes_N4.tolist() == [[0, 10, 1, 40], [10, 10, 40, 40], [56, 10, 86, 40]]
    masks_HWN = shapes(outputs)
    assert not masks_HWN[..., 0].any()
    assert masks_HWN[15:35, 15:35, 1].all()
    assert masks_HWN[15:35, 61:81, 2].all()


@pytest.fixture
def data(tiny_coco: Any) -> CocoData:
    return read_coco(tiny_coco.val_annotations, tiny_coco.val_images, training=False)


def test_views_hold_the_same_images_in_several_sizes(data: CocoData) -> None:
    loader = eval_loader(data, Sizing(64, 256, tta=TTAConfig(short_sides=[64, 96])), batch_size=2)
    assert loader.images == 5
    outputs = []
    for views, records in loader:
        outputs += [record.image_id for record in records]
        assert isinstance(views, MultiScaleBatch)
        small, large = views.to("cpu").batches
        assert small.scales_B.tolist() == [1.0] * len(records)
        assert large.scales_B.tolist() == [1.5] * len(records)
        assert large.sizes_B2.tolist() == [[96, 96]] * len(records)
    assert sorted(outputs) == [f"val-{number}" for number in range(5)]


@pytest.fixture
def flags(
    train_settings: dict[str, Any], arguments: Callable[..., list[str]], call: Any, tmp_path: Path
) -> Callable[..., list[str]]:
    """The command line that evaluates a detector of which every box counts."""
    settings = train_settings | {"steps": 1}
    settings["model"] = train_settings["model"] | {"roi": train_settings["model"]["roi"] | {"score_threshold": 0.0}}
    assert call(train.main, arguments(settings)) == 0
    data = settings["data"]
    common = ["--model", str(tmp_path / "run" / "detector.safetensors"), "--annotations", data["val_annotations"]]
    common += ["--images", data["val_images"], "--workers", "0", "--device", "cpu", "--threads", "1"]
    return lambda output, *more: [*common, "--output", str(tmp_path / output), *more]


def test_as_many_objects_as_without_views(flags: Callable[..., list[str]], call: Any, tmp_path: Path) -> None:
    """The number of detections is the detector's, not a setting of its own."""
    file = tmp_path / "run" / "detector.safetensors"
    for most in (7, 130):
        line = flags(f"views_{most}", "--tta.short_sides", "[48, 64, 96]", "--tta.nms_iou", "0.999")
        metadata = read_metadata(file)
        metadata["model"]["roi"]["detections_per_image"] = most
        line[1] = str(tmp_path / f"{most}.safetensors")
        save_model_file(Path(line[1]), read_tensors(file), metadata)
        assert call(evaluate.main, line) == 0
        rows = json.loads((tmp_path / f"views_{most}" / "detections.json").read_text())
        assert {sum(row["image_id"] == f"val-{n}" for row in rows) for n in range(5)} == {most}


def test_evaluation_with_views(flags: Callable[..., list[str]], call: Any, tmp_path: Path) -> None:
    assert call(evaluate.main, flags("plain")) == 0
    assert call(evaluate.main, flags("one", "--tta.flip", "false")) == 0
    assert call(evaluate.main, flags("views", "--tta.short_sides", "[48, 64, 96]")) == 0
    rows = {name: json.loads((tmp_path / name / "detections.json").read_text()) for name in ("plain", "one", "views")}
    key = lambda row: (row["image_id"], -row["score"], row["bbox"])  # noqa: E731
    assert sorted(rows["one"], key=key) == sorted(rows["plain"], key=key)  # one view, merged with nothing
    scores = {name: sum(row["score"] for row in some) for name, some in rows.items()}
    assert scores["views"] > scores["plain"]
    assert max(sum(row["image_id"] == f"val-{n}" for row in rows["views"]) for n in range(5)) <= 100


def test_a_long_evaluation_says_how_far_it_is(
    flags: Callable[..., list[str]], call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(evaluate.main, flags("quiet")) == 0
    assert "images done" not in (tmp_path / "quiet" / "log.txt").read_text()
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    for name, more in (("told", ()), ("views", ("--tta.flip", "true"))):
        assert call(evaluate.main, flags(name, *more)) == 0
        log = (tmp_path / name / "log.txt").read_text()
        assert re.findall(r"(\d) of 5 images done, [\d.]+ s to go", log) == ["1", "2", "3", "4"]


def test_precision_of_the_forward_pass(flags: Callable[..., list[str]], call: Any, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        assert call(evaluate.main, flags(precision, "--precision", precision)) == 0
    rows = [json.loads((tmp_path / name / "detections.json").read_text()) for name in ("fp32", "bf16")]
    best = [max(row["score"] for row in some) for some in rows]
    assert best[0] != best[1]
    assert math.isclose(*best, rel_tol=0.05)


def test_other_classes_are_refused(
    flags: Callable[..., list[str]], user_error: Callable[..., str], tiny_coco: Any, call: Any, tmp_path: Path
) -> None:
    """Classes go by name and keep the file's ids: another order of `categories` is the same set, another name is not."""
    content = json.loads(tiny_coco.val_annotations.read_text())
    wide, tall = content["categories"]
    renumbered = {3: 11, 7: 2}
    turned = content | {"categories": [tall | {"id": 2}, wide | {"id": 11}]}
    turned["annotations"] = [one | {"category_id": renumbered[one["category_id"]]} for one in content["annotations"]]
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    assert call(evaluate.main, flags("plain")) == 0
    given = str(tiny_coco.val_annotations)
    assert (
        call(evaluate.main, [str(tmp_path / "turned.json") if word == given else word for word in flags("turned")]) == 0
    )
    one, two = (json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("plain", "turned"))
    assert one == two
    rows = [json.loads((tmp_path / name / "detections.json").read_text()) for name in ("plain", "turned")]
    assert [renumbered[row["category_id"]] for row in rows[0]] == [row["category_id"] for row in rows[1]]
    other = content | {"categories": [wide, tall | {"name": "round"}]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    message = user_error(evaluate.main, flags("other", "--annotations", str(tmp_path / "other.json")))
    assert message == (
        f"{tmp_path}/other.json: its 2 classes differ from the 2 classes of the detector; unknown: round; missing: tall"
    )
    assert not (tmp_path / "other").exists()
