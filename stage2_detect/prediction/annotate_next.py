"""Photos to annotate next: unlabeled photos the most uncertain for a detector first, near-duplicates apart, as a list, values and a page of pictures.

Doubts are computed in parts, as in a prediction, so that a killed run continues; the files are written at the end.
"""

import base64
import html
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ssld.shared.distributed.processes import DTYPES
from ssld.shared.errors import UserError
from ssld.shared.files import UNLISTED, escaped, fits_a_list, write_atomically
from ssld.shared.images import UnreadableImage, open_image
from ssld.shared.tally import Tally
from ssld.shared.wording import count, printable
from ssld.stage2_detect.data.check.images import difference_hash, near_duplicates
from ssld.stage2_detect.data.coco import CocoImage, Id
from ssld.stage2_detect.data.coco_json import result_rows
from ssld.stage2_detect.data.image_files import ImageFiles, records_of
from ssld.stage2_detect.data.loaders import ImageLoader, load_record
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.predict_config import AuditConfig
from ssld.stage2_detect.prediction.doubt import Doubt, doubt_of, two_views
from ssld.stage2_detect.prediction.files import Parts, data_set, image_entry
from ssld.stage2_detect.prediction.label_tools import write_label_files
from ssld.stage2_detect.prediction.steps import Work, by_part, list_names
from ssld.stage2_detect.prediction.tiles import FileWindows, window_batches
from ssld.stage2_detect.prediction.video_file import is_video

if TYPE_CHECKING:
    from ssld.stage2_detect.detector_file import LoadedDetector

LIST, VALUES, PAGE = "annotate_next.txt", "annotate_next.json", "annotate_next.html"
MOST_PICTURES = 200
"""photos on the page, which holds its pictures; the list may be longer"""
_SIDE = 480  # pixels; longer side of a picture on the page
_DIGITS = 6  # of doubts in the files


class Doubted(NamedTuple):
    """A photo with the doubts about it.

    Attributes:
        rows: COCO results, from the score threshold on.
    """

    record: CocoImage
    name: str
    doubt: Doubt
    rows: list[dict[str, Any]]


class Chosen(NamedTuple):
    """Result of `choose`: positions in the order of doubt."""

    listed: list[int]
    copy_of: dict[int, int]
    """position of a photo that was left out: position of the listed photo that it nearly duplicates"""


def find_photos(config: AuditConfig) -> Work:
    """List the photos of `config.images`; videos, and names that a list cannot hold, are left out and counted.

    Raises UserError where no photo is left, or as `steps.list_names`.
    """
    listed = Tally()
    folder, names, excluded = list_names(config.images, config.exclude, listed)
    photos = []
    for name in names:
        if is_video(f"{folder}/{name}"):
            listed.skip("video", "that are no photos", name)
        elif not fits_a_list(os.path.abspath(f"{folder}/{name}")):
            listed.drop("image", UNLISTED, escaped(name))
        else:
            photos.append(name)
    if not photos:
        raise UserError(f"{config.images}: has no photos: {listed.describe()}")
    by_id: dict[Id, str] = dict(enumerate(photos, 1))
    records, unreadable = records_of(ImageFiles(folder, photos), list(by_id))
    return Work(folder, by_id, records, unreadable, [], excluded, listed)


def doubt_parts(
    config: AuditConfig, loaded: "LoadedDetector", device: torch.device, parts: Parts, numbers: Sequence[int], work: Work,
    each: Callable[[], None],
) -> Iterator[int]:  # fmt: skip
    """Compute the doubts of the parts with these numbers, in order; write each part when it is complete, then yield its number.

    Args:
        each: called after every photo.
    """
    part_of = {record.image_id: number for number in numbers for record in parts.records[number]}
    batches = [
        batch for number in numbers for batch in window_batches(parts.records[number], config.batch_size, None, 0.0)
    ]
    sizing = Sizing.of(loaded.resize, short_side=config.short_side, long_side=config.long_side)
    loader = ImageLoader(batches, FileWindows(), sizing, workers=config.workers, skip_unreadable=True)

    loaded.model.to(device)
    views = two_views(loaded.fast, loader, device=device, dtype=DTYPES[config.precision]) if batches else iter(())
    for number, part in by_part(views, lambda one: part_of[one[0].record.image_id], numbers):
        rows: dict[Id, list[dict[str, Any]]] = {}
        doubts: dict[Id, Doubt] = {}
        for window, first, second in part:
            image_id = window.record.image_id
            doubts[image_id] = doubt_of(first, second, config.least)
            counted = first.where(first.scores_N >= config.least)
            if len(counted.scores_N):
                rows[image_id] = list(result_rows(image_id, counted, loaded.category_ids))
            each()
        best = max((row["score"] for of_image in rows.values() for row in of_image), default=0.0)
        bad = work.unreadable_of(parts.records[number], loader.unreadable)
        parts.write(number, rows, bad, best, doubts=list(doubts.items()))
        yield number


