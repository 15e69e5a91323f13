"""Ratios of the detection loader against PIL with torchvision's transforms, v1 and v2, measured side by side on one thread:
never an absolute time.

    python benchmarks/detection_loader.py ANNOTATIONS.json FOLDER_OF_IMAGES [--pairs 30] [--batch 4] [--rows abcdefghi]

Both decode the same photos by PIL and give a padded batch of the same sizes, flips and boxes. Ours ends in uint8 pixels, which the network
normalizes on its device; the opponent's chain is Resize on the PIL image, ToTensor, Normalize, flip, pad. The rows: images/s of

(a) our fast kernel / the opponent, both bicubic            goal: at least 1.3
(b) the same, our normalization on the CPU counted too
(c) our fast kernel / the opponent, both bilinear
(d) our reference kernel / the opponent, bicubic
(e) our fast kernel with AutoAugment / without it
(f) `augment: light` / the same chain of transforms.v2, bicubic     goal: at least 1.3
(g) the same, our normalization on the CPU counted too
(h) `augment: strong` without compositions / the same chain of transforms.v2, bicubic
(i) the same, our normalization on the CPU counted too

The chain of v2 works on uint8 tensors: PIL's decoding, `resized_crop` to the window and size of our view with antialiasing, flip, `ColorJitter`,
for `strong` `GaussianBlur` and `RandomErasing` as often as ours, `to_dtype`, `normalize`, pad. Mosaic, mixup and copy-paste are left out, since
torchvision has none of them.

Beside them, in grey levels: how far the fast kernel's pixels are from the reference's, on one pass over the photos and on black-and-white noise.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as kernels

from benchmarks.side_by_side import rounds, show
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData, CocoImage, read_coco
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.data.padding import padded_side
from ssld.stage2_detect.data.views import TrainingViews, View, draw_view, view_image
from ssld.stage2_detect.models.normalize import Normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT_SIDES = (640, 672, 704, 736, 768, 800)
LIGHT = AugmentConfig(preset="light")
STRONG = AugmentConfig(preset="strong", copy_paste=0, mosaic=0, mixup=0)
ROWS = {
    "a": ("fast / torchvision v1, bicubic", "bicubic", "fast"),
    "b": ("the same, normalization counted", "bicubic", "normalized"),
    "c": ("fast / torchvision v1, bilinear", "bilinear", "fast bilinear"),
    "d": ("reference / torchvision v1, bicubic", "bicubic", "reference"),
    "e": ("fast with AutoAugment / without", "fast", "augmented"),
    "f": ("light: fast / torchvision v2, bicubic", "light v2", "light"),
    "g": ("the same, normalization counted", "light v2", "light normalized"),
    "h": ("strong: fast / torchvision v2, bicubic", "strong v2", "strong"),
    "i": ("the same, normalization counted", "strong v2", "strong normalized"),
}
"""row: (label, work whose time is divided, work that divides it)"""


def opponent(records: list[CocoImage], views: list[View], interpolation: InterpolationMode) -> torch.Tensor:
    """A normalized float batch, as a data set with torchvision's v1 transforms makes it; boxes are made and dropped."""
    normalize = transforms.Normalize(MEAN, STD)
    pixels = []
    for record, view in zip(records, views, strict=True):
        with Image.open(record.path) as image:
            resized = transforms.Resize((view.height, view.width), interpolation)(image.convert("RGB"))
        tensor = normalize(transforms.ToTensor()(resized))
        boxes_N4 = torch.from_numpy(record.boxes_N4) * view.scale
        if view.flip:
            tensor = tensor.flip(2)
            boxes_N4[:, [0, 2]] = view.width - boxes_N4[:, [2, 0]]
        pixels.append(tensor)
    return padded(pixels)


