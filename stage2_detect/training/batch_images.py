"""The first training images of a detector with their boxes after augmentation, for `batches.jpg`.

Makes them with a loader of its own in the calling process: a batch is a function of (seed, step), so the training's batches stay what they are.
"""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from ssld.shared.files import short_names
from ssld.shared.training.batch_sheet import FEWEST, MOST
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.loaders import TrainBatch
from ssld.stage2_detect.data.training_data import TrainingData, training_loader
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections

_LONGEST = 480  # pixels; larger images are shrunk, with their boxes


def first_images(config: TrainConfig, data: TrainingData, *, steps: int, ranks: int) -> list[tuple[Image.Image, str]]:
    """Draw the first images of the main rank, 8 to 16 of them if the run has so many; the caption is the file name.

    Raises UserError as the training does.
    """
    names = short_names(record.path for record in data.train.images)
    alone = config.model_copy(update={"workers": 0})
    images: list[tuple[Image.Image, str]] = []
    batches = training_loader(alone, data, start=0, stop=min(steps, FEWEST), rank=0, ranks=ranks, steps=steps)
    for batch in islice(batches, FEWEST):
        images += drawn_images(batch, data.train.class_names, names)
        if len(images) >= FEWEST:
            break
    return images[:MOST]


def drawn_images(
    batch: TrainBatch, class_names: tuple[str, ...], names: Mapping[str, str]
) -> list[tuple[Image.Image, str]]:
    """Draw the images of a micro-batch without their padding, and the boxes and names of their objects; `names`: captions by path."""
    images = []
    for number, record in enumerate(batch.records):
        height, width = batch.images.sizes_B2[number].tolist()
        pixels_CHW = batch.images.pixels_BCHW[number, :, :height, :width]
        image = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
        factor = min(1.0, _LONGEST / max(height, width))
        if factor < 1:
            image = image.resize((max(1, round(width * factor)), max(1, round(height * factor))))
        labels_G = batch.targets.labels_BG[number]
        inside_G = labels_G >= 0
        boxes_N4 = batch.targets.boxes_BG4[number][inside_G] * torch.tensor(
            [image.width / width, image.height / height] * 2
        )
        objects = Detections(boxes_N4, torch.full((len(boxes_N4),), float("nan")), labels_G[inside_G])
        images.append((draw_objects(image, objects, class_names), names.get(record.path, Path(record.path).name)))
    return images
