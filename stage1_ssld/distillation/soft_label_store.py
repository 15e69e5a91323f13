"""Soft-label store: soft labels of V views of every image, which replace the live teacher.

    store.json         inputs of the soft labels: teacher with its input size and precision, sources, view settings, classes, m, V, versions; and a
                       checksum per shard
    shard-00000.bin    records of `shard_images` images, V views each

data/soft_labels.py defines the records. V views per image, K classes, m stored classes per view.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
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
from ssld.shared.run_identity import input_digest
from ssld.stage1_ssld.data.labels import are_prototypes
from ssld.stage1_ssld.data.soft_labels import record_layout
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data.views import training_view
from ssld.stage1_ssld.data_config import DataConfig, TeacherConfig, is_remote

FORMAT = 2
HEADER = "store.json"
REPLAYED = 8
"""Fewest views that are recomputed and compared when a store is opened."""
VIEW_KEYS = (
    "image_size", "train_view", "crop_area", "crop_ratio", "interpolation", "flip", "augment", "augment_probability", "erase"
)  # fmt: skip
"""Settings that a training view depends on."""
CENTER_KEYS = ("image_size", "train_view", "interpolation", "val_crop")
"""Settings that a view depends on with train_view: center."""
_OPEN_SHARDS = 256
"""Most shards mapped at a time: each keeps a file open, and a process may open 1,024."""
_NAMES = 64
"""Image names, spread over a source, that identify it."""


def source_record(source: ImageSource) -> dict[str, Any]:
    """Identity of a source: settings, number of rows, names of some images, and a digest of its files."""
    config = source.config
    local = not is_remote(config.path) and "*" not in config.path
    settings = config.model_dump(mode="json", exclude={"weight", "labels", "label_column"})
    names = [source.rows.name(row) for row in spread(len(source), _NAMES, repeat=True)]
    labels = None if config.labels in ("auto", "none") else config.labels  # a label file selects rows
    return settings | {
        "labels": labels,
        "rows": len(source),
        "names": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        "digest": input_digest(ImageFolder(config.path)) if local else None,
    }


def view_settings(data: DataConfig) -> dict[str, Any]:
    """Settings that a view depends on, as JSON values."""
    return data.model_dump(mode="json", include=set(CENTER_KEYS if data.train_view == "center" else VIEW_KEYS))


def replayed_rows(sources: Sequence[ImageSource], views: int) -> list[tuple[int, int, int]]:
    """(source, row, view) of the views to compare: at least one per source and REPLAYED in all, if there are so many, spread over the rows."""
    each = -(-REPLAYED // len(sources))
    chosen = {
        (source.number, row, number % views): None
        for source in sources
        for number, row in enumerate(spread(len(source), each, repeat=True))
    }
    return list(chosen)


def pixels_checksum(source: ImageSource, row: int, view: int, data: DataConfig, seed: int) -> str | None:
    """Checksum of the pixels of one view; None if its image cannot be read."""
    try:
        image = source.open(row, data.decoder)
    except UnreadableImage:
        return None
    return content_hash({"": training_view(image, source.key(row), view, data, seed)})[:16]


def header_checksum(header: dict[str, Any]) -> str:
    """Checksum of all other entries of a header."""
    entries = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


class SoftLabelStore:
    """A finished store, opened for reading.

    Attributes:
        views: V, views per image.
        top: m, stored classes per view.
        num_classes: K.
        class_names: their names; None where unknown.
        seed: seed of the views.
        header: content of store.json.

    Raises:
        UserError: not a store, an unfinished one, or shards that are missing, of another size or damaged. All ranks open it together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / HEADER).is_file():
            unfinished = any(path.glob("shard-*.bin")) if path.is_dir() else False
            what = "is unfinished: run ssld soft-labels again" if unfinished else f"holds no {HEADER}: not a store"
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
                f"{path / HEADER}: does not match its checksum; restore the original file, or rewrite the store"
            )
        self.views, self.top, self.seed = int(header["views"]), int(header["top"]), int(header["seed"])
        self.num_classes: int = header["num_classes"]
        self.class_names: list[str] | None = header["class_names"]
        self._first_row = np.cumsum([0, *(source["rows"] for source in header["sources"])]).tolist()
        self._layout = record_layout(self.top, self.num_classes, header["precision"])
        self._check_shards()
        self._shards: dict[int, np.ndarray] = {}

    def record(self, source: int, row: int, view: int) -> np.void:
        """Record of one view. Raises UnreadableImage for an image that could not be read when the store was written."""
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
        """Teacher metadata for the student's file."""
        facts: dict[str, Any] = self.header["teacher"]
        return facts

    def match(self, sources: Sequence[ImageSource], data: DataConfig) -> None:
        """Set the number of each source to its number in the store, and recompute some views.

        A source is identified by its path, or, if its folder was moved as a whole, by its files.

        Raises UserError with the difference: a view setting, a source that is not in the store or has other images, or the pixels of a view.
        """
        current = view_settings(data)
        for key, stored in self.header["view"].items():
            if current[key] != stored:
                raise UserError(
                    f"store {self.path}: was written with data.{key} {json.dumps(stored)}, but this run has {json.dumps(current[key])}; "
                    "set it back, or write another store"
                )
        for source in sources:
            source.number = self._number_of(source)
        by_number = {source.number: source for source in sources}
        for number, row, view, checksum in self.header["replayed"]:
            if number in by_number and pixels_checksum(by_number[number], row, view, data, self.seed) != checksum:
                raise UserError(
                    f"store {self.path}: view {view} of {by_number[number].location(row)} differs from the one its soft label was written for; "
                    f"library versions that differ: {self._other_versions() or 'none that is recorded'}; write the store again with these"
                )

    def notes(self) -> Iterator[str]:
        """Yield lines for the log on what differs from the time it was written, and on what an earlier version did not record."""
        if versions := self._other_versions():
            yield f"store {self.path}: written with {versions}; the compared views are equal"
        settings = self.header["teacher_settings"]
        if "mean" not in settings:
            yield f"store {self.path}: written by a version that did not record mean and std of its teacher, so they are not compared"
        unresized = settings["size"] is None or set(map(bool, settings["size"])) == {False}
        if unresized and are_prototypes(self.class_names):
            side = self.header["view"]["image_size"]
            yield (
                f"warning: store {self.path}: written by a version whose teachers of prototypes saw views of {side} px as they are; prototypes hold "
                "at the size they were made at: if that is another one, write the store again (ssld soft-labels)"
            )

    def _pixels(self, size: Any) -> Any:
        """Return the (height, width) that a teacher sees, or those of an ensemble's members: null is the size of the views."""
        side = self.header["view"]["image_size"]
        of_members = isinstance(size, list) and not all(isinstance(one, int) for one in size)
        return [self._pixels(one) for one in size] if of_members else size or [side, side]

    def check_teacher(self, teacher: Teacher) -> None:
        """Raise UserError if the store holds the soft labels of another teacher, or of this teacher at another input size or precision."""
        writer, given = self.facts(), teacher.facts()
        if writer["content_sha256"] != given["content_sha256"]:
            raise UserError(
                f"store {self.path}: holds the soft labels of {writer['reference']}, not of {given['reference']}: other weights; "
                "give that teacher, or none"
            )
        recorded = self.header["teacher_settings"]
        for key, value in teacher.settings().items():
            stored = recorded.get(key, value)  # an earlier version did not record mean and std
            if stored != value and not (key == "size" and self._pixels(stored) == self._pixels(value)):
                back = f"set teacher.{key} back, " if key in TeacherConfig.model_fields else ""
                raise UserError(
                    f"store {self.path}: its soft labels are of a teacher with {key} {json.dumps(stored)}, but this run has {json.dumps(value)}; "
                    f"{back}give no teacher, or write another store"
                )

    def _number_of(self, source: ImageSource) -> int:
        current, stored = source_record(source), self.header["sources"]
        differences = [[key for key, value in current.items() if record[key] != value] for record in stored]
        for allowed in ([], ["path"]):
            if allowed in differences and (not allowed or current["digest"] is not None):
                return differences.index(allowed)
        for record, keys in zip(stored, differences, strict=True):
            if record["path"] == source.path:
                key = keys[0]
                files = key in ("names", "digest")
                what = "its files have changed" if files else f"{key} was {record[key]!r} and is {current[key]!r}"
                raise UserError(
                    f"store {self.path}: {source.path} has changed since the store was written: {what}; write another store"
                )
        known = ", ".join(record["path"] for record in stored)
        raise UserError(f"store {self.path}: has no soft labels for {source.path}; it was written for {known}")

    def _check_shards(self) -> None:
        """Verify the shards, shared among the ranks; all ranks raise the same error."""
        errors: list[str] = []
        shards = self.header["shards"]
        for shard in shards[rank() :: world_size()]:
            file = self.path / shard["file"]
            if not file.is_file():
                errors.append(f"{file}: is missing")
            elif file.stat().st_size != shard["images"] * self.views * self._layout.itemsize:
                errors.append(f"{file}: has another size than it was written with")
            elif file_sha256(file) != shard["sha256"]:
                errors.append(f"{file}: does not match its checksum")
        errors = gather_lists(errors)
        if errors:
            raise UserError(
                f"store {self.path}: {errors[0]}; run ssld soft-labels again with the settings of {self.path.parent} to write that file again"
            )

    def _other_versions(self) -> str:
        installed = library_versions()
        return ", ".join(
            f"{name} {version} then, {installed.get(name)} now"
            for name, version in self.header["versions"].items()
            if installed.get(name) != version
        )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that pixels depend on."""
    import PIL
    import timm
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    return versions | {"pillow": PIL.__version__, "numpy": np.__version__}
