"""Masks: targets of a RoI, the head's loss, pasting, average precision of shapes, and the commands on drawn scenes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filled_shapes import filled
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional as F

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.data.coco import read_coco, require_masks
from ssld.stage2_detect.data.loaders import masks_of
from ssld.stage2_detect.data.views import View
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.models.batch import Detections, Targets
from ssld.stage2_detect.models.mask_head import MaskHead, paste, positives_on_host
from ssld.stage2_detect.models.mask_targets import ImageMasks, decode, rasterize
from ssld.stage2_detect.models.roi_heads import SampledRoIs

TRIANGLE = [4.0, 4.0, 36.0, 8.0, 20.0, 30.0]
SQUARE = [50.0, 10.0, 58.0, 10.0, 58.0, 18.0, 50.0, 18.0]


def rle_of(bitmap: np.ndarray) -> dict[str, Any]:
    return mask_codec.encode(np.asfortranarray(bitmap.astype(np.uint8)))


def bitmap(polygons: list[list[float]], height: int = 40, width: int = 64) -> np.ndarray:
    return filled(polygons, height, width)


@pytest.mark.parametrize(
    "masks",
    [
        ImageMasks(([TRIANGLE, SQUARE],)),
        ImageMasks(([TRIANGLE, SQUARE],), np.array([[[1.5, 0, -7.0], [0, 1.5, 3.0]]])),
        ImageMasks(([TRIANGLE, SQUARE],), np.array([[[-2.0, 0, 128.0], [0, 2.0, 0]]])),
    ],
    ids=["as it is", "scaled and cut", "mirrored"],
)
def test_polygons_are_filled_as_pycocotools_fills_them(masks: ImageMasks) -> None:
    """Against one call of pycocotools for polygons moved by hand."""
    rois = np.array([[10.0, 5, 60, 45], [0, 0, 30, 30], [30, 20, 31, 20.5]], dtype=np.float32)
    grids = rasterize([masks], np.zeros(3, dtype=int), np.zeros(3, dtype=int), rois, 28)
    for grid, (x1, y1, x2, y2) in zip(grids, rois.astype(np.float64), strict=True):
        moved = []
        for polygon in (TRIANGLE, SQUARE):
            x, y = np.array(polygon[::2]), np.array(polygon[1::2])
            if masks.matrices_N23 is not None:
                ((a, _, b), (_, c, d)) = masks.matrices_N23[0]
                x, y = a * x + b, c * y + d
            moved.append(np.stack(((x - x1) * (28 / (x2 - x1)), (y - y1) * (28 / (y2 - y1))), axis=1).ravel().tolist())
        np.testing.assert_array_equal(grid, filled(moved, 28, 28))
    assert grids[0].any()


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths_are_sampled_under_the_centers(compressed: bool) -> None:
    shape = bitmap([TRIANGLE, SQUARE])
    code: dict[str, Any] = rle_of(shape)
    if not compressed:
        flat = shape.ravel(order="F").astype(int)
        changes = np.flatnonzero(np.diff(np.concatenate([[0], flat, [-1]])))
        code = {"size": [40, 64], "counts": np.diff(np.concatenate([[0], changes])).tolist()}
    masks = ImageMasks((code,), np.array([[[-2.0, 0, 110.0], [0, 2.0, -4.0]]]))
    roi = np.array([[-5.0, -6.0, 97.0, 70.0]], dtype=np.float32)
    (grid,) = rasterize([masks], np.zeros(1, dtype=int), np.zeros(1, dtype=int), roi, 14)
    expected = np.zeros((14, 14), dtype=bool)
    for row in range(14):
        for column in range(14):
            x = (100 - (-5 + (column + 0.5) / 14 * 102) + 10) / 2
            y = (-6 + (row + 0.5) / 14 * 76 + 4) / 2
            inside = 0 <= x < 64 and 0 <= y < 40
            expected[row, column] = inside and shape[int(y), int(x)]
    np.testing.assert_array_equal(grid, expected)
    assert expected.any()
    assert not expected.all()


def test_masks_follow_a_view_as_boxes_do(tmp_path: Path) -> None:
    """A rectangle's shape fills its own box, whatever the view."""
    x, y, width, height = 12.0, 6.0, 20.0, 10.0
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 40}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "segmentation": [corners]}
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    (record,) = read_coco(tmp_path / "a.json", None, training=True, segmentations=True).images
    from ssld.stage2_detect.data.views import view_boxes

    for view in (View(1.0, 40, 64), View(2.5, 80, 150, flip=True), View(2.0, 60, 90, flip=True, top=5, left=11)):
        boxes = view_boxes(record.boxes_N4, view)
        (grid,) = rasterize([masks_of(record, view)], np.zeros(1, int), np.zeros(1, int), boxes, 28)
        assert grid.all(), view


