"""Reader of detection data sets of the Hugging Face hub: Parquet files with a column of images and a column of objects.

Layout: https://huggingface.co/docs/datasets/object_detection. `image` is bytes, or a struct with them; `objects` is a
struct of lists or a list of structs with `bbox` and `category` (numbers with the names in the file's metadata, or
names), and optionally `area`, `iscrowd` and `segmentation` (polygons, or RLE). Splits follow from file names
(`train-00000-of-00002.parquet`), or from folders if file names are numbers (`train/0000.parquet`). The files are read in
place, a few rows at a time, and the encoded images are written unchanged.
"""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ssld.shared.errors import UserError
from ssld.shared.files import list_files
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage2_detect.data.convert.hub_objects import (
    NO_OBJECTS,
    BoxFormat,
    Keys,
    is_labeled,
    keys_of,
    objects_of,
    read_object,
    side_of,
)
from ssld.stage2_detect.data.convert.records import (
    SourceData,
    SourceImage,
    check_class_names,
    check_splits,
    read_class_list,
    size_of_bytes,
)

HUB, PARQUET = "hub:", ".parquet"
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_SPLIT = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_.-]*"
)  # safe as a folder name: it is taken from the names of untrusted files
_ROWS_AT_A_TIME = 32


def is_hub(source: str) -> bool:
    """Whether a source is `hub:ORG/NAME`, a .parquet file, or a folder with .parquet files."""
    path = Path(source)
    if source.startswith(HUB) or path.suffix.lower() == PARQUET:
        return True
    return path.is_dir() and bool(list_files(path, (PARQUET,)))


def read_hub(
    source: str, *, pending: Path, classes: Path | None, splits: list[str], box_format: BoxFormat
) -> SourceData:
    """Read a data set from a file, a folder or `hub:ORG/NAME`; writes the images to `pending`/SPLIT.

    Class names are those of `classes`, else those of the files' metadata, else the names that occur, sorted. Raises
    UserError, naming file and row, for any fault of the data.
    """
    path = download(source.removeprefix(HUB)) if source.startswith(HUB) else Path(source)
    files = files_by_split(path)
    check_splits(splits, files, source)
    chosen = {split: files[split] for split in splits or files}
    all_files = [file for of_split in chosen.values() for file in of_split]
    keys = {file: _keys_of(file) for file in all_files}
    names = read_class_list(classes) if classes else _class_names(all_files, keys)
    label_of: dict[Any, int] = {name: label for label, name in enumerate(names)}
    data = SourceData("Hugging Face", names, hint="are its numbers another box_format?")
    for split, of_split in chosen.items():
        folder = pending / split
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        images: list[SourceImage] = []
        tally = Tally()
        first = 0
        for file in of_split:
            images += _read_file(file, keys[file], folder, first, label_of, box_format, tally)
            first += pq.read_metadata(file).num_rows
        if not first:
            raise UserError(f"{source}: split {split} has no rows")
        if not images:
            raise UserError(
                f"{source}: split {split} has no row with objects, not even an empty list; label its images first"
            )
        _drop_repeated_ids(images)
        data.splits[split], data.tallies[split] = images, tally
        data.searched[split] = f"in {count(len(of_split), 'file')}, the first {of_split[0]}"
    return data


def download(name: str) -> Path:
    """Fetch the Parquet files of a data set of the hub, or find them in its client's cache; returns their folder. Raises UserError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # from the hub's client or the network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{HUB}{name}: cannot be fetched: {reason}") from None


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """Return the sorted files of each split. Raises UserError for several subsets in one folder."""
    files = [path] if path.is_file() else [path / name for name in list_files(path, (PARQUET,))]
    if not files:
        raise UserError(f"{path}: holds no .parquet file")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.fullmatch(file.stem)
        split = shard["split"] if shard else file.absolute().parent.name if file.stem.isdigit() else file.stem
        if not _SPLIT.fullmatch(split):
            raise UserError(
                f"{file}: its split would be called {split!r}; rename the file, with letters, digits, '_', '-' and '.' before -00000-of-00001"
            )
        by_split.setdefault(split, []).append(file)
    for split, of_split in by_split.items():
        folders = sorted({str(file.parent) for file in of_split})
        if len(folders) > 1:
            raise UserError(f"{path}: several subsets have a split {split!r}; give one of {', '.join(folders[:4])}")
    return by_split


def _keys_of(file: Path) -> Keys:
    """Check the columns of a file by its schema and return the names of the fields."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: is not a Parquet file: {' '.join(str(error).split())[:120]}") from None
    for column in ("image", "objects"):
        if column not in schema.names:
            raise UserError(f"{file}: has no column {column!r} (it has {', '.join(schema.names)})")
    kind = schema.field("objects").type
    if _is_list(kind):
        kind = kind.value_type
    if not pa.types.is_struct(kind):
        raise UserError(f"{file}: objects: expected a struct of lists or a list of structs, got {kind}")
    names = [field.name for field in kind]
    return keys_of(names, str(file))


