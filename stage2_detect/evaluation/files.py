"""Files of an evaluation: `analysis.json`, and the best and worst images with drawn ground truth and detections.

`pictures/index.json` lists them: `kind` (best or worst), `truth` and `detections` (files beside it), `image`, `image_id`, `lrp`, `right`,
`wrong`, `missed`.
They are ranked by LRP error (`analysis.py`); an image without objects and without detections has none and is not listed.
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
_OF_EACH = 4  # images per kind
_LONGER_SIDE = 560  # pixels of a drawn image, for the report page


def write_evaluation(
    run: RunDir, data: CocoData, detections: Mapping[Id, Detections], metrics: dict[str, Any], *, score_threshold: float
) -> tuple[dict[str, Any], list[Path]]:
    """Analyse the detections of an evaluation and write the results, on the main rank.

    Args:
        run: the run directory.
        data: read with `training=False`.
        detections: by image id, boxes in original-image pixels.
        metrics: of `coco_ap`; `per_class` is copied to the analysis.
        score_threshold: lowest score that counts, in numbers and drawn images.

    Returns:
        `analysis.report`, and the files written.
    """
    analysed = analyse(data, detections, score_threshold=score_threshold)
    report = analysis.report(analysed, metrics["per_class"])
    write_atomically(run.path / "analysis.json", json.dumps(report) + "\n")
    run.log(*analysis.describe(report))
    return report, [run.path / "analysis.json", *draw_best_and_worst(run.path / PICTURES, data, detections, analysed)]


def best_and_worst(analysed: Analysis, most: int = _OF_EACH) -> dict[str, list[int]]:
    """Choose the images to draw: row numbers, `best` by rising LRP error, `worst` by falling; none is in both.

    Of equal errors, the image with more right detections comes first among the best, the one with more mistakes among the worst.
    """
    right_I, wrong_I, missed_I = analysed.counts_I3.T
    known = np.flatnonzero(~np.isnan(analysed.lrp_I))
    rising = known[np.lexsort((-right_I[known], analysed.lrp_I[known]))]
    falling = known[np.lexsort((-(wrong_I + missed_I)[known], -analysed.lrp_I[known]))]
    good = [int(row) for row in rising if right_I[row]][: min(most, -(-len(known) // 2))]
    bad = [int(row) for row in falling if wrong_I[row] + missed_I[row] and int(row) not in good][:most]
    return {BEST: good, WORST: bad}


def draw_best_and_worst(
    folder: Path, data: CocoData, detections: Mapping[Id, Detections], analysed: Analysis
) -> list[Path]:
    """Write the drawn images and their index in place of older ones; returns the files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    records = {record.image_id: record for record in data.images}
    names_with_crowds = [*data.class_names, *(f"{name} (crowd)" for name in data.class_names)]
    index: list[dict[str, Any]] = []
    files: list[Path] = []
    for kind, rows in best_and_worst(analysed).items():
        for number, row in enumerate(rows, 1):
            image_id = analysed.image_ids[row]
            record = records[image_id]
            names = {side: f"{kind}_{number}_{side}.jpg" for side in ("truth", "detections")}
            image = Image.fromarray(load_record(record).permute(1, 2, 0).numpy())
            of_image = detections[image_id] if image_id in detections else _nothing()
            of_image = of_image.where(of_image.scores_N >= analysed.score_threshold)
            _save(
                folder / names["truth"],
                draw_objects(image, truth_of(record, len(data.class_names)), names_with_crowds, legend=True),
            )
            _save(folder / names["detections"], draw_objects(image, of_image, data.class_names, legend=True))
            files += [folder / name for name in names.values()]
            right, wrong, missed = analysed.counts_I3[row].tolist()
            entry = {
                "kind": kind,
                **names,
                "image": Path(record.path).name,
                "image_id": image_id,
                "lrp": round(float(analysed.lrp_I[row]), 4),
            }
            index.append(entry | {"right": right, "wrong": wrong, "missed": missed})
    write_atomically(folder / "index.json", json.dumps(index, indent=1) + "\n")
    return [*files, folder / "index.json"]


def truth_of(record: CocoImage, classes: int) -> Detections:
    """Convert the objects of an image to detections with scores of NaN. Crowd regions have classes of their own, after the others."""
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
    """Encode a COCO segmentation as one compressed RLE."""
    code = (
        mask_codec.frPyObjects(shape, height, width)
        if isinstance(shape, list) or isinstance(shape["counts"], list)
        else shape
    )
    return mask_codec.merge(code) if isinstance(code, list) else code


def _nothing() -> Detections:
    return Detections(torch.zeros((0, 4)), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def _save(file: Path, image: Image.Image) -> None:
    image.thumbnail((_LONGER_SIDE, _LONGER_SIDE), Image.Resampling.LANCZOS)
    image.save(file, quality=72, optimize=True)