def assemble(config: AuditConfig, parts: Parts, work: Work) -> tuple[list[Doubted], list[str]]:
    """Return (photos, the most doubtful first and equal ones by name; names of unreadable files). Raises UserError when nothing can be read."""
    rows: dict[Id, list[dict[str, Any]]] = {}
    doubts: dict[Id, Doubt] = {}
    bad = set(work.unreadable)
    for part in parts.read_all():
        rows |= dict(part["found"])
        doubts |= {image_id: Doubt(*values) for image_id, values in part["doubts"]}
        bad |= {name for name, _ in part["unreadable"]}
    photos = [
        Doubted(one, work.names[one.image_id], doubts[one.image_id], rows.get(one.image_id, []))
        for one in work.records
        if one.image_id in doubts
    ]
    if not photos:
        raise UserError(f"nothing can be read in {count(len(bad), 'file')} of {config.images}; the first is {min(bad)}")
    return sorted(photos, key=lambda one: (-one.doubt.total, one.name)), sorted(bad)


def choose(number: int, most: int, hashes_of: Callable[[int], tuple[int, int]]) -> Chosen:
    """Choose up to `most` of `number` photos in their order, without near-duplicates of chosen ones.

    Args:
        hashes_of: difference hashes of a photo, by position, and of its mirror image; asked for one after the other, as long as photos are missing.
    """
    listed: list[int] = []
    hashes: list[int] = []
    copy_of: dict[int, int] = {}
    for position in range(number):
        if len(listed) == most:
            break
        own = hashes_of(position)
        if near := near_duplicates(own, hashes):
            copy_of[position] = listed[min(place for _, place in near)]
        else:
            listed.append(position)
            hashes.append(own[0])
    return Chosen(listed, copy_of)


def hashes_of_file(path: str) -> tuple[int, int]:
    """Return the difference hashes of an image and of its mirror image. Raises UserError if it cannot be read any more."""
    try:
        image = open_image(path)
    except UnreadableImage as error:
        raise UserError(str(error)) from None
    assert isinstance(image, Image.Image)  # of the decoder pil
    return difference_hash(image), difference_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def write_files(
    folder: Path,
    config: AuditConfig,
    loaded: "LoadedDetector",
    photos: Sequence[Doubted],
    chosen: Chosen,
    lost: str,
    log: Callable[[str], None],
) -> list[Path]:
    """Write the list, the values, the page, and what `config.write` requests into `folder`; returns the files.

    Args:
        photos: in the order of doubt.
        lost: files of `config.images` that were not compared, in words, or nothing.
        log: as of `write_label_files`.
    """
    listed = [photos[position] for position in chosen.listed]
    paths = [os.path.abspath(one.record.path) for one in listed]  # absolute: the list may be moved
    files = [folder / LIST, folder / VALUES, folder / PAGE]
    write_atomically(files[0], "".join(f"{path}\n" for path in paths))
    write_atomically(files[1], json.dumps(values_of(config, loaded, photos, chosen), allow_nan=False, indent=1) + "\n")
    write_atomically(files[2], page_of(listed, loaded, len(photos), about_page(config, loaded, chosen, lost)))
    if not config.write:
        return files
    boxes = data_set(
        loaded,
        [image_entry(one.record, one.name) for one in listed],
        {one.record.image_id: one.rows for one in listed},
        description="boxes of photos to annotate next",
        threshold=config.least,
    )
    return files + write_label_files(folder, boxes, config.write, prefix=config.label_studio_prefix, log=log)