def _class_names(files: list[Path], keys: dict[Path, Keys]) -> list[str]:
    known = {tuple(names) for names in (_names_in_metadata(file, keys[file].category) for file in files) if names}
    if len(known) > 1:
        raise UserError(f"{files[0]}: the files of this data set name different classes")
    if known:
        names = list(known.pop())
    else:
        categories: set[Any] = set()
        for file in files:
            for number, row in _rows(file, ["objects"]):
                for one in objects_of(row["objects"], f"{file}, row {number}"):
                    category = one.get(keys[file].category)
                    if isinstance(category, list | dict):
                        raise UserError(f"{file}, row {number}: category {category!r}, expected a name or a number")
                    categories.add(category)
        if not all(isinstance(name, str) for name in categories):
            raise UserError(
                f"{files[0]}: objects.{keys[files[0]].category} is a number without a class name; give --classes FILE"
            )
        names = sorted(categories)
    check_class_names(names, f"{files[0]}: objects.{keys[files[0]].category}")
    return names


def _names_in_metadata(file: Path, category: str) -> list[str]:
    """Return the names of the ClassLabel of the categories in the file's Hugging Face metadata; empty without one."""
    try:
        features = json.loads((pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its metadata 'huggingface' is not JSON: {error}") from None
    for key in ("info", "features", "objects"):
        features = features.get(key) if isinstance(features, dict) else None

    def below(value: Any, inside: bool) -> list[str]:
        if isinstance(value, dict):
            if inside and value.get("_type") == "ClassLabel":
                return [str(name) for name in value.get("names") or []]
            return next((names for key, one in value.items() if (names := below(one, inside or key == category))), [])
        return next((names for one in value if (names := below(one, inside))), []) if isinstance(value, list) else []

    return below(features, False)


def _rows(file: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 0, row) of a file. Raises UserError for a damaged file."""
    number = 0
    try:
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            for batch in opened.iter_batches(_ROWS_AT_A_TIME, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file}: damaged after row {number - 1} ({reason}); fetch it again") from None


def _read_file(
    file: Path,
    keys: Keys,
    folder: Path,
    first: int,
    label_of: dict[Any, int],
    box_format: BoxFormat,
    tally: Tally,
) -> Iterator[SourceImage]:
    """Yield the labeled images of a file and write them to `folder`, numbered from `first`."""
    present = pq.read_schema(file).names
    columns = [name for name in ("image", "objects", "image_id", "width", "height") if name in present]
    for number, row in _rows(file, columns):
        place = f"{file}, row {number}"
        if not is_labeled(row["objects"]):
            tally.skip("image", NO_OBJECTS, place)
            continue
        cell = row["image"]
        encoded = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(encoded, bytes) or not encoded:
            raise UserError(f"{place}: holds no image bytes")
        wide, high = (side_of(row.get(key), place, key) for key in ("width", "height"))
        width, height = size_of_bytes(encoded, place, (wide, high) if wide and high else None, place)
        objects = [
            read_object(one, keys, f"{place}, object {index}", label_of, box_format, (width, height))
            for index, one in enumerate(objects_of(row["objects"], place))
        ]
        image = folder / f"{first + number:08d}{_suffix(encoded)}"
        image.write_bytes(encoded)
        image_id = row.get("image_id")
        yield SourceImage(image, width, height, objects, image_id if isinstance(image_id, int) else None)


def _drop_repeated_ids(images: list[SourceImage]) -> None:
    """Renumber the images unless all ids are present and different."""
    ids = {image.image_id for image in images}
    if None in ids or len(ids) < len(images):
        images[:] = [image._replace(image_id=None) for image in images]


def _suffix(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as image:
        name = (image.format or "img").lower()
    return {"jpeg": ".jpg", "mpo": ".jpg", "tiff": ".tif"}.get(name, f".{name}")


def _is_list(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
