"""One-stage detector: uint8 images -> pyramid P3..P7 -> a head over all of it -> selection and NMS.

Shapes: B images, A anchors of all levels, N candidates of an image, K classes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import boxes, postprocess
from ssld.stage2_detect.models.anchors import Grids, grids_of
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.normalize import Normalize
from ssld.stage2_detect.models.postprocess import NMS
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.retinanet import RetinaNet

OneStageHead = GFL | RetinaNet
Outputs = tuple[Tensor, Tensor]
"""Logits [B, A, K] and box values [B, A, ...] of a head."""


class HeadPass(NamedTuple):
    """What a detector computes from a batch up to its head."""

    features: Sequence[Tensor]
    """maps P3..P7, [B, C, H, W] each"""
    outputs: Outputs


class DenseDetector(nn.Module):
    """The detector contract: in train mode `model(images, targets)` -> losses by name, in eval mode `model(images)` -> detections.

    Args:
        mean, std: mean and standard deviation of the backbone's input, for red, green, blue in units of 0..1.
        candidates: anchors per level before NMS, ranked by their best class, or scores; None: all.
        candidates_of: whether the candidates are anchors with the scores of all classes, or scores of one anchor and class.
        score_threshold: least score of a detection.
        nms_iou: overlap with a better detection of the same class above which a detection is dropped.
        detections_per_image: largest number of detections per image.
        clip_boxes: clip boxes to the image, and drop those without area in it.
        clip_after_nms: compare the whole boxes in NMS, and clip the `detections_per_image` best that it keeps: those outside of the image suppress
            others and count among them, and are dropped then, as in detectron2@60d7a1fd, modeling/{meta_arch/retinanet,postprocessing}.py.
        ranks: processes whose counts the losses of `forward` are divided by.
    """

    def __init__(
        self,
        *,
        pyramid: TimmPyramid,
        dense: OneStageHead,
        mean: Sequence[float],
        std: Sequence[float],
        candidates: int | None = 1000,
        candidates_of: Literal["anchors", "scores"] = "anchors",
        score_threshold: float = 0.05,
        nms_iou: float = 0.6,
        detections_per_image: int = 100,
        clip_boxes: bool = True,
        clip_after_nms: bool = False,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        super().__init__()
        self.normalize, self.pyramid, self.dense = Normalize(mean, std), pyramid, dense
        self.candidates, self.candidates_of = candidates, candidates_of
        self.score_threshold, self.nms_iou = score_threshold, nms_iou
        self.detections_per_image, self.clip_boxes, self.ranks = detections_per_image, clip_boxes, ranks
        self.clip_after_nms = clip_boxes and clip_after_nms

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """Compute losses (float32 scalars, already divided by their counts) in train mode, detections in eval mode."""
        features = self.features(images)
        if self.training:
            assert targets is not None, "training needs targets"
            return self.losses(features, images.sizes_B2, targets, self.ranks)[0]
        return self.detect(self.dense(features), grids_of(features), images)

    def features(self, images: ImageBatch) -> list[Tensor]:
        """Compute the feature maps of the pyramid, P3..P7."""
        maps: list[Tensor] = self.pyramid(self.normalize(images))
        return maps

    def losses(
        self, features: Sequence[Tensor], sizes_B2: Tensor, targets: Targets, ranks: Ranks
    ) -> tuple[dict[str, Tensor], Outputs]:
        """Compute the losses of `forward` from feature maps; also return the head's outputs."""
        outputs: Outputs = self.dense(features)
        return self.dense.losses(outputs, grids_of(features), sizes_B2, targets, ranks), outputs

    @torch.no_grad()
    def detect(self, outputs: Outputs, grids: Grids, images: ImageBatch) -> list[Detections]:
        """Detections of each image in original coordinates, on the CPU: one copy from the device per batch."""
        logits_BAK, values = outputs
        K = logits_BAK.shape[2]
        anchors_per_cell = logits_BAK.shape[1] // sum(rows * columns for rows, columns in grids)
        of_scores = self.candidates_of == "scores" and self.candidates is not None
        ranked_BE = logits_BAK.flatten(1) if of_scores else logits_BAK.amax(dim=-1)
        chosen, start = [], 0
        for rows, columns in grids:
            count = rows * columns * anchors_per_cell * (K if of_scores else 1)
            kept = count if self.candidates is None else min(count, self.candidates)
            chosen.append(ranked_BE[:, start : start + count].topk(kept, dim=1).indices + start)
            start += count
        index_BN = torch.cat(chosen, dim=1)
        class_BN1 = (index_BN % K)[..., None]
        index_BN = index_BN // K if of_scores else index_BN
        row_B1 = torch.arange(len(index_BN), device=index_BN.device)[:, None]
        boxes_BN4 = self.dense.decode(values[row_B1, index_BN], index_BN, grids)
        scores_BNK = logits_BAK[row_B1, index_BN].sigmoid()
        if of_scores:
            scores_BNK = torch.full_like(scores_BNK, -torch.inf).scatter(2, class_BN1, scores_BNK.gather(2, class_BN1))
        if self.clip_after_nms:
            selected = self._select(boxes_BN4, scores_BNK)
            inputs = zip(selected, images.original_sizes(), images.on_host()[1], strict=True)
            return [postprocess.to_original(*one)[0] for one in inputs]
        boxes_BN4 = boxes_BN4 / images.scales_B[:, None, None]
        if self.clip_boxes:
            # To the network's input: the originals' sizes are on the host, from where a copy would wait.
            boxes_BN4 = boxes.clip(boxes_BN4, images.sizes_B2 / images.scales_B[:, None])
            # Boxes that lay in the padding have no area left.
            scores_BNK = torch.where((boxes.area(boxes_BN4) > 0)[..., None], scores_BNK, -torch.inf)
        selected = self._select(boxes_BN4, scores_BNK)
        if not self.clip_boxes:
            return selected
        return [postprocess.inside(*one)[0] for one in zip(selected, images.original_sizes(), strict=True)]

    def _select(self, boxes_BN4: Tensor, scores_BNK: Tensor) -> list[Detections]:
        return postprocess.select(
            boxes_BN4[:, :, None],
            scores_BNK,
            threshold=self.score_threshold,
            nms=NMS(iou=self.nms_iou),
            most=self.detections_per_image,
        )
