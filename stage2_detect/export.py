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
from ssld.stage2_detect.export_config import FILES, ExportDetectorConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ExportDetectorConfig, export_detector, argv, program="export.py")


def export_detector(config: ExportDetectorConfig) -> None:
    """Write the files and `hub/`, and upload the folder if requested.

    Raises UserError for a file that is not a detector file, a network that cannot be traced, outputs that differ by more than the tolerances (no
    file is left then), and an upload that fails.
    """
    from contextlib import ExitStack

    from ssld.shared.deploy.graph_files import require_onnx
    from ssld.shared.deploy.hub import check_name, push
    from ssld.shared.files import atomically
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.deploy.card import write_folder
    from ssld.stage2_detect.deploy.check import batches_of, check, graph_of, images_of, measure
    from ssld.stage2_detect.deploy.writing import runner, write, write_runtime
    from ssld.stage2_detect.detector_file import load_detector

    if "onnx" in config.formats:
        require_onnx()
    if config.push_to_hub:
        check_name(config.push_to_hub)
    loaded = load_detector(config.model)
    graph_of(loaded.fast)
    images = images_of(config, print)  # before minutes of tracing
    run = RunDir(config, "export_detector")
    if run.status == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    for line in loaded.notes:
        run.log(line)

    # ---- the files, under temporary names until all of them are checked
    files = {str(name): run.path / FILES[name] for name in config.formats}
    metrics: dict[str, object] = {}
    with ExitStack() as stack:
        temporary = {name: stack.enter_context(atomically(file)) for name, file in files.items()}
        canvas = config.canvas
        for name, path in temporary.items():
            run.log(f"{FILES[name]}: tracing and writing, which takes a minute or two")
            canvas = write(name, path, loaded, canvas, run.log)
        many = batches_of(images, loaded.resize, canvas, config.batch_size)
        runs = {name: runner(name, path) for name, path in temporary.items()}
        for name, call in runs.items():
            metrics[name] = check(call, loaded.model, many, config, FILES[name], run.log)
        if config.benchmark:
            run.log("measuring speeds")
            metrics["seconds"] = measure(runs, loaded, many, run.log)
    written = list(files.values())
    if "onnx" in files:
        written.append(write_runtime(run.path))

    # ---- the hub's folder
    folder = run.path / "hub"
    write_folder(folder, config.model, loaded, written, push_to_hub=config.push_to_hub, checks=metrics)
    if config.push_to_hub:
        run.log(f"uploaded to {push(folder, config.push_to_hub, private=config.private)}")
    run.finish(metrics, [*written, *sorted(folder.iterdir())])
    run.log(f"wrote {', '.join(map(str, written))} and {folder}")


if __name__ == "__main__":
    sys.exit(main())
