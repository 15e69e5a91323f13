"""Writing a soft-label store: shards of fixed rows, each by one rank, each complete or absent; the header comes last and makes it a store."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import Dataset

from shared.errors import Stopped, UserError
from shared.images import UnreadableImage
from shared.processes import to_device, uses_gpu
from shared.quarantine import Quarantine
from shared.ranks import from_main_rank, gather_lists, rank, world_size
from shared.run_dir import RunDir, file_sha256, write_atomically
from shared.stop import StopRequest
from stage1_ssld.batch import NO_LABEL, View
from stage1_ssld.config import SoftLabelsConfig
from stage1_ssld.data import make_loader
from stage1_ssld.sources import ImageSource, open_sources
from stage1_ssld.store import (
    FORMAT,
    HEADER,
    answer_type,
    encode_answers,
    library_versions,
    missing_answer,
    pixels_checksum,
    replayed_rows,
    source_record,
    view_settings,
)
from stage1_ssld.teachers import make_teacher
from stage1_ssld.views import training_view


class AllViews(Dataset[View]):
    """(row over all sources, view number) -> View, whose label is the place of its answer among those of all rows."""

    def __init__(self, sources: Sequence[ImageSource], config: SoftLabelsConfig) -> None:
        self._sources, self._config = sources, config
        self._ends = np.cumsum([len(source) for source in sources]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, item: tuple[int, int]) -> View:
        index, view = item
        number = next(n for n, end in enumerate(self._ends) if index < end)
        source = self._sources[number]
        row = index - (self._ends[number] - len(source))
        try:
            image = source.read(row)
        except UnreadableImage:
            return View(None, NO_LABEL, source.key(row), [source.location(row)])
        key, config = source.key(row), self._config
        return View(training_view(image, key, view, config.data, config.seed), index * config.views + view, key, [])


def write_store(config: SoftLabelsConfig) -> None:
    """Write `<output>/store`.

    Raises:
        UserError: anything the user can mend; a disk too small for it; too many unreadable images.
        Stopped: after SIGTERM or Ctrl-C; what is written stays.
    """
    sources = open_sources(config.data.train, "data.train")
    accelerator = Accelerator(cpu=not uses_gpu(config.device))
    device, main = accelerator.device, accelerator.is_main_process
    run = RunDir(config, "write_soft_labels", main=main)
    if from_main_rank(run.status) == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    teacher = make_teacher(config.teacher, precision="fp32", device=device, channels_last=config.channels_last)
    if config.top > teacher.num_classes:
        raise UserError(f"top: {config.top} classes are to be kept, the teacher has {teacher.num_classes}")
    record = answer_type(config.top, teacher.num_classes, config.store_precision)
    images = sum(len(source) for source in sources)
    folder = run.path / "store"
    if main:
        folder.mkdir(exist_ok=True)
        _check_disk(folder, images * config.views * record.itemsize)
    accelerator.wait_for_everyone()
    run.log(
        f"{images} images x {config.views} views x {record.itemsize} bytes = {images * config.views * record.itemsize / 1e6:,.1f} MB in {folder}"
    )

    # ---- the shards
    views = AllViews(sources, config)
    quarantine = Quarantine(run, images)
    count = -(-images // config.shard_images)
    with StopRequest() as stop:
        for first in range(0, count, world_size()):  # all ranks take as many turns: they agree on a stop after each
            number = first + rank()
            file = folder / shard_name(number)
            if number < count and not file.exists():
                rows = range(number * config.shard_images, min((number + 1) * config.shard_images, images))
                answers = np.full(len(rows) * config.views, missing_answer(record), record)
                pairs = [(row, view) for row in rows for view in range(config.views)]
                batches = [pairs[at : at + config.batch_size] for at in range(0, len(pairs), config.batch_size)]
                for batch in make_loader(views, batches, workers=config.workers, pin_memory=device.type == "cuda"):
                    quarantine.add(batch.unreadable)
                    if len(batch.keys):
                        found = encode_answers(teacher(to_device(batch.pixels_BCHW, device)), config.top, record)
                        answers[batch.labels_B.numpy() - rows.start * config.views] = found
                _write_shard(file, answers)
                if main:
                    run.log(f"{min(first + world_size(), count)} of {count} files")
            if stop.agreed():
                raise Stopped(f"the files that are finished stay in {folder}")
    quarantine.judge(images)
    accelerator.wait_for_everyone()

    # ---- the header
    shards = gather_lists(
        [_shard_record(folder, number, config, images, record) for number in range(rank(), count, world_size())]
    )
    if main:
        rows_checked = replayed_rows(sources, config.views)
        header = {
            "format": FORMAT,
            "teacher": teacher.facts(),
            "num_classes": teacher.num_classes,
            "class_names": teacher.class_names,
            "sources": [source_record(source) for source in sources],
            "view": view_settings(config.data),
            "views": config.views,
            "seed": config.seed,
            "top": config.top,
            "precision": config.store_precision,
            "shard_images": config.shard_images,
            "versions": library_versions(),
            "replayed": [
                [number, row, view, pixels_checksum(sources[number], row, view, config.data, config.seed)]
                for number, row, view in rows_checked
            ],
            "shards": sorted(shards, key=lambda shard: shard["file"]),
        }
        write_atomically(folder / HEADER, json.dumps(header, indent=1) + "\n")
    size = sum(shard["images"] for shard in shards) * config.views * record.itemsize
    kept = sum(shard["kept"] for shard in shards) / max(1, sum(shard["answers"] for shard in shards))
    missing = images - sum(shard["answers"] for shard in shards) // config.views
    run.log(
        f"store of {size / 1e6:,.1f} MB: the {config.top} classes kept hold {100 * kept:.2f} % of the probability on average"
    )
    run.finish(
        {"images": images, "views": config.views, "bytes": size, "kept_probability": kept, "unreadable": missing},
        [folder / HEADER],
    )


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.bin"


def _write_shard(file: Path, answers: np.ndarray) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as out:
            out.write(answers.tobytes())
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _shard_record(
    folder: Path, number: int, config: SoftLabelsConfig, images: int, record: np.dtype[Any]
) -> dict[str, Any]:
    """What the header says of a shard: its checksum, how many answers it has, and the probability that these keep in all."""
    file = folder / shard_name(number)
    answers = np.fromfile(file, record)
    answers = answers[~np.isnan(answers["rest"])]
    return {
        "file": file.name,
        "images": min(config.shard_images, images - number * config.shard_images),
        "sha256": file_sha256(file),
        "answers": len(answers),
        "kept": float(np.exp(answers["log_probs"].astype(np.float64)).sum()),
    }


def _check_disk(folder: Path, size: int) -> None:
    written = sum(file.stat().st_size for file in folder.glob("shard-*.bin"))
    free = shutil.disk_usage(folder).free
    if size - written > free:
        raise UserError(
            f"{folder}: the store takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; fewer views, a smaller top, or another --output"
        )
