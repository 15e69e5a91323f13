"""Images of a training batch for `batches.jpg`: the views as the student gets them. A module of its own, because batch.py knows no Pillow."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ssld.shared.files import short_names
from ssld.shared.training.batch_sheet import MOST
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch

_LEAST_SIDE = 160  # pixels; smaller views are enlarged by an integer factor, so that their captions fit


def view_images(pixels_BCHW: Tensor, batch: Batch, class_names: Sequence[str] | None) -> list[tuple[Image.Image, str]]:
    """Convert the first views of a batch to images; the caption is the image's name, and its class where a label is read.

    Args:
        pixels_BCHW: 0..255, uint8 views or their float32 mixture, of `batch`.
    """
    pixels_BHWC = pixels_BCHW[:MOST].detach().cpu().float().round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    names = short_names(batch.keys)
    images = []
    for view_HWC, label, key in zip(pixels_BHWC, batch.labels_B.tolist(), batch.keys, strict=False):
        zoom = max(1, -(-_LEAST_SIDE // max(view_HWC.shape[:2])))
        image = Image.fromarray(view_HWC)
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        name = f"{class_names[label]}: " if class_names and label != NO_LABEL and label < len(class_names) else ""
        images.append((image, f"{name}{names[key]}"))
    return images