def padded(pixels: list[torch.Tensor]) -> torch.Tensor:
    """A batch of float images of different sizes."""
    height, width = (padded_side(max(one.shape[axis] for one in pixels)) for axis in (1, 2))
    batch_BCHW = torch.zeros(len(pixels), 3, height, width)
    for canvas, one in zip(batch_BCHW, pixels, strict=True):
        canvas[:, : one.shape[1], : one.shape[2]].copy_(one)
    return batch_BCHW


def chain(augment: AugmentConfig) -> v2.Transform:
    """The colors, blur and erasing of `augment` as transforms.v2 has them."""
    steps: list[Any] = [v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)]
    if augment.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], augment.blur))
    if augment.erasing:
        steps.append(v2.RandomErasing(augment.erasing, (0.02, 0.15), (1 / 3, 3)))
    return v2.Compose(steps)


def opponent_v2(records: list[CocoImage], views: list[View], colors: v2.Transform) -> torch.Tensor:
    """A normalized float batch, as a data set with torchvision's v2 transforms makes it; boxes are made and dropped."""
    pixels = []
    for record, view in zip(records, views, strict=True):
        with Image.open(record.path) as image:
            tensor = kernels.pil_to_tensor(image.convert("RGB"))
        top, left = round(view.top / view.scale), round(view.left / view.scale)
        high = min(round(view.height / view.scale), record.height - top)
        wide = min(round(view.width / view.scale), record.width - left)
        size = [view.height, view.width]
        tensor = kernels.resized_crop(tensor, top, left, high, wide, size, InterpolationMode.BICUBIC, antialias=True)
        boxes_N4 = torch.from_numpy(record.boxes_N4) * view.scale - torch.tensor([view.left, view.top] * 2)
        if view.flip:
            tensor = kernels.horizontal_flip(tensor)
            boxes_N4[:, [0, 2]] = view.width - boxes_N4[:, [2, 0]]
        tensor = kernels.to_dtype(colors(tensor), torch.float32, scale=True)
        pixels.append(kernels.normalize(tensor, list(MEAN), list(STD)))
    return padded(pixels)


class Batches:
    """The same batches, one a call, from the loader or from the opponent."""

    def __init__(self, data: CocoData, batch: int, short_sides: Sequence[int]) -> None:
        self.data, self.batch = data, batch
        self.short_sides = list(short_sides)
        self.order = self.loader(0).order

    def loader(self, steps: int, *, augment: AugmentConfig | None = None, **resize: Any) -> TrainLoader:
        """The first batches; `resize` are settings of that section."""
        sizes = ResizeConfig(train_short_sides=self.short_sides, **resize)
        augment = augment or AugmentConfig()
        return TrainLoader(self.data, sizes, augment, batch_size=self.batch, seed=0, start_step=0, stop_step=steps)

    def view(self, record: CocoImage, epoch: int) -> View:
        """The view of an image that a batch holds."""
        return draw_view(
            record.height,
            record.width,
            seed=0,
            image_id=record.image_id,
            view=epoch,
            train_short_sides=self.short_sides,
            train_long_side=1333,
            flip=0.5,
        )

    def ours(self, *, normalized: bool = False, **options: Any) -> Callable[[], None]:
        stream = iter(self.loader(100 * self.order.steps_per_epoch, **options))
        normalize = Normalize(MEAN, STD)

        def work() -> None:
            images = next(stream).images
            if normalized:
                normalize(images)

        return work

    def torchvisions_v2(self, augment: AugmentConfig) -> Callable[[], None]:
        views_of = TrainingViews(0, ResizeConfig(train_short_sides=self.short_sides), augment)
        colors, steps = chain(augment), iter(range(10**9))

        def work() -> None:
            records, epoch = self.step(next(steps))
            views = [
                views_of.geometry(one.height, one.width, one.boxes_N4, image_id=one.image_id, number=epoch)
                for one in records
            ]
            opponent_v2(records, views, colors)

        return work

    def step(self, step: int) -> tuple[list[CocoImage], int]:
        """The images of a step, and its pass over the data."""
        records = [self.data.images[index] for index in self.order.micro_batch(step, 0, 0)]
        return records, step // self.order.steps_per_epoch

    def torchvisions(self, interpolation: InterpolationMode) -> Callable[[], None]:
        steps = iter(range(10**9))

        def work() -> None:
            records, epoch = self.step(next(steps))
            views = [self.view(record, epoch) for record in records]
            opponent(records, views, interpolation)

        return work


