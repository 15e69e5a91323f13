"""AP of exported files on an evaluation set, and the decision whether a file of lower precision may be kept. An INT8 file that loses too much is
written again with its noisiest layers in float32.

Every image runs alone, so that padding is the same for all files.
"""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssld.shared.training.progress import Clock
from ssld.shared.wording import duration
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import CocoData, Id
from ssld.stage2_detect.data.loaders import load_record
from ssld.stage2_detect.deploy.calibration import observe, ranges
from ssld.stage2_detect.deploy.check import Batch, Run, batches_of, fitted, images_of, padded
from ssld.stage2_detect.deploy.precision import layers, losses, tensors, title, write_half, write_int8
from ssld.stage2_detect.deploy.writing import openvino_runner, runner
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.export_config import FILES, LOWER, ExportDetectorConfig, GateFailed
from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.mask_head import paste
from ssld.stage2_detect.models.postprocess import to_original

_LISTED = 5  # layers named in the message
_FIRST = 4  # layers in float32 in the first of the further attempts


def files_of(data: CocoData) -> set[Path]:
    """Resolve the paths of the evaluation images, which must not give the ranges of INT8: AP would look better than it is."""
    return {Path(record.path).resolve() for record in data.images}


def ap_of_files(
    runs: Mapping[str, Run],
    data: CocoData,
    resize: ResizeConfig,
    canvas: tuple[int, int] | None,
    mask_threshold: float | None,
    log: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Compute the AP of files on an evaluation set, in percent: {name: {"AP": ...}}, and "mask_AP" of a detector with masks.

    Args:
        mask_threshold: None for a detector without masks.
        log: receives a progress line now and then.
    """
    detections: dict[str, dict[Id, Detections]] = {name: {} for name in runs}
    clock = Clock(len(data.images))
    for record in data.images:
        image_CHW = load_record(record)
        size = (image_CHW.shape[1], image_CHW.shape[2])
        resized_CHW, scale = fitted(image_CHW, resize, canvas)
        batch = padded([resized_CHW], canvas)
        for name, run in runs.items():
            detections[name][record.image_id] = _of_image(run, batch, scale, size, mask_threshold)
        clock.add()
        if clock.due():
            log(f"{clock.done} of {clock.total} images done, {duration(clock.left)} to go")
    return {name: _aps(data, found, mask_threshold is not None) for name, found in detections.items()}


def _aps(data: CocoData, found: Mapping[Id, Detections], masks: bool) -> dict[str, float]:
    aps = {"AP": 100 * float(coco_ap(data, found)["AP"])}
    return aps | ({"mask_AP": 100 * float(coco_ap(data, found, masks=True)["AP"])} if masks else {})


def _of_image(run: Run, batch: Batch, scale: float, size: tuple[int, int], mask_threshold: float | None) -> Detections:
    boxes, scores, labels, count, *maps = (torch.from_numpy(part) for part in run(*batch))
    n = int(count[0])
    inside = Detections(boxes[0, :n], scores[0, :n], labels[0, :n])
    found, kept_N = to_original(inside, torch.tensor(size), torch.tensor(scale, dtype=torch.float32))
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


def float_counts(layers: int, rounds: int) -> list[int]:
    """Count the layers to keep in float32 in each attempt: none, then 4, 8, 16, ..., as long as others are left."""
    counts = [0, *(_FIRST << number for number in range(rounds))]
    return [count for count in counts if count < layers]


def search(
    attempt: Callable[[Sequence[str]], str | None],
    ranked: Callable[[], Sequence[str]],
    counts: Sequence[int],
    log: Callable[[str], None],
) -> tuple[list[str], str | None]:
    """Keep more and more of the noisiest layers in float32 until an attempt succeeds.

    Args:
        attempt: writes and judges a file with these layers in float32; returns why it is refused, or None.
        ranked: layers, noisiest first; called after the first attempt.
        counts: numbers of layers in float32, from `float_counts`.

    Returns:
        The layers of the last attempt, and why it was refused, or None.
    """
    kept: list[str] = []
    refused: str | None = None
    for number, count in enumerate(counts):
        if number:
            kept = list(ranked()[:count])
            log(f"{refused}; attempt {number} of {len(counts) - 1} with the {count} noisiest layers in float32")
        refused = attempt(kept)
        if refused is None:
            break
    return kept, refused


class LowerPrecision:
    """Files of lower precision of one detector, each judged by its AP on an evaluation set.

    Args:
        files: paths by format and precision; that of `onnx` exists.
    """

    def __init__(
        self,
        config: ExportDetectorConfig,
        loaded: LoadedDetector,
        data: CocoData,
        canvas: tuple[int, int] | None,
        files: Mapping[str, Path],
        log: Callable[[str], None],
    ) -> None:
        self.config, self.loaded, self.data, self.canvas, self.files, self.log = (
            config, loaded, data, canvas, files, log
        )  # fmt: skip
        self.runs: dict[str, Run] = {}
        """How to run each file that is kept, by file name and runtime."""
        self.aps: dict[str, dict[str, float]] = {}
        """AP in percent, by file name and runtime."""

    def write(self) -> dict[str, Any]:
        """Write and judge all that is requested; returns the facts about INT8 for the run's result. Raises GateFailed."""
        self.log(f"AP on {len(self.data.images)} images of {self.data.file}")
        self.aps = self._measure({FILES["onnx"]: runner("onnx", self.files["onnx"])})
        if self.config.fp16:
            self.log(f"{LOWER['fp16']}: {write_half(self.files['onnx'], self.files['fp16'])} layers in float16")
            refused = self._judge("fp16")
            if refused:
                raise GateFailed(f"{refused}; --fp16 false leaves this file out")
        return self._write_int8() if self.config.int8 else {}

    def _write_int8(self) -> dict[str, Any]:
        import onnx

        config, source, target = self.config, self.files["onnx"], self.files["int8"]
        images = images_of(config, self.log, config.calibration_images, files_of(self.data))
        batches = batches_of(images, self.loaded.resize, self.canvas, 1)  # singly, since padding would only cost time
        self.log(
            f"{LOWER['int8']}: measuring ranges on {len(images)} images of {config.images}, none of {self.data.file}"
        )
        if without_vnni():
            self.log("this CPU has no VNNI: INT8 gains less speed here, and reduce_range may save AP")
        model = onnx.load(source)
        count = len(set(layers(model).values()))
        observed = observe(source, tensors(model), batches, torch.get_num_threads(), self.log)
        limits = ranges(observed, config.calibration)
        noise: dict[str, float] = {}

        def attempt(kept: Sequence[str]) -> str | None:
            lower = write_int8(source, target, limits, floats=kept, reduce_range=config.reduce_range)
            if not kept:
                noise.update(losses(source, target, observed))
            self.log(f"{LOWER['int8']}: {lower} of {count} layers in INT8")
            return self._judge("int8")

        counts = float_counts(count, config.float_rounds)
        kept, refused = search(attempt, lambda: list(noise), counts, self.log)
        if refused:
            raise GateFailed(
                f"{refused}, with {len(kept)} of {count} layers in float32; layers with the lowest signal-to-noise ratio in INT8: "
                f"{_ratios(noise, list(noise)[:_LISTED])}; another calibration, more calibration_images or float_rounds may help, or --int8 false"
            )
        if kept:
            self.log(
                f"{LOWER['int8']}: in float32 stay, with their signal-to-noise ratio in INT8: {_ratios(noise, kept)}"
            )
        return {"layers": count, "float_layers": [title(weight) for weight in kept], "images": len(images)}

    def _judge(self, precision: str) -> str | None:
        """Measure a file's AP in each runtime; returns which one loses how much too much, or None."""
        path, name = self.files[precision], LOWER[precision]
        runs = {name: runner("onnx", path)}
        if self.config.openvino:
            runs[f"{name} by OpenVINO"] = openvino_runner(path)
        aps, before = self._measure(runs), self.aps[FILES["onnx"]]
        self.runs |= runs
        self.aps |= aps
        most = self.config.max_ap_drop
        failed = [key for key in runs if not decide(key, before, aps[key], most, self.log)]
        if not failed:
            return None
        lost = max(before[key] - aps[failed[0]][key] for key in before)
        return f"{failed[0]}: loses {lost:.2f} points of AP, max_ap_drop is {most:g}"

    def _measure(self, runs: Mapping[str, Run]) -> dict[str, dict[str, float]]:
        threshold = self.loaded.metadata["model"]["mask"]["threshold"] if self.loaded.has_masks else None
        return ap_of_files(runs, self.data, self.loaded.resize, self.canvas, threshold, self.log)


def int8_ratios(latency: Mapping[str, float], log: Callable[[str], None]) -> dict[str, float]:
    """Compute the latency of the INT8 file by each runtime over that of torch; logs where INT8 gains nothing."""
    int8 = {name: seconds for name, seconds in latency.items() if name.startswith(LOWER["int8"])}
    others = {name: seconds for name, seconds in latency.items() if name not in int8}
    best, other = min(int8, key=int8.__getitem__), min(others, key=others.__getitem__)
    ratios = {name: seconds / latency["torch"] for name, seconds in int8.items()}
    log(f"{best} takes {ratios[best]:.2f} of torch's time")
    if int8[best] >= others[other]:
        log(f"INT8 gains nothing here: {other} takes {others[other] / latency['torch']:.2f} of torch's time")
    return ratios


def _ratios(noise: Mapping[str, float], weights: Sequence[str]) -> str:
    """Name layers with their ratio of signal to noise."""
    return ", ".join(f"{title(one)} ({-10 * math.log10(max(noise[one], 1e-30)):.0f} dB)" for one in weights)


def without_vnni() -> bool:
    """Return whether this is an x86 CPU without instructions for 8-bit dot products."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return platform.machine().lower() in ("x86_64", "amd64") and known is not None and not known()
