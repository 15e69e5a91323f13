"""Ratios of the detection loader against PIL with torchvision's v1 transforms, measured side by side on one thread:
never an absolute time.

    python benchmarks/detection_loader.py ANNOTATIONS.json FOLDER_OF_IMAGES [--pairs 30] [--batch 4]

Both decode the same photos by PIL and give a padded batch of the same sizes, flips and boxes. Ours ends in uint8 pixels, which the network
normalizes on its device; the opponent's chain is Resize on the PIL image, ToTensor, Normalize, flip, pad. The rows: images/s of

(a) our fast kernel / the opponent, both bicubic            goal: at least 1.3
(b) the same, our normalization on the CPU counted too
(c) our fast kernel / the opponent, both bilinear
(d) our reference kernel / the opponent, bicubic
(e) our fast kernel with AutoAugment / without it

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
from torchvision.transforms import InterpolationMode

from benchmarks.side_by_side import rounds, show
from ssld.stage2_detect.augment_config import AugmentConfig
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData, CocoImage, read_coco
from ssld.stage2_detect.data.loaders import TrainLoader
from ssld.stage2_detect.data.padding import padded_side
from ssld.stage2_detect.data.views import View, draw_view, view_image
from ssld.stage2_detect.models.normalize import Normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT_SIDES = (640, 672, 704, 736, 768, 800)


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
    height, width = (padded_side(max(one.shape[axis] for one in pixels)) for axis in (1, 2))
    batch_BCHW = torch.zeros(len(pixels), 3, height, width)
    for canvas, one in zip(batch_BCHW, pixels, strict=True):
        canvas[:, : one.shape[1], : one.shape[2]].copy_(one)
    return batch_BCHW


class Batches:
    """The same batches, one a call, from the loader or from the opponent."""

    def __init__(self, data: CocoData, batch: int, short_sides: Sequence[int]) -> None:
        self.data, self.batch = data, batch
        self.short_sides = list(short_sides)
        self.order = self.loader(0).order

    def loader(self, steps: int, *, auto_augment: bool = False, **resize: Any) -> TrainLoader:
        """The first batches; `resize` are settings of that section."""
        sizes = ResizeConfig(train_short_sides=self.short_sides, **resize)
        augment = AugmentConfig(auto_augment=auto_augment)
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

    def torchvisions(self, interpolation: InterpolationMode) -> Callable[[], None]:
        steps = iter(range(10**9))

        def work() -> None:
            step = next(steps)
            records = [self.data.images[index] for index in self.order.micro_batch(step, 0, 0)]
            epoch = step // self.order.steps_per_epoch
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
    parser.add_argument("--short-sides", type=int, nargs="+", default=SHORT_SIDES)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    batches = Batches(
        read_coco(arguments.annotations, arguments.folder, training=True), arguments.batch, arguments.short_sides
    )
    works = {
        "fast": batches.ours(kernel="fast"),
        "bicubic": batches.torchvisions(InterpolationMode.BICUBIC),
        "normalized": batches.ours(kernel="fast", normalized=True),
        "reference": batches.ours(),
        "fast bilinear": batches.ours(kernel="fast", interpolation="bilinear"),
        "bilinear": batches.torchvisions(InterpolationMode.BILINEAR),
        "augmented": batches.ours(kernel="fast", auto_augment=True),
    }
    timings = rounds(works, arguments.pairs, torch.device("cpu"))
    print(
        f"torch {torch.__version__}, one CPU thread, {arguments.pairs} rounds of {arguments.batch} images: median (quartiles)"
    )
    show("(a) fast / torchvision v1, bicubic", [r["bicubic"] / r["fast"] for r in timings])
    show("(b) the same, normalization counted", [r["bicubic"] / r["normalized"] for r in timings])
    show("(c) fast / torchvision v1, bilinear", [r["bilinear"] / r["fast bilinear"] for r in timings])
    show("(d) reference / torchvision v1, bicubic", [r["bicubic"] / r["reference"] for r in timings])
    show("(e) fast with AutoAugment / without", [r["fast"] / r["augmented"] for r in timings])
    for interpolation in ("bicubic", "bilinear"):
        mean, largest = kernel_difference(batches, interpolation)
        print(f"fast from reference, {interpolation}: {mean:.2f} grey levels in the mean, {largest} at most")
    print(f"on black-and-white noise, bicubic: {noise_difference()} at most")


if __name__ == "__main__":
    main()