def kernel_difference(batches: Batches, interpolation: str) -> tuple[float, int]:
    """(mean, largest) absolute difference, in grey levels, of the two kernels' batches over one pass; their padding counts as equal."""
    total = largest = pixels = 0
    loaders = [
        batches.loader(batches.order.steps_per_epoch, kernel=kernel, interpolation=interpolation)
        for kernel in ("fast", "reference")
    ]
    for fast, reference in zip(*loaders, strict=True):
        apart = (fast.images.pixels_BCHW.int() - reference.images.pixels_BCHW.int()).abs()
        total, largest = total + int(apart.sum()), max(largest, int(apart.max()))
        pixels += 3 * int(fast.images.sizes_B2.prod(dim=1).sum())
    return total / pixels, largest


def noise_difference() -> int:
    """The largest on noise of pure black and white, 480 x 640 made 800 x 1067, bicubic."""
    noise_CHW = 255 * torch.randint(0, 2, (3, 480, 640), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    view = View(800 / 480, 800, 1067)
    fast, reference = (view_image(noise_CHW, view, "bicubic", kernel).int() for kernel in ("fast", "reference"))
    return int((fast - reference).abs().max())


def main(argv: Sequence[str] | None = None) -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rows", default="".join(ROWS))
    parser.add_argument("--short-sides", type=int, nargs="+", default=SHORT_SIDES)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    batches = Batches(
        read_coco(arguments.annotations, arguments.folder, training=True), arguments.batch, arguments.short_sides
    )
    works: dict[str, Callable[[], Callable[[], None]]] = {
        "fast": lambda: batches.ours(kernel="fast"),
        "bicubic": lambda: batches.torchvisions(InterpolationMode.BICUBIC),
        "normalized": lambda: batches.ours(kernel="fast", normalized=True),
        "reference": lambda: batches.ours(),
        "fast bilinear": lambda: batches.ours(kernel="fast", interpolation="bilinear"),
        "bilinear": lambda: batches.torchvisions(InterpolationMode.BILINEAR),
        "augmented": lambda: batches.ours(kernel="fast", augment=AugmentConfig(auto_augment=True)),
        "light": lambda: batches.ours(kernel="fast", augment=LIGHT),
        "light normalized": lambda: batches.ours(kernel="fast", augment=LIGHT, normalized=True),
        "light v2": lambda: batches.torchvisions_v2(LIGHT),
        "strong": lambda: batches.ours(kernel="fast", augment=STRONG),
        "strong normalized": lambda: batches.ours(kernel="fast", augment=STRONG, normalized=True),
        "strong v2": lambda: batches.torchvisions_v2(STRONG),
    }
    rows = {letter: row for letter, row in ROWS.items() if letter in arguments.rows}
    needed = {name for _, *names in rows.values() for name in names}
    chosen = {name: make() for name, make in works.items() if name in needed}
    timings = rounds(chosen, arguments.pairs, torch.device("cpu"))
    print(
        f"torch {torch.__version__}, one CPU thread, {arguments.pairs} rounds of {arguments.batch} images: median (quartiles)"
    )
    for letter, (label, divided, divisor) in rows.items():
        show(f"({letter}) {label}", [seconds[divided] / seconds[divisor] for seconds in timings])
    if not {"a", "d"} & set(rows):
        return
    for interpolation in ("bicubic", "bilinear"):
        mean, largest = kernel_difference(batches, interpolation)
        print(f"fast from reference, {interpolation}: {mean:.2f} grey levels in the mean, {largest} at most")
    print(f"on black-and-white noise, bicubic: {noise_difference()} at most")


if __name__ == "__main__":
    main()
