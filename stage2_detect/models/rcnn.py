"""R-CNN detector: uint8 images -> pyramid -> RPN -> RoI heads (arXiv 1506.01497 on 1612.03144).

The model owns its normalization (`normalize.py`): it takes uint8 batches.

Shapes: B images, R regions of an image, N detections of one, S side of a mask's features.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import postprocess
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.mask_head import MaskHead, paste, positives_on_host
from ssld.stage2_detect.models.normalize import Normalize
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.roi_heads import RoIHeads, SampledRoIs
from ssld.stage2_detect.models.rpn import RPN


class RCNN(nn.Module):
    """The detector contract: in train mode `model(images, targets)` -> losses by name, in eval mode `model(images)` ->
    detections.

    Args:
        mask_head: predicts masks too; None: boxes only.
        mean, std: mean and standard deviation of the backbone's input, for red, green, blue in units of 0..1.
        ranks: processes whose counts the losses of `forward` are divided by.
    """

    def __init__(
        self,
        *,
        pyramid: TimmPyramid,
        rpn: RPN,
        roi_heads: RoIHeads,
        mask_head: MaskHead | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        ranks: Ranks = ONE_RANK,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.pyramid, self.rpn, self.roi_heads, self.mask_head = pyramid, rpn, roi_heads, mask_head
        self.ranks = ranks

    @property
    def detections_per_image(self) -> int:
        """Largest number of detections per image."""
        return self.roi_heads.detections_per_image

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """Compute losses `loss_rpn_cls`, `loss_rpn_box`, `loss_cls`, `loss_box` (of a cascade `loss_cls_0`, ...), with masks
        `loss_mask` (float32 scalars, already divided by their counts) in train mode, detections in eval mode.
        """
        features = self.features(images)
        if self.training:
            assert targets is not None, "training needs targets"
            return self.losses(features, images.sizes_B2, targets, self.ranks)[0]
        network = self.detect_network(features, images)
        originals, kept = self._to_originals(network, images)
        if self.mask_head is None:
            return originals
        maps_BNSS = self.mask_head.predict(features, network).cpu()
        maps = [maps_NSS[: len(kept_N)][kept_N] for maps_NSS, kept_N in zip(maps_BNSS, kept, strict=True)]
        return self.with_masks(originals, maps, images)

    @torch.no_grad()
    def detect_boxes(self, images: ImageBatch) -> tuple[list[Tensor], list[Detections]]:
        """The pyramid's maps, and detections of each image without masks, in pixels of the originals."""
        features = self.features(images)
        return features, self._to_originals(self.detect_network(features, images), images)[0]

    @torch.no_grad()
    def mask_maps(self, features: Sequence[Tensor], images: ImageBatch, detections: Sequence[Detections]) -> Tensor:
        """Probabilities [B, N, 2 S, 2 S] of the class in each box, as of `MaskHead.predict`; boxes in pixels of the originals, detected in
        any view of them.
        """
        assert self.mask_head is not None, "this detector has no mask head"
        scales_B = images.on_host()[1]
        scaled = [replace(one, boxes_N4=one.boxes_N4 * scale) for one, scale in zip(detections, scales_B, strict=True)]
        return self.mask_head.predict(features, scaled)

    def with_masks(
        self, detections: Sequence[Detections], maps: Sequence[Tensor], images: ImageBatch
    ) -> list[Detections]:
        """Detections in pixels of the originals with their maps of probabilities, [N, 2 S, 2 S] on the CPU for each image, as masks."""
        assert self.mask_head is not None, "this detector has no mask head"
        threshold = self.mask_head.threshold
        return [
            replace(one, masks=paste(maps_NSS, one.boxes_N4, height, width, threshold))
            for one, maps_NSS, (height, width) in zip(detections, maps, images.original_sizes().tolist(), strict=True)
        ]

    def features(self, images: ImageBatch) -> list[Tensor]:
        """Compute the feature maps of the pyramid, P2..P6."""
        maps: list[Tensor] = self.pyramid(self.normalize(images))
        return maps

    def losses(
        self, features: Sequence[Tensor], sizes_B2: Tensor, targets: Targets, ranks: Ranks, *, masks: bool = True
    ) -> tuple[dict[str, Tensor], tuple[SampledRoIs, Tensor]]:
        """Compute the losses of `forward` from feature maps.

        Args:
            masks: whether a mask head is trained, for which the targets need masks.

        Returns:
            The losses; and the RoIs that the first box head is trained on, with its float32 logits [N, K + 1] of them.
        """
        proposals, losses = self.rpn(features, sizes_B2, targets)
        sampled = self.roi_heads.sample(proposals, targets)
        # Copied before the box heads are launched: a GPU computes these while the host rasterizes masks.
        positives = positives_on_host(sampled) if self.mask_head and masks else None
        roi_losses, logits_NK = self.roi_heads.losses(features, sampled, sizes_B2, targets, ranks)
        if self.mask_head and positives:
            losses |= self.mask_head.losses(features, sampled, positives, targets, ranks)
        return losses | roi_losses, (sampled, logits_NK)

    def detect_network(self, features: Sequence[Tensor], images: ImageBatch) -> list[Detections]:
        """Detections without masks, in coordinates of the network's input."""
        proposals, _ = self.rpn(features, images.sizes_B2)
        return self.roi_heads.detect_network(features, proposals, images.sizes_B2)

    @staticmethod
    def _to_originals(detections: Sequence[Detections], images: ImageBatch) -> tuple[list[Detections], list[Tensor]]:
        """Detections in pixels of the originals, and which of those given they are: bool [N] for each image."""
        parts = zip(detections, images.original_sizes(), images.on_host()[1], strict=True)
        originals, kept = zip(*(postprocess.to_original(*part) for part in parts), strict=True)
        return list(originals), list(kept)