def sampled(positive: list[list[bool]], objects: list[list[int]]) -> SampledRoIs:
    flags = torch.tensor(positive)
    boxes = torch.tensor([0.0, 0, 40, 32]).repeat(*flags.shape, 1) + 3.0 * torch.arange(flags.shape[1])[None, :, None]
    return SampledRoIs(boxes, torch.ones_like(flags), flags, torch.tensor(objects))


def head(**options: Any) -> MaskHead:
    torch.manual_seed(0)
    return MaskHead(classes=2, channels=4, hidden=6, convolutions=2, pool_size=7, **options)


def loss_of(
    model: MaskHead, features: list[torch.Tensor], rois: SampledRoIs, truth: Targets, ranks: Ranks = ONE_RANK
) -> torch.Tensor:
    return model.losses(features, rois, positives_on_host(rois), truth, ranks)["loss_mask"]


def test_loss_is_the_mean_over_positives_of_the_objects_class() -> None:
    masks = (
        ImageMasks(([TRIANGLE], [SQUARE])),
        ImageMasks((rle_of(bitmap([TRIANGLE])),)),
        ImageMasks(()),
    )
    targets = Targets(
        torch.zeros(3, 2, 4), torch.tensor([[1, 0], [0, -1], [-1, -1]]), torch.zeros(3).long(), masks=masks
    )
    features = [torch.randn(3, 4, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    rois = sampled([[False, True, True], [True, False, False], [False] * 3], [[0, 1, 0], [0, 0, 0], [0, 0, 0]])
    model = head()
    loss = loss_of(model, features, rois, targets)
    total, count = 0.0, 0
    for image, place in rois.positive_BR.nonzero().tolist():
        number = int(rois.objects_BR[image, place])
        one = sampled([[True]], [[0]])
        box = rois.rois_BR4[image, place]
        one = SampledRoIs(box[None, None], one.valid_BR, one.positive_BR, one.objects_BR)
        logits = model(model._pool([f[image : image + 1] for f in features], one.rois_BR4, one.valid_BR))
        label = int(targets.labels_BG[image, number])
        expected = rasterize(masks, np.array([image]), np.array([number]), box[None].numpy(), 14)
        x, y = logits[0, label].detach().double().numpy(), expected[0].astype(np.float64)
        total += float((np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x)))).mean())
        count += 1
    assert count == 3
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_ranks_add_up_to_the_whole_batch() -> None:
    """Two positives on one rank, one on the other: the whole batch's loss is the mean of the ranks' losses."""
    masks = (ImageMasks(([TRIANGLE], [SQUARE])), ImageMasks(([TRIANGLE],)))
    labels, boxes, seeds = torch.tensor([[1, 0], [0, -1]]), torch.zeros(2, 2, 4), torch.zeros(2).long()
    features = [torch.randn(2, 4, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    positive, objects = [[True, True], [True, False]], [[0, 1], [0, 0]]
    whole = loss_of(head(), features, sampled(positive, objects), Targets(boxes, labels, seeds, masks=masks))
    both = Ranks(2, lambda count: 0 * count + 3)
    ranks = [
        loss_of(
            head(),
            [feature[rank : rank + 1] for feature in features],
            sampled(positive[rank : rank + 1], objects[rank : rank + 1]),
            Targets(boxes[:1], labels[rank : rank + 1], seeds[:1], masks=masks[rank : rank + 1]),
            both,
        ).item()
        for rank in range(2)
    ]
    assert ranks[0] != pytest.approx(ranks[1], rel=0.1)
    assert sum(ranks) / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_loss_without_positives_is_zero_and_so_are_its_gradients() -> None:
    features = [torch.randn(1, 4, 64 // stride, 64 // stride, requires_grad=True) for stride in (4, 8, 16, 32)]
    model = head()
    for labels in (torch.tensor([[1]]), torch.zeros(1, 0).long()):
        targets = Targets(torch.zeros(*labels.shape, 4), labels, torch.zeros(1).long(), masks=(ImageMasks(()),))
        loss = loss_of(model, features, sampled([[False, False]], [[0, 0]]), targets)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_pasting_is_bilinear_sampling_at_pixel_centers() -> None:
    """Against torch's grid_sample of the whole image, for boxes inside, at the border and thinner than a pixel."""
    maps = torch.rand(4, 14, 14, generator=torch.Generator().manual_seed(2))
    boxes = torch.tensor([[3.3, 4.7, 30.2, 25.9], [-4.0, 20.0, 20.0, 47.5], [10.0, 10.0, 10.4, 30.0], [0, 0, 50, 40]])
    height, width = 40, 50
    codes = paste(maps, boxes, height, width, 0.5)
    for code, one, (x1, y1, x2, y2) in zip(codes, maps.double(), boxes.double().tolist(), strict=True):
        y = ((torch.arange(height).double() + 0.5) - y1) / (y2 - y1) * 2 - 1
        x = ((torch.arange(width).double() + 0.5) - x1) / (x2 - x1) * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
        expected = F.grid_sample(one[None, None], grid, align_corners=False)[0, 0] >= 0.5
        np.testing.assert_array_equal(decode([code])[:, :, 0].astype(bool), expected.numpy())


@pytest.mark.parametrize("at_once", [1, 50_000])
@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_average_precision_of_masks(
    tmp_path: Path, backend: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against pycocotools called on files: polygons, RLE and a crowd, detected with shifted shapes; per class too."""
    monkeypatch.setattr("ssld.stage2_detect.evaluation.coco_ap._MASKS_AT_ONCE", at_once)
    draw = np.random.default_rng(4)
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 40} for i in (3, 1, 2)]
    annotations: list[dict[str, Any]] = []
    detections: dict[int | str, Detections] = {}
    results = []
    for image in images:
        boxes, scores, labels, masks = [], [], [], []
        for number in range(3):
            x, y, w, h = (float(v) for v in (*draw.uniform(0, 20, 2), *draw.uniform(8, 18, 2)))
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            crowd = number == 2
            shape: Any = rle_of(bitmap([polygon])) if number else [polygon]
            if number:
                shape = {"size": shape["size"], "counts": shape["counts"].decode()}
            entry = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": 1 + number % 2}
            annotations.append(
                entry | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(crowd), "segmentation": shape}
            )
            move = draw.uniform(-3, 3)
            code = rle_of(bitmap([[value + move for value in polygon]]))
            score = float(draw.uniform(0.2, 1))
            boxes.append([x + move, y + move, x + w + move, y + h + move])
            scores.append(score)
            labels.append(number % 2)
            masks.append(code)
            counts = {"size": code["size"], "counts": code["counts"].decode()}
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": 1 + number % 2,
                    "score": np.float32(score).item(),
                    "segmentation": counts,
                }
            )
        detections[image["id"]] = Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), masks)
    content = {"images": images, "annotations": annotations, "categories": [{"id": k, "name": f"c{k}"} for k in (1, 2)]}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    data = require_masks(read_coco(tmp_path / "gt.json", None, training=False, segmentations=True))
    actual = coco_ap(data, detections, backend, masks=True)
    truth = COCO(str(tmp_path / "gt.json"))
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    reference = dict(zip(names, evaluation.stats, strict=True))
    assert 0.1 < actual["AP"] < 0.95
    for name, value in reference.items():
        assert (-1 if actual[name] is None else actual[name]) == pytest.approx(value, abs=1e-12), name
