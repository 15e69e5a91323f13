"""Mask head: a small map per RoI and class, pasted into the image (arXiv 1703.06870).

Behavior as of PaddleDetection@666f597f: trained on the positives of the first box stage, also in a cascade; the loss is the mean over positives and
positions of the map of the object's class; in evaluation the final boxes are pooled, and the map of their class is pasted at the original size.

Shapes: B images, R RoIs of an image, N = B * R, C channels, K classes, S side of a map, P positives, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_codec
from torch import Tensor, nn
from torch.nn import functional as F

from ssld.shared.distributed.ranks import ONE_RANK, Ranks
from ssld.stage2_detect.models import pooling
from ssld.stage2_detect.models.batch import Detections, Targets
from ssld.stage2_detect.models.mask_targets import ImageMasks, rasterize
from ssld.stage2_detect.models.norms import Norm, RoIConvolutions
from ssld.stage2_detect.models.roi_heads import SampledRoIs

_PASTED_PIXELS = 2**23  # of full-size masks at once, 8 MB


@dataclass(frozen=True)
class Positives:
    """The positive RoIs of a batch on the host, where their shapes are rasterized."""

    images: int
    """B."""
    most: int
    """Largest number per image, at least 1."""
    image_P: np.ndarray
    """int64 index of the image."""
    place_P: np.ndarray
    """int64 index among the image's RoIs, below `most`."""
    object_P: np.ndarray
    """int64 index among the image's objects."""
    rois_P4: np.ndarray
    """float32, in coordinates of the network's input."""


def positives_on_host(sampled: SampledRoIs) -> Positives:
    """Copy the positives to the host, where they come first among each image's RoIs."""
    # One tensor, so one copy that a GPU is waited for: masks are rasterized on the host. An index is exact in float32.
    columns = (sampled.rois_BR4, sampled.objects_BR[..., None].float(), sampled.positive_BR[..., None].float())
    rows_BR6 = torch.cat(columns, dim=-1).cpu().numpy()
    image_P, place_P = rows_BR6[..., 5].nonzero()
    rows_P6 = rows_BR6[image_P, place_P]
    most = int(place_P.max(initial=0)) + 1
    return Positives(len(rows_BR6), most, image_P, place_P, rows_P6[:, 4].astype(np.int64), rows_P6[:, :4])


