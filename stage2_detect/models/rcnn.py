"""R-CNN detector: uint8 images -> pyramid -> RPN -> RoI heads (arXiv 1506.01497 on 1612.03144).

The model owns its normalisation: it takes uint8 batches, which are a quarter of the bytes to move, and zeroes the
padding *after* normalising, as the references do (the other order changes features by 14-22 %).

Shapes: B images, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stage2_detect.models import postprocess
from stage2_detect.models.batch import Detections, ImageBatch, Targets
from stage2_detect.models.mask_head import MaskHead, paste
from stage2_detect.models.pyramid import TimmPyramid
from stage2_detect.models.roi_heads import RoIHeads, SampledRoIs
from stage2_detect.models.rpn import RPN


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
    ) -> None:
        super().__init__()
        self.pyramid, self.rpn, self.roi_heads, self.mask_head = pyramid, rpn, roi_heads, mask_head
        # Not in the state dict: they belong to the backbone's description, which is stored beside the weights.
        self.register_buffer("mean_C11", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """Losses `loss_rpn_cls`, `loss_rpn_box`, `loss_cls`, `loss_box` (of a cascade `loss_cls_0`, ...), with masks
        `loss_mask` (float32 scalars, already normalised), or detections.
        """
        features = self.features(images)
        if self.training:
            assert targets is not None, "training needs targets"
            return self.losses(features, images.sizes_B2, targets)[0]
        proposals, _ = self.rpn(features, images.sizes_B2)
        found = self.roi_heads.detect_network(features, proposals, images.sizes_B2)
        maps = self.mask_head.predict(features, found) if self.mask_head else [None] * len(found)
        originals = [None] * len(found) if images.originals_B2 is None else images.originals_B2.tolist()
        return [
            self._to_original(*parts)
            for parts in zip(found, maps, images.sizes_B2, images.scales_B, originals, strict=True)
        ]

    def features(self, images: ImageBatch) -> list[Tensor]:
        """The feature maps of the pyramid, P2..P6."""
        maps: list[Tensor] = self.pyramid(normalise(images, self.mean_C11, self.std_C11))
        return maps

    def losses(
        self, features: Sequence[Tensor], sizes_B2: Tensor, targets: Targets
    ) -> tuple[dict[str, Tensor], SampledRoIs]:
        """The losses of `forward` from feature maps, and the regions that the first box head was trained on."""
        proposals, losses = self.rpn(features, sizes_B2, targets)
        roi_losses, sampled = self.roi_heads.losses(features, proposals, sizes_B2, targets)
        if self.mask_head:
            losses |= self.mask_head.losses(features, sampled, targets)
        return losses | roi_losses, sampled

    def _to_original(
        self, found: Detections, maps_DSS: Tensor | None, size_2: Tensor, scale: Tensor, original: list[int] | None
    ) -> Detections:
        detections, some_D = postprocess.to_original(found, size_2, scale)
        if maps_DSS is None or self.mask_head is None:
            return detections
        height, width = original or (size_2 / scale + 0.5).floor().long().tolist()
        masks = paste(maps_DSS[some_D], detections.boxes_N4, height, width, self.mask_head.threshold)
        return replace(detections, masks=masks)
