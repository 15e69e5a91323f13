"""What an evaluation leaves behind for people: `analysis.json`, and some pictures with what is in them beside what was found.

`pictures/index.json` lists the pictures: `kind` (best or worst), `truth` and `found` (files beside it), `image`, `lrp`, `right`, `wrong`, `missed`.
They are ranked by their LRP error (`analysis.py`); a picture without objects in which nothing was found has none and is not shown.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_codec

from ssld.shared.files import write_atomically
from ssld.shared.run_dir import RunDir
from ssld.stage2_detect.data.coco import CocoData, CocoImage, Id
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.evaluation import analysis
from ssld.stage2_detect.evaluation.analysis import Analysis, analyse
from ssld.stage2_detect.evaluation.drawing import draw_objects
from ssld.stage2_detect.models.batch import Detections

BEST, WORST = "best", "worst"
PICTURES = "pictures"
_OF_EACH = 4
_LONGER_SIDE = 560  # pixels of a written picture: they go into a page


def write_evaluation(
    run: RunDir, data: CocoData, detections: Mapping[Id, Detections], metrics: dict[str, Any], *, score_threshold: float
) -> tuple[dict[str, Any], list[Path]]:
    """Analyse the detections of an evaluation and write what came out, on the main rank.

    Args:
        run: the run directory.
        data: read with `training=False`.
        detections: by image id, boxes in original-image pixels.
        metrics: of `coco_ap`: `per_class` goes into the analysis.
        score_threshold: lowest score that counts, in numbers and pictures.

    Returns:
        (`analysis.report`, the files written).
    """
    found = analyse(data, detections, score_threshold=score_threshold)
    report = analysis.report(found, metrics["per_class"])
    write_atomically(run.path / "analysis.json", json.dumps(report) + "\n")
    for line in analysis.describe(report):
        run.log(line)
    return report, [run.path / "analysis.json", *draw_best_and_worst(run.path / PICTURES, data, detections, found)]


def best_and_worst(found: Analysis, most: int = _OF_EACH) -> dict[str, list[int]]:
    """Rows of the images to show: `best` by rising LRP error, `worst` by falling; none is in both.

    Between equal errors the image with more to say comes first: more right detections for the best, more mistakes for the worst.
    """
    right_I, wrong_I, missed_I = found.counts_I3.T
    known = np.flatnonzero(~np.isnan(found.lrp_I))
    rising = known[np.lexsort((-right_I[known], found.lrp_I[known]))]
    falling = known[np.lexsort((-(wrong_I + missed_I)[known], -found.lrp_I[known]))]
    good = [int(row) for row in rising if right_I[row]][: min(most, -(-len(known) // 2))]
    bad = [int(row) for row in falling if wrong_I[row] + missed_I[row] and int(row) not in good][:most]
    return {BEST: good, WORST: bad}


def draw_best_and_worst(
    folder: Path, data: CocoData, detections: Mapping[Id, Detections], found: Analysis
) -> list[Path]:
    """Write the pictures and their index in place of older ones; the files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    records = {record.image_id: record for record in data.images}
    names_with_crowds = [*data.class_names, *(f"{name} (crowd)" for name in data.class_names)]
    index: list[dict[str, Any]] = []
    files: list[Path] = []
    for kind, rows in best_and_worst(found).items():
        for number, row in enumerate(rows, 1):
            image_id = found.image_ids[row]
            record = records[image_id]
            names = {side: f"{kind}_{number}_{side}.jpg" for side in ("truth", "found")}
            picture = Image.fromarray(load_record(record).permute(1, 2, 0).numpy())
            said = detections[image_id] if image_id in detections else _nothing()
            said = said.where(said.scores_N >= found.score_threshold)
            _save(
                folder / names["truth"],
                draw_objects(picture, truth_of(record, len(data.class_names)), names_with_crowds, legend=True),
            )
            _save(folder / names["found"], draw_objects(picture, said, data.class_names, legend=True))
            files += [folder / name for name in names.values()]
            right, wrong, missed = found.counts_I3[row].tolist()
            entry = {"kind": kind, **names, "image": Path(record.path).name, "lrp": round(float(found.lrp_I[row]), 4)}
            index.append(entry | {"right": right, "wrong": wrong, "missed": missed})
    write_atomically(folder / "index.json", json.dumps(index, indent=1) + "\n")
    return [*files, folder / "index.json"]


def truth_of(record: CocoImage, classes: int) -> Detections:
    """The objects of an image as if they had been found, without scores (NaN). Crowd regions are classes of their own, after the others."""
    boxes_N4 = record.file_boxes_N4
    corners_N4 = np.concatenate([boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]], 1)
    masks = None
    if record.segmentations is not None and None not in record.segmentations:
        masks = [_encoded(shape, record.height, record.width) for shape in record.segmentations]
    return Detections(
        torch.from_numpy(corners_N4).float(),
        torch.full((len(corners_N4),), float("nan")),
        torch.from_numpy(record.labels_N + classes * record.crowd_N),
        masks,
    )


def _encoded(shape: Any, height: int, width: int) -> Any:
    """A COCO segmentation as one compressed RLE."""
    code = (
        mask_codec.frPyObjects(shape, height, width)
        if isinstance(shape, list) or isinstance(shape["counts"], list)
        else shape
    )
    return mask_codec.merge(code) if isinstance(code, list) else code


def _nothing() -> Detections:
    return Detections(torch.zeros((0, 4)), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def _save(file: Path, picture: Image.Image) -> None:
    picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE), Image.Resampling.LANCZOS)
    picture.save(file, quality=72, optimize=True)
