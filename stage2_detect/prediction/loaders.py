"""Pictures, or windows of them, as the network sees them in a prediction: sizes, batches, and processes that decode them.

Legend: C channels, H height, W width.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssld.shared.distributed.processes import start_worker
from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoImage
from ssld.stage2_detect.data.loaders import PAD_MULTIPLE, load_record
from ssld.stage2_detect.data.views import fit_view, view_image
from ssld.stage2_detect.evaluation.tta import Sizes
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.prediction.tiles import Window, windows_of

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sizing:
    """The sizes in which a picture is looked at.

    Attributes:
        sides: (short side, longest side) of each, more than one for test-time augmentation.
        interpolation, kernel: see `augment.view_image`.
        several: whether a batch is a `Sizes`, as `tta.detect_views` wants it.
    """

    sides: tuple[tuple[int, int], ...]
    interpolation: str
    kernel: str
    several: bool = False

    @classmethod
    def of(
        cls,
        resize: ResizeConfig,
        *,
        short_side: int | None = None,
        long_side: int | None = None,
        tta_sides: Sequence[int] | None = None,
    ) -> "Sizing":
        """A recipe's sizes of evaluation, unless others are given. `tta_sides`: short sides of several views, empty for the one; None without
        test-time augmentation."""
        short, long = short_side or resize.val_short_side, long_side or resize.val_long_side
        sides = tuple((side, round(long * side / short)) for side in tta_sides or [short])
        return cls(sides, resize.interpolation, resize.kernel, tta_sides is not None)

    def batch(self, images: Sequence[Tensor]) -> ImageBatch | Sizes:
        """uint8 [3, H, W] pictures, not none, in one batch, or one a size."""
        batches = tuple(self._batch(images, *sides) for sides in self.sides)
        return Sizes(batches) if self.several else batches[0]

    def _batch(self, images: Sequence[Tensor], short_side: int, max_long: int) -> ImageBatch:
        views = [fit_view(image.shape[1], image.shape[2], short_side=short_side, max_long=max_long) for image in images]
        high, wide = (
            -(-max(sides) // PAD_MULTIPLE) * PAD_MULTIPLE for sides in zip(*((v.height, v.width) for v in views), strict=True)
        )  # fmt: skip
        pixels_BCHW = torch.zeros(len(images), 3, high, wide, dtype=torch.uint8)
        for canvas, image, view in zip(pixels_BCHW, images, views, strict=True):
            canvas[:, : view.height, : view.width] = view_image(image, view, self.interpolation, self.kernel)
        return ImageBatch(
            pixels_BCHW,
            torch.tensor([(view.height, view.width) for view in views]),
            torch.tensor([view.scale for view in views], dtype=torch.float32),
            torch.tensor([image.shape[1:] for image in images]),
        )


class Shown(NamedTuple):
    """A window of a picture."""

    record: CocoImage
    window: Window


def batches_of(
    records: Sequence[CocoImage], batch_size: int, tile: int | None = None, overlap: float = 0.0
) -> list[list[Shown]]:
    """All windows of the pictures, in their order, so many a batch."""
    shown = [Shown(one, window) for one in records for window in windows_of(one.width, one.height, tile, overlap)]
    return [shown[start : start + batch_size] for start in range(0, len(shown), batch_size)]


class PictureLoader:
    """Iterates over (batch, the windows in it). Pictures that cannot be decoded are left out and noted in `unreadable` when their batch has come.

    A picture whose size is not what its header says raises `UserError`. `workers=0` decodes in the calling process.
    """

    def __init__(self, batches: Sequence[Sequence[Shown]], sizing: Sizing, workers: int) -> None:
        self.unreadable: list[UnreadableImage] = []
        self._batches = batches
        self._loader = DataLoader(
            _Batches(batches, sizing),
            batch_size=None,
            num_workers=workers if len(batches) > 1 else 0,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # its own, so that torch's global one is not advanced
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[ImageBatch | Sizes, list[Shown]]]:
        for loaded, shown in zip(self._loader, self._batches, strict=True):
            if loaded.error:
                raise UserError(loaded.error)
            self.unreadable += [UnreadableImage(*parts) for parts in loaded.unreadable]
            if loaded.batch is not None:
                yield loaded.batch, [shown[position] for position in loaded.positions]


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; each is made in a thread while the one before is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


class _Loaded(NamedTuple):
    """A batch, the positions in it that could be decoded, and what could not; errors are values, since a `DataLoader`
    wraps a raised one in a traceback."""

    batch: ImageBatch | Sizes | None
    positions: list[int]
    unreadable: list[tuple[str, str]]
    error: str = ""


class _Batches(Dataset[_Loaded]):
    def __init__(self, batches: Sequence[Sequence[Shown]], sizing: Sizing) -> None:
        self.batches, self.sizing = batches, sizing
        self._most_pixels = Image.MAX_IMAGE_PIXELS  # as the main process has it
        self._last: tuple[str, Tensor] | None = None  # the next windows are mostly of the same picture

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> _Loaded:
        images, positions, unreadable = [], [], []
        for position, (record, window) in enumerate(self.batches[index]):
            try:
                images.append(window.of(self._decoded(record)))
                positions.append(position)
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
            except UserError as error:
                return _Loaded(None, [], [], str(error))
        return _Loaded(self.sizing.batch(images) if images else None, positions, unreadable)

    def _decoded(self, record: CocoImage) -> Tensor:
        if self._last is None or self._last[0] != record.path:
            Image.MAX_IMAGE_PIXELS = self._most_pixels
            self._last = (record.path, load_record(record))
        return self._last[1]
