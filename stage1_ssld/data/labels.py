"""Classes of labeled sources, and their labels as class numbers of a model."""

import itertools
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.shared.wording import count
from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.sources import LOSS_SETTING, ImageSource


def labeled_classes(
    sources: Sequence[ImageSource], *, allow_loss: bool = False
) -> tuple[list[ImageSource], int, list[str] | None]:
    """Return the labeled sources, the number of classes, and the class names (None if no source has names).

    Sources may number the same names differently: `match_classes` maps them to the returned order, that of the first named source. Classes
    without an image are counted in the tally of the first source.

    Raises:
        UserError: no labeled source, sources with different class names, a single class, or, unless `allow_loss`, most class numbers without images.
    """
    for source in sources:
        _refuse_strays(source)
    labeled = [source for source in sources if source.labels is not None]
    if not labeled:
        raise UserError(f"{sources[0].path}: no labels; sort the images into class folders or add a label column")
    for source in labeled:
        missing = (source.labels or []).count(NO_LABEL)
        if missing:
            raise UserError(f"{source.path}: {missing} of {len(source)} images have no label; leave them out")
    named = [source for source in labeled if source.class_names]
    for source in named[1:]:
        if set(source.class_names or []) != set(named[0].class_names or []):
            raise UserError(
                f"{source.path}: its class names differ from those of {named[0].path}: {_first_difference(source, named[0])}"
            )
    names = named[0].class_names if named else None
    highest = max(max(source.labels or [0]) for source in labeled)
    if names and highest >= len(names):
        raise UserError(f"label {highest} in {labeled[0].path} is outside the {len(names)} classes of {named[0].path}")
    count = len(names) if names else highest + 1
    if count == 1:
        raise UserError(
            f"{labeled[0].path}: all images are of one class, {names[0] if names else 0!r}: at least two classes are needed; add images of other "
            "classes, or distil from a teacher, which needs no labels"
        )
    _count_empty(labeled, count, names, allow_loss=allow_loss)
    return labeled, count, names


def _count_empty(labeled: Sequence[ImageSource], count: int, names: list[str] | None, *, allow_loss: bool) -> None:
    """Count classes without images. An unnamed class without images counts as a loss: a wrong number, such as 9999 among ten classes, makes many."""
    present = {label for source in labeled for label in match_classes(source, names, count, "the sources") or []}
    empty, tally = count - len(present), Tally()  # counted, not listed: one wrong number may make billions of classes
    tally.keep("class", len(present))
    if empty:
        first = next(number for number in itertools.count() if number not in present)
        if names:
            tally.skip("class", "without an image", names[first], empty)
        else:
            tally.drop("class", "without an image", f"class {first} of 0 to {count - 1}", empty)
    tally.check(labeled[0].path, allow_loss=allow_loss, otherwise=LOSS_SETTING)
    if empty:
        labeled[0].tally.merge(tally)


def doubt_on_order(source: ImageSource) -> str | None:
    """Return a warning if class folders are numbers whose order as text differs from their numeric order; None otherwise."""
    names = source.class_names or []
    if not source.folders_are_classes or not all(re.fullmatch("[0-9]+", name) for name in names):
        return None
    by_number = sorted(names, key=int)
    moved = next((at for at, name in enumerate(names) if by_number[at] != name), None)
    if moved is None:
        return None
    return (
        f"{source.path}: its class folders are numbers and sorted as text, as torchvision does: class {moved} is folder {names[moved]!r}; in "
        f"numeric order it would be {by_number[moved]!r}. Names with leading zeros have one order"
    )


def labels_in_classes(source: ImageSource, names: list[str] | None, count: int) -> list[int] | None:
    """Return the source's labels as class numbers of a teacher, if the classes certainly match: by name, or by number of named classes; else None.

    Unnamed class numbers, and folders called 00 to ff into which a pool was split, may mean other classes; distillation allows both, since it reads
    no labels.
    """
    if not source.class_names or not (names or len(source.class_names) == count):
        return None
    if not names and source.folders_are_classes and _are_shards(source.class_names):
        return None
    try:
        return match_classes(source, names, count, "the teacher")
    except UserError:  # other names
        return None


