"""Writer of a soft-label store: shards of fixed rows, each written atomically by one rank; the header is written last and completes the store.

The views of a forward pass depend on the shard alone, so that any number of ranks and restarts writes the same bytes.
"""

import itertools
import json
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ssld.shared.checksums import is_sound, write_with_sum
from ssld.shared.distributed.processes import describe_processes, pins_memory, start_processes, to_device
from ssld.shared.distributed.ranks import from_main_rank, gather_lists, on_main_rank, rank, world_size
from ssld.shared.distributed.stop import StopRequest
from ssld.shared.errors import Stopped, UserError
from ssld.shared.files import file_sha256, write_atomically
from ssld.shared.images import DecodedImage, UnreadableImage, require_decoder
from ssld.shared.models.backbones import check_networks
from ssld.shared.models.teacher import Teacher
from ssld.shared.run_dir import RunDir
from ssld.shared.training.quarantine import Quarantine
from ssld.shared.wording import amount
from ssld.stage1_ssld.config import SoftLabelsConfig
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch, View
from ssld.stage1_ssld.data.loaders import make_loader
from ssld.stage1_ssld.data.soft_labels import encode, missing_record, record_layout
from ssld.stage1_ssld.data.sources import ImageSource, open_sources
from ssld.stage1_ssld.data.views import training_view
from ssld.stage1_ssld.distillation.soft_label_store import (
    FORMAT,
    HEADER,
    header_checksum,
    library_versions,
    pixels_checksum,
    replayed_rows,
    source_record,
    view_settings,
)
from ssld.stage1_ssld.distillation.teacher import compare_teacher, make_teacher, try_teacher


