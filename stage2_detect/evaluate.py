"""Evaluate a detector file by COCO AP, overall and per class.

    python stage2_detect/evaluate.py --model runs/det/detector.safetensors --annotations val.json --images val --output runs/det_ap

Writes `detections.json` (COCO results with the original ids) beside result.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shared.command import run_command
from stage2_detect.config import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(EvaluateConfig, evaluate_detector, argv, program="evaluate.py")


def evaluate_detector(config: EvaluateConfig) -> None:
    """Evaluate the file that `config` names and write result.json."""
    import torch
    from accelerate import Accelerator

    from shared.processes import uses_gpu
    from shared.ranks import from_main_rank
    from shared.run_dir import RunDir
    from stage2_detect.coco import read_coco
    from stage2_detect.coco_ap import detections_to_json
    from stage2_detect.detector_file import load_detector
    from stage2_detect.scoring import describe, score

    loaded = load_detector(config.model)
    data = read_coco(config.annotations, config.images, training=False, class_names=loaded.class_names)
    accelerator = Accelerator(cpu=not uses_gpu(config.device))
    run = RunDir(config, "evaluate_detector", main=accelerator.is_main_process)
    if from_main_rank(run.status) == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    run.log(data.describe())
    metrics, detections = score(
        loaded.model.to(accelerator.device),
        data,
        short_side=config.short_side or loaded.resize.val_short_side,
        long_side=config.long_side or loaded.resize.val_long_side,
        interpolation=loaded.resize.interpolation,
        kernel=loaded.resize.kernel,
        batch_size=config.batch_size,
        workers=config.workers,
        device=accelerator.device,
        dtype=torch.float32,
        backend=config.backend,
    )
    file = run.path / "detections.json"
    if accelerator.is_main_process:
        detections_to_json(data, detections, file)
    run.log(describe(metrics))
    for name, ap in metrics["per_class"].items():
        run.log(f"  {name:<24}{'-' if ap is None else f'{100 * ap:6.2f}'}")
    accelerator.end_training()
    run.finish(metrics, [file])


if __name__ == "__main__":
    sys.exit(main())
