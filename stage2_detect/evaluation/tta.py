"""Test-time augmentation: detections of several sizes of an image, and of their mirror images, merged by NMS.

Works on any detector that turns an `ImageBatch` into one `Detections` an image. Every view is detected as if it were
alone; then the boxes of all views of an image compete within their class, and the best are kept. A detector of masks
looks for the shapes in the boxes that are left, in every view, and the probabilities are averaged over the views
(detectron2's `test_time_augmentation.py` does so too).

Legend: B images, C channels, H height, W width, N detections of an image, S side of a mask head's map.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssld.stage2_detect.data.sizing import MultiScaleBatch
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.models.boxes import class_nms
from ssld.stage2_detect.models.rcnn import RCNN


def detect_views(
    detector: Callable[[ImageBatch], list[Detections]], sizes: MultiScaleBatch, *, flip: bool, nms_iou: float, most: int
) -> list[Detections]:
    """Merged detections of each image, best first: at most `most`, none with an overlap above `nms_iou` in its class.

    For masks the pyramids of all views of the batch are held meanwhile: some 90 MB an image and view at 800 x 1333 in float32.
    """
    rcnn = detector if isinstance(detector, RCNN) and detector.mask_head else None
    views, found, features = [], [], []
    for images, mirror in itertools.product(sizes.batches, (False, True) if flip else (False,)):
        view = mirrored(images) if mirror else images
        maps, seen = rcnn.find_boxes(view) if rcnn else ([], detector(view))
        found.append(_mirror_back(seen, images) if mirror else seen)
        views.append((view, mirror))
        features.append(maps)
    best = [merged(parts, nms_iou=nms_iou, most=most) for parts in zip(*found, strict=True)]
    if rcnn is None:
        assert all(one.masks is None for one in seen), "masks of views are looked for anew, by an RCNN"
        return best
    shapes: list[list[Tensor]] = []
    for (view, mirror), maps in zip(views, features, strict=True):
        ours = rcnn.mask_maps(maps, view, _mirror_back(best, view) if mirror else best)
        shapes.append([map_NSS.flip(2) if mirror else map_NSS for map_NSS in ours])
    means = [torch.stack(parts).mean(0) for parts in zip(*shapes, strict=True)]
    return rcnn.with_masks(best, means, sizes.batches[0])


def mirrored(images: ImageBatch) -> ImageBatch:
    """The images mirrored inside their true size; the padding stays where it is."""
    column_1W = torch.arange(images.pixels_BCHW.shape[3], device=images.pixels_BCHW.device)[None]
    width_B1 = images.sizes_B2[:, 1:].to(column_1W.device)
    source_BW = torch.where(column_1W < width_B1, width_B1 - 1 - column_1W, column_1W)
    pixels_BCHW = images.pixels_BCHW.gather(3, source_BW[:, None, None].expand_as(images.pixels_BCHW))
    return replace(images, pixels_BCHW=pixels_BCHW)


def original_widths(images: ImageBatch) -> Tensor:
    """float64 [B]: what a mirror image's boxes are mirrored in, in pixels of the original image.

    It is the width that the network saw, which rounding made up to half a pixel other than the image's.
    """
    return images.sizes_B2[:, 1].double().cpu() / images.scales_B.double().cpu()


def _mirror_back(found: Sequence[Detections], images: ImageBatch) -> list[Detections]:
    """Of every image: from the mirror image to the image, or the other way."""
    widths_B = original_widths(images).tolist()
    return [unmirrored(one, width) for one, width in zip(found, widths_B, strict=True)]


def unmirrored(found: Detections, width: float) -> Detections:
    """Detections of a mirror image on the image itself."""
    x1_N, y1_N, x2_N, y2_N = found.boxes_N4.unbind(1)
    boxes_N4 = torch.stack([(width - x2_N).clamp(min=0), y1_N, (width - x1_N).clamp(min=0), y2_N], 1)
    return Detections(boxes_N4, found.scores_N, found.labels_N)


def merged(parts: Sequence[Detections], *, nms_iou: float, most: int) -> Detections:
    """Those of all parts that NMS within classes leaves."""
    boxes_N4, scores_N, labels_N = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("boxes_N4", "scores_N", "labels_N")
    )
    best = class_nms(boxes_N4, scores_N, labels_N, nms_iou, most=most)
    return Detections(boxes_N4[best], scores_N[best], labels_N[best])
