"""Image sources: what `path` of a source means, its images by row, and its labels where it has any.

Folders are listed here (`load_dataset("imagefolder")` may drop files whose class name looks like a split) and their images read one by one; Parquet
files are read in place (`load_dataset` would write them to the disk a second time), into memory where they are small and by row group where not;
local tar files are indexed and read in place. A label is never needed. To read in order, without an index: shards.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import spread
from ssld.shared.images import Picture, UnreadableImage, open_image, pixels_of
from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.listing import (
    LOOKED_AT,
    PARQUET_ERRORS,
    Listing,
    filesystem_of,
    list_path,
    read_text,
    unreadable_parquet,
)
from ssld.stage1_ssld.data.manifest import is_manifest, open_manifest
from ssld.stage1_ssld.data.row_groups import parquet_rows, row_groups
from ssld.stage1_ssld.data.rows import Encoded, FileRows, Rows, TableRows, TarRows
from ssld.stage1_ssld.data_config import SourceConfig


class ImageSource:
    """Images of one source, by row.

    Attributes:
        path: as configured; number: of the source among those of a run.
        class_names: of its labels, None where it has none; `labels` may be known without them.
        labels: class number of every row, NO_LABEL where one has none; None for an unlabelled source.
        unlabeled_because: what keeps a source from having labels that it seems to have; an error only where labels are read.

    Raises:
        UserError: the path is not there, holds no images, or its columns or labels are not what the settings say.
    """

    def __init__(self, config: SourceConfig, number: int) -> None:
        self.path, self.number, self.config = config.path, number, config
        self.class_names: list[str] | None = None
        self.labels: list[int] | None = None
        self.unlabeled_because: str | None = None
        self.rows: Rows = self._open(config)
        if len(self) == 0:
            raise UserError(f"{self.path}: holds no images")

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """Names the image wherever it is drawn: number of the source and relative path or row."""
        return f"{self.number}:{self.rows.name(row)}"

    def location(self, row: int) -> str:
        """Where a person finds the image."""
        return self.rows.location(row)

    def read(self, row: int) -> Tensor:
        """The decoded image, uint8 [3,H,W]. Raises UnreadableImage."""
        return pixels_of(self.open(row))

    def open(self, row: int, decoder: str = "pil") -> Picture:
        """The decoded image, of which parts are to become a tensor. Raises UnreadableImage."""
        try:
            encoded = self.rows.encoded(row)
        except OSError as error:
            raise UnreadableImage(self.location(row), str(error.strerror or error)) from None
        return decode(encoded, self.location(row), decoder)

    def _open(self, config: SourceConfig) -> Rows:
        if config.path.startswith("hub:"):
            return self._open_hub(config)
        listing = list_path(config.path)
        if listing.kind == "parquet":
            return self._open_parquet(listing, config)
        if config.labels not in ("auto", "none"):
            remedy = (
                "write the class numbers into the list"
                if listing.kind == "list"
                else "sort these images into class folders"
            )
            raise UserError(f"{self.path}: a label file is for Parquet sources; {remedy} instead")
        if listing.kind == "list":
            return self._open_list(listing, config)
        if listing.kind == "tar":
            return self._open_tars(listing, config)
        return self._open_folder(listing, config)

    def _open_folder(self, listing: Listing, config: SourceConfig) -> Rows:
        names = listing.files
        if config.labels == "auto" and not listing.pattern:
            strays = [name for name in names if name.count("/") != 1]
            if strays and 2 * len(strays) <= len(names):
                self.unlabeled_because = (
                    f"most images lie in class folders, but {strays[0]} does not ({len(strays)} of {len(names)}); "
                    "move it into one, or set labels: none"
                )
            if not strays:
                self.class_names = sorted({name.split("/")[0] for name in names})
                number = {name: index for index, name in enumerate(self.class_names)}
                self.labels = [number[name.split("/")[0]] for name in names]
        return FileRows(listing.folder, names)

    def _open_list(self, listing: Listing, config: SourceConfig) -> Rows:
        rows, labels = list_rows(listing, config)
        if config.labels == "auto":
            self.labels = labels
        looked_at = [rows.location(row) for row in spread(len(rows), LOOKED_AT)]
        missing = [place for place in looked_at if "://" not in place and not Path(place).is_file()]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(looked_at)} files looked at are not there, first {missing[0]}; "
                "set root to the folder that the list is relative to"
            )
        return rows

    def _open_tars(self, listing: Listing, config: SourceConfig) -> Rows:
        if not listing.local:
            raise UserError(f"{self.path}: tar files elsewhere have no index; set data.streaming: true, or copy them")
        rows = TarRows(listing.folder, listing.files, labels=config.labels == "auto")
        self.labels = rows.labels
        return rows

    def _open_hub(self, config: SourceConfig) -> Rows:
        """A data set of the Hugging Face hub, in the cache of `datasets`: it has to be downloaded somewhere anyway."""
        if config.labels not in ("auto", "none"):
            raise UserError(f"{self.path}: a label file is for Parquet sources; set labels: auto or none")
        try:
            rows = datasets.load_dataset(self.path.removeprefix("hub:"), config.subset, split=config.split)
        except Exception as error:  # of the hub, of the data set's builder, of the network
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.path}: cannot be had from the hub ({why}); check the name, split and subset"
            ) from None
        if config.image_column not in rows.column_names:
            raise UserError(
                f"{self.path}: has no column {config.image_column!r} (it has {', '.join(rows.column_names)}); set image_column"
            )
        if config.labels == "auto" and config.label_column in rows.column_names:
            self.labels = _class_numbers(rows.data.table, config.label_column, self.path)
            self.class_names = getattr(rows.features[config.label_column], "names", None)
        return TableRows(self.path, rows.data.table, config.image_column, Path("."))

    def _open_parquet(self, listing: Listing, config: SourceConfig) -> Rows:
        try:
            opened = [filesystem_of(file) for file in listing.files]
            schema, *others = [pq.read_schema(file, filesystem=filesystem) for filesystem, file in opened]
            if is_manifest(schema):
                return open_manifest(listing.files[0], config, lambda part: ImageSource(part, 0).rows)
            # Files without labels among files with labels make an unlabelled source.
            wanted = (config.label_column, config.id_column)
            columns = [name for name in wanted if all(name in other.names for other in (schema, *others))]
            table = pa.concat_tables(
                pq.read_table(file, columns=columns, filesystem=filesystem).replace_schema_metadata(None)
                for filesystem, file in opened
            )
            groups, rows = row_groups(listing, config), None
            if config.labels == "auto" and config.label_column in columns:
                self.labels = _class_numbers(table, config.label_column, self.path)
                self.class_names = _class_names(schema, config.label_column)
            elif config.labels not in ("auto", "none"):
                rows = self._join_labels(table, Path(config.labels), config)
            return parquet_rows(listing, self.path, groups, rows)
        except PARQUET_ERRORS as error:
            raise unreadable_parquet(self.path, error) from None

    def _join_labels(self, table: pa.Table, file: Path, config: SourceConfig) -> np.ndarray:
        """The rows that the label file gives a class."""
        if config.id_column not in table.column_names:
            raise UserError(f"{self.path}: has no column {config.id_column!r} to join {file} by; set id_column")
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        try:
            known = pq.read_table(file)
        except PARQUET_ERRORS as error:
            raise unreadable_parquet(str(file), error) from None
        if not {config.id_column, config.label_column} <= set(known.column_names):
            raise UserError(f"{file}: needs the columns {config.id_column!r} and {config.label_column!r}")
        numbers = _class_numbers(known, config.label_column, str(file))
        label_of = dict(zip(known[config.id_column].to_pylist(), numbers, strict=True))
        labels = [label_of.get(identifier, NO_LABEL) for identifier in table[config.id_column].to_pylist()]
        self.labels = [label for label in labels if label != NO_LABEL]
        return np.flatnonzero(np.array(labels) != NO_LABEL)


def decode(encoded: Encoded, location: str, decoder: str = "pil") -> Picture:
    """The decoded image. Raises UnreadableImage."""
    if encoded is None:
        raise UnreadableImage(location, "empty")
    return open_image(encoded, name=None if isinstance(encoded, Path) else location, decoder=decoder)


def open_sources(configs: Sequence[SourceConfig], key: str) -> list[ImageSource]:
    """Open several sources. Raises UserError naming the key and the path for anything that is not one."""
    sources = []
    for number, config in enumerate(configs):
        try:
            sources.append(ImageSource(config, number))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return sources


def list_rows(listing: Listing, config: SourceConfig) -> tuple[FileRows, list[int] | None]:
    """(files, class numbers or None) of a list file: a path a line, and behind a space or tab a class number. Empty lines are skipped."""
    names: list[str] = []
    labels: list[int | None] = []
    for line in read_text(listing.files[0]).splitlines():
        if line.strip():
            name, _, last = line.strip().replace("\t", " ").rpartition(" ")
            numbered = bool(name) and last.removeprefix("-").isdigit()
            names.append(name.strip() if numbered else line.strip())
            labels.append(max(int(last), NO_LABEL) if numbered else None)
    given = [label for label in labels if label is not None]
    if given and len(given) != len(labels):
        raise UserError(
            f"{config.path}: image {labels.index(None) + 1} has no class number, others have; give one to all or none"
        )
    return FileRows(config.root or listing.folder, names), given or None


def _class_numbers(table: pa.Table, column: str, path: str) -> list[int]:
    """The labels of a table, NO_LABEL for null and negative ones."""
    if not pa.types.is_integer(table.schema.field(column).type):
        raise UserError(
            f"{path}: column {column!r} holds {table.schema.field(column).type}, class numbers are needed; "
            "set label_column, or labels: none"
        )
    return [NO_LABEL if label is None or label < 0 else label for label in table.column(column).to_pylist()]


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    metadata: dict[str, Any] = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if isinstance(feature, dict) else None
