"""Detectors as graphs with outputs of fixed size, for `torch.export` and ONNX: shapes depend on the input's shape alone.

A detector's own `forward` returns lists, selected on the host. Here every image has `detections_per_image` rows, the first `count` of which are
detections. Levels of the pyramid with fewer anchors than candidates are padded with anchors of a score below all others. The modules are the
detector's own, and so are the values, with two differences: R-CNN boxes without area are dropped before the best are selected, not after; and
coordinates are those of the input, as of `forward` for images of scale 1.

Shapes: B images, N candidates of an image, R proposals, K classes, M rows of the output, L anchors of a level, P problems and Q classes of
NMS.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ssld.stage2_detect.models import anchors, boxes
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.dense import DenseDetector
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.models.rpn import Proposals

KeepByNMS = Callable[[Tensor, Tensor, float, float, int], Tensor]
"""`keep_by_nms`, or an operator with the same result."""
NOTHING = -1e30  # score of empty places: below every logit, and finite, as ONNX files need it

SOFT_NMS = (
    "export: model.roi.nms.kind lowers scores (soft NMS), for which ONNX has no operator; only hard can be exported"
)


def keep_by_nms(boxes_PN4: Tensor, scores_PQN: Tensor, iou: float, threshold: float, most: int) -> Tensor:
    """Mark the boxes that greedy NMS keeps, for every problem and class by itself: bool [P, Q, N].

    Args:
        boxes_PN4: float32; the classes of a problem share its boxes.
        iou: overlap above which the worse box is dropped.
        threshold: boxes with scores at or below it are neither kept nor drop others.
        most: number per class that the caller uses; keeping more is allowed.
    """
    P, Q, N = scores_PQN.shape
    flat_D = (scores_PQN.flatten() > threshold).nonzero()[:, 0]
    # Two dummy boxes in front: programs of `torch.export` may be specialized for sizes of two or more.
    flat_D = torch.cat((flat_D.new_zeros(2), flat_D))
    # In float64 and moved apart, as in `boxes.class_nms`.
    apart_D = (flat_D // N) * (boxes_PN4.amax() - boxes_PN4.amin() + 1).double()
    moved_D4 = boxes_PN4.flatten(0, 1)[flat_D // (Q * N) * N + flat_D % N].double() + apart_D[:, None]
    scores_D = scores_PQN.flatten()[flat_D].double()
    real_D = torch.arange(flat_D.shape[0], device=flat_D.device) >= 2
    moved_D4 = torch.where(real_D[:, None], moved_D4, -1e9)  # without area, and far from all others
    kept = nms(moved_D4, torch.where(real_D, scores_D, -torch.inf), iou)
    chosen = torch.cat((kept, kept.new_zeros(2)))
    place = torch.where(real_D[chosen], flat_D[chosen], P * Q * N)
    keep = torch.zeros(P * Q * N + 1, dtype=torch.bool, device=flat_D.device)
    keep[place] = True
    return keep[:-1].view(P, Q, N)


class FixedSamePadding(nn.Module):
    """A convolution with TensorFlow's padding (`timm.layers.Conv2dSame`), for inputs whose sides are multiples of its stride.

    Then the padding does not depend on the sides: k - s in all, of which the greater half comes last. timm computes it from the sides, and a
    tracer with free sides builds terms of it that grow from layer to layer, and takes minutes for them.
    """

    def __init__(self, same: nn.Conv2d) -> None:
        super().__init__()
        self.conv = same
        totals = [
            max((kernel - 1) * dilation + 1 - stride, 0)
            for kernel, dilation, stride in zip(same.kernel_size, same.dilation, same.stride, strict=True)
        ]
        self.pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Return `same(maps_BCHW)`."""
        conv = self.conv
        padded = F.pad(maps_BCHW, self.pads)
        return F.conv2d(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


class Clip(nn.Module):
    """ReLU6 and other `nn.Hardtanh`; one operator of ONNX's export, which takes a fifth of its time to decompose 35 of them."""

    def __init__(self, hardtanh: nn.Hardtanh) -> None:
        super().__init__()
        self.low, self.high = float(hardtanh.min_val), float(hardtanh.max_val)

    def forward(self, values: Tensor) -> Tensor:
        """Return `hardtanh(values)`."""
        if torch.onnx.is_in_onnx_export():
            clipped: Tensor = onnx_clip(values, self.low, self.high)
            return clipped
        return values.clamp(self.low, self.high)


@torch.library.custom_op("ssld::clip", mutates_args=())
def onnx_clip(values: Tensor, low: float, high: float) -> Tensor:
    """Clip values, as an operator that is not traced into: `deploy/writing.py` writes it in ONNX."""
    return values.clamp(low, high)


@onnx_clip.register_fake
def _(values: Tensor, low: float, high: float) -> Tensor:
    return torch.empty_like(values)


def easily_traced(model: nn.Module) -> nn.Module:
    """Return a copy with `FixedSamePadding` and `Clip` in place of what they compute; the model itself where it has neither."""
    if not any(isinstance(module, Conv2dSame | nn.Hardtanh) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv2dSame):
                setattr(parent, name, FixedSamePadding(child))
            elif isinstance(child, nn.Hardtanh):
                setattr(parent, name, Clip(child))
    return model


class DetectorGraph(nn.Module):
    """(pixels uint8 [B, 3, H, W], sizes int64 [B, 2]) -> boxes [B, M, 4], scores [B, M], labels [B, M], count [B], and for a detector with masks
    their maps [B, M, 2S, 2S].

    Sizes are the true (height, width) inside padded pixels. Boxes are (x1, y1, x2, y2) in pixels of the input, scores fall, and rows from `count` on
    hold zeros, their labels -1. A map is the probability of the object's shape over its box.

    Args:
        model: in evaluation mode; its modules are used, not copied, unless some are replaced (`easily_traced`).
        nms: function that drops overlapping boxes.

    Raises ValueError for a detector with soft NMS, which changes scores.
    """

    def __init__(self, model: RCNN | DenseDetector, nms: KeepByNMS = keep_by_nms) -> None:
        super().__init__()
        self.model: Any = easily_traced(model)
        self.nms = nms
        if isinstance(model, RCNN):
            if model.roi_heads.nms.kind != "hard":
                raise ValueError("soft NMS")
            self.most = model.roi_heads.detections_per_image
        else:
            self.most = model.detections_per_image

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs of `forward`."""
        masks = isinstance(self.model, RCNN) and self.model.mask_head is not None
        return ["boxes", "scores", "labels", "count", *(["masks"] if masks else [])]

    def forward(self, pixels_BCHW: Tensor, sizes_B2: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        images = ImageBatch(pixels_BCHW, sizes_B2, torch.ones(pixels_BCHW.shape[0], device=pixels_BCHW.device))
        features = self.model.features(images)
        if isinstance(self.model, RCNN):
            return self._two_stages(self.model, features, sizes_B2)
        return self._one_stage(self.model, features, sizes_B2)

    def _one_stage(self, model: DenseDetector, features: list[Tensor], sizes_B2: Tensor) -> tuple[Tensor, ...]:
        logits_BAK, values = model.dense(features)
        grids = anchors.grids_of(features)
        K = model.dense.head.classes
        of_scores = model.candidates_of == "scores" and model.candidates is not None
        ranked_BE = logits_BAK.flatten(1) if of_scores else logits_BAK.amax(dim=-1)
        per_cell = model.dense.head.anchors_per_cell * (K if of_scores else 1)
        chosen, valid, start = [], [], 0
        for rows, columns in grids:
            count = rows * columns * per_cell
            index_BN, _, valid_BN = _best(ranked_BE[:, start : start + count], model.candidates)
            chosen.append(index_BN + start)
            valid.append(valid_BN)
            start += count
        index_BN, valid_BN = torch.cat(chosen, dim=1), torch.cat(valid, dim=1)
        class_BN1 = (index_BN % K)[..., None]
        index_BN = index_BN // K if of_scores else index_BN
        row_B1 = torch.arange(index_BN.shape[0], device=index_BN.device)[:, None]
        boxes_BN4 = model.dense.decode(values[row_B1, index_BN], index_BN, grids)
        if model.clip_boxes and not model.clip_after_nms:
            boxes_BN4 = boxes.clip(boxes_BN4, sizes_B2)
            valid_BN = valid_BN & (boxes.area(boxes_BN4) > 0)
        scores_BNK = torch.where(valid_BN[..., None], logits_BAK[row_B1, index_BN].sigmoid(), NOTHING)
        if of_scores:
            scores_BNK = torch.full_like(scores_BNK, NOTHING).scatter(2, class_BN1, scores_BNK.gather(2, class_BN1))
        scores_BKN = scores_BNK.transpose(1, 2)
        keep_BKN = self.nms(boxes_BN4, scores_BKN, model.nms_iou, model.score_threshold, self.most)
        scores_BKN = torch.where(keep_BKN, scores_BKN, NOTHING)
        scores_BM, labels_BM, place_BM, valid_BM = self._take(scores_BKN)
        boxes_BM4 = boxes.take(boxes_BN4, place_BM)
        if model.clip_after_nms:
            boxes_BM4 = boxes.clip(boxes_BM4, sizes_B2)
            # Those without area move behind the others.
            scores_BM, order_BM = torch.where(boxes.area(boxes_BM4) > 0, scores_BM, NOTHING).topk(self.most, dim=1)
            boxes_BM4, labels_BM, valid_BM = (
                boxes.take(boxes_BM4, order_BM),
                labels_BM.gather(1, order_BM),
                scores_BM > NOTHING,
            )
        return self._rows(boxes_BM4, scores_BM, labels_BM, valid_BM)

    def _two_stages(self, model: RCNN, features: list[Tensor], sizes_B2: Tensor) -> tuple[Tensor, ...]:
        heads = model.roi_heads
        boxes_BRK4, scores_BRK = heads.score(features, self._propose(model, features, sizes_B2), sizes_B2)
        scores_BRK = torch.where(boxes.area(boxes_BRK4) > 0, scores_BRK, NOTHING)
        boxes_BKR4, scores_BKR = boxes_BRK4.transpose(1, 2), scores_BRK.transpose(1, 2)
        B, K, R = scores_BKR.shape
        if boxes_BKR4.shape[1] == 1:  # one box a proposal for all classes
            keep_BKR = self._thin(boxes_BKR4[:, 0], scores_BKR, heads.nms.iou, heads.score_threshold)
            scores_BM, labels_BM, place_BM, valid_BM = self._take(torch.where(keep_BKR, scores_BKR, NOTHING))
            boxes_BM4 = boxes.take(boxes_BKR4[:, 0], place_BM)
        else:
            each = boxes_BKR4.flatten(0, 1), scores_BKR.flatten(0, 1)[:, None]
            keep_BKR = self._thin(*each, heads.nms.iou, heads.score_threshold).view(B, K, R)
            scores_BM, labels_BM, place_BM, valid_BM = self._take(torch.where(keep_BKR, scores_BKR, NOTHING))
            boxes_BM4 = boxes.take(boxes_BKR4.flatten(1, 2), labels_BM * R + place_BM)
        rows = self._rows(boxes_BM4, scores_BM, labels_BM, valid_BM)
        if model.mask_head is None:
            return rows
        maps_BMSS = model.mask_head.maps(features, boxes_BM4, labels_BM, valid_BM)
        return *rows, maps_BMSS * valid_BM[..., None, None]

    def _propose(self, model: RCNN, features: list[Tensor], sizes_B2: Tensor) -> Proposals:
        rpn = model.rpn
        post_nms = rpn.post_nms_top_n_test
        grids = anchors.grids_of(features)
        anchors_A4 = rpn.anchors(grids, sizes_B2.device)
        candidates, scores, start = [], [], 0
        for feature, (rows, columns) in zip(features, grids, strict=True):
            logits, deltas = rpn.head(feature)
            logits_BL = anchors.in_order(logits, 1).squeeze(-1).float()
            deltas_BL4 = anchors.in_order(deltas, 4).float()
            index_BN, scores_BN, valid_BN = _best(logits_BL, rpn.pre_nms_top_n_test)
            deltas_BN4, anchors_BN4 = boxes.take(deltas_BL4, index_BN), anchors_A4[index_BN + start]
            boxes_BN4 = boxes.clip(boxes.decode(deltas_BN4, anchors_BN4, (1.0, 1.0, 1.0, 1.0)), sizes_B2)
            large_BN = ((boxes_BN4[..., 2:] - boxes_BN4[..., :2]) >= rpn.min_size).all(dim=-1)
            if rpn.score_threshold > 0:
                large_BN = large_BN & (scores_BN.sigmoid() >= rpn.score_threshold)
            candidates.append(boxes_BN4)
            scores.append(torch.where(valid_BN & large_BN, scores_BN, NOTHING))
            start += rows * columns * rpn.head.objectness.out_channels
        boxes_BLN4, scores_BLN = torch.stack(candidates, dim=1), torch.stack(scores, dim=1)
        keep_BLN = self.nms(
            boxes_BLN4.flatten(0, 1), scores_BLN.flatten(0, 1)[:, None], rpn.nms_iou, NOTHING, post_nms
        ).view(scores_BLN.shape)
        scores_BN = torch.where(keep_BLN, scores_BLN, NOTHING).flatten(1)
        scores_BR, index_BR = scores_BN.topk(min(post_nms, scores_BN.shape[1]), dim=1)
        return Proposals(boxes.take(boxes_BLN4.flatten(1, 2), index_BR), scores_BR > NOTHING)

    def _thin(self, boxes_PN4: Tensor, scores_PQN: Tensor, iou: float, threshold: float) -> Tensor:
        return self.nms(boxes_PN4, scores_PQN, iou, threshold, self.most)

    def _take(self, scores_BKN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Select the best rows of every image: scores, classes, candidates, and whether there is one, [B, M] each."""
        N = scores_BKN.shape[2]
        filled = F.pad(scores_BKN.flatten(1), (0, self.most), value=NOTHING)
        scores_BM, index_BM = filled.topk(self.most, dim=1)
        valid_BM = scores_BM > NOTHING
        index_BM = torch.where(valid_BM, index_BM, 0)
        return scores_BM, index_BM // N, index_BM % N, valid_BM

    @staticmethod
    def _rows(boxes_BM4: Tensor, scores_BM: Tensor, labels_BM: Tensor, valid_BM: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.where(valid_BM[..., None], boxes_BM4, 0.0),
            torch.where(valid_BM, scores_BM, 0.0),
            torch.where(valid_BM, labels_BM, -1),
            valid_BM.sum(dim=1),
        )


def _best(scores_BL: Tensor, most: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best anchors of a level: indices, scores and validity [B, most], padded where it has fewer; all of them where `most` is None."""
    if most is None:
        index_L = torch.arange(scores_BL.shape[1], device=scores_BL.device)
        return index_L.expand_as(scores_BL), scores_BL, torch.ones_like(scores_BL, dtype=torch.bool)
    scores_BN, index_BN = F.pad(scores_BL, (0, most), value=NOTHING).topk(most, dim=1)
    valid_BN = scores_BN > NOTHING
    return torch.where(valid_BN, index_BN, 0), scores_BN, valid_BN