class MaskHead(pooling.PoolsRoIs, RoIConvolutions):
    """Predicts a mask for each RoI and class from feature maps.

    Args:
        classes: K.
        channels: width of the feature maps.
        strides: pixels per cell of the feature maps that RoIs are pooled from, finest first.
        hidden: width of the convolutions.
        convolutions: number of convolutions.
        norm, freeze_norm: norm after the convolutions, see `norms.norm_layer`.
        pool_size: side of the pooled features; maps have twice that.
        sampling_ratio, aligned: see `pooling.pool_rois`.
        threshold: probability from which a pixel belongs to the object.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        hidden: int = 256,
        convolutions: int = 4,
        norm: Norm = "none",
        freeze_norm: bool = False,
        pool_size: int = 14,
        sampling_ratio: int = 0,
        aligned: bool = True,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(
            channels=channels, hidden=hidden, convolutions=convolutions, norm=norm, freeze_norm=freeze_norm
        )
        self.strides, self.pool_size = tuple(strides), pool_size
        self.sampling_ratio, self.aligned, self.threshold = sampling_ratio, aligned, threshold
        self.upsample = nn.ConvTranspose2d(hidden if convolutions else channels, hidden, 2, stride=2)
        self.logits = nn.Conv2d(hidden, classes, 1)
        for layer in (self.upsample, self.logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, pooled_NCSS: Tensor, valid_N: Tensor | None = None) -> Tensor:
        """Compute float32 logits [N, K, 2 S, 2 S] from pooled features; with `valid_N` (bool) those of other RoIs mean nothing."""
        maps = self.convolve(pooled_NCSS, valid_N)
        logits: Tensor = self.logits(F.relu(self.upsample(maps))).float()
        return logits

    def losses(
        self,
        features: Sequence[Tensor],
        sampled: SampledRoIs,
        positives: Positives,
        targets: Targets,
        ranks: Ranks = ONE_RANK,
    ) -> dict[str, Tensor]:
        """Compute `loss_mask`: binary cross-entropy, mean over the positives of all ranks and the positions of their maps; 0 without
        positives.

        Args:
            positives: `positives_on_host(sampled)`.
        """
        assert targets.masks is not None, "training a mask head needs targets with masks"
        target_NSS = self._targets(targets.masks, positives, features[0].device)
        # The positives come first; the largest number of them per image is known on the host.
        rois_BR4, positive_BR = sampled.rois_BR4[:, : positives.most], sampled.positive_BR[:, : positives.most]
        objects_BR = sampled.objects_BR[:, : positives.most]
        positive_N = positive_BR.flatten()
        logits_NKSS = self(self._pool(features, rois_BR4, positive_BR), positive_N)
        class_N = targets.labels_of(objects_BR).clamp(min=0).flatten()
        logits_NSS = logits_NKSS[torch.arange(len(class_N), device=class_N.device), class_N]
        entropy_N = F.binary_cross_entropy_with_logits(logits_NSS, target_NSS, reduction="none").mean(dim=(1, 2))
        count = ranks.total(positive_N.sum()).clamp(min=1)
        return {"loss_mask": torch.where(positive_N, entropy_N, 0.0).sum() * ranks.world_size / count}

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], detections: Sequence[Detections]) -> Tensor:
        """Compute probabilities of the detected class in every box.

        Args:
            features: feature maps of the pyramid.
            detections: of each image, in coordinates of the network's input, on the CPU.

        Returns:
            float32 [B, N, 2 S, 2 S] on the features' device, N the largest number of detections per image, at least 1; rows beyond
            an image's own detections mean nothing.
        """
        most = max(1, *(len(one.scores_N) for one in detections))
        # One upload: box, class, whether there is one.
        rows_BN6 = torch.zeros((len(detections), most, 6))
        for row_N6, one in zip(rows_BN6, detections, strict=True):
            row_N6[: len(one.scores_N), :4], row_N6[: len(one.scores_N), 4] = one.boxes_N4, one.labels_N
            row_N6[: len(one.scores_N), 5] = 1
        device = features[0].device
        if device.type == "cuda":
            rows_BN6 = rows_BN6.pin_memory()
        rows_BN6 = rows_BN6.to(device, non_blocking=True)
        return self.maps(features, rows_BN6[..., :4], rows_BN6[..., 4].long(), rows_BN6[..., 5] > 0)

    def maps(self, features: Sequence[Tensor], rois_BR4: Tensor, class_BR: Tensor, valid_BR: Tensor) -> Tensor:
        """Probabilities [B, R, 2 S, 2 S] of one class a RoI; for RoIs that are not valid they mean nothing."""
        logits_NKSS = self(self._pool(features, rois_BR4, valid_BR))
        class_N = class_BR.flatten()
        chosen_NSS = logits_NKSS[torch.arange(class_N.shape[0], device=class_N.device), class_N].sigmoid()
        return chosen_NSS.view(*class_BR.shape, *chosen_NSS.shape[1:])

    def _targets(self, masks: Sequence[ImageMasks], positives: Positives, device: torch.device) -> Tensor:
        """Rasterize the targets: float32 [N, 2 S, 2 S] on `device`, shapes of the positives, zeros elsewhere."""
        size = 2 * self.pool_size
        grids = rasterize(masks, positives.image_P, positives.object_P, positives.rois_P4, size)
        target_BRSS = torch.zeros((positives.images, positives.most, size, size), dtype=torch.bool)
        target_BRSS[positives.image_P, positives.place_P] = torch.from_numpy(grids)
        if device.type == "cuda":  # from pageable memory the host would wait for the copy
            target_BRSS = target_BRSS.pin_memory()
        return target_BRSS.to(device, non_blocking=True).flatten(0, 1).float()


def paste(maps_DSS: Tensor, boxes_D4: Tensor, height: int, width: int, threshold: float) -> list[Any]:
    """COCO RLE of every map at its box in an image of height x width, where its probability reaches the threshold.

    A map is interpolated bilinearly between the centers of its places, and falls to zero beyond the outermost ones. As that is separable, a mask
    is the product of two thin matrices with the map; the pixels looked at are those of the box alone.
    """
    codes: list[Any] = []
    maps, corners = maps_DSS.double().cpu().numpy(), boxes_D4.double().tolist()
    size = [height, width]  # one list for all: an evaluation keeps half a million codes
    step = max(1, _PASTED_PIXELS // (height * width))
    for start in range(0, len(maps), step):
        part = range(start, min(start + step, len(maps)))
        full_HWD = np.zeros((height, width, len(part)), dtype=np.uint8, order="F")
        for layer, index in enumerate(part):
            x1, y1, x2, y2 = corners[index]
            left, right = max(int(np.floor(x1)), 0), min(int(np.ceil(x2)), width)
            top, bottom = max(int(np.floor(y1)), 0), min(int(np.ceil(y2)), height)
            if left >= right or top >= bottom:
                continue
            map_SS = maps[index]
            rows_HS = _weights(top, bottom, y1, y2, len(map_SS))
            columns_WS = _weights(left, right, x1, x2, len(map_SS))
            full_HWD[top:bottom, left:right, layer] = rows_HS @ map_SS @ columns_WS.T >= threshold
        codes += [{"size": size, "counts": code["counts"]} for code in mask_codec.encode(full_HWD)]
    return codes


def _weights(first: int, last: int, start: float, end: float, size: int) -> np.ndarray:
    """float64 [pixels, size]: the share of each place of a map in the pixels first .. last - 1, the map lying from `start` to `end`."""
    centers = (np.arange(first, last) + 0.5 - start) / (end - start) * size - 0.5
    return np.clip(1 - np.abs(centers[:, None] - np.arange(size)), 0, None)
