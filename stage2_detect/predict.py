"""Find objects in pictures, to look at or to train on.

    python stage2_detect/predict.py --model runs/det/detector.safetensors --images photos --output runs/seen
    python stage2_detect/predict.py --model runs/det/detector.safetensors --images more_photos --pseudo_labels true --output runs/pseudo

Writes `predictions.json`, a COCO data set whose annotations have scores, and `pictures/`, the pictures with their boxes; with `pseudo_labels`
`pseudo_labels.json` alone, for `train.py --pseudo`. A run that was killed goes on with the same command.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shared.command import run_command
from stage2_detect.predict_config import PredictConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PredictConfig, predict, argv, program="predict.py")


def predict(config: PredictConfig) -> None:
    """Detect in the pictures that `config` names and write what was found.

    Raises:
        UserError: anything the user can mend; no picture can be read; for pseudo-labels, no box reaches the threshold.
    """
    import json

    from accelerate import Accelerator

    from shared.errors import UserError
    from shared.processes import uses_gpu
    from shared.ranks import from_main_rank, rank, world_size
    from shared.run_dir import RunDir, write_atomically
    from stage2_detect.detector_file import load_detector
    from stage2_detect.prediction import assemble, check_detector, detect_parts, find_work
    from stage2_detect.prediction_files import Parts, counts, table_text

    # ---- detector and pictures, checked before any process group exists
    loaded = load_detector(config.model)
    check_detector(config, loaded)
    work = find_work(config)

    accelerator = Accelerator(cpu=not uses_gpu(config.device))
    run = RunDir(config, "predict", main=accelerator.is_main_process)
    if from_main_rank(run.status) == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return

    # ---- detection, part by part; what a killed run has done stays
    parts = Parts(run.path / "parts", work.records, config.batch_size)
    left = parts.left()
    accelerator.wait_for_everyone()  # before anybody writes a part
    run.log(f"{work.describe()}; {sum(len(parts.records[number]) for number in left)} to look at")
    mine = left[rank() :: world_size()]
    for done, number in enumerate(detect_parts(config, loaded, parts, mine, work, accelerator.device), 1):
        run.log(f"part {number + 1} of {len(parts.records)} done, {len(mine) - done} left")
    accelerator.wait_for_everyone()

    # ---- the files
    problem, metrics = "", {}
    files = [run.path / ("pseudo_labels.json" if config.pseudo_labels else "predictions.json")]
    if accelerator.is_main_process:
        try:
            content, unreadable, best = assemble(config, loaded, parts, work)
        except UserError as error:
            problem = str(error)
            parts.delete()  # so that the folder can be used again
        else:
            if unreadable:
                run.quarantine(unreadable)
                run.log(
                    f"cannot be read, and listed in {run.path / 'quarantine.txt'}: {len(unreadable)}, first {unreadable[0]}"
                )
            write_atomically(files[0], json.dumps(content, allow_nan=False))
            if config.csv:
                files.append(files[0].with_suffix(".csv"))
                write_atomically(files[1], table_text(content))
            metrics = counts(content) | {"pictures": len(work.names), "unreadable": len(unreadable)}
            run.log(
                f"{metrics['boxes']} boxes with a score of {config.least:g} or more, in {metrics['images_with_boxes']} "
                f"of {len(work.names)} pictures: {files[0]}"
                + ("" if metrics["boxes"] else f"; the best of all boxes has {best:.2f}")
            )
    problem = from_main_rank(problem)
    if problem:
        raise UserError(problem)
    accelerator.end_training()
    run.finish(metrics, files)
    if accelerator.is_main_process:
        parts.delete()


if __name__ == "__main__":
    sys.exit(main())
