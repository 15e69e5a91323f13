"""Images as uint8 tensors, and randomness that belongs to one view of one image.

PIL decodes, or torchcodec where the setting names it: torchvision's decoders warn that they are deprecated since 0.29, and fail on BMP, TIFF, 16-bit
PNG and WebP with EXIF. This module only decodes; crop, resize and normalization happen on the tensor, later. Alpha is dropped, not blended, as OpenCV
and torchvision do. Deliberately absent: animations (the first frame counts), color profiles.

Legend: C 3 channels (RGB), H height, W width.
"""

import errno
import hashlib
import importlib
import io
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import escaped

DecodedImage = Image.Image | Tensor
"""A decoded image: an RGB image of PIL, or uint8 [3, H, W]."""

# EXIF orientation -> the transpose that turns the stored image upright (EXIF 2.32, section 4.6.4)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = _UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_SIDEWAYS = 5  # from this value on width and height are exchanged
_TURNED_BY_PILLOW = "TIFF"  # alone among the formats: its size is the upright one from the start, its pixels are turned as they are loaded
_PNG_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
"""keywords of the texts in a PNG in which Pillow looks for an orientation"""


class ImageHeader(NamedTuple):
    """Facts from the header of an image."""

    height: int
    """width and height of the stored pixels"""
    width: int
    orientation: int
    """EXIF orientation, 1 to 8: how the stored pixels have to be turned or mirrored (EXIF 2.32, section 4.6.4); 1, not at all, for invalid values"""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the upright image."""
        return (self.width, self.height) if self.orientation >= _SIDEWAYS else (self.height, self.width)


_NOT_OF_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""errors on opening a sound image"""