class AllViews(Dataset[View]):
    """(row over all sources, view number) -> View, whose label is the index of its record among those of all rows.

    The views of an image are read consecutively, so that it is decoded once.
    """

    def __init__(self, sources: Sequence[ImageSource], config: SoftLabelsConfig) -> None:
        self._sources, self._config = sources, config
        self._ends = np.cumsum([len(source) for source in sources]).tolist()
        self._last: tuple[int, DecodedImage | None] = (-1, None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def find(self, index: int) -> tuple[ImageSource, int]:
        """Source of a row over all sources, and the row in it."""
        number = next(n for n, end in enumerate(self._ends) if index < end)
        source = self._sources[number]
        return source, index - (self._ends[number] - len(source))

    def __getitem__(self, item: tuple[int, int]) -> View:
        index, view = item
        source, row = self.find(index)
        if self._last[0] != index:
            try:
                self._last = (index, source.open(row, self._config.data.decoder))
            except UnreadableImage:
                self._last = (index, None)
        key, image, config = source.key(row), self._last[1], self._config
        if image is None:
            return View(None, NO_LABEL, key, [source.location(row)])
        return View(training_view(image, key, view, config.data, config.seed), index * config.views + view, key, [])


class ViewBatches:
    """Batches of (row, view) over all views of some shards; a batch holds views of one shard only."""

    def __init__(self, shards: Sequence[range], views: int, batch_size: int) -> None:
        self._shards, self._views, self._batch_size = shards, views, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in self._shards:
            pairs = ((row, view) for row in rows for view in range(self._views))
            while batch := list(itertools.islice(pairs, self._batch_size)):
                yield batch

    def of(self, rows: range) -> int:
        """Number of batches of a shard."""
        return -(-len(rows) * self._views // self._batch_size)


def write_store(config: SoftLabelsConfig) -> None:
    """Write `<output>/store`.

    Raises:
        UserError: a teacher that does not fit the images, a full disk, too many unreadable images.
        Stopped: after SIGTERM or Ctrl-C; finished files are kept.
    """
    require_decoder(config.data.decoder, "data.decoder")
    check_networks(config.networks(), config.hub_data())
    sources = open_sources(config.data.train, "data.train", allow_loss=config.data.allow_loss)
    accelerator, config = start_processes(config)
    device, main = accelerator.device, accelerator.is_main_process
    run = RunDir(config, "write_soft_labels", main=main)
    if run.status == "finished" and not _is_whole(run.path / "store"):
        run.reopen()
    if run.finished_earlier(from_main_rank(run.status)):
        return
    for number, source in enumerate(sources):
        run.tell(f"data.train.{number}", source.path, source.tally)
    run.log(*describe_processes(accelerator, config, config.workers))
    teacher = make_teacher(
        config.teacher, precision=config.precision, device=device, channels_last=config.channels_last
    )
    compare_teacher(run, teacher, config.teacher, config.data.image_size)
    run.log(*teacher.loaded)
    if config.top > teacher.num_classes:
        raise UserError(
            f"top: {config.top} is more than the {teacher.num_classes} classes of the teacher; set top: {teacher.num_classes} to store all"
        )
    layout = record_layout(config.top, teacher.num_classes, config.store_precision)
    images = sum(len(source) for source in sources)
    size = images * config.views * layout.itemsize
    folder = run.path / "store"
    fresh = from_main_rank(not any(folder.glob("shard-*.bin")))
    on_main_rank(lambda: _check_disk(folder, size), "disk space")
    run.log(f"{images} images x {config.views} views x {layout.itemsize} bytes = {amount(size)} in {folder}")
    if fresh:
        run.log(try_teacher(teacher, sources, config, device=device))
    on_main_rank(lambda: folder.mkdir(exist_ok=True))  # not before: a refused teacher leaves nothing

    # ---- the shards
    views = AllViews(sources, config)
    quarantine = Quarantine(run, images)
    shards_rows = [range(at, min(at + config.shard_images, images)) for at in range(0, images, config.shard_images)]
    count = len(shards_rows)
    files = [folder / shard_name(number) for number in range(count)]
    sizes = [len(rows) * config.views * layout.itemsize for rows in shards_rows]
    mine = range(rank(), count, world_size())
    missing = [n for n in mine if not is_sound(files[n]) or files[n].stat().st_size != sizes[n]]
    for number in missing if main else []:
        if files[number].exists():
            run.log(f"{files[number]}: does not match its checksum; recomputing it")
    batches = ViewBatches([shards_rows[number] for number in missing], config.views, config.batch_size)
    with StopRequest() as stop, closing(_loaded(views, batches, config)) as stream:
        # All ranks make the same number of iterations, because they agree on a stop in each.
        for first in range(0, count, world_size()):
            number = first + rank()
            if number < count:
                rows = shards_rows[number]
                if number in missing:
                    records = _records(itertools.islice(stream, batches.of(rows)), rows, config, teacher, layout, stop)
                    if records is not None:
                        _write_shard(files[number], records)
                if files[number].exists():
                    quarantine.add(_unreadable(files[number], views, rows, config.views, layout))
            if stop.agreed():
                quarantine.write()
                raise Stopped(f"the finished files are kept in {folder}")
            quarantine.judge(min((first + world_size()) * config.shard_images, images))
            run.log(f"{min(first + world_size(), count)} of {count} files")

    # ---- the header
    shards = gather_lists(
        [_shard_record(folder, number, config, images, layout) for number in range(rank(), count, world_size())]
    )
    shards = sorted(shards, key=lambda shard: shard["file"])
    metrics = _summary(shards, images, config.views, layout)
    if main:
        header = _header(config, teacher, sources, shards, kept=metrics["kept_probability"])
        write_atomically(folder / HEADER, json.dumps(header, indent=1) + "\n")
    entropy = f"{metrics['entropy']:.3f} nats on average"
    if config.top < teacher.num_classes:
        entropy = f"at least {entropy} (the other classes count as one)"
    run.log(
        f"store of {amount(metrics['bytes'])}; {100 * metrics['first_probability']:.1f} % of the probability in the most likely class, "
        f"{100 * metrics['kept_probability']:.1f} % in the {config.top} stored ones, entropy {entropy}"
    )
    accelerator.end_training()
    run.finish(metrics, [folder / HEADER])


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.bin"


def _header(
    config: SoftLabelsConfig,
    teacher: Teacher,
    sources: Sequence[ImageSource],
    shards: Sequence[dict[str, Any]],
    *,
    kept: float,
) -> dict[str, Any]:
    """Content of the header: what the soft labels are of, the share of probability in them (`kept`), pixels by which a reader tests that it makes the
    same views, and the shards."""
    header = {
        "format": FORMAT,
        "teacher": teacher.facts(),
        "teacher_settings": teacher.settings(),
        "num_classes": teacher.num_classes,
        "class_names": teacher.class_names,
        "sources": [source_record(source) for source in sources],
        "view": view_settings(config.data),
        "views": config.views,
        "seed": config.seed,
        "top": config.top,
        "kept_probability": round(kept, 4),
        "precision": config.store_precision,
        "shard_images": config.shard_images,
        "versions": library_versions(),
        "replayed": [
            [number, row, view, pixels_checksum(sources[number], row, view, config.data, config.seed)]
            for number, row, view in replayed_rows(sources, config.views)
        ],
        "shards": [{key: shard[key] for key in ("file", "images", "sha256")} for shard in shards],
    }
    return header | {"sha256": header_checksum(header)}


def _loaded(views: AllViews, batches: ViewBatches, config: SoftLabelsConfig) -> Generator[Batch]:
    """Batches of one loader over all shards, whose processes start once and read ahead across shards."""
    yield from make_loader(views, batches, workers=config.workers, pin_memory=pins_memory())


def _records(
    stream: Iterable[Batch],
    rows: range,
    config: SoftLabelsConfig,
    teacher: Teacher,
    layout: np.dtype[Any],
    stop: StopRequest,
) -> np.ndarray | None:
    """Records of all views of some rows, image by image; None if a signal stops this process."""
    records = np.full(len(rows) * config.views, missing_record(layout), layout)
    for batch in stream:
        if stop.requested:
            return None
        if len(batch.keys):
            logits_BK = teacher(to_device(batch.pixels_BCHW, teacher.device))
            records[batch.labels_B.numpy() - rows.start * config.views] = encode(logits_BK, config.top, layout)
    return records


def _unreadable(file: Path, views: AllViews, rows: range, count: int, layout: np.dtype[Any]) -> list[str]:
    """Locations of the images of a shard without soft labels."""
    missing = np.isnan(np.fromfile(file, layout)["rest"]).reshape(-1, count).any(axis=1)
    places = [views.find(rows[int(place)]) for place in np.flatnonzero(missing)]
    return [source.location(row) for source, row in places]


def _check_disk(folder: Path, size: int) -> None:
    """Raise UserError if the remaining files do not fit on the disk."""
    written = sum(file.stat().st_size for file in folder.glob("shard-*.bin"))
    free = shutil.disk_usage(folder.parent).free
    if size - written > free:
        raise UserError(
            f"{folder}: the store takes {amount(size)}, but {amount(free)} are free; set fewer views, a smaller top, or another --output"
        )


def _write_shard(file: Path, records: np.ndarray) -> None:
    write_with_sum(file, records.tobytes())


def _is_whole(store: Path) -> bool:
    """Whether all shards of a finished store with a verified header exist and match their checksums."""
    shards = json.loads((store / HEADER).read_text(encoding="utf-8"))["shards"]
    return all((file := store / shard["file"]).is_file() and file_sha256(file) == shard["sha256"] for shard in shards)


def _shard_record(
    folder: Path, number: int, config: SoftLabelsConfig, images: int, layout: np.dtype[Any]
) -> dict[str, Any]:
    """Checksum of a shard, number of its soft labels, and sums over them: entropy, probability of the most likely and of all stored classes."""
    file = folder / shard_name(number)
    records = np.fromfile(file, layout)
    records = records[~np.isnan(records["rest"])]
    rest = records["rest"].astype(np.float64)
    log_probs = np.concatenate([records["log_probs"].astype(np.float64), np.maximum(rest, -1e9)[:, None]], axis=1)
    probs = np.exp(log_probs)
    return {
        "file": file.name,
        "images": min(config.shard_images, images - number * config.shard_images),
        "sha256": file_sha256(file),
        "soft_labels": len(records),
        "entropy": float(-(probs * log_probs).sum()),
        "first": float(probs[:, 0].sum()),
        "kept": float(probs[:, :-1].sum()),
    }


def _summary(shards: Sequence[dict[str, Any]], images: int, views: int, layout: np.dtype[Any]) -> dict[str, float]:
    """Metrics for result.json; the entropy is over the stored classes and one bucket for the rest."""
    total = {key: sum(shard[key] for shard in shards) for key in ("soft_labels", "entropy", "first", "kept")}
    number = max(1, total["soft_labels"])
    return {
        "images": images,
        "unreadable": images - total["soft_labels"] // views,
        "views": views,
        "bytes": images * views * layout.itemsize,
        "entropy": total["entropy"] / number,
        "first_probability": total["first"] / number,
        "kept_probability": total["kept"] / number,
    }
