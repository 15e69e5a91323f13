"""Figures of matplotlib written as a few pixels, a digest of what they show.

Layout and rendering of the curves take longer than a small training. What a figure is made of is put together as always; the pixels depend on its
lines, texts and images: two runs that draw the same write the same pixels.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from PIL import Image


def install(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let figures be saved as sketches; `replace` sets an attribute, as `monkeypatch.setattr` does."""
    from matplotlib.figure import Figure

    save = Figure.savefig

    def savefig(self: Figure, file: Any, **options: Any) -> None:
        if options.get("format", "png") == "png":
            _sketch(self).save(file, "PNG")
        else:
            save(self, file, **options)

    replace(Figure, "savefig", savefig)


def _sketch(figure: Any) -> Image.Image:
    digest = hashlib.sha256(repr([text.get_text() for text in figure.texts]).encode())  # the title of the figure
    for axes in figure.axes:
        texts = [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        digest.update(repr((texts, axes.get_xlim(), axes.get_ylim())).encode())
        for line in axes.lines:
            digest.update(repr((line.get_label(), line.get_xydata().tolist())).encode())
        for patch in axes.patches:
            digest.update(patch.get_path().vertices.tobytes())
        for image in axes.images:
            digest.update(image.get_array().tobytes())
    return Image.frombytes("RGB", (4, 4), (digest.digest() * 2)[:48])
