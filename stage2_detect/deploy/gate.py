"""AP of exported files on an evaluation set, and the decision whether a file of lower precision may be kept.

Every image runs alone, so that padding is the same for all files.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData, Id
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.deploy.check import Batch, Run, batches_of, fitted, images_of, padded
from ssld.stage2_detect.deploy.precision import losses, write_half, write_int8
from ssld.stage2_detect.deploy.writing import openvino_runner, runner
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.export_config import FILES, LOWER, ExportDetectorConfig, GateFailed
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.mask_head import paste
from ssld.stage2_detect.models.postprocess import to_original

_LISTED = 5  # layers named in the message


def files_of(data: CocoData) -> set[Path]:
    """Resolve the paths of the evaluation images, which must not give the ranges of INT8: AP would look better than it is."""
    return {Path(record.path).resolve() for record in data.images}


def ap_of_files(
    runs: Mapping[str, Run],
    data: CocoData,
    resize: ResizeConfig,
    canvas: tuple[int, int] | None,
    mask_threshold: float | None,
) -> dict[str, dict[str, float]]:
    """Compute the AP of files on an evaluation set, in percent: {name: {"AP": ...}}, and "mask_AP" of a detector with masks.

    Args:
        mask_threshold: None for a detector without masks.
    """
    detections: dict[str, dict[Id, Detections]] = {name: {} for name in runs}
    for record in data.images:
        image_CHW = load_record(record)
        size = (image_CHW.shape[1], image_CHW.shape[2])
        resized_CHW, scale = fitted(image_CHW, resize, canvas)
        batch = padded([resized_CHW], canvas)
        for name, run in runs.items():
            detections[name][record.image_id] = _of_image(run, batch, scale, size, mask_threshold)
    return {name: _aps(data, found, mask_threshold is not None) for name, found in detections.items()}


def _aps(data: CocoData, found: Mapping[Id, Detections], masks: bool) -> dict[str, float]:
    aps = {"AP": 100 * float(coco_ap(data, found)["AP"])}
    return aps | ({"mask_AP": 100 * float(coco_ap(data, found, masks=True)["AP"])} if masks else {})


def _of_image(run: Run, batch: Batch, scale: float, size: tuple[int, int], mask_threshold: float | None) -> Detections:
    boxes, scores, labels, count, *maps = (torch.from_numpy(part) for part in run(*batch))
    n = int(count[0])
    inside = Detections(boxes[0, :n], scores[0, :n], labels[0, :n])
    found, kept_N = to_original(inside, batch[1][0], torch.tensor(scale, dtype=torch.float32))
    if mask_threshold is None:
        return found
    masks = paste(maps[0][0, :n][kept_N], found.boxes_N4, *size, mask_threshold)
    return Detections(found.boxes_N4, found.scores_N, found.labels_N, masks)


def decide(
    name: str, before: Mapping[str, float], after: Mapping[str, float], most: float, log: Callable[[str], None]
) -> bool:
    """Log AP before and after; returns whether no AP falls by more than `most` points."""
    for key, ap in before.items():
        log(f"{name}: {key.replace('_', ' ')} {ap:.2f} -> {after[key]:.2f} ({after[key] - ap:+.2f}), allowed -{most:g}")
    return all(after[key] >= ap - most for key, ap in before.items())


def worst_layers(source: Path, int8: Path, batch: Batch, threads: int) -> str:
    """Name the layers that INT8 makes noisiest, with their ratio of signal to noise."""
    noise = list(losses(source, int8, batch, threads).items())[:_LISTED]
    return "; ".join(f"{layer} ({-10 * math.log10(max(share, 1e-30)):.0f} dB)" for layer, share in noise)


def write_lower(
    config: ExportDetectorConfig,
    loaded: LoadedDetector,
    data: CocoData,
    canvas: tuple[int, int] | None,
    files: Mapping[str, Path],
    log: Callable[[str], None],
) -> tuple[dict[str, Run], dict[str, dict[str, float]]]:
    """Write the files of lower precision and compare their AP with that of the ONNX file.

    Args:
        files: paths by format and precision; that of `onnx` exists.

    Returns:
        How to run each file, and AP in percent, by file name and runtime.

    Raises GateFailed.
    """
    runs = {FILES["onnx"]: runner("onnx", files["onnx"])}
    calibration: list[Batch] = []
    if config.int8:
        images = images_of(config, log, config.calibration_images, files_of(data))
        calibration = batches_of(images, loaded.resize, canvas, 1)  # singly, since padding would only cost time
        log(f"{LOWER['int8']}: measuring ranges on {len(images)} images of {config.images}, none of {data.file}")
        log(f"{LOWER['int8']}: {write_int8(files['onnx'], files['int8'], calibration)} layers in INT8")
    if config.fp16:
        log(f"{LOWER['fp16']}: {write_half(files['onnx'], files['fp16'])} layers in float16")
    for name in LOWER:
        if name in files:
            runs[LOWER[name]] = runner("onnx", files[name])
            if config.openvino:
                runs[f"{LOWER[name]} by OpenVINO"] = openvino_runner(files[name])
    log(f"AP on {len(data.images)} images of {data.file}")
    threshold = loaded.metadata["model"]["mask"]["threshold"] if loaded.has_masks else None
    aps = ap_of_files(runs, data, loaded.resize, canvas, threshold)
    before = aps[FILES["onnx"]]
    failed = [
        name for name in runs if name != FILES["onnx"] and not decide(name, before, aps[name], config.max_ap_drop, log)
    ]
    if failed:
        lost = max(before[key] - aps[failed[0]][key] for key in before)
        line = f"{failed[0]}: loses {lost:.2f} points of AP, max_ap_drop is {config.max_ap_drop:g}"
        if "int8" in failed[0]:
            worst = worst_layers(files["onnx"], files["int8"], calibration[0], torch.get_num_threads())
            line += f"; layers with the lowest signal-to-noise ratio in INT8: {worst}; more calibration_images may help, or --int8 false"
        raise GateFailed(line)
    del runs[FILES["onnx"]]
    return runs, aps
