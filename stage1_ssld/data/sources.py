"""Image sources: the images at a path by row, and their labels, if there are any.

Folders are listed without `datasets`, whose "imagefolder" may drop files whose class name looks like a split. Parquet files are read in place
(`load_dataset` would write a second copy to disk): small ones into memory, larger ones by row group. Local tar files are indexed and read in place.
Labels are optional. shards.py reads sources in order, without an index.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import IMAGE_SUFFIXES, escaped, list_folders, spread
from ssld.shared.images import DecodedImage, UnreadableImage, open_image, pixels_of
from ssld.shared.tally import Tally
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

HUB_SPLIT = "train"
"""Default split of a hub data set."""
LOSS_SETTING = "set data.allow_loss: true to continue with the remaining images"


class ImageSource:
    """Images of one source, by row.

    Attributes:
        path: path as configured.
        number: number of the source among those of a run.
        class_names: names of its classes; None where unknown, even if there are labels.
        labels: class number per row, NO_LABEL where unlabeled; None for an unlabeled source.
        unlabeled_because: reason why a source that looks labeled was treated as unlabeled; an error only where labels are read.
        folders_are_classes: whether the class names are folder names.
        tally: counts of images, by class folder if there are any, and of what was left out.

    Raises:
        UserError: the path does not exist, holds no images, or lacks a configured column.
    """

    def __init__(self, config: SourceConfig, number: int) -> None:
        self.path, self.number, self.config = config.path, number, config
        self.class_names: list[str] | None = None
        self.labels: list[int] | None = None
        self.unlabeled_because: str | None = None
        self.folders_are_classes = False
        self.tally = Tally()
        self.rows: Rows = self._open(config)
        if len(self) == 0:
            left_out = self.tally.describe()
            raise UserError(f"{self.path}: holds no images{f' ({left_out})' if left_out else ''}")

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """Unique name of the image in a run: number of the source, and relative path or row."""
        return f"{self.number}:{self.rows.name(row)}"

    def location(self, row: int) -> str:
        """Location of the image, for messages."""
        return self.rows.location(row)

    def read(self, row: int) -> Tensor:
        """Decode the image to uint8 [3,H,W]. Raises UnreadableImage."""
        return pixels_of(self.open(row))

    def open(self, row: int, decoder: str = "pil") -> DecodedImage:
        """Decode the image, before conversion to a tensor. Raises UnreadableImage."""
        try:
            encoded = self.rows.encoded(row)
        except OSError as error:
            raise UnreadableImage(self.location(row), str(error.strerror or error)) from None
        return decode(encoded, self.location(row), decoder)

    def _open(self, config: SourceConfig) -> Rows:
        if config.path.startswith("hub:"):
            return self._open_hub(config)
        listing = list_path(config.path, config.split)
        self.tally.merge(listing.tally)
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
                    f"most images lie in class folders, but {escaped(strays[0])} does not ({len(strays)} of {len(names)}); "
                    "move it into one, or set labels: none"
                )
            if not strays:
                folders = [escaped(name.split("/")[0]) for name in names]
                self.class_names, self.folders_are_classes = sorted(set(folders)), True
                number = {name: index for index, name in enumerate(self.class_names)}
                self.labels = [number[name] for name in folders]
                self.tally.keep("class", len(number))
                for name in list_folders(listing.folder) if listing.local else []:
                    if escaped(name) not in number:
                        self.tally.drop("class", "without an image", escaped(name))
        return FileRows(listing.folder, names)

    def _open_list(self, listing: Listing, config: SourceConfig) -> Rows:
        listed = list_rows(listing, config)
        self.tally.merge(listed.tally)
        if config.labels == "auto":
            self.labels, self.unlabeled_because = listed.labels, listed.problem
        rows = listed.rows
        checked = [rows.encoded(row) for row in spread(len(rows), LOOKED_AT)] if listed.local else []
        missing = [place for place in checked if isinstance(place, Path) and not place.is_file()]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(checked)} checked files do not exist, first {escaped(str(missing[0]))}; "
                "set root to the folder that the list is relative to"
            )
        return rows

    def _open_tars(self, listing: Listing, config: SourceConfig) -> Rows:
        if not listing.local:
            raise UserError(f"{self.path}: remote tar files cannot be indexed; set data.streaming: true, or copy them")
        rows = TarRows(listing.folder, listing.files, labels=config.labels == "auto", field=config.image_column)
        self.labels, self.unlabeled_because = rows.labels, rows.problem
        self.tally.merge(rows.tally)
        return rows

    def _open_hub(self, config: SourceConfig) -> Rows:
        """Open a data set of the Hugging Face hub in the cache of `datasets`, which downloads it."""
        if config.labels not in ("auto", "none"):
            raise UserError(f"{self.path}: a label file is for Parquet sources; set labels: auto or none")
        name, split = self.path.removeprefix("hub:"), config.split or HUB_SPLIT
        try:
            # `load_dataset` of an image folder leaves out files whose class is named like a split.
            if datasets.load_dataset_builder(name, config.subset).name == "imagefolder":
                return self._open_hub_folder(name, config)
            rows = datasets.load_dataset(name, config.subset, split=split)
        except UserError:
            raise
        except Exception as error:  # from the hub, the data set's builder or the network
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.path}: cannot be loaded from the hub ({why}); check the name, split and subset"
            ) from None
        if config.image_column not in rows.column_names:
            raise UserError(
                f"{self.path}: has no column {config.image_column!r} (it has {', '.join(rows.column_names)}); set image_column"
            )
        table = rows.data.table
        if config.labels == "auto" and config.label_column in rows.column_names:
            self.labels, self.unlabeled_because = _class_numbers(table.column(config.label_column), config.label_column)
            self.class_names = getattr(rows.features[config.label_column], "names", None) if self.labels else None
        self.tally.keep("image", len(table))
        return TableRows(self.path, table, config.image_column, Path("."))

    def _open_hub_folder(self, name: str, config: SourceConfig) -> Rows:
        """Open a hub data set of image files, listed like any folder."""
        folder = name if Path(name).is_dir() else snapshot_download(name, repo_type="dataset")
        listing = list_path(folder, config.split)
        self.tally.merge(listing.tally)
        return self._open_folder(listing, config)

    def _open_parquet(self, listing: Listing, config: SourceConfig) -> Rows:
        try:
            opened = [filesystem_of(file) for file in listing.files]
            schemas = [pq.read_schema(file, filesystem=filesystem) for filesystem, file in opened]
            if is_manifest(schemas[0]):
                rows = open_manifest(listing.files[0], config, lambda part: ImageSource(part, 0).rows)
                self.tally.keep("image", len(rows))
                return rows
            # If any file lacks the label column, the whole source is unlabeled.
            optional = (config.label_column, config.id_column)
            columns = [name for name in optional if all(name in schema.names for schema in schemas)]
            tables = [
                pq.read_table(
                    file, columns=columns, filesystem=filesystem, page_checksum_verification=True
                ).replace_schema_metadata(None)
                for filesystem, file in opened
            ]
            groups, chosen = row_groups(listing, config), None
            if config.labels == "auto" and config.label_column in columns:
                self._read_labels(listing.files, tables, schemas, config.label_column)
            elif config.labels not in ("auto", "none"):
                table = pa.concat_tables(tables, promote_options="permissive")
                chosen = self._join_labels(table, Path(config.labels), config)
            rows = parquet_rows(listing, self.path, groups, chosen)
            self.tally.keep("image", len(rows))
            return rows
        except PARQUET_ERRORS as error:
            raise unreadable_parquet(self.path, error) from None

    def _read_labels(
        self, files: Sequence[str], tables: Sequence[pa.Table], schemas: Sequence[pa.Schema], column: str
    ) -> None:
        """Read the labels of Parquet files. Files may have their own class names in any order; labels then number the union of all names."""
        numbers: list[int] = []
        names: list[list[str] | None] = []
        for file, schema in zip(files, schemas, strict=True):
            own, problem = _class_names(schema, column)
            if problem:
                self.unlabeled_because = f"{file}: {problem}; correct them, or set labels: none"
                return
            names.append(own)
        together = list(dict.fromkeys(name for own in names for name in own or []))
        for file, table, own in zip(files, tables, names, strict=True):
            labels, problem = _class_numbers(table.column(column), column)
            if labels is None or (together and not own):
                self.unlabeled_because = problem or f"{file} has class numbers without names, others have names"
                return
            if own:
                if max(labels, default=0) >= len(own):
                    self.unlabeled_because = f"{file}: label {max(labels)} is outside its {len(own)} classes"
                    return
                labels = [label if label == NO_LABEL else together.index(own[label]) for label in labels]
            numbers += labels
        self.labels, self.class_names = numbers, together or None
        others = [file for file, own in zip(files, names, strict=True) if own and own != together]
        if others:
            self.tally.change("file", "whose classes are matched by name, in another order", others[0], len(others))

    def _join_labels(self, table: pa.Table, file: Path, config: SourceConfig) -> np.ndarray:
        """Set the labels from a label file and return the rows that have one."""
        if config.id_column not in table.column_names:
            raise UserError(f"{self.path}: has no column {config.id_column!r} to join {file} by; set id_column")
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        try:
            known = pq.read_table(file, page_checksum_verification=True)
        except PARQUET_ERRORS as error:
            raise unreadable_parquet(str(file), error) from None
        if not {config.id_column, config.label_column} <= set(known.column_names):
            raise UserError(f"{file}: needs the columns {config.id_column!r} and {config.label_column!r}")
        numbers, problem = _class_numbers(known.column(config.label_column), config.label_column)
        if numbers is None:
            raise UserError(f"{file}: {problem}")
        for place, ids in ((self.path, table), (file, known)):
            kind = ids.schema.field(config.id_column).type
            if pa.types.is_nested(kind):
                raise UserError(
                    f"{place}: column {config.id_column!r} holds {kind} where numbers or text are needed; set id_column"
                )
        label_of: dict[Any, int] = {}
        for identifier, number in zip(known[config.id_column].to_pylist(), numbers, strict=True):
            if label_of.setdefault(identifier, number) != number:
                raise UserError(
                    f"{file}: {config.id_column} {identifier!r} has the labels {label_of[identifier]} and {number}; keep one"
                )
        identifiers = table[config.id_column].to_pylist()
        labels = [label_of.get(identifier, NO_LABEL) for identifier in identifiers]
        for identifier, label in zip(identifiers, labels, strict=True):
            if identifier not in label_of:
                self.tally.drop("image", f"whose {config.id_column} is not in {file.name}", identifier)
            elif label == NO_LABEL:
                self.tally.skip("image", f"without a class in {file.name}", identifier)
        self.labels = [label for label in labels if label != NO_LABEL]
        return np.flatnonzero(np.array(labels) != NO_LABEL)


def decode(encoded: Encoded, location: str, decoder: str = "pil") -> DecodedImage:
    """Decode an image. Raises UnreadableImage."""
    if encoded is None:
        raise UnreadableImage(location, "empty")
    return open_image(encoded, name=None if isinstance(encoded, Path) else location, decoder=decoder)


def open_sources(
    configs: Sequence[SourceConfig], key: str, *, allow_loss: bool = False, otherwise: str = LOSS_SETTING
) -> list[ImageSource]:
    """Open several sources.

    Args:
        key: setting of the sources, for messages.
        allow_loss: whether to continue where most images of a source or class are lost.
        otherwise: advice in the message on lost images.

    Raises:
        UserError: a path that is not a source; images lost in bulk, unless `allow_loss`.
    """
    sources = []
    for number, config in enumerate(configs):
        try:
            source = ImageSource(config, number)
            source.tally.check(source.path, allow_loss=allow_loss, otherwise=otherwise)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        sources.append(source)
    return sources


class ListedRows(NamedTuple):
    """Rows of a list file: files, class numbers or None, the reason why there are none, counts, and whether the files are local."""

    rows: FileRows
    labels: list[int] | None
    problem: str | None
    tally: Tally
    local: bool


_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(\.0*)?")
_NUMBERED = re.compile(rf"(.*?)[ \t,]+({_NUMBER.pattern})$")
_SUFFIXED = re.compile(rf"(.*?(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))(?:[ \t]+|,[ \t]*)(.+)", re.IGNORECASE)


def list_rows(listing: Listing, config: SourceConfig) -> ListedRows:
    """Parse a list file: one path per line, optionally followed by a space, tab or comma and a class number; empty lines and # comments are skipped.

    A path may be quoted. Backslashes are read as slashes if no file has the name with backslashes. Raises UserError for a file that is not text, and
    for a URL that no installed package can open.
    """
    file, folder = listing.files[0], config.root or listing.folder
    names: list[str] = []
    labels: list[int | None] = []
    tally, problem = Tally(), None
    label_of: dict[str, int | None] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.strip(" \t\r")
        if not line or (line.startswith("#") and not _exists(folder, line)):
            continue
        name, label, fault = _entry(line, folder)
        problem = problem or (fault and f"line {number}: {fault}")
        if name in label_of:
            tally.change("image", "listed more than once", escaped(name))
            if None not in (label, label_of[name]) and label != label_of[name]:
                problem = (
                    problem or f"line {number}: {escaped(name)} has another class number on an earlier line; keep one"
                )
        label_of[name] = label
        names.append(name)
        labels.append(label)
    given = [label for label in labels if label is not None]
    if given and len(given) != len(labels):
        problem = problem or f"image {labels.index(None) + 1} has no class number, others have; give one to all or none"
    for place in {name.partition("://")[0]: name for name in (folder, *names) if "://" in name}.values():
        filesystem_of(place)
    tally.keep("image", len(names))
    local = "://" not in folder and not any("://" in name for name in names)
    return ListedRows(FileRows(folder, names), None if problem else given or None, problem, tally, local)


def _entry(line: str, folder: str) -> tuple[str, int | None, str | None]:
    """(path, class number or None, error message or None) of a line of a list."""
    name, rest = line, ""
    if line[0] in "\"'" and (end := line.find(line[0], 1)) > 0:
        name, rest = line[1:end], line[end + 1 :].strip(" \t,")
    elif match := _SUFFIXED.match(line):
        if _NUMBER.fullmatch(match[2]) or not _exists(folder, line):
            name, rest = match[1], match[2]
    elif (match := _NUMBERED.match(line)) and not _exists(folder, line):
        name, rest = match[1], match[2]
    if "\\" in name and not _exists(folder, name) and _exists(folder, name.replace("\\", "/")):
        name = name.replace("\\", "/")
    if not rest:
        return name, None, None
    if not _NUMBER.fullmatch(rest):
        return name, None, f"{escaped(rest)!r} is not a class number; give every image one, or none"
    return name, max(int(float(rest)), NO_LABEL), None


def _exists(folder: str, name: str) -> bool:
    return "://" not in folder and "://" not in name and (Path(folder) / name).is_file()


def _class_numbers(column: pa.ChunkedArray, name: str) -> tuple[list[int] | None, str | None]:
    """(labels of a column, NO_LABEL for null and negative ones; None), or (None, the reason)."""
    if not pa.types.is_integer(column.type):
        return None, (
            f"column {name!r} holds {column.type} where class numbers are needed; set label_column, or labels: none"
        )
    return [NO_LABEL if label is None or label < 0 else label for label in column.to_pylist()], None


def _class_names(schema: pa.Schema, column: str) -> tuple[list[str] | None, str | None]:
    """(class names of a column from the Hugging Face metadata or None, the reason why existing ones are unusable or None)."""
    try:
        value: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return None, "its Hugging Face metadata, which hold the class names, are not JSON"
    for key in ("info", "features", column, "names"):
        value = value.get(key) if isinstance(value, dict) else None
    if not value:
        return None, None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None, f"its class names are not a list of strings ({str(value)[:80]})"
    twice = next((name for number, name in enumerate(value) if name in value[:number]), None)
    return (value, None) if twice is None else (None, f"two of its classes are named {twice!r}")
