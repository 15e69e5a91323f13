"""R-CNN detector: uint8 images -> pyramid -> RPN -> RoI heads (arXiv 1506.01497 on 1612.03144).

The model owns its normalisation: it takes uint8 batches, which are a quarter of the bytes to move, and zeroes the
padding *after* normalising, as the references do (the other order changes features by 14-22 %).

Shapes: B images, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import postprocess
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.mask_head import MaskHead, paste
from ssld.stage2_detect.models.pyramid import TimmPyramid
from ssld.stage2_detect.models.roi_heads import RoIHeads, SampledRoIs
from ssld.stage2_detect.models.rpn import RPN


def normalise(images: ImageBatch, mean_C11: Tensor, std_C11: Tensor) -> Tensor:
    """float32 pixels [B, C, H, W] with zeros in the padding; `mean` and `std` in units of 0..255."""
    H, W = images.pixels_BCHW.shape[-2:]
    device = images.pixels_BCHW.device
    rows_BH = torch.arange(H, device=device) < images.sizes_B2[:, :1]
    columns_BW = torch.arange(W, device=device) < images.sizes_B2[:, 1:]
    outside_B1HW = ~(rows_BH[:, :, None] & columns_BW[:, None, :])[:, None]
    # In place: on a CPU, new memory for each step takes four times as long.
    pixels_BCHW = images.pixels_BCHW.to(torch.float32, copy=True)
    return pixels_BCHW.sub_(mean_C11).div_(std_C11).masked_fill_(outside_B1HW, 0.0)


class RCNN(nn.Module):
    """The detector contract: in train mode `model(images, targets)` -> losses by name, in eval mode `model(images)` ->
    detections.

    Args:
        mask_head: also finds the objects' shapes.
        mean, std: of the backbone's input, for red, green, blue in units of 0..1.
        ranks: what the losses of `forward` are divided over.
    """

    mean_C11: Tensor
    std_C11: Tensor

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
        self.pyramid, self.rpn, self.roi_heads, self.mask_head = pyramid, rpn, roi_heads, mask_head
        self.ranks = ranks
        # Not in the state dict: they belong to the backbone's description, which is stored beside the weights.
        self.register_buffer("mean_C11", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def detections_per_image(self) -> int:
        """At most."""
        return self.roi_heads.detections_per_image

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """Losses `loss_rpn_cls`, `loss_rpn_box`, `loss_cls`, `loss_box` (of a cascade `loss_cls_0`, ...), with masks
        `loss_mask` (float32 scalars, already normalised), or detections.
        """
        features = self.features(images)
        if self.training:
            assert targets is not None, "training needs targets"
            return self.losses(features, images.sizes_B2, targets, self.ranks)[0]
        found = self._find(features, images)
        seen = self._to_originals(found, images)
        if self.mask_head is None:
            return [detections for detections, _ in seen]
        maps = self.mask_head.predict(features, found)
        kept = [maps_DSS[some_D] for maps_DSS, (_, some_D) in zip(maps, seen, strict=True)]
        return self.with_masks([detections for detections, _ in seen], kept, images)

    @torch.no_grad()
    def find_boxes(self, images: ImageBatch) -> tuple[list[Tensor], list[Detections]]:
        """(the pyramid's maps, what each image shows without masks, in pixels of the originals)."""
        features = self.features(images)
        return features, [detections for detections, _ in self._to_originals(self._find(features, images), images)]

    @torch.no_grad()
    def mask_maps(self, features: Sequence[Tensor], images: ImageBatch, found: Sequence[Detections]) -> list[Tensor]:
        """Probabilities [N, 2 S, 2 S] of the class in each box of an image; boxes in pixels of the originals, of any view of them."""
        assert self.mask_head is not None, "a detector of boxes has no masks"
        scaled = [replace(o, boxes_N4=o.boxes_N4 * scale) for o, scale in zip(found, images.scales_B, strict=True)]
        return self.mask_head.predict(features, scaled)

    def with_masks(self, found: Sequence[Detections], maps: Sequence[Tensor], images: ImageBatch) -> list[Detections]:
        """Detections in pixels of the originals with their maps of probabilities [N, 2 S, 2 S] as masks."""
        assert self.mask_head is not None, "a detector of boxes has no masks"
        sizes_B2 = images.originals_B2
        if sizes_B2 is None:
            sizes_B2 = (images.sizes_B2 / images.scales_B[:, None] + 0.5).floor().long()
        threshold = self.mask_head.threshold
        return [
            replace(one, masks=paste(maps_NSS, one.boxes_N4, height, width, threshold))
            for one, maps_NSS, (height, width) in zip(found, maps, sizes_B2.tolist(), strict=True)
        ]

    def features(self, images: ImageBatch) -> list[Tensor]:
        """The feature maps of the pyramid, P2..P6."""
        maps: list[Tensor] = self.pyramid(normalise(images, self.mean_C11, self.std_C11))
        return maps

    def losses(
        self, features: Sequence[Tensor], sizes_B2: Tensor, targets: Targets, ranks: Ranks
    ) -> tuple[dict[str, Tensor], SampledRoIs]:
        """The losses of `forward` from feature maps, and the regions that the first box head was trained on."""
        proposals, losses = self.rpn(features, sizes_B2, targets)
        roi_losses, sampled = self.roi_heads.losses(features, proposals, sizes_B2, targets, ranks)
        if self.mask_head:
            losses |= self.mask_head.losses(features, sampled, targets, ranks)
        return losses | roi_losses, sampled

    def _find(self, features: Sequence[Tensor], images: ImageBatch) -> list[Detections]:
        """In coordinates of the network's input."""
        proposals, _ = self.rpn(features, images.sizes_B2)
        return self.roi_heads.detect_network(features, proposals, images.sizes_B2)

    @staticmethod
    def _to_originals(found: Sequence[Detections], images: ImageBatch) -> list[tuple[Detections, Tensor]]:
        parts = zip(found, images.sizes_B2, images.scales_B, strict=True)
        return [postprocess.to_original(one, size_2, scale) for one, size_2, scale in parts]
