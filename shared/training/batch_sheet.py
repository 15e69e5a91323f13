"""`batches.jpg`: one sheet of the first training images as the network gets them, to find wrong boxes, labels and augmentation by eye.

Used by both stages; each draws its own images. Pillow alone, so that neither random numbers nor the device are touched.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ssld.shared.files import write_atomically
from ssld.shared.wording import printable

SHEET_FILE = "batches.jpg"
FEWEST, MOST = 8, 16
"""number of images on a sheet; fewer where the first batches hold fewer"""
_COLUMNS = 4
_CAPTION = 18  # pixels; height of the strip below an image
_LETTER = 7  # pixels; width of a letter of the caption
_GAP = 6  # pixels between images
_BACKGROUND = (255, 255, 255)


def write_sheet(run: Path, images: Sequence[tuple[Image.Image, str]]) -> Path:
    """Write the sheet of images and their captions into a run directory; returns the file."""
    content = io.BytesIO()
    sheet_of(images).save(content, "JPEG", quality=90)
    write_atomically(run / SHEET_FILE, content.getvalue())
    return run / SHEET_FILE


def sheet_of(images: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Arrange up to 16 images in rows of four, each with its caption below; the end of a long caption is shown."""
    images = images[:MOST]
    wide = max(image.width for image, _ in images) + _GAP
    high = max(image.height for image, _ in images) + _CAPTION + _GAP
    columns = min(_COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * wide - _GAP, -(-len(images) // columns) * high - _GAP), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (image, caption) in enumerate(images):
        left, top = number % columns * wide, number // columns * high
        sheet.paste(image.convert("RGB"), (left, top))
        # The font has the letters of ASCII alone.
        text = printable(caption).encode("ascii", "backslashreplace").decode()
        draw.text((left + 1, top + image.height + 1), text[-((wide - _GAP) // _LETTER) :], fill=(0, 0, 0), font=font)
    return sheet
