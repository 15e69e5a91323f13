"""Run a detector over an evaluation set and score it by COCO AP, on any number of ranks."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from ssld.shared.distributed.ranks import from_main_rank, gather_on_main_rank, rank, world_size
from ssld.shared.wording import duration
from ssld.stage2_detect.config import TTAConfig
from ssld.stage2_detect.data.coco import CocoData, Id
from ssld.stage2_detect.data.loaders import EvalLoader
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.evaluation.tta import SizesLoader, detect_views
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.models.inference import for_inference

Record = TypeVar("Record")
_SILENCE = 30.0  # seconds that nothing is heard for


@torch.no_grad()
def detections(
    model: Detector,
    loader: Iterable[tuple[Any, Sequence[Record]]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    tta: TTAConfig | None = None,
) -> Iterator[tuple[Record, Detections]]:
    """What each image of a loader shows, on the CPU, in the loader's order; `model` is left in evaluation mode.

    The loader gives batches, an `ImageBatch` or with `tta` a `Sizes` each, and what names the images in them.
    """
    model.eval()
    fast: Callable[[Any], list[Detections]] = for_inference(model)
    if tta:
        fast = partial(detect_views, fast, flip=tta.flip, iou=tta.nms_iou, most=model.detections_per_image)
    for images, records in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = fast(images.to(device, non_blocking=True))
        for record, one in zip(records, found, strict=True):
            yield record, Detections(one.boxes_N4.cpu(), one.scores_N.cpu(), one.labels_N.cpu(), one.masks)


def detect(
    model: Detector,
    loader: EvalLoader | SizesLoader,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tta: TTAConfig | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[Id, Detections]:
    """`detections` by image id: on the main rank those of all ranks, on the others nothing. `say` hears now and then how far it is."""
    found = detections(model, loader, device=device, dtype=dtype, tta=tta)
    if say:
        found = _told(found, loader.images, say)
    return dict(gather_on_main_rank([(record.image_id, one) for record, one in found]))


def _told(found: Iterator[Record], images: int, say: Callable[[str], None]) -> Iterator[Record]:
    """`found` as it is, and from time to time a line on how many of this process's images are done."""
    began = told = time.perf_counter()
    for number, one in enumerate(found, 1):
        yield one
        now = time.perf_counter()
        if now - told >= _SILENCE and number < images:
            told = now
            say(f"{number} of {images} images seen, {duration((images - number) * (now - began) / number)} to go")


def loader_of(
    data: CocoData,
    *,
    short_side: int,
    long_side: int,
    interpolation: str,
    kernel: str,
    batch_size: int,
    workers: int,
    tta: TTAConfig | None = None,
    rank: int = 0,
    ranks: int = 1,
    skip_unreadable: bool = False,
) -> EvalLoader | SizesLoader:
    """What a detector is to see of `data`: with `tta` several sizes of each image, where the longest side allowed grows with the short one."""
    sides = (tta and tta.short_sides) or [short_side]
    loaders = [
        EvalLoader(
            data,
            batch_size=batch_size,
            short_side=side,
            max_long=round(long_side * side / short_side),
            interpolation=interpolation,
            kernel=kernel,
            rank=rank,
            ranks=ranks,
            workers=-(-workers // len(sides)),
            skip_unreadable=skip_unreadable,
        )
        for side in sides
    ]
    return SizesLoader(loaders) if tta else loaders[0]


def score(
    model: Detector,
    data: CocoData,
    *,
    short_side: int,
    long_side: int,
    interpolation: str,
    kernel: str,
    batch_size: int,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    tta: TTAConfig | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[Id, Detections]]:
    """(COCO metrics, the same on every rank; detections, on the main rank) of a detector on `data`. The metrics of masks end in `_segm`, and are
    there where detector and `data` have masks.

    With `tta`, of its sizes merged. `say` hears now and then how far it is.
    """
    loader = loader_of(
        data,
        short_side=short_side,
        long_side=long_side,
        interpolation=interpolation,
        kernel=kernel,
        batch_size=batch_size,
        workers=workers,
        tta=tta,
        rank=rank(),
        ranks=world_size(),
    )
    found = detect(model, loader, device=device, dtype=dtype, tta=tta, say=say)
    metrics: dict[str, Any] = {}
    if rank() == 0:
        metrics = coco_ap(data, found, backend)
        has_shapes = data.images[0].segmentations is not None
        if has_shapes and any(one.masks is not None for one in found.values()):
            segm = coco_ap(data, found, backend, masks=True)
            metrics |= {f"{name}_segm": value for name, value in segm.items()}
    return from_main_rank(metrics), found


def describe(metrics: dict[str, Any]) -> str:
    """One line for the log."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP_segm", "AP50_segm", "AP75_segm")
    return ", ".join(f"{name} {100 * metrics[name]:.2f}" for name in names if metrics.get(name) is not None)
