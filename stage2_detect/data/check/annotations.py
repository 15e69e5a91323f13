"""Checks of one COCO file without its images: ids, sizes, boxes, classes. Checks that read the images are in `images.py`.

Legend: N annotations, or those with a readable image, class and box; I images, in file order.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally
from ssld.shared.wording import count, some
from ssld.stage2_detect.data.check.findings import Finding, Level, Repair, first_ids
from ssld.stage2_detect.data.coco import (
    CROWD,
    FLAT,
    OUTSIDE,
    entries_with_other_boxes,
    format_doubts,
    is_bulk,
    loss_of,
    parted_text,
    tally_boxes,
    validate_boxes,
)
from ssld.stage2_detect.data.coco_json import Convention, load_content, stated_orientation
from ssld.stage2_detect.data.coco_rows import (
    CATEGORY_TYPE,
    EMPTY_CROWD,
    FIXES,
    IMAGE_TYPE,
    NESTED,
    NO_ID,
    NO_SIZE,
    ODD_AREA,
    ODD_CROWD,
    ODD_NAME,
    SHAPE_BOX,
    TEXT,
    TURNED,
    TWICE,
    UNUSED,
    WHOLE_ID,
    WHOLE_SIZE,
    Oddity,
    ValidatedRows,
    alike_names,
    changes_of,
    id_of,
    row_name,
    validate_rows,
)
from ssld.stage2_detect.data.image_names import same_file, same_photo
from ssld.stage2_detect.data.segmentations import is_shape

MANY_EMPTY = 0.25
"""share of images without objects above which some of them are probably not labeled"""
TINY_SIDE = 4.0
"""side in pixels below which an object has too few pixels to be distinguished from noise"""
FEW = 10
"""number of boxes below which a class is hard to learn and to score"""
MANY_CROWDS = 0.25
"""share of crowd regions in a class above which they are probably single objects that a tool marked as crowd"""

_APART = "each entry is trained on without the boxes of the others"
_READ_AS = {
    WHOLE_ID: "reads it as an integer",
    IMAGE_TYPE: "uses the type of the image ids",
    CATEGORY_TYPE: "uses the type of the category ids",
    ODD_NAME: "removes them",
    UNUSED: "removes it",
    WHOLE_SIZE: "reads it as an integer",
    TEXT: "reads it as numbers",
    NESTED: "reads its four numbers",
    TURNED: "uses the box around the turned rectangle",
    SHAPE_BOX: "uses the box around it",
    EMPTY_CROWD: "sets it to 0",
    ODD_AREA: "uses width x height",
}
"""how training, evaluation and a cleaned copy read the value of each change"""


@dataclass
class FileCheck:
    """A COCO file while it is checked."""

    name: str
    """train or val"""
    file: Path
    folder: Path
    """folder of its images"""
    content: dict[str, Any]
    rows: ValidatedRows
    label: str
    """name of the file in findings"""
    findings: list[Finding] = field(default_factory=list)
    repair: Repair = field(default_factory=Repair)
    image_of: dict[Any, int] = field(default_factory=dict)
    """position of each image by its id"""
    class_of: dict[Any, str] = field(default_factory=dict)
    """class name by category id"""
    boxes_of: Counter[str] = field(default_factory=Counter)
    """number of boxes that training uses, by class"""
    tally: Tally = field(default_factory=Tally)
    """boxes and images that training keeps, drops and changes"""
    stated: Convention | None = None
    """form of the images that the boxes refer to, if the file states it"""
    statistics: dict[str, Any] = field(default_factory=dict)
    """numbers for choosing settings: see `_measure`"""

    def add(self, level: Level, text: str, fix: str | None = None) -> None:
        """Add a finding about this file: see `Finding`."""
        self.findings.append(Finding(level, self.label, text, fix))

    def left_out(self) -> Tally:
        """Return a tally of the rows that a cleaned copy leaves out."""
        tally, repair, rows = Tally(), self.repair, self.rows
        for index, row in enumerate(self.content["images"]):
            cause = repair.drop_images.get(index)
            if cause is None:
                tally.keep("image")
            elif cause:
                tally.drop("image", cause, row.get("file_name") or row_name(self.content["images"], index))
        # Several boxes with one unknown id are probably a class with a wrong id, for example with ids from 0 and categories from 1.
        unknown = Counter(
            str(row.get("category_id"))
            for row, label in zip(self.content["annotations"], rows.labels_N.tolist(), strict=True)
            if label < 0
        )
        for index, row in enumerate(self.content["annotations"]):
            label, owner = int(rows.labels_N[index]), int(rows.owners_N[index])
            odd = str(row.get("category_id"))
            group = rows.class_names[label] if label >= 0 else f"category_id {odd}" if unknown[odd] > 1 else None
            cause = repair.drop_annotations.get(index)
            if cause is None and repair.drop_images.get(owner):
                cause = "of an image that is left out"
            if cause is None:
                tally.keep("box", group=group)
            elif cause:
                tally.drop("box", cause, f"annotation {row_name(self.content['annotations'], index)}", group=group)
        return tally


def check_rows(
    name: str, file: Path, folder: Path, *, label: str | None = None, masks: bool = False, allow_loss: bool = False
) -> FileCheck:
    """Check everything about a file that needs no image, for a detector with `masks` or without.

    `label` names the file in findings; None: its own name. Raises UserError for a file that is not COCO JSON.
    """
    content = load_content(file)
    rows = validate_rows(content)
    check = FileCheck(name, file, folder, content, rows, label or file.name)
    for index, (image_id, file_name) in enumerate(zip(rows.image_ids, rows.file_names, strict=True)):
        if image_id is not None and file_name is not None:
            check.image_of[image_id] = index
    for index, (category_id, class_name) in enumerate(zip(rows.category_ids, rows.class_names, strict=True)):
        if category_id is not None and class_name is not None and index not in rows.unused:
            check.class_of[category_id] = class_name
    if not rows.category_ids:
        check.add("fault", "'categories' is empty: training stops")
    for oddity in rows.faults:
        check.add("fault", f"{_describe(check, oddity)}: training stops", FIXES.get((oddity.kind, oddity.cause)))
        _repair_fault(check, oddity)
    for oddity in rows.changes:
        read_as = _READ_AS[oddity.cause]
        reader = "training" if name == "train" else "evaluation"
        check.add("warning", f"{_describe(check, oddity)}: {reader} {read_as}", read_as)
    try:
        check.stated = stated_orientation(content)
    except UserError as error:
        check.add("fault", f"{error}: training stops", "sets it from the sizes of the images")
        check.repair.orientation = "upright"  # unless the images show otherwise
    accept_changes(check.repair, rows)
    first_of = _check_names(check, allow_loss=allow_loss)
    _check_boxes(check, first_of, masks=masks, allow_loss=allow_loss)
    return check


def accept_changes(repair: Repair, rows: ValidatedRows) -> None:
    """Add to `repair` the values that training reads in place of those of the file."""
    tables = {"image": repair.image_values, "annotation": repair.annotation_values, "category": repair.category_values}
    for oddity in rows.changes:
        for index, values in oddity.values.items():
            tables[oddity.kind].setdefault(index, {}).update(values)
    repair.drop_categories.update(rows.unused)


def _describe(check: FileCheck, oddity: Oddity) -> str:
    """Return text like `3 annotations without ... (first ids: ...)`."""
    if oddity.kind == "image":
        rows = check.content["images"]
        names = some([rows[index].get("file_name") or row_name(rows, index) for index in oddity.values])
    else:
        names = some(oddity.names) if oddity.cause == NO_ID else first_ids(oddity.names)
    return f"{count(len(oddity.names), oddity.kind, 'categories' if oddity.kind == 'category' else None)} {oddity.cause} ({names})"


def _repair_fault(check: FileCheck, oddity: Oddity) -> None:
    match oddity.kind, oddity.cause:
        case "image", cause if cause == TWICE:
            _repair_images_given_twice(check, oddity.values)
        case "image", cause if cause != NO_SIZE:
            check.repair.drop_images |= dict.fromkeys(oddity.values, cause)
        case "annotation", cause if cause in (NO_ID, TWICE):
            free = max((one for one in check.rows.annotation_ids if isinstance(one, int)), default=0) + 1
            taken = check.repair.annotation_values
            free += sum("id" in values for values in taken.values())
            for index in oddity.values:
                check.repair.set_annotation(index, id=free)
                free += 1
        case "annotation", cause if cause == ODD_CROWD:
            for index in oddity.values:
                check.repair.set_annotation(index, iscrowd=0)
        case "annotation", cause:
            check.repair.drop_annotations |= dict.fromkeys(oddity.values, cause)


def _repair_images_given_twice(check: FileCheck, again: Iterable[int]) -> None:
    """Keep one of several equal rows; drop different images with one id, since the image of their boxes is unknown."""
    rows = check.content["images"]
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[id_of(row.get("id"))].append(index)
    for one in dict.fromkeys(id_of(rows[index]["id"]) for index in again):
        group = groups[one]
        equal = len({repr([rows[index].get(key) for key in ("file_name", "width", "height")]) for index in group}) == 1
        check.repair.drop_images |= dict.fromkeys(group[1:], "") if equal else dict.fromkeys(group, TWICE)


def _check_names(check: FileCheck, *, allow_loss: bool) -> dict[int, int]:
    """Report images listed twice and copies of one photo; returns {position of a repeated image: position of the first}."""
    positions = list(check.image_of.values())
    names = [str(check.rows.file_names[position]) for position in positions]
    ids = list(check.image_of)
    again, copies = same_file(names), same_photo(names)
    check.statistics["together"] = [[ids[one] for one in group] for group in (*again, *copies)]
    first_of = {positions[one]: positions[group[0]] for group in again for one in group[1:]}
    if again:
        text = f"{count(len(again), 'image')} listed more than once, under other ids ({some([names[group[0]] for group in again])})"
        groups = [[positions[one] for one in group] for group in again]
        parted = entries_with_other_boxes(groups, check.rows.owners_N, check.rows.labels_N, check.rows.boxes_N4)
        stops = check.name == "train" and not allow_loss and is_bulk(parted, len(positions))
        effect = f"{parted_text(parted, len(positions))}: training stops" if stops else _APART
        check.add("fault" if stops else "warning", f"{text}: {effect}", "merges their boxes under the first id")
        check.repair.drop_images |= dict.fromkeys(first_of, "")
        owners = check.rows.owners_N.tolist()
        for index, owner in enumerate(owners):
            if owner in first_of:
                check.repair.set_annotation(index, image_id=check.rows.image_ids[first_of[owner]])
    if copies:
        examples = some([names[group[0]] for group in copies])
        total = sum(map(len, copies))
        check.add(
            "note",
            f"{count(total, 'image')} that are augmented copies of {count(len(copies), 'photo')} by their names ({examples})",
        )
    return first_of


def _check_boxes(check: FileCheck, first_of: dict[int, int], *, masks: bool, allow_loss: bool) -> None:
    """Check boxes as training does, and count and measure the usable ones."""
    all_rows, annotations = check.rows, check.content["annotations"]
    named_I = np.array([name is not None for name in all_rows.file_names], dtype=bool)
    sound_N = (all_rows.owners_N >= 0) & (all_rows.labels_N >= 0) & ~np.isnan(all_rows.boxes_N4).any(1)
    sound_N[sound_N] &= named_I[all_rows.owners_N[sound_N]]
    rows = np.flatnonzero(sound_N)
    owners_N, labels_N, crowd_N = all_rows.owners_N[rows], all_rows.labels_N[rows], all_rows.crowd_N[rows]
    sizes_N2 = all_rows.sizes_I2[owners_N]
    names = [
        name or f"of category {row_name(check.content['categories'], i)}" for i, name in enumerate(all_rows.class_names)
    ]
    validated = validate_boxes(all_rows.boxes_N4[rows], sizes_N2)
    ids = [annotations[row].get("id") for row in rows]
    check.tally.keep("image", len(check.image_of))
    tally_boxes(check.tally, validated, crowd_N, labels_N, names, [all_rows.annotation_ids[row] for row in rows])
    for noun, cause, number, first in changes_of(all_rows):
        check.tally.change(noun, cause, first, number)
    unusable_N = validated.degenerate_N | validated.outside_N
    clipped_N = (validated.clipped_N4 != validated.corners_N4).any(1) & ~unusable_N & ~crowd_N

    def report(mask_N: np.ndarray, level: Level, cause: str, effect: str, fix: str | None) -> None:
        positions = np.flatnonzero(mask_N)
        if len(positions):
            examples = first_ids([ids[position] for position in positions])
            check.add(level, f"{count(len(positions), 'box')} {cause} ({examples}): {effect}", fix)

    doubts = format_doubts(validated, crowd_N, sizes_N2)
    stops = ": training stops" if check.name == "train" else ": the scores would be worthless"
    for doubt in doubts:
        stopping = doubt.bulk and not allow_loss
        check.add("fault" if stopping else "warning", f"{doubt.text}{stops if stopping else ''}")
    dropped = "training drops them" if check.name == "train" else "never detected, so missed in every score"
    # With a suspicious box format the copy keeps all boxes unchanged.
    leaves_out, clips = (None, None) if doubts else ("removes them", "clips them")
    report(validated.degenerate_N & ~crowd_N, "warning", FLAT, dropped, leaves_out)
    report(validated.outside_N & ~crowd_N, "warning", OUTSIDE, dropped, leaves_out)
    report(clipped_N, "note", "reaching over the border", "training clips them", clips)
    first_owners_N = np.array([first_of.get(owner, owner) for owner in owners_N.tolist()], dtype=np.int64)
    again_N = _duplicates(first_owners_N, labels_N, crowd_N, validated.corners_N4) & ~unusable_N & ~crowd_N
    report(again_N, "warning", "given twice", "trained on twice, and one is missed in every score", "keeps one")
    usable_N = ~unusable_N & ~crowd_N
    sides_N2 = validated.clipped_N4[:, 2:] - validated.clipped_N4[:, :2]
    tiny_N = usable_N & (sides_N2.min(1, initial=np.inf) < TINY_SIDE)
    report(tiny_N, "note", f"with a side below {TINY_SIDE:g} pixels", "hard to detect at any image size", None)
    crowded = _crowded(labels_N, crowd_N, names)
    effect = "not trained on and not counted in scores"
    report(crowd_N, "warning" if crowded else "note", CROWD, f"{effect}{crowded}", None)
    shapes = [annotations[row].get("segmentation") for row in rows]
    if masks or any(shapes):  # files of boxes alone have none
        bad = [
            max(width, height) < np.inf and not is_shape(shape, int(height), int(width))
            for (width, height), shape in zip(sizes_N2.tolist(), shapes, strict=True)
        ]
        # Evaluation scores the mask of every object, crowd regions and unusable boxes included.
        scored_N = usable_N if check.name == "train" or not masks else np.ones(len(rows), dtype=bool)
        shapeless_N = scored_N & np.array(bad, dtype=bool)
        effect = "training a detector with masks stops" + ("" if masks else "; other kinds do not read it")
        if masks or not shapeless_N.all():  # a file without any usable one is of boxes alone
            report(shapeless_N, "fault" if masks else "note", "without a usable segmentation", effect, None)
    if not doubts:
        _drop_boxes(check.repair, rows[validated.degenerate_N & ~crowd_N], FLAT)
        _drop_boxes(check.repair, rows[validated.outside_N & ~crowd_N], OUTSIDE)
        clips_N = clipped_N & ~again_N
        _clip_boxes(check, rows[clips_N], validated.clipped_N4[clips_N])
    _drop_boxes(check.repair, rows[again_N], "")
    check.boxes_of.update(names[label] for label in labels_N[usable_N])
    _report_loss(check, allow_loss=allow_loss)
    unused = int((~usable_N).sum()) + len(annotations) - len(rows)
    used_I = np.bincount(owners_N[usable_N], minlength=len(all_rows.image_ids))
    _measure(check, used_I, sides_N2[usable_N], owners_N[usable_N], unused)


def _drop_boxes(repair: Repair, rows: np.ndarray, cause: str) -> None:
    repair.drop_annotations |= dict.fromkeys(rows.tolist(), cause)


def _clip_boxes(check: FileCheck, rows: np.ndarray, clipped_N4: np.ndarray) -> None:
    """Add the clipped boxes, x1, y1, x2, y2, of these annotations to the repair, with their area where no mask has it."""
    for row, corners in zip(rows.tolist(), clipped_N4.tolist(), strict=True):
        left, top, right, bottom = (round(value, 3) for value in corners)
        box = [left, top, round(right - left, 3), round(bottom - top, 3)]
        area = {} if check.content["annotations"][row].get("segmentation") else {"area": box[2] * box[3]}
        check.repair.set_annotation(row, bbox=box, **area)


def _report_loss(check: FileCheck, *, allow_loss: bool) -> None:
    """Report a loss of boxes for which training refuses the file although each row can be read."""
    lost, objects = loss_of(check.tally), check.tally.kept("box")
    if check.name == "train":
        if lost:
            allowed = allow_loss and objects
            check.add(
                "warning" if allowed else "fault",
                f"{lost}: training {'continues with the remaining boxes' if allowed else 'stops'}",
            )
    elif not objects + check.tally.dropped("box", FLAT) + check.tally.dropped("box", OUTSIDE):
        check.add("fault", "no objects: evaluation gives no score")


def _crowded(labels_N: np.ndarray, crowd_N: np.ndarray, names: Sequence[str]) -> str:
    """Return the end of a line on crowd regions, naming the classes with a large share of them; may be empty."""
    total, crowds = Counter(labels_N.tolist()), Counter(labels_N[crowd_N].tolist())
    shares = {names[label]: number / total[label] for label, number in crowds.items()}
    many = [f"{100 * share:.0f} % of {name!r}" for name, share in shares.items() if share > MANY_CROWDS]
    return f"; they are {some(many)}: meant as single objects?" if many else ""


def _duplicates(owners_N: np.ndarray, labels_N: np.ndarray, crowd_N: np.ndarray, corners_N4: np.ndarray) -> np.ndarray:
    """Return bool [N]: boxes equal to an earlier one in image, class and, to a tenth of a pixel, position."""
    earlier: set[Any] = set()
    again = np.zeros(len(owners_N), dtype=bool)
    columns = (owners_N.tolist(), labels_N.tolist(), crowd_N.tolist(), corners_N4.round(1).tolist())
    for index, (owner, label, crowd, corners) in enumerate(zip(*columns, strict=True)):
        key = (owner, label, crowd, *corners)
        again[index] = key in earlier
        earlier.add(key)
    return again


def _measure(check: FileCheck, used_I: np.ndarray, sides_N2: np.ndarray, owners_N: np.ndarray, dropped: int) -> None:
    """Report classes and images with few or no boxes, and fill `FileCheck.statistics`."""
    rows, sizes_I2 = check.content["images"], check.rows.sizes_I2
    empty = [index for index in check.image_of.values() if not used_I[index]]
    if empty:
        examples = some([str(rows[index]["file_name"]) for index in empty])
        text = f"{count(len(empty), 'image')} without objects ({examples})"
        effect = ": trained on as negatives; data.keep_empty: false skips them" if check.name == "train" else ""
        many = len(empty) > MANY_EMPTY * len(check.image_of)
        asked = "; are they labeled at all? Photos that nobody has labeled teach the detector to miss objects, and make its scores wrong"
        check.add("warning" if many else "note", f"{text}{effect}{asked * many}")
    names = list(dict.fromkeys(check.class_of.values()))
    for alike in alike_names(names):
        check.add("warning", f"the classes {alike} differ in capitals, spaces, dashes or underscores alone: one class?")
    none = [name for name in names if not check.boxes_of[name]]
    few = [f"{name} {check.boxes_of[name]}" for name in names if 0 < check.boxes_of[name] < FEW]
    if none and check.boxes_of:
        check.add(
            "warning" if check.name == "train" else "note",
            f"{count(len(none), 'class')} without any box ({some(none)})",
        )
    if few:
        check.add("note", f"{count(len(few), 'class')} with fewer than {FEW} boxes ({some(few)})")
    sized = [index for index in check.image_of.values() if np.isfinite(sizes_I2[index]).all()]
    short, long = ({index: float(pick(sizes_I2[index])) for index in sized} for pick in (np.min, np.max))
    relative = [
        float(side) / short[owner]
        for side, owner in zip(np.sqrt(sides_N2.prod(1)), owners_N.tolist(), strict=True)
        if owner in short
    ]
    check.statistics |= {
        "images": len(check.image_of),
        "boxes": len(sides_N2),
        "dropped": dropped,
        "classes": {name: check.boxes_of[name] for name in names},
        "short_side": float(np.median(list(short.values()))) if short else None,
        "long_side": float(np.median(list(long.values()))) if long else None,
        "object_sizes": [round(float(value), 4) for value in np.percentile(relative, (5, 25, 50, 75, 95))]
        if relative
        else None,
        "most_boxes": int(used_I.max(initial=0)),
    }
