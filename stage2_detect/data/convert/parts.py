"""The COCO file and the image folder to train and to evaluate on, from what the settings name: one path to a data set, files, or lists of files.

A data set in another format is converted into the cache (`cache.py`), and several COCO files are merged there; single COCO files are read in place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssld.shared.errors import UserError
from ssld.shared.terminal import say
from ssld.shared.wording import count
from ssld.stage2_detect.config import ConvertDataConfig, DetectionDataConfig, source_inputs
from ssld.stage2_detect.data.convert.cache import cache_folder, kept, key_of
from ssld.stage2_detect.data.convert.conversion import LOOKED_FOR, content_of, convert, find_source
from ssld.stage2_detect.data.convert.hub import HUB, download
from ssld.stage2_detect.data.convert.merging import Pairs, common_folder, write_merged
from ssld.stage2_detect.layouts.coco import CocoLayout, find_coco, part_kind
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
        return _of_source(data.source, allow_loss=data.allow_loss)
    train, notes = read_as_one("train", data.pairs("train"))
    pairs = data.pairs("val")
    val, val_notes = read_as_one("val", pairs) if pairs else (None, [])
    return DataSet("COCO", train, val, [*notes, *val_notes], max(len(data.pairs("train")), len(pairs)) > 1)


def read_as_one(name: str, pairs: Pairs) -> tuple[Part, list[str]]:
    """Return (a part, lines for the log) of one or more COCO files; several are merged in the cache."""
    if len(pairs) == 1:
        return Part(name, *pairs[0]), []
    for file, folder in pairs:
        if not file.is_file() or not folder.is_dir():
            raise UserError(
                f"{file if not file.is_file() else folder}: no such {'folder' if file.is_file() else 'file'}"
            )
    key = key_of(
        [place for pair in pairs for place in pair],
        "merged",
        [[str(path.absolute()) for path in pair] for pair in pairs],
    )
    folder, record = kept(key, lambda pending: {"notes": write_merged(pairs, pending / f"{name}.json")})
    return Part(name, folder / f"{name}.json", common_folder(pairs)), record["notes"]


def _of_source(source: str, *, allow_loss: bool) -> DataSet:
    path = Path(download(source.removeprefix(HUB))) if source.startswith(HUB) else Path(source)
    if not path.exists():
        hint = (
            f"; for a data set of the Hugging Face hub write {HUB}{source}"
            if source.count("/") == 1 and not path.suffix
            else ""
        )
        raise UserError(f"data: {source}: no such file or folder{hint}")
    layout = find_yolo(path)
    if (layout is None or layout.file.is_dir()) and (coco := find_coco(path)):
        return _of_coco(source, coco)
    found = find_source(str(path))
    if found is None:
        raise UserError(
            f"data: {source}: {LOOKED_FOR} nor COCO JSON (train/_annotations.coco.json, annotations/instances_*.json); {content_of(path)}"
        )
    train, val = choose(source, found.splits)
    config = ConvertDataConfig(
        source=str(path), splits=[train, *([val] if val else [])], allow_loss=allow_loss, output=cache_folder()
    )
    places = [path] if layout is None else list(source_inputs("", str(path)).values())
    names = layout.names if layout else []

    def make(pending: Path) -> dict[str, Any]:
        say(f"{source}: converting it to COCO JSON, once ({cache_folder()})")
        optional = [val] if val and part_kind(val) == "test" else []
        try:
            data, contents, orientation = convert(config, pending, may_be_empty=optional)
        except UserError as error:
            advice = (
                "; these are flags of `ssld convert-data`, whose files data.train_annotations takes"
                if " --" in str(error)
                else ""
            )
            raise UserError(f"data: {error}{advice}") from None
        notes = [*data.notes, *([text] if (text := orientation.describe()) else [])]
        notes += [f"{split}: {line}" for split, content in contents.items() if (line := content.tally.describe())]
        folders = {}
        for split, content in contents.items():
            inside = pending.resolve() in content.folder.resolve().parents
            folders[split] = split if inside else str(content.folder.resolve())
        return {"kind": data.kind, "classes": data.class_names, "notes": notes, "folders": folders}

    key = key_of(places, str(path.resolve()), config.splits, allow_loss, names)
    folder, record = kept(key, make)
    # A relative folder is inside the cache: `/` keeps an absolute one.
    parts = {
        split: Part(split, folder / f"{split}.json", folder / images) for split, images in record["folders"].items()
    }
    chosen = _chosen(source, record["kind"], train, val if val in parts else None, found.splits)
    return DataSet(record["kind"], parts[train], parts.get(val or ""), [chosen, *record["notes"]], True)


def _of_coco(source: str, coco: CocoLayout) -> DataSet:
    train, val = choose(source, list(coco.parts))
    parts = {split: Part(split, *coco.parts[split]) for split in (train, val) if split}
    notes = [_chosen(source, "COCO", train, val, list(coco.parts)), *coco.notes]
    return DataSet("COCO", parts[train], parts.get(val or ""), notes)


def choose(source: str, splits: Sequence[str]) -> tuple[str, str | None]:
    """Choose the splits to train and to evaluate on: train; val, valid or validation, else test.

    A single split without any of these names is trained on. Raises UserError without a split for training, and for two that may be the one meant.
    """
    kinds: dict[str | None, list[str]] = {}
    for split in splits:
        kinds.setdefault(part_kind(split), []).append(split)
    for kind, names in kinds.items():
        if kind and len(names) > 1:  # trainval beside train, say
            names[:] = [name for name in names if name.lower() == kind] or names
            if len(names) > 1:
                raise UserError(
                    f"data: {source}: {' and '.join(names)} may both be meant for {kind}; give the COCO files of `ssld convert-data`"
                )
    train = kinds.get("train") or (list(splits) if len(splits) == 1 and kinds.get(None) else [])
    if not train:
        raise UserError(f"data: {source}: has no part to train on, called train (it has {', '.join(splits) or 'none'})")
    val = kinds.get("val") or kinds.get("test")
    return train[0], val[0] if val else None


def _chosen(source: str, kind: str, train: str, val: str | None, splits: Sequence[str]) -> str:
    evaluated = f"evaluated on {val}" if val else "no evaluation: it has no part called val, valid or test"
    left = [split for split in splits if split not in (train, val)]
    unused = f"; {count(len(left), 'part')} not used: {', '.join(left)}" if left else ""
    return f"{source}: {kind}, trained on {train}, {evaluated}{unused}"