class UnreadableImage(Exception):
    """A file that cannot be decoded: its `name` and the `reason`. Callers quarantine it or turn it into a `UserError`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both in args: the exception survives pickling between worker processes
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read image {self.name}: {self.reason}"


def require_decoder(name: str, key: str) -> None:
    """Raise UserError naming the key where a decoder is not installed."""
    if name == "torchcodec":
        try:
            importlib.import_module("torchcodec.decoders")
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or its libraries cannot be loaded
            why = " ".join(str(error).split())[:160]
            raise UserError(
                f"{key}: torchcodec cannot be imported ({why}); pip install 'torchcodec>=0.16', or set it to pil"
            ) from None


def open_image(
    source: bytes | str | Path,
    *,
    exif: bool | Callable[[ImageHeader], bool] = True,
    name: str | None = None,
    decoder: str = "pil",
) -> DecodedImage:
    """Decode a file or its bytes to RGB; raises `UnreadableImage` for every error of the decoder.

    Args:
        exif: whether to turn it upright by its EXIF orientation; or a function that decides, whose `UserError` passes through.
        name: name of the image in errors; by default the path.
        decoder: pil returns an image of PIL, of which a crop is cheaper than of a tensor; torchcodec reads color and
            grey JPEGs faster, to uint8 [3, H, W], and leaves all other files, and those it cannot read, to PIL. Both
            are libjpeg-turbo: 1,764 JPEGs of ImageNet and COCO had the same pixels by torchcodec 0.17 and Pillow 13.
    """
    with _decoder_errors(source, name):
        if decoder == "torchcodec":
            source = source if isinstance(source, bytes) else Path(source).read_bytes()
        with _open(source) as image:
            deep = image.mode == "RGB" and ";16" in str(getattr(image, "tile", ""))  # gone once it is loaded
            header, itself = _header(image), image.format == _TURNED_BY_PILLOW
            upright = exif(header) if callable(exif) else exif
            turn = None if upright == itself else (_UPRIGHT if upright else _BACK).get(header.orientation)
            if decoder == "torchcodec" and isinstance(source, bytes) and image.mode in ("RGB", "L") and turn is None:
                pixels = _jpeg(source)
                if pixels is not None:
                    return pixels
            rgb = as_rgb(image)
            rgb.load()
            if deep and 0 < np.asarray(rgb).max() < 16:  # PIL keeps the upper 8 bits of each 16
                raise UnreadableImage("", "16 bits a channel, of which 12 or fewer are used: write it with 8")
            return rgb if turn is None else rgb.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of PIL, as it lies in memory, to RGB of 8 bits: grey values of more bits are scaled, alpha is dropped."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels_of(image: DecodedImage) -> Tensor:
    """Return uint8 [3, H, W] of a decoded image. The memory is laid out as [H, W, 3]: the tensor is a view, which saves a copy;
    use `.contiguous()` where the layout matters."""
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_of(image: DecodedImage, top: int, left: int, height: int, width: int) -> Tensor:
    """Return uint8 [3, height, width] of a rectangle, in its own memory, laid out as [height, width, 3]."""
    if isinstance(image, Tensor):
        return image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return pixels_of(image.crop((left, top, left + width, top + height)))


def decode_image(
    source: bytes | str | Path, *, exif: bool | Callable[[ImageHeader], bool] = True, name: str | None = None
) -> Tensor:
    """Return `pixels_of` the image that `open_image` opens; raises `UnreadableImage`."""
    return pixels_of(open_image(source, exif=exif, name=name))


def image_header(source: bytes | str | Path, *, name: str | None = None) -> ImageHeader:
    """Read the header of an image, without decoding its pixels; raises `UnreadableImage`."""
    with _decoder_errors(source, name), _open(source) as image:
        return _header(image)


def image_headers(paths: Sequence[str]) -> list[ImageHeader | None]:
    """Read the headers of many files in several threads, some thousand per second; None for files that cannot be read."""

    def header(path: str) -> ImageHeader | None:
        try:
            with _open(path) as image:
                return _header(image)
        except MemoryError:
            raise
        except Exception:  # as in `_decoder_errors`, which would change the filter of warnings in every thread
            return None

    with warnings.catch_warnings(), ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(header, paths))


def stable_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on the parts only: equal in every process, on every machine, for every Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded_torch(key: str, view: int, seed: int) -> Iterator[None]:
    """Seed torch's global generator (CPU) from (seed, key, view), and restore its state afterwards."""
    state = torch.default_generator.get_state()
    try:
        # Not torch.manual_seed, which would seed accelerators too.
        torch.default_generator.manual_seed(stable_seed(seed, key, view))
        yield
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def seeded_view(key: str, view: int, seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), Python and NumPy from (seed, key, view), and restore their states afterwards.

    Augmentations of other libraries draw from the global generators. Inside this block their draws are a function of
    the image and the view, not of the worker, the rank or what was drawn before.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    value = stable_seed(seed, key, view)
    with seeded_torch(key, view, seed):
        try:
            random.seed(value)
            np.random.seed(value % 2**32)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _decoder_errors(source: bytes | str | Path, name: str | None) -> Iterator[None]:
    """Turn errors of decoders, of nearly every type (OSError, SyntaxError, struct.error, IndexError ...), into `UnreadableImage`;
    hide their warnings about faults that they corrected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (MemoryError, UserError):
            raise
        except UnreadableImage as error:
            raise UnreadableImage(name or _label(source), error.reason) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NOT_OF_THE_FILE:
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            if isinstance(error, Image.UnidentifiedImageError):
                reason = _unknown(source)
            raise UnreadableImage(name or _label(source), " ".join(reason.split()) or type(error).__name__) from error


def _unknown(source: bytes | str | Path) -> str:
    """Say what a file that Pillow does not know is, by its first bytes."""
    if isinstance(source, bytes):
        head = source[:132]
    else:
        with open(source, "rb") as file:
            head = file.read(132)
    if not head:
        return "the file is empty"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF, damaged or of a kind that is not read: convert it to JPEG"
    if head[4:8] == b"ftyp":  # ISO base media file format; the brands are of ISO/IEC 23008-12
        if head[8:12] in (b"mif1", b"msf1") or head[8:11] in (b"hei", b"hev"):
            return "HEIC, which is not read: convert it to JPEG"
        return "a video, or a raw photo of a camera, which is not read: export it as JPEG"
    if head[128:] == b"DICM":
        return "DICOM, which is not read: convert it to PNG"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: run git lfs pull"
    if head.lstrip().startswith(b"<"):
        return "a web page or a vector drawing, not an image of pixels"
    return "not an image, or of an unknown format"


def _label(source: bytes | str | Path) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else escaped(str(source))


def _jpeg(encoded: bytes) -> Tensor | None:
    """Decode a JPEG by torchcodec; None for other files, and for a JPEG that it cannot read."""
    if not encoded.startswith(b"\xff\xd8"):
        return None
    decoders: Any = importlib.import_module("torchcodec.decoders")
    try:
        pixels: Tensor = decoders.decode_jpeg(encoded, mode="RGB")
    except (RuntimeError, ValueError):
        return None
    return pixels


def _open(source: bytes | str | Path) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _header(image: Image.Image) -> ImageHeader:
    """Return the header of an image that is open and not loaded."""
    orientation, (width, height) = _orientation(image), image.size
    if orientation >= _SIDEWAYS and image.format == _TURNED_BY_PILLOW:
        width, height = height, width
    return ImageHeader(height, width, orientation)


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and not _has_exif_in_png(image):
        return 1
    try:
        value = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF before a sound image: use it as stored
        return 1
    return value if value in _UPRIGHT else 1


def _has_exif_in_png(image: Any) -> bool:
    """Whether a PNG has a chunk, before or after its pixels, in which Pillow looks for an orientation: to find that there is none Pillow would
    decode the pixels. Chunks: https://www.w3.org/TR/png-3/#5Chunk-layout."""
    file, place = image.fp, image.fp.tell()
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            length, kind = int.from_bytes(head[:4]), head[4:]
            start = file.read(min(length, 32)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if kind == b"eXIf" or start.startswith(_PNG_TEXTS):
                return True
            file.seek(length + 4 - len(start), os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Scale grey values of more than 8 bits, or fractions, to 0..255, where PIL's own conversion clips them at 255.

    A file does not say how many of its bits a camera used: white is the largest value of the fewest bits that hold all values (8, 10, 12, 14 or 16),
    1 for fractions, and else the largest value itself. Where values are negative, black is the smallest.
    """
    values = grey.astype(np.float64)
    finite = values[np.isfinite(values)]
    black, white = (min(finite.min(), 0.0), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    if black == 0:
        ranges = ([1.0] if grey.dtype.kind == "f" else []) + [2.0**bits - 1 for bits in (8, 10, 12, 14, 16)]
        white = next((limit for limit in ranges if white <= limit), white)
    return np.round((values - black) * (255.0 / ((white - black) or 1.0))).astype(np.uint8)
