"""The step that needs the most memory: the largest images a run may see, each with the objects of the image that has the most. What `auto_batch`
tries; a file of its own, as in stage 1, since the training loop need not show it."""

from collections.abc import Callable, Sequence

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
    """A function of a number of images: forward pass (under the teacher, if there is one), backward pass, optimizer step, evaluation of a batch."""
    resize = config.resize
    largest = Sizing(max(resize.train_short_sides), resize.train_long_side)
    high, wide = largest_canvas([*data.train.images, *data.unlabeled], largest)
    if config.augment.large_scale_jitter:
        high = wide = resize.train_long_side
    crowd = max(data.train.images, key=lambda record: len(record.labels_N))
    view = largest.view(crowd.height, crowd.width)
    val_high, val_wide = largest_canvas(data.val.images if data.val else [], Sizing.of(resize))

    def attempt(images: int) -> None:
        targets = Targets(
            torch.from_numpy(crowd.boxes_N4.astype(np.float32) * view.scale).expand(images, -1, -1),
            torch.from_numpy(crowd.labels_N).expand(images, -1),
            torch.arange(images),
            masks=(masks_of(crowd, view),) * images if config.model.has_masks else None,
        ).to(device)
        trained.model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = trained.model(_noise(images, high, wide, device), targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if data.val:
            trained.evaluated.eval()
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                for_inference(trained.evaluated)(_noise(config.val_batch_size, val_high, val_wide, device))

    return attempt


def largest_canvas(records: Sequence[CocoImage], sizing: Sizing) -> tuple[int, int]:
    """(height, width) that hold each of these images at this size: wide and high ones may meet in a batch."""
    sizes = {(record.height, record.width) for record in records}
    views = [sizing.view(*size) for size in sizes]
    return max((view.height for view in views), default=0), max((view.width for view in views), default=0)


def _noise(images: int, high: int, wide: int, device: torch.device) -> ImageBatch:
    return ImageBatch(
        torch.randint(0, 256, (images, 3, padded_side(high), padded_side(wide)), dtype=torch.uint8),
        torch.tensor([[high, wide]] * images),
        torch.ones(images),
    ).to(device)
