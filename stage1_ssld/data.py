"""Image sources and batches of stage 1.

A source is a Hugging Face `datasets` dataset without a copy in its cache. Folders are listed here (`load_dataset("imagefolder")` may drop files whose
class name looks like a split) and their images read one by one; Parquet files are read into memory whole, encoded images and all, by every process of
a run (`load_dataset` would write them to the disk a second time). A label is never needed.

Batches are a pure function of (seed, step, rank), views of (seed, image key, pass): nothing about them is stored in a checkpoint.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.table import InMemoryTable
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from shared.errors import UserError
from shared.files import require_images
from shared.images import UnreadableImage, decode_image, seeded_view, stable_seed
from shared.workers import start_worker
from stage1_ssld.batch import NO_LABEL, View, collate
from stage1_ssld.data_config import DataConfig, SourceConfig
from stage1_ssld.views import train_view, val_view


class ImageSource:
    """Images of one source, by row.

    Attributes:
        class_names: of its labels, None where it has none; `labels` is then None too.
        labels: class number of every row.
    """

    def __init__(self, config: SourceConfig, number: int) -> None:
        self.path, self.number = Path(config.path), number
        self.class_names: list[str] | None = None
        self.labels: list[int] | None = None
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file or folder")
        parquet = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if parquet:
            self._open_parquet(parquet, config)
        else:
            self._list_folder(config)
        if len(self) == 0:
            raise UserError(f"{self.path}: holds no images")

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        """Names the image wherever it is drawn: number of the source and relative path or row."""
        return f"{self.number}:{self._rows[row]['image'] if self._folder else row}"

    def location(self, row: int) -> str:
        """Where a person finds the image."""
        return str(self.path / self._rows[row]["image"]) if self._folder else f"{self.path}, row {row}"

    def read(self, row: int) -> Tensor:
        """The decoded image, uint8 [3,H,W]. Raises UnreadableImage."""
        image = self._rows[row]["image"]
        if self._folder:
            return decode_image(self.path / image)
        if isinstance(image, dict):
            folder = self.path if self.path.is_dir() else self.path.parent
            image = image.get("bytes") or (folder / image["path"] if image.get("path") else None)
        if image is None:
            raise UnreadableImage(self.location(row), "empty")
        return decode_image(image)

    def _list_folder(self, config: SourceConfig) -> None:
        self._folder = True
        names = require_images(self.path)
        if config.labels not in ("auto", "none"):
            raise UserError(
                f"{self.path}: a label file is for Parquet sources; sort these images into class folders instead"
            )
        strays = [name for name in names if name.count("/") != 1]
        if config.labels == "auto" and strays and 2 * len(strays) <= len(names):
            raise UserError(
                f"{self.path}: most images lie in class folders, but {strays[0]} does not ({len(strays)} of {len(names)}); "
                "move it into one, or set labels: none"
            )
        if config.labels == "auto" and not strays:
            self.class_names = sorted({name.split("/")[0] for name in names})
            number = {name: index for index, name in enumerate(self.class_names)}
            self.labels = [number[name.split("/")[0]] for name in names]
        self._rows = datasets.Dataset.from_dict({"image": names})

    def _open_parquet(self, files: list[Path], config: SourceConfig) -> None:
        self._folder = False
        try:
            schema, *others = [pq.read_schema(file) for file in files]
            # Files without labels among files with labels make an unlabelled source.
            wanted = (config.image_column, config.label_column, config.id_column)
            columns = [name for name in wanted if all(name in other.names for other in (schema, *others))]
            table = pa.concat_tables(
                [pq.read_table(file, columns=columns, memory_map=True).replace_schema_metadata(None) for file in files]
            )
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: not readable as Parquet ({' '.join(str(error).split())[:160]})") from None
        if config.image_column not in columns:
            bare = next(file for file in files if config.image_column not in pq.read_schema(file).names)
            has = ", ".join(pq.read_schema(bare).names)
            raise UserError(f"{bare}: has no column {config.image_column!r} (it has {has}); set image_column")
        if config.labels == "auto" and config.label_column in columns:
            self.labels = _class_numbers(table, config.label_column, self.path)
            self.class_names = _class_names(schema, config.label_column)
        elif config.labels not in ("auto", "none"):
            table = self._join_labels(table, Path(config.labels), config)
        images = table.select([config.image_column]).rename_columns(["image"]).replace_schema_metadata(None)
        self._rows = datasets.Dataset(InMemoryTable(images))

    def _join_labels(self, table: pa.Table, file: Path, config: SourceConfig) -> pa.Table:
        """Keep the rows that the label file gives a class."""
        if config.id_column not in table.column_names:
            raise UserError(f"{self.path}: has no column {config.id_column!r} to join {file} by; set id_column")
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        try:
            known = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: not readable as Parquet ({' '.join(str(error).split())[:160]})") from None
        if not {config.id_column, config.label_column} <= set(known.column_names):
            raise UserError(f"{file}: needs the columns {config.id_column!r} and {config.label_column!r}")
        numbers = _class_numbers(known, config.label_column, file)
        label_of = dict(zip(known[config.id_column].to_pylist(), numbers, strict=True))
        labels = [label_of.get(identifier, NO_LABEL) for identifier in table[config.id_column].to_pylist()]
        self.labels = [label for label in labels if label != NO_LABEL]
        # Not `take`, which joins the chunks of a column into one: above 2 GB of images its offsets overflow.
        return table.filter(pa.array([label != NO_LABEL for label in labels], pa.bool_()))


def _class_numbers(table: pa.Table, column: str, path: Path) -> list[int]:
    """The labels of a table, NO_LABEL for null and negative ones."""
    if not pa.types.is_integer(table.schema.field(column).type):
        raise UserError(
            f"{path}: column {column!r} holds {table.schema.field(column).type}, class numbers are needed; "
            "set label_column, or labels: none"
        )
    return [NO_LABEL if label is None or label < 0 else label for label in table.column(column).to_pylist()]


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if isinstance(feature, dict) else None


def open_sources(configs: Sequence[SourceConfig], key: str) -> list[ImageSource]:
    """Open several sources. Raises UserError naming the key and the path for anything that is not one."""
    sources = []
    for number, config in enumerate(configs):
        try:
            sources.append(ImageSource(config, number))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return sources


class TrainViews(Dataset[Any]):
    """(index over all sources, pass) -> (view, label, key, locations of unreadable images met on the way).

    An unreadable image is replaced by the next one; the view is None when the 100 next ones are unreadable too.
    """

    def __init__(
        self, sources: Sequence[ImageSource], labels: Sequence[Sequence[int] | None], config: DataConfig, seed: int
    ) -> None:
        self.sources, self.labels, self.config, self.seed = sources, labels, config, seed
        self._ends = torch.tensor([len(source) for source in sources]).cumsum(0).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, item: tuple[int, int]) -> View:
        index, view = item
        unreadable: list[str] = []
        while len(unreadable) < min(len(self), 100):
            number = next(n for n, end in enumerate(self._ends) if index < end)
            source, row = self.sources[number], index - (self._ends[number] - len(self.sources[number]))
            try:
                image = source.read(row)
            except UnreadableImage:
                unreadable.append(source.location(row))
                index = (index + 1) % len(self)
                continue
            key, labels, config = source.key(row), self.labels[number], self.config
            with seeded_view(key, view, self.seed):
                pixels = train_view(
                    image, size=config.image_size, area=config.crop_area, ratio=config.crop_ratio, flip=config.flip
                )
            return View(pixels, NO_LABEL if labels is None else labels[row], key, unreadable)
        return View(
            None, NO_LABEL, "", unreadable
        )  # the loop says so: an error raised here would carry a worker's traceback


class ValViews(Dataset[Any]):
    """Row of a source -> (view, label, key, unreadable); the view is None for an unreadable image."""

    def __init__(self, source: ImageSource, labels: Sequence[int] | None, *, size: int, crop: float) -> None:
        self.source, self.labels, self.size, self.crop = source, labels, size, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> View:
        label = NO_LABEL if self.labels is None else self.labels[row]
        try:
            return View(
                val_view(self.source.read(row), size=self.size, crop=self.crop), label, self.source.key(row), []
            )
        except UnreadableImage:
            return View(None, label, self.source.key(row), [self.source.location(row)])


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (index, pass) of one rank, from `start_step` to `steps`.

    Sample number n of the run is image n % N of pass n // N in that pass's permutation. A step takes the next `batch_size` numbers; ranks and
    accumulation cut them into contiguous pieces, so that every split of a global batch sees the same images.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        steps: int,
        start_step: int,
        seed: int,
        rank: int,
        ranks: int,
        accumulate: int,
    ) -> None:
        if batch_size % (ranks * accumulate):
            raise UserError(f"batch_size {batch_size} is not a multiple of {ranks} processes x accumulate {accumulate}")
        self.images, self.batch_size, self.steps, self.start_step = images, batch_size, steps, start_step
        self.seed, self.rank, self.ranks, self.accumulate = seed, rank, ranks, accumulate

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // (self.ranks * self.accumulate)
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.start_step, self.steps):
            for micro in range(self.accumulate):
                first = step * self.batch_size + (self.rank * self.accumulate + micro) * size
                batch = []
                for number in range(first, first + size):
                    if number // self.images != epoch:
                        epoch = number // self.images
                        order = torch.randperm(
                            self.images, generator=torch.Generator().manual_seed(stable_seed(self.seed, epoch))
                        )
                    batch.append((int(order[number % self.images]), epoch))
                yield batch


def make_loader(dataset: Dataset[Any], batches: Any, *, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """A loader over lists of items; decoding happens in `workers` processes, in this one for 0."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: the loader's base seed would otherwise advance torch's global generator
    )


def val_batches(images: int, batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """Batches fixed by index, dealt to the ranks in turn: the same batches for any number of ranks."""
    starts = range(rank * batch_size, images, batch_size * ranks)
    return [list(range(start, min(start + batch_size, images))) for start in starts]