def values_of(
    config: AuditConfig, loaded: "LoadedDetector", photos: Sequence[Doubted], chosen: Chosen
) -> dict[str, Any]:
    """Return the content of `annotate_next.json`: all photos in the order of doubt."""
    place = {position: number for number, position in enumerate(chosen.listed, 1)}
    return {
        "detector": loaded.metadata.get("content_sha256"),
        "score_threshold": config.least,
        "listed": len(chosen.listed),
        "near_duplicates": len(chosen.copy_of),
        "photos": [
            {
                "file_name": one.name,
                "doubt": round(one.doubt.total, _DIGITS),
                "margin": round(one.doubt.margin, _DIGITS),
                "disagreement": round(one.doubt.disagreement, _DIGITS),
                "boxes": len(one.rows),
                "place": place.get(position),
                "near_duplicate_of": photos[chosen.copy_of[position]].name if position in chosen.copy_of else None,
            }
            for position, one in enumerate(photos)
        ],
    }


def about_page(config: AuditConfig, loaded: "LoadedDetector", chosen: Chosen, lost: str) -> str:
    """Say whose boxes the page shows, from which score on, and what was left out."""
    detector = str(loaded.metadata.get("content_sha256") or "")[:8]
    parts = [
        f"Boxes of {config.model}{f' (content hash {detector})' if detector else ''} with a score of at least {config.least:g}.",
        f"Of {config.images} left out: {count(len(chosen.copy_of), 'near-duplicate')} of listed photos"
        + (f"; {lost}." if lost else "."),
    ]
    return " ".join(printable(part) for part in parts)


def page_of(listed: Sequence[Doubted], loaded: "LoadedDetector", number: int, about: str) -> str:
    """Return the page: the first `MOST_PICTURES` listed photos with their boxes, in one HTML file.

    Args:
        number: of compared photos.
        about: sentences on the detector and on what was left out.
    """
    shown = listed[:MOST_PICTURES]
    more = "" if len(shown) == len(listed) else f" The first {len(shown)} of them are shown."
    title = f"{count(len(listed), 'photo')} to annotate next, of {number:,}"
    figures = "\n".join(_figure(place, one, loaded) for place, one in enumerate(shown, 1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem; color-scheme: light dark; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption, .about {{ font-size: .875rem; overflow-wrap: anywhere; }}
@media print {{ figure {{ break-inside: avoid; }} }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>The most doubtful first.{more} Doubt, in objects: scores near 0.5 (margin), and differences between the boxes of a photo
and of its mirror image (disagreement). It orders the photos; it is no error of the detector.</p>
<p class="about">{html.escape(about)}</p>
<main>
{figures}
</main></body></html>
"""


def _figure(place: int, one: Doubted, loaded: "LoadedDetector") -> str:
    picture = _picture(one, loaded)
    data = base64.b64encode(_jpeg(picture)).decode()
    name = html.escape(printable(one.name))
    doubt = one.doubt
    numbers = f"doubt {doubt.total:.2f} = margin {doubt.margin:.2f} + disagreement {doubt.disagreement:.2f}"
    size = f'width="{picture.width}" height="{picture.height}"'
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" {size} alt="{name} with {count(len(one.rows), "box")} of the detector" loading="lazy">'
        f"<figcaption>{place}. {name}<br>{numbers}; {count(len(one.rows), 'box')}</figcaption></figure>"
    )


def _picture(one: Doubted, loaded: "LoadedDetector") -> Image.Image:
    """Draw the boxes on a photo, which is made smaller first, so that names stay legible."""
    image = Image.fromarray(load_record(one.record).permute(1, 2, 0).numpy())
    factor = min(1.0, _SIDE / max(image.size))
    image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    corners_N4 = np.array([row["bbox"] for row in one.rows], dtype=np.float64).reshape(-1, 4)
    corners_N4[:, 2:] += corners_N4[:, :2]
    classes = {category: number for number, category in enumerate(loaded.category_ids)}
    labels = torch.tensor([classes[row["category_id"]] for row in one.rows], dtype=torch.int64)
    scores = torch.tensor([row["score"] for row in one.rows], dtype=torch.float64)
    objects = Detections(torch.from_numpy(corners_N4 * factor), scores, labels)
    return draw_objects(image, objects, loaded.class_names, legend=True)


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80, optimize=True)
    return content.getvalue()
