"""The COCO file and the image folder to train and to evaluate on, from what the settings name: one path to a data set, files, or lists of files.

A data set in another format is converted into the cache (`cache.py`), and several COCO files are merged there; single COCO files are read in place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssld.shared.errors import UserError
from ssld.shared.terminal import say
from ssld.shared.wording import count
from ssld.stage2_detect.config import ConvertDataConfig, EvaluateConfig
from ssld.stage2_detect.data.convert.cache import cache_folder, kept, key_of
from ssld.stage2_detect.data.convert.conversion import LOOKED_FOR, content_of, convert, find_splits
from ssld.stage2_detect.data.convert.hub import HUB, download
from ssld.stage2_detect.data.convert.merging import Pairs, common_folder, write_merged
from ssld.stage2_detect.data_config import DetectionDataConfig, source_inputs
from ssld.stage2_detect.layouts.coco import CocoLayout, find_coco, part_kind
from ssld.stage2_detect.layouts.others import other_tool
from ssld.stage2_detect.layouts.yolo import find_yolo


class Part(NamedTuple):
    """One part of a data set."""

    split: str
    """its name in the data set; train or val for files named by the settings"""
    annotations: Path
    images: Path


class DataSet(NamedTuple):
    """Parts of a data set that a run uses."""

    kind: str
    """name of its format"""
    train: Part
    val: Part | None = None
    notes: Sequence[str] = ()
    """lines for the log: what was chosen, converted, dropped"""
    converted: bool = False
    """whether its files are in the cache"""


def find_data(data: DetectionDataConfig) -> DataSet:
    """Return the parts that settings name, converted or merged where needed. Raises UserError for any fault of the files."""
    if data.source is not None:
        source = _open(data.source)
        train, val = choose(data.source, source.splits)
        kind, parts, notes = _read(source, [train, *([val] if val else [])], allow_loss=data.allow_loss)
        evaluated = f"evaluated on {val}" if val in parts else "without a part called val, valid or test to evaluate on"
        chosen = _chosen(source, kind, f"trained on {train}, {evaluated}", list(parts))
        return DataSet(kind, parts[train], parts.get(val or ""), [chosen, *notes], source.coco is None)
    train_part, notes = read_as_one("train", data.pairs("train"))
    pairs = data.pairs("val")
    val_part, val_notes = read_as_one("val", pairs) if pairs else (None, [])
    return DataSet("COCO", train_part, val_part, [*notes, *val_notes], max(len(data.pairs("train")), len(pairs)) > 1)


def evaluated_part(config: EvaluateConfig) -> tuple[Part, list[str]]:
    """Return (the part to evaluate on, lines for the log). Raises UserError for any fault of the files, and for a data set without that part."""
    if config.data is None:
        return read_as_one("val", config.pairs())
    source = _open(config.data)
    split = config.split or _evaluated(_by_kind(config.data, source.splits))
    if split not in source.splits:
        what = f"part {split!r}" if split else "part called val, valid or test; give --split"
        raise UserError(f"data: {config.data}: has no {what} (it has {', '.join(source.splits) or 'none'})")
    kind, parts, notes = _read(source, [split], allow_loss=True)
    return parts[split], [_chosen(source, kind, f"evaluated on {split}", [split]), *notes]


def read_as_one(name: str, pairs: Pairs) -> tuple[Part, list[str]]:
    """Return (a part, lines for the log) of one or more COCO files; several are merged in the cache."""
    if len(pairs) == 1:
        return Part(name, *pairs[0]), []
    for file, folder in pairs:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        if not folder.is_dir():
            raise UserError(f"image folder {folder} does not exist")
    places = [place for pair in pairs for place in pair]
    key = key_of(places, name, [str(place.absolute()) for place in places])
    folder, record = kept(key, lambda pending: {"notes": write_merged(pairs, pending / f"{name}.json")})
    return Part(name, folder / f"{name}.json", common_folder(pairs)), record["notes"]


class _Source(NamedTuple):
    """A data set given by one path."""

    name: str
    """as the settings name it"""
    path: Path
    splits: list[str]
    coco: CocoLayout | None


def _open(name: str) -> _Source:
    """Recognize a data set by its content. Raises UserError for anything else, with what was looked for."""
    path = download(name.removeprefix(HUB)) if name.startswith(HUB) else Path(name)
    if not path.exists():
        like_hub = name.count("/") == 1 and not path.suffix
        hint = f"; for a data set of the Hugging Face hub write {HUB}{name}" if like_hub else ""
        raise UserError(f"data: {name}: no such file or folder{hint}")
    layout = find_yolo(path)
    if (layout is None or layout.file.is_dir()) and (coco := find_coco(path)):
        return _Source(name, path, list(coco.parts), coco)
    splits = find_splits(str(path))
    if splits is None:
        unknown = f"{LOOKED_FOR} nor COCO JSON (train/_annotations.coco.json, annotations/instances_*.json); {content_of(path)}"
        raise UserError(f"data: {name}: {other_tool(path) or unknown}")
    return _Source(name, path, splits, None)


def _read(source: _Source, splits: list[str], *, allow_loss: bool) -> tuple[str, dict[str, Part], list[str]]:
    """Return (format, parts by split, lines for the log); a test split without objects is left out."""
    if source.coco:
        return "COCO", {split: Part(split, *source.coco.parts[split]) for split in splits}, source.coco.notes
    path, layout = source.path, find_yolo(source.path)
    config = ConvertDataConfig(source=str(path), splits=splits, allow_loss=allow_loss, output=cache_folder())
    optional = [split for split in splits[1:] if part_kind(split) == "test"]

    def make(pending: Path) -> dict[str, Any]:
        say(f"{source.name}: converting it to COCO JSON, once ({cache_folder()})")
        try:
            data, contents, orientation = convert(config, pending, may_be_empty=optional)
        except UserError as error:
            # Whichever module wrote the line: who reads a flag in it would look for it among those of this command.
            names_flags = " --" in str(error)
            advice = (
                "; these are flags of `ssld convert-data`, whose files the settings take too" if names_flags else ""
            )
            raise UserError(f"data: {error}{advice}") from None
        notes = [*data.notes, *([text] if (text := orientation.describe()) else [])]
        notes += [f"{split}: {line}" for split, content in contents.items() if (line := content.tally.describe())]
        folders = {}
        for split, content in contents.items():
            inside = pending.resolve() in content.folder.resolve().parents
            folders[split] = split if inside else str(content.folder.resolve())
        return {"kind": data.kind, "notes": notes, "folders": folders}

    places = list(source_inputs("", str(path)).values())
    folder, record = kept(key_of(places, str(path.resolve()), splits, allow_loss, layout and layout.names), make)
    # `/` keeps an absolute folder; a relative one is inside the cache.
    parts = {
        split: Part(split, folder / f"{split}.json", folder / images) for split, images in record["folders"].items()
    }
    return record["kind"], parts, record["notes"]


def choose(source: str, splits: Sequence[str]) -> tuple[str, str | None]:
    """Choose the splits to train and to evaluate on: train; val, valid or validation, else test.

    A single split without any of these names is trained on. Raises UserError without a split for training, and for two that may be the one meant.
    """
    kinds = _by_kind(source, splits)
    alone = len(splits) == 1 and part_kind(splits[0]) is None
    if "train" not in kinds and not alone:
        has = ", ".join(splits) or "none"
        raise UserError(
            f"data: {source}: has no part to train on, called train (it has {has}); rename it, or give its files in place of the data set"
        )
    return kinds.get("train", splits[0]), _evaluated(kinds)


def _evaluated(kinds: dict[str, str]) -> str | None:
    return kinds.get("val") or kinds.get("test")


def _by_kind(source: str, splits: Sequence[str]) -> dict[str, str]:
    """Return the split of each kind, train, val and test; others by their own names. Raises UserError for two splits of a kind."""
    kinds: dict[str, str] = {}
    for split in splits:
        kind = part_kind(split) or split
        exact = [name for name in (kinds.get(kind), split) if name and name.lower() == kind]  # train beside trainval
        if kind in kinds and len(exact) != 1:
            raise UserError(
                f"data: {source}: {kinds[kind]} and {split} may both be meant for {kind}; name the files of `ssld convert-data` in the settings"
            )
        kinds[kind] = exact[0] if kind in kinds else split
    return kinds


def _chosen(source: _Source, kind: str, use: str, used: list[str]) -> str:
    left = [split for split in source.splits if split not in used]
    unused = f"; {count(len(left), 'part')} not used: {', '.join(left)}" if left else ""
    return f"{source.name}: {kind}, {use}{unused}"
