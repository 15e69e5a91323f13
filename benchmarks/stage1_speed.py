"""Ratios of stage 1 to what people use otherwise, measured side by side in one run: never an absolute time.

    python benchmarks/stage1_speed.py FOLDER_OF_IMAGES [--pairs 30]

Loader: one training view of 224 px from a JPEG, ours (PIL decode, crop and flip on the uint8 tensor) against PIL with torchvision's v1 transforms
up to a normalised float tensor. Step: forward of teacher and student, loss, backward, against `timm.task.LogitDistillationTask` on the same batch
(timm's needs labels; ours does not). The two of a pair run one after the other, in alternating order; printed are the median and the quartiles of
the ratio opponent / ours, so above 1 means ours is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.task import LogitDistillationTask
from torchvision import transforms

from shared.backbones import Classifier, create_classifier, parse_reference
from shared.files import require_images
from shared.images import decode_image, seeded_view
from stage1_ssld.losses import symmetric_kl
from stage1_ssld.views import train_view

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def ratio(ours: Callable[[], None], theirs: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """Quartiles of theirs / ours over interleaved pairs."""
    ours(), theirs()  # warm-up
    ratios = []
    for number in range(pairs):
        seconds = {}
        for work in (ours, theirs) if number % 2 else (theirs, ours):
            start = time.perf_counter()
            work()
            seconds[work] = time.perf_counter() - start
        ratios.append(seconds[theirs] / seconds[ours])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def loader(folder: Path, pairs: int) -> tuple[float, float, float]:
    """torchvision v1 / ours, 20 images at a time."""
    files = [folder / name for name in require_images(folder)][:20]
    crop = transforms.RandomResizedCrop(224, AREA, RATIO)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    chain = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])

    def ours() -> None:
        for file in files:
            with seeded_view(str(file), 0, 0):
                train_view(decode_image(file), size=224, area=AREA, ratio=RATIO, flip=0.5)

    def theirs() -> None:
        for file in files:
            with Image.open(file) as image:
                chain(image.convert("RGB"))

    return ratio(ours, theirs, pairs)


def step(pairs: int, student_arch: str, teacher_arch: str, size: int, batch: int) -> tuple[float, float, float]:
    """timm's logit distillation / ours, random weights."""
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (batch,))
    student: Classifier = create_classifier(parse_reference(f"random:{student_arch}"))[0].train()
    teacher = create_classifier(parse_reference(f"random:{teacher_arch}"))[0].eval().requires_grad_(False)
    task = LogitDistillationTask(
        timm.create_model(student_arch), timm.create_model(teacher_arch), loss_type="kl"
    ).train()
    mean, std = student.mean_3, student.std_3

    def ours() -> None:
        with torch.no_grad():
            answer = teacher(pixels)
        (symmetric_kl(student(pixels), answer) / batch).backward()
        student.zero_grad()

    def theirs() -> None:
        task((pixels.float() - mean) / std, labels)["loss"].backward()
        task.zero_grad()

    return ratio(ours, theirs, pairs)


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, 1 thread, {arguments.pairs} pairs: quartiles of theirs / ours"
    )
    print("loader, 224 px:         {:.2f} {:.2f} {:.2f}".format(*loader(arguments.folder, arguments.pairs)))
    print(
        "step, resnet18d at 64:  {:.2f} {:.2f} {:.2f}".format(*step(arguments.pairs, "resnet18d", "resnet34d", 64, 8))
    )


if __name__ == "__main__":
    main()
