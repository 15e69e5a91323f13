"""All files of an export, under temporary names until each of them agrees with the detector in torch."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ssld.shared.files import atomically
from ssld.shared.run_dir import RunDir
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.deploy.check import batches_of, check_outputs, measure_speeds
from ssld.stage2_detect.deploy.gate import LowerPrecision, int8_ratios
from ssld.stage2_detect.deploy.writing import openvino_runner, runner, write, write_runtime
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.export_config import FILES, LOWER, ExportDetectorConfig


def write_checked(
    config: ExportDetectorConfig, loaded: LoadedDetector, images: Sequence[Tensor], data: CocoData | None, run: RunDir
) -> tuple[dict[str, Any], list[Path]]:
    """Write the files that `config` names to the run directory; return what was measured and the files.

    Args:
        images: for the check, uint8 [3, H, W] each.
        data: evaluation images of the AP of lower precisions; None: there are none.

    Raises:
        UserError: a network that cannot be traced, and outputs that differ by more than the tolerances; no file is left.
        GateFailed: a lower precision loses more AP than `max_ap_drop`; no file is left.
    """
    files = {str(name): run.path / FILES[name] for name in config.formats}
    files |= {name: run.path / LOWER[name] for name in LOWER if getattr(config, name)}
    metrics: dict[str, Any] = {}
    with ExitStack() as stack:
        temporary = {name: stack.enter_context(atomically(file)) for name, file in files.items()}
        canvas = config.canvas
        for name in config.formats:
            run.log(f"{FILES[name]}: tracing the network and writing the file")
            started = time.monotonic()
            canvas = write(name, temporary[name], loaded, canvas, run.log)
            run.log(f"{FILES[name]}: written after {time.monotonic() - started:.0f} s")
        batches = batches_of(images, loaded.resize, canvas, config.batch_size)
        runs = {}
        for name in config.formats:
            runs[FILES[name]] = runner(name, temporary[name])
            metrics[name] = check_outputs(runs[FILES[name]], loaded.model, batches, config, FILES[name], run.log)
        if config.openvino:
            label = f"{FILES['onnx']} by OpenVINO"
            runs[label] = openvino_runner(temporary["onnx"])
            metrics["openvino"] = check_outputs(runs[label], loaded.model, batches, config, label, run.log)
        int8: dict[str, Any] = {}
        if data is not None:
            lower = LowerPrecision(config, loaded, data, canvas, temporary, run.log)
            int8 = lower.write()
            metrics["AP"] = lower.aps
            runs |= lower.runs
        if config.benchmark or int8:
            run.log("measuring speeds")
            metrics["seconds"] = seconds = measure_speeds(runs, loaded, batches, run.log)
            if int8:
                metrics["int8"] = int8 | {"latency_of_torch": int8_ratios(seconds["latency"], run.log)}
    runtime = [write_runtime(run.path)] if "onnx" in files else []
    return metrics, [*files.values(), *runtime]
