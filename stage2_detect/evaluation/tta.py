"""Test-time augmentation: detections of several sizes of an image, and of their mirror images, merged by NMS.

Works on any detector that turns an `ImageBatch` into one `Detections` per image. Detection runs on every view alone; then
NMS within classes runs over the boxes of all views of an image. A detector with masks predicts the masks of the remaining
boxes in every view, and the probabilities are averaged over the views, as in detectron2's `test_time_augmentation.py`.

Legend: B images, C channels, H height, W width, N detections of an image, S side of a mask head's map.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssld.stage2_detect.data.sizing import MultiScaleBatch
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.models.boxes import class_nms, has_area
from ssld.stage2_detect.models.rcnn import RCNN


def detect_views(
    detector: Callable[[ImageBatch], list[Detections]], sizes: MultiScaleBatch, *, flip: bool, nms_iou: float, most: int
) -> list[Detections]:
    """Detect in every view and merge: at most `most` detections of each image, best first, none with an overlap above `nms_iou` in its class.

    For masks the feature maps of all views of the batch are held meanwhile: some 90 MB per image and view at 800 x 1333 in float32.
    """
    rcnn = detector if isinstance(detector, RCNN) and detector.mask_head else None
    views, detections, features = [], [], []
    for images, mirror in itertools.product(sizes.batches, (False, True) if flip else (False,)):
        view = mirrored(images) if mirror else images
        maps, of_view = rcnn.detect_boxes(view) if rcnn else ([], detector(view))
        detections.append(mirror_back(of_view, images) if mirror else of_view)
        views.append((view, mirror))
        features.append(maps)
    best = [merged(parts, nms_iou=nms_iou, most=most) for parts in zip(*detections, strict=True)]
    if rcnn is None:
        assert all(one.masks is None for one in of_view), "masks of several views can be merged by an RCNN alone"
        return best
    masks = []
    for (view, mirror), maps in zip(views, features, strict=True):
        maps_BNSS = rcnn.mask_maps(maps, view, mirror_back(best, view) if mirror else best)
        masks.append(maps_BNSS.flip(3) if mirror else maps_BNSS)
    means_BNSS = torch.stack(masks).mean(0).cpu()
    means = [means_NSS[: len(one.scores_N)] for means_NSS, one in zip(means_BNSS, best, strict=True)]
    return rcnn.with_masks(best, means, sizes.batches[0])


def mirrored(images: ImageBatch) -> ImageBatch:
    """Mirror the images inside their true size; the padding stays at the right and the bottom."""
    column_1W = torch.arange(images.pixels_BCHW.shape[3], device=images.pixels_BCHW.device)[None]
    width_B1 = images.sizes_B2[:, 1:].to(column_1W.device)
    source_BW = torch.where(column_1W < width_B1, width_B1 - 1 - column_1W, column_1W)
    pixels_BCHW = images.pixels_BCHW.gather(3, source_BW[:, None, None].expand_as(images.pixels_BCHW))
    return replace(images, pixels_BCHW=pixels_BCHW)


def original_widths(images: ImageBatch) -> Tensor:
    """Width of each image as the network received it, in pixels of the original: float64 [B] on the CPU.

    Boxes are mirrored in it. Resizing rounds, so it differs from the image's width by up to half a pixel of the network's input.
    """
    sizes_B2, scales_B = images.on_host()
    return sizes_B2[:, 1].double() / scales_B.double()


def mirror_back(detections: Sequence[Detections], images: ImageBatch) -> list[Detections]:
    """Convert detections of mirror images to those of the images, or the other way."""
    rows = zip(detections, original_widths(images).tolist(), images.original_sizes()[:, 1].tolist(), strict=True)
    return [unmirrored(*row) for row in rows]


def unmirrored(detections: Detections, width: float, right: float = math.inf) -> Detections:
    """Convert detections of a mirror image to those of the image, which end at `right`; `width` as of `original_widths`.

    Boxes beyond the border end without area. They are not dropped here: masks need the same boxes in every view.
    """
    x1_N, y1_N, x2_N, y2_N = detections.boxes_N4.unbind(1)
    boxes_N4 = torch.stack([(width - x2_N).clamp(0, right), y1_N, (width - x1_N).clamp(0, right), y2_N], 1)
    return Detections(boxes_N4, detections.scores_N, detections.labels_N)


def merged(parts: Sequence[Detections], *, nms_iou: float, most: int) -> Detections:
    """Merge detections of one image by NMS within classes and keep the best `most`; boxes without area are dropped before."""
    parts = [part.where(has_area(part.boxes_N4)) for part in parts]
    boxes_N4, scores_N, labels_N = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("boxes_N4", "scores_N", "labels_N")
    )
    best = class_nms(boxes_N4, scores_N, labels_N, nms_iou, most=most)
    return Detections(boxes_N4[best], scores_N[best], labels_N[best])
