"""The training losses on evaluation images: without augmentation, gradients, or a change to the model.

Legend: B images of a batch, G objects (padded to the batch's most).
"""

from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from ssld.shared.distributed.ranks import ONE_RANK, gather_lists, rank, world_size
from ssld.shared.images import stable_seed
from ssld.stage2_detect.data.coco import MIN_SIDE, CocoData, CocoImage
from ssld.stage2_detect.data.loaders import EvalLoader, masks_of
from ssld.stage2_detect.data.views import fit_view, view_boxes
from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.build import Detector


@torch.no_grad()
def validation_losses(
    model: Detector,
    data: CocoData,
    *,
    short_side: int,
    long_side: int,
    interpolation: str,
    kernel: str,
    batch_size: int,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Mean over the images of every loss and of their sum, `loss`; the same on every rank. `model` is left in evaluation mode.

    The model stays in evaluation mode: running statistics, no dropout, proposals as in evaluation. The sampling of anchors and regions is the
    same at every call. `data` was read with `training=True`: crowds are no objects.
    """
    loader = EvalLoader(
        data,
        batch_size=batch_size,
        short_side=short_side,
        max_long=long_side,
        interpolation=interpolation,
        kernel=kernel,
        rank=rank(),
        ranks=world_size(),
        workers=workers,
    )
    model.eval()
    sums: dict[str, Tensor] = {}
    for images, records in loader:
        on_device, targets = images.to(device, non_blocking=True), targets_of(records, short_side, long_side).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            # Divided by this rank's counts: the ranks do not have equally many batches.
            losses, _ = model.losses(model.features(on_device), on_device.sizes_B2, targets, ONE_RANK)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.double() * len(records)
    parts = gather_lists([{name: value.item() for name, value in sums.items()}])
    names = list(dict.fromkeys(name for part in parts for name in part))
    means = {name: sum(part.get(name, 0.0) for part in parts) / len(data.images) for name in names}
    return {"loss": sum(means.values()), **means}


def targets_of(records: list[CocoImage], short_side: int, long_side: int) -> Targets:
    """The objects of evaluation images where `EvalLoader` puts them; the sampling's seeds depend on the image alone."""
    objects, masks = [], []
    for record in records:
        view = fit_view(record.height, record.width, short_side=short_side, max_long=long_side)
        boxes_N4 = view_boxes(record.boxes_N4, view)
        sound_N = ((boxes_N4[:, 2:] - boxes_N4[:, :2]) > MIN_SIDE).all(1)
        objects.append((boxes_N4[sound_N], record.labels_N[sound_N]))
        masks.append(masks_of(record, asdict(view), np.flatnonzero(sound_N)))
    most = max(len(labels) for _, labels in objects)
    boxes_BG4 = torch.zeros(len(records), most, 4)
    labels_BG = torch.full((len(records), most), -1, dtype=torch.int64)
    for row, (boxes, labels) in enumerate(objects):
        boxes_BG4[row, : len(boxes)] = torch.from_numpy(boxes)
        labels_BG[row, : len(labels)] = torch.from_numpy(labels)
    seeds_B = torch.tensor([stable_seed("validation", record.image_id) for record in records], dtype=torch.int64)
    with_masks = any(record.segmentations is not None for record in records)
    return Targets(boxes_BG4, labels_BG, seeds_B, masks=tuple(masks) if with_masks else None)