def prototype_names(count: int) -> list[str]:
    """Class names of a teacher whose classes are prototypes."""
    return [f"prototype {number}" for number in range(count)]


def are_prototypes(names: list[str] | None) -> bool:
    """Whether classes are prototypes, which human labels never name."""
    return bool(names) and names == prototype_names(len(names or []))


def match_classes(source: ImageSource, names: list[str] | None, count: int, owner: str) -> list[int] | None:
    """Return the source's labels as class numbers of a model, matched by name where both have names; None without labels, or for prototypes.

    Raises UserError if the classes differ: other names, or a class number that the model does not have.
    """
    _refuse_strays(source)
    if source.labels is None or (are_prototypes(names) and not are_prototypes(source.class_names)):
        return None
    if names and source.class_names:
        number = {name: index for index, name in enumerate(names)}
        strange = [name for name in source.class_names if name not in number]
        if strange:
            raise UserError(
                f"{source.path}: class {strange[0]!r} is not among the {count} classes of {owner} ({names[0]!r}, ...); "
                "use images of its classes, or labels: none"
            )
        own = [number[name] for name in source.class_names]
        return [label if label == NO_LABEL else own[label] for label in source.labels]
    classes = len(source.class_names) if source.class_names else max(source.labels) + 1
    if classes > count or (source.class_names and classes != count):
        raise UserError(
            f"{source.path}: has {classes} classes, but {owner} has {count}; use images of its classes, or labels: none for this source"
        )
    return source.labels


def _are_shards(folders: Sequence[str]) -> bool:
    """Whether folder names are hexadecimal numbers of equal length, as of a pool split into equal parts."""
    return len({len(name) for name in folders}) == 1 and all(re.fullmatch("[0-9a-f]+", name) for name in folders)


def _refuse_strays(source: ImageSource) -> None:
    if source.unlabeled_because:
        raise UserError(f"{source.path}: {source.unlabeled_because}")


def _first_difference(a: ImageSource, b: ImageSource) -> str:
    names_a, names_b = set(a.class_names or []), set(b.class_names or [])
    only = [
        f"only the {which} has {min(names)!r}"
        for which, names in (("first", names_a - names_b), ("second", names_b - names_a))
        if names
    ]
    return ", ".join(only)


class NeighborLabels(NamedTuple):
    """Labels of the query images and of the bank whose images vote, numbered alike over `classes` classes."""

    queries: list[int]
    bank: list[int]
    classes: int


def neighbor_labels(source: ImageSource, bank: ImageSource, neighbors: int) -> NeighborLabels:
    """Return the labels of both sources in the bank's numbering, matched by name where both have names.

    Raises UserError if either has no labels, if both have an image in common, which would be its own nearest neighbor, if the bank lacks a class of
    `source`, or if it has fewer labeled images than `neighbors`.
    """
    if source.labels is None:
        raise UserError(f"{source.path}: no labels, which nearest-neighbor accuracy needs; leave out bank")
    if bank.labels is None:
        raise UserError(f"bank: {bank.path}: no labels for its images to vote with; use a labeled source")
    queries, voters = ({os.path.abspath(one.location(row)) for row in range(len(one))} for one in (source, bank))
    if both := sorted(queries & voters):
        number = f"{count(len(both), 'image')} of it {'is' if len(both) == 1 else 'are'}"
        raise UserError(
            f"bank: {bank.path}: {number} in {source.path} too, first {both[0]}: the nearest neighbor of an image would be itself; give other images"
        )
    known = len(bank.labels) - bank.labels.count(NO_LABEL)
    if neighbors > known:
        raise UserError(f"neighbors: {neighbors} is more than the {known} labeled images of {bank.path}")
    classes = len(bank.class_names) if bank.class_names else max(bank.labels) + 1
    labels = match_classes(source, bank.class_names, classes, bank.path)
    assert labels is not None
    return NeighborLabels(labels, bank.labels, classes)
