"""Evaluate a detector file by COCO AP, overall and per class.

    python stage2_detect/evaluate.py --model runs/det/detector.safetensors --annotations val.json --images val --output runs/det_ap

Writes `detections.json` (COCO results with the original ids), `analysis.json` (precision, recall and F1 of each class
at `score_threshold`, confusion matrix, precision-recall curves), `label_audit.json` and `label_audit.jpg` (labels to look at
first) and `pictures/` (the best and the worst images, with ground truth and detections) beside result.json. With
`--compare runs/other_ap/detections.json` the difference in AP to another detector is reported with a 95 % interval
(`evaluation/bootstrap.py`).
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage2_detect.config import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(EvaluateConfig, evaluate_detector, argv, program="evaluate.py")


def evaluate_detector(config: EvaluateConfig) -> None:
    """Evaluate the detector file of `config` and write result.json; the processes of a launcher share the images.

    Raises UserError for a faulty file, other classes than the detector's, detections of other images in `compare`, and an image that cannot be read.
    """
    from ssld.shared.distributed.processes import DTYPES, describe_processes, start_processes
    from ssld.shared.distributed.ranks import from_main_rank
    from ssld.shared.run_dir import RunDir
    from ssld.shared.training.trackers import start_trackers
    from ssld.shared.wording import count, printable
    from ssld.stage2_detect.data.coco import read_coco, require_masks
    from ssld.stage2_detect.data.coco_json import write_results
    from ssld.stage2_detect.data.convert.parts import evaluated_part
    from ssld.stage2_detect.data.sizing import Sizing
    from ssld.stage2_detect.data.trained_images import images_with_marks
    from ssld.stage2_detect.detector_file import load_named
    from ssld.stage2_detect.evaluation.bootstrap import bootstrap_metrics, read_detections
    from ssld.stage2_detect.evaluation.files import write_evaluation
    from ssld.stage2_detect.evaluation.label_audit import write_audit
    from ssld.stage2_detect.evaluation.scoring import compare_expected, describe, score

    loaded = load_named(config.model)
    with_masks = loaded.has_masks
    part, notes = evaluated_part(config)
    data = read_coco(
        part.annotations,
        part.images,
        training=False,
        segmentations=with_masks,
        class_names=loaded.class_names,
        cache_annotations=config.cache_annotations,
    )
    if with_masks:
        require_masks(data)
    # Read before the evaluation, so that a wrong file costs no time.
    others = read_detections(config.compare, data) if config.compare else None
    accelerator, config = start_processes(config)
    run = RunDir(config, "evaluate_detector", main=accelerator.is_main_process)
    if run.finished_earlier(from_main_rank(run.status)):
        return
    start_trackers(accelerator, config, run)
    run.log(*describe_processes(accelerator, config, config.workers))
    run.log(*notes)
    run.log(data.describe())
    run.tell("annotations", data.file, data.tally)
    marks = loaded.metadata.get("trained_images")
    trained = images_with_marks(data.images, marks) if run.main and marks else []
    if trained:
        run.log(
            f"warning: the scores are too good: {len(trained):,} of {count(len(data.images), 'evaluation image')} at least are images that the "
            f"detector was trained on (first: {printable(trained[0])}); evaluate it on others"
        )
    metrics, detections = score(
        loaded.model.to(accelerator.device),
        data,
        Sizing.of(loaded.resize, short_side=config.short_side, long_side=config.long_side, tta=config.tta),
        batch_size=config.batch_size,
        workers=config.workers,
        device=accelerator.device,
        dtype=DTYPES[config.precision],
        backend=config.backend,
        log=run.log,
    )
    run.log(describe(metrics))
    if config.expected:
        metrics["expected_met"], line = compare_expected(config.expected, metrics, len(data.images), config.precision)
        run.log(line)
    files = [run.path / "detections.json"]
    if accelerator.is_main_process:
        write_results(detections, data.category_ids, files[0])
        intervals, lines = bootstrap_metrics(data, read_detections(files[0], data), others, config.compare)
        metrics |= intervals
        run.log(*lines)
        threshold = config.score_threshold
        report, written = write_evaluation(run, data, detections, metrics, score_threshold=threshold)
        files += written
        files += write_audit(run, data, detections, folder=part.images, score_threshold=threshold)
        metrics["at_threshold"] = {key: report[key] for key in ("score_threshold", "iou")} | report["all_classes"]
        metrics["per_class_f1"] = {row["class"]: row["f1"] for row in report["classes"]}
    metrics["orientation"] = {"val": data.orientation.record()}
    accelerator.end_training()
    run.finish(metrics, files)


if __name__ == "__main__":
    sys.exit(main())
