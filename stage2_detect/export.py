"""Export a detector file: `detector.onnx` and `detector.pt2`, checked against torch, and `hub/`, a folder for the Hugging Face hub with a model card.

    python stage2_detect/export.py --model runs/det/detector.safetensors --images photos --output runs/det_export

Runs on the CPU. `--benchmark true` measures what was written, `--push_to_hub ORG/NAME` uploads the folder.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.terminal import say
from ssld.stage2_detect.export_config import ExportDetectorConfig, GateFailed


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, 1 where a lower precision loses too much AP."""
    try:
        return run_command(ExportDetectorConfig, export_detector, argv, program="export.py")
    except GateFailed as failed:
        say(f"error: {failed}", sys.stderr)
        return 1


def export_detector(config: ExportDetectorConfig) -> None:
    """Write the files and `hub/`, and upload the folder if requested.

    Raises:
        UserError: a file that is not a detector file, a network that cannot be traced, outputs that differ by more than the tolerances (no
            file is left then), and an upload that fails.
        GateFailed: a lower precision loses more than `max_ap_drop`; no file is left.
    """
    from ssld.shared.deploy.graph_files import require_onnx
    from ssld.shared.deploy.hub import check_name, push
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.data.coco import read_coco
    from ssld.stage2_detect.data.padding import PAD_MULTIPLE
    from ssld.stage2_detect.deploy.card import write_folder
    from ssld.stage2_detect.deploy.check import find_photos, graph_of, images_of
    from ssld.stage2_detect.deploy.checked_files import write_checked
    from ssld.stage2_detect.deploy.gate import files_of
    from ssld.stage2_detect.deploy.writing import LEAST, require_openvino
    from ssld.stage2_detect.detector_file import load_named

    if "onnx" in config.formats:
        require_onnx()
    if config.openvino:
        require_openvino()
    if config.push_to_hub:
        check_name(config.push_to_hub)
    loaded = load_named(config.model)
    graph_of(loaded.model)
    images = images_of(config, print)  # before minutes of tracing
    data = None
    if config.val_annotations and (config.int8 or config.fp16):
        data = read_coco(
            config.val_annotations,
            config.val_images,
            training=False,
            segmentations=loaded.has_masks,
            class_names=loaded.class_names,
        )
        if config.int8:
            # Raises, before minutes of tracing, where all photos are those of the evaluation.
            find_photos(config, files_of(data))
    run = RunDir(config, "export_detector")
    if run.finished_earlier():
        return
    run.log(*loaded.notes)
    shortest = PAD_MULTIPLE * LEAST
    if config.canvas is None and loaded.resize.short_side < shortest:
        run.log(
            f"warning: this detector sees photos of {loaded.resize.short_side} px, and the files pad shorter sides to {shortest} px: "
            f"their detections differ from those of ssld predict; train with resize.short_side {shortest} or more"
        )

    metrics, written = write_checked(config, loaded, images, data, run)

    # ---- the hub's folder
    folder = run.path / "hub"
    write_folder(folder, config.model, loaded, written, push_to_hub=config.push_to_hub, checks=metrics)
    if config.push_to_hub:
        run.log(f"uploaded to {push(folder, config.push_to_hub, private=config.private)}")
    run.finish(metrics, [*written, *sorted(folder.iterdir())])
    run.log(f"wrote {', '.join(map(str, written))} and {folder}")


if __name__ == "__main__":
    sys.exit(main())
