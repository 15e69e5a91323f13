"""The soft-label store: soft labels of V views of every image, read back instead of running the teacher.

    store.json         what the soft labels are bound to: teacher with its input size and precision, sources, view settings, classes, m, V, versions;
                       a checksum of every shard
    shard-00000.bin    soft labels of `shard_images` images after the other, V views each, as records

What a record holds: data/soft_labels.py. V views per image, K classes, m of them kept.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssld.shared.distributed.ranks import gather_lists, rank, world_size
from ssld.shared.errors import UserError
from ssld.shared.files import ImageFolder, file_sha256, spread
from ssld.shared.images import UnreadableImage
from ssld.shared.models.model_file import content_hash
from ssld.shared.models.teacher import Teacher
from ssld.shared.run_dir import input_digest
from ssld.stage1_ssld.data.soft_labels import record_layout
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data.views import training_view
from ssld.stage1_ssld.data_config import DataConfig, is_remote

FORMAT = 2
HEADER = "store.json"
REPLAYED = 8
"""Views that are made again when a store is opened."""
VIEW_KEYS = (
    "image_size", "train_view", "crop_area", "crop_ratio", "interpolation", "flip", "augment", "augment_probability", "erase"
)  # fmt: skip
"""Settings that a training view depends on."""
CENTER_KEYS = ("image_size", "train_view", "interpolation", "val_crop")
"""The same with train_view: center."""
_OPEN_SHARDS = 256
"""Maps held open: each holds a file, and a process may have 1,024."""
_NAMES = 64
"""Names of images, spread over a source, that it is known by."""


def source_record(source: ImageSource) -> dict[str, Any]:
    """What a source is known by: its settings, rows, and a digest of its files."""
    config = source.config
    local = not is_remote(config.path) and "*" not in config.path
    settings = config.model_dump(mode="json", exclude={"weight", "labels", "label_column"})
    names = [source.rows.name(row) for row in spread(len(source), _NAMES, repeat=True)]
    labels = None if config.labels in ("auto", "none") else config.labels  # a label file leaves rows out
    return settings | {
        "labels": labels,
        "rows": len(source),
        "names": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        "digest": input_digest(ImageFolder(config.path)) if local else None,
    }


def view_settings(data: DataConfig) -> dict[str, Any]:
    """What a view depends on, as JSON values."""
    return data.model_dump(mode="json", include=set(CENTER_KEYS if data.train_view == "center" else VIEW_KEYS))


def replayed_rows(sources: Sequence[ImageSource], views: int) -> list[tuple[int, int, int]]:
    """(source, row, view) of the views whose pixels are checked: at least one a source, at least 8 where there are so many, spread over the rows."""
    each = -(-REPLAYED // len(sources))
    chosen = {
        (source.number, row, number % views): None
        for source in sources
        for number, row in enumerate(spread(len(source), each, repeat=True))
    }
    return list(chosen)


def pixels_checksum(source: ImageSource, row: int, view: int, data: DataConfig, seed: int) -> str | None:
    """Checksum of one view; None where its image cannot be read."""
    try:
        image = source.open(row, data.decoder)
    except UnreadableImage:
        return None
    return content_hash({"": training_view(image, source.key(row), view, data, seed)})[:16]


def header_checksum(header: dict[str, Any]) -> str:
    """Of everything a header says besides."""
    said = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class SoftLabelStore:
    """A finished store, opened for reading.

    Attributes:
        views: V; top: m; num_classes: K; class_names; seed: of the views.
        header: all that store.json says.

    Raises:
        UserError: not a store, an unfinished one, or shards that are missing, of another size or damaged. All ranks open it together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / HEADER).is_file():
            unfinished = any(path.glob("shard-*.bin")) if path.is_dir() else False
            what = "is unfinished: run write_soft_labels.py again" if unfinished else f"holds no {HEADER}: not a store"
            raise UserError(f"{path}: {what}")
        try:
            self.header: dict[str, Any] = json.loads((path / HEADER).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path / HEADER}: not readable ({error}); write the store again") from None
        header = self.header
        form = header.get("format") if isinstance(header, dict) else None
        if form != FORMAT:
            raise UserError(f"{path}: a store of format {form}, this version reads {FORMAT}; write it again")
        if header.get("sha256") != header_checksum(header):
            raise UserError(
                f"{path / HEADER}: does not match its checksum; put back what was written, or write it again"
            )
        self.views, self.top, self.seed = int(header["views"]), int(header["top"]), int(header["seed"])
        self.num_classes: int = header["num_classes"]
        self.class_names: list[str] | None = header["class_names"]
        self._first_row = np.cumsum([0, *(source["rows"] for source in header["sources"])]).tolist()
        self._layout = record_layout(self.top, self.num_classes, header["precision"])
        self._check_shards()
        self._shards: dict[int, np.ndarray] = {}

    def record(self, source: int, row: int, view: int) -> np.void:
        """The soft label of one view. Raises UnreadableImage for an image that could not be read when the store was written."""
        number, place = divmod(self._first_row[source] + row, self.header["shard_images"])
        if number not in self._shards:
            while len(self._shards) >= _OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]
            file = self.path / self.header["shards"][number]["file"]
            self._shards[number] = np.memmap(file, self._layout, "r").reshape(-1, self.views)
        record: np.void = self._shards[number][place, view]
        if np.isnan(record["rest"]):
            raise UnreadableImage(f"source {source}, row {row}", "was unreadable when the store was written")
        return record

    @property
    def teacher_precision(self) -> str:
        """Precision of the teacher's forward pass."""
        return str(self.header["teacher_settings"]["precision"])

    def facts(self) -> dict[str, Any]:
        """What a student's file says about its teacher."""
        facts: dict[str, Any] = self.header["teacher"]
        return facts

    def match(self, sources: Sequence[ImageSource], data: DataConfig) -> None:
        """Give each source its number in the store, and replay some views.

        A source is known by its path, or, where its folder has moved as a whole, by its files.

        Raises UserError naming what differs: a view setting, a source that is not in the store or has other images, or the pixels of a replayed view.
        """
        ours = view_settings(data)
        for key, theirs in self.header["view"].items():
            if ours[key] != theirs:
                raise UserError(
                    f"store {self.path}: was written with data.{key} {json.dumps(theirs)}, here it is {json.dumps(ours[key])}; "
                    "set it back, or write another store"
                )
        for source in sources:
            source.number = self._number_of(source)
        by_number = {source.number: source for source in sources}
        for number, row, view, checksum in self.header["replayed"]:
            if number in by_number and pixels_checksum(by_number[number], row, view, data, self.seed) != checksum:
                raise UserError(
                    f"store {self.path}: view {view} of {by_number[number].location(row)} is not the one its soft label was written for; "
                    f"libraries differ ({self._other_versions() or 'none that is recorded'}): write the store again here"
                )

    def note(self) -> str | None:
        """A line on library versions that differ from those it was written with; None when none do."""
        versions = self._other_versions()
        return (
            f"store {self.path}: written with {versions}; the views it was checked on are the same"
            if versions
            else None
        )

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises UserError when the store holds the soft labels of another teacher, or of the same with another input size or precision."""
        theirs, ours = self.facts(), teacher.facts()
        if theirs["content_sha256"] != ours["content_sha256"]:
            raise UserError(
                f"store {self.path}: holds the soft labels of {theirs['reference']}, not of {ours['reference']}: other weights; "
                "give that teacher, or none"
            )
        for key, value in teacher.settings().items():
            stored = self.header["teacher_settings"][key]
            if stored != value:
                raise UserError(
                    f"store {self.path}: its soft labels are those of a teacher with {key} {json.dumps(stored)}, here it is {json.dumps(value)}; "
                    f"set teacher.{key} as it was, give no teacher, or write another store"
                )

    def _number_of(self, source: ImageSource) -> int:
        ours, stored = source_record(source), self.header["sources"]
        differences = [[key for key, value in ours.items() if theirs[key] != value] for theirs in stored]
        for same in ([], ["path"]):
            if same in differences and (not same or ours["digest"] is not None):
                return differences.index(same)
        for theirs, keys in zip(stored, differences, strict=True):
            if theirs["path"] == source.path:
                key = keys[0]
                files = key in ("names", "digest")
                what = "its files have changed" if files else f"{key} was {theirs[key]!r} and is {ours[key]!r}"
                raise UserError(
                    f"store {self.path}: {source.path} is not what it was written for: {what}; write another store"
                )
        known = ", ".join(theirs["path"] for theirs in stored)
        raise UserError(f"store {self.path}: has no soft labels for {source.path}; it was written for {known}")

    def _check_shards(self) -> None:
        """Every rank reads its share of the shards; all tell the same error."""
        found: list[str] = []
        shards = self.header["shards"]
        for shard in shards[rank() :: world_size()]:
            file = self.path / shard["file"]
            if not file.is_file():
                found.append(f"{file}: is missing")
            elif file.stat().st_size != shard["images"] * self.views * self._layout.itemsize:
                found.append(f"{file}: has another size than it was written with")
            elif file_sha256(file) != shard["sha256"]:
                found.append(f"{file}: does not match its checksum")
        found = gather_lists(found)
        if found:
            raise UserError(
                f"store {self.path}: {found[0]}; run write_soft_labels.py again with the settings of {self.path.parent}: it makes that file anew"
            )

    def _other_versions(self) -> str:
        ours = library_versions()
        return ", ".join(
            f"{name} {theirs} then, {ours.get(name)} now"
            for name, theirs in self.header["versions"].items()
            if ours.get(name) != theirs
        )


def library_versions() -> dict[str, str]:
    """Of the libraries that pixels depend on."""
    import PIL
    import timm
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    return versions | {"pillow": PIL.__version__, "numpy": np.__version__}
