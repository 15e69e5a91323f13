"""Detect objects in images and videos, to view the results or to train on them.

    python stage2_detect/predict.py --model runs/det/detector.safetensors --images photos --output runs/photos
    python stage2_detect/predict.py --model runs/det/detector.safetensors --images clip.mp4 --write json,images,csv --output runs/clip
    python stage2_detect/predict.py --model runs/det/detector.safetensors --images more_photos --pseudo_labels true --output runs/pseudo

Writes `predictions.json`, a COCO data set whose annotations have scores, and `pictures/`, the images with drawn boxes; `--write` chooses among
these, CSV, YOLO labels, crops, and boxes to correct in Label Studio or CVAT. With `pseudo_labels` it writes `pseudo_labels.json` alone, for
`train.py --pseudo`. A killed run resumes with the same command.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage2_detect.predict_config import PredictConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PredictConfig, predict, argv, program="predict.py")


def predict(config: PredictConfig) -> None:
    """Detect objects in the images of `config` and write the results.

    Raises:
        UserError: bad settings or files; no image can be read; for pseudo-labels, no box reaches the threshold.
    """
    from ssld.stage2_detect.data.image_files import images_of_any_size

    with images_of_any_size(config.tile is not None):
        _predict(config)


def _predict(config: PredictConfig) -> None:
    import json

    from ssld.shared.distributed.processes import describe_processes, start_processes
    from ssld.shared.distributed.ranks import from_main_rank, on_main_rank, rank, wait_for_all, world_size
    from ssld.shared.errors import UserError
    from ssld.shared.files import write_atomically
    from ssld.shared.run_dir import RunDir
    from ssld.shared.wording import count
    from ssld.stage2_detect.detector_file import load_named
    from ssld.stage2_detect.prediction.files import DrawingsAndCrops, Parts, counts, table_text, write_yolo
    from ssld.stage2_detect.prediction.label_tools import without_odd_names, write_label_files
    from ssld.stage2_detect.prediction.part_runs import PartProgress, left_to_do, tell_read
    from ssld.stage2_detect.prediction.steps import (
        Runner,
        assemble,
        check_detector,
        detect_parts,
        detect_video,
        find_work,
    )
    from ssld.stage2_detect.prediction.video import VideoParts, write_video

    # ---- detector and images, checked before any process group exists
    loaded = load_named(config.model)
    check_detector(config, loaded)
    work = find_work(config)

    accelerator, config = start_processes(config)
    run = RunDir(config, "predict", main=accelerator.is_main_process, scratch=("parts",))
    if run.finished_earlier(from_main_rank(run.status)):
        return

    run.log(*describe_processes(accelerator, config, config.workers))

    # ---- detection, part by part; parts of a killed run are kept
    parts = Parts(run.path / "parts", work.records, config.batch_size)
    videos = VideoParts(run.path / "parts", work.folder, work.videos)
    mine, my_videos = left_to_do(run, work, parts, videos)
    progress = PartProgress(run, parts, mine)
    clock = progress.clock
    runner = Runner(config, loaded, accelerator.device, progress.add)
    progress.follow(detect_parts(runner, parts, mine, work))
    for name in my_videos:
        frames = 0
        for frames in detect_video(runner, videos, name):
            if clock.due():
                run.log(f"{name}: {count(frames, 'frame')} done: {clock.describe()}")
        run.log(f"{name}: {count(frames, 'frame')} done: {clock.describe()}")
    progress.close()
    run.log(*loaded.notes)
    wait_for_all()
    for name in work.videos:
        if reason := videos.read(name)["error"]:
            run.log(f"{name}: decoding stopped early: {reason}")
    drawer = DrawingsAndCrops(config, loaded.class_names)
    if drawer.drawing or drawer.cropping:
        for name in work.videos[rank() :: world_size()]:
            write_video(run.path, videos, name, loaded.class_names, loaded.category_ids, drawer)
    wait_for_all()

    # ---- the files
    def write() -> tuple[dict[str, int], list[Path]]:
        files: list[Path] = []
        try:
            content, unreadable, best = assemble(config, loaded, parts, videos, work)
        except UserError:
            parts.delete()  # so that the folder can be used again
            raise
        tell_read(run, config.images, work, unreadable)
        if config.writes("json") or config.pseudo_labels:
            files.append(run.path / ("pseudo_labels.json" if config.pseudo_labels else "predictions.json"))
            write_atomically(files[-1], json.dumps(content, allow_nan=False))
        if config.writes("csv"):
            files.append(run.path / "predictions.csv")
            write_atomically(files[-1], table_text(without_odd_names(content, files[-1].name, run.log)))
        tools = [tool for tool in ("label_studio", "cvat") if config.writes(tool)]
        files += write_label_files(run.path, content, tools, prefix=config.label_studio_prefix, log=run.log)
        if config.writes("yolo", "yolo_scores"):
            files += write_yolo(run.path, content, scores=config.writes("yolo_scores"))
        frames_read = sum(video["frames"] for video in content.get("videos", []))
        total = len(set(work.names.values()).difference(unreadable)) + frames_read
        metrics = counts(content) | {"pictures": len(work.names), "unreadable": len(unreadable)}
        metrics |= {"videos": len(work.videos)} if work.videos else {}
        run.log(
            f"{count(metrics['boxes'], 'box')} with a score of {config.least:g} or more, in {metrics['images_with_boxes']} "
            f"of {count(total, 'frame' if work.videos and not work.names else 'image')}: {files[0] if files else run.path}"
            + ("" if metrics["boxes"] else f"; the highest score is {best:.2f}")
        )
        return metrics, files

    metrics, files = on_main_rank(write)
    accelerator.end_training()
    run.finish(metrics, files)


if __name__ == "__main__":
    sys.exit(main())
