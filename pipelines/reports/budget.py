"""Images of the page as data: URLs, within a number of bytes."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

PAGE_BYTES = 4_000_000
"""encoded bytes of all images in a page"""
SHEET_SIDE = 1200
"""longer side of an embedded sheet of many small images, in pixels"""


class Budget:
    """Number of bytes left for images in a page; sheets of many small images may use up to half of them."""

    def __init__(self, left: int = PAGE_BYTES) -> None:
        self.left = left
        self._sheets_left = left // 2

    def embed(self, file: Path, longest: int) -> str | None:
        """Encode an image file as a data: URL, its longer side at most `longest` pixels; None if it is unreadable or the budget is used up."""
        from PIL import Image

        try:
            with Image.open(file) as image:
                if file.suffix == ".jpg" and max(image.size) <= longest:
                    return self._take(file.read_bytes())
                return self.encode(image, longest)
        except Exception:  # PIL raises many kinds of exceptions for damaged files
            return None

    def embed_sheet(self, file: Path) -> str | None:
        """Encode a sheet of many small images as `embed` does; None also if the part of the budget for sheets is used up."""
        before = self.left
        source = self.embed(file, SHEET_SIDE)
        spent = before - self.left
        if spent > self._sheets_left:
            self.left = before
            return None
        self._sheets_left -= spent
        return source

    def encode(self, image: "Image.Image", longest: int) -> str | None:
        """Encode an image as a data: URL of a JPEG, its longer side at most `longest` pixels; None if the budget is used up."""
        from PIL import Image

        if image.mode[0] in "IF":  # more than 8 bits: PIL's own conversion makes such photos white
            from ssld.shared.images import as_rgb  # imports torch, which a page without such photos does not need

            image = as_rgb(image)
        small = image.convert("RGB")
        small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82, optimize=True)  # without EXIF: browsers would turn it once more
        return self._take(buffer.getvalue())

    def _take(self, content: bytes) -> str | None:
        text = base64.b64encode(content).decode()
        if len(text) > self.left:
            return None
        self.left -= len(text)
        return f"data:image/jpeg;base64,{text}"
