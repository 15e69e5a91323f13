"""Training step of the largest memory use, which `auto_batch` tries: images of the largest size of a batch, with the objects of the image that has
the most of them; then an evaluation batch of the largest size. With random pixels, since memory does not depend on them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.coco import CocoImage
from ssld.stage2_detect.data.loaders import masks_of
from ssld.stage2_detect.data.padding import padded_side
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.data.training_data import TrainingData
from ssld.stage2_detect.models.batch import ImageBatch, Targets
from ssld.stage2_detect.models.inference import for_inference
from ssld.stage2_detect.training.trained_detector import TrainedDetector


def whole_step(
    config: TrainConfig,
    trained: TrainedDetector,
    data: TrainingData,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[int], None]:
    """Return a function of a number of images: forward (with the teacher, if any), backward, optimizer step and a batch of evaluation.

    The optimizer's step changes the weights: the caller restores them.
    """
    resize = config.resize
    largest = Sizing(max(resize.train_short_sides), resize.train_long_side)
    height, width = largest_canvas([*data.train.images, *data.unlabeled], largest)
    if config.augment.large_scale_jitter:
        height = width = resize.train_long_side
    fullest = max(data.train.images, key=lambda record: len(record.labels_N))
    view = largest.view(fullest.height, fullest.width)
    val_height, val_width = largest_canvas(data.val.images if data.val else [], Sizing.of(resize))

    def attempt(images: int) -> None:
        targets = Targets(
            torch.from_numpy(fullest.boxes_N4.astype(np.float32) * view.scale).expand(images, -1, -1),
            torch.from_numpy(fullest.labels_N).expand(images, -1),
            torch.arange(images),
            masks=(masks_of(fullest, view),) * images if config.model.has_masks else None,
        ).to(device)
        trained.model.train()
        batch, weak = _noise(images, height, width, device), None
        if config.moving_teacher and images > 1:
            unlabeled = min(max(1, round(images * config.moving_teacher.ratio)), images - 1)
            targets = replace(targets, labeled_B=torch.arange(images) < images - unlabeled)
            weak = _noise(unlabeled, height, width, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = trained.model(batch, targets, *([] if weak is None else [weak]))
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if data.val:
            trained.evaluated.eval()
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                for_inference(trained.evaluated)(_noise(config.val_batch_size, val_height, val_width, device))

    return attempt


def largest_canvas(records: Sequence[CocoImage], sizing: Sizing) -> tuple[int, int]:
    """Return (height, width) that fit each of these images at this size, since wide and high ones may share a batch."""
    sizes = {(record.height, record.width) for record in records}
    views = [sizing.view(*size) for size in sizes]
    return max((view.height for view in views), default=0), max((view.width for view in views), default=0)


def _noise(images: int, height: int, width: int, device: torch.device) -> ImageBatch:
    return ImageBatch(
        torch.randint(0, 256, (images, 3, padded_side(height), padded_side(width)), dtype=torch.uint8),
        torch.tensor([[height, width]] * images),
        torch.ones(images),
    ).to(device)
