"""Export a backbone file to ONNX and `torch.export`, compared with torch, and to a Hugging Face hub folder with a model card.

    python stage1_ssld/export.py --model runs/ssld/student.safetensors --data.path images/val --output runs/ssld_export

Writes `backbone.onnx`, `backbone.pt2` and `hub/`. Runs on the CPU. `--benchmark true` measures the speed of the files, `--push_to_hub ORG/NAME`
uploads the folder.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.errors import UserError
from ssld.stage1_ssld.config import EXPORTED as FILES
from ssld.stage1_ssld.config import ExportConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ssld.shared.models.backbones import InputSettings
    from ssld.shared.run_dir import RunDir
    from ssld.stage1_ssld.data.sources import ImageSource


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(ExportConfig, export_backbone, argv, program="export.py")


def export_backbone(config: ExportConfig) -> None:
    """Write `backbone.onnx`, `backbone.pt2` and `hub/`, and upload the folder if `push_to_hub` is set.

    Raises UserError for a file that is not a backbone file, an image size that the network does not support, logits that differ by more than the
    tolerance (no exported file is left behind then), and a failed upload.
    """
    from contextlib import ExitStack

    import torch

    from ssld.shared.deploy.graph_files import require_onnx
    from ssld.shared.deploy.hub import check_name, public, push
    from ssld.shared.files import atomically
    from ssld.shared.models.backbones import InputSettings, create_classifier
    from ssld.shared.models.model_file import read_metadata
    from ssld.shared.models.references import parse_reference
    from ssld.shared.run_dir import RunDir
    from ssld.stage1_ssld.data.sources import ImageSource
    from ssld.stage1_ssld.deploy import onnx_file
    from ssld.stage1_ssld.deploy.card import write_folder

    if "onnx" in config.formats:
        require_onnx()
    if config.push_to_hub:
        check_name(config.push_to_hub)
    if "arch" not in read_metadata(config.model, kind="backbone"):
        raise UserError(f"{config.model}: was not written by this project; a backbone file is needed")
    source = ImageSource(config.data, 0) if config.data else None
    reference = parse_reference(str(config.model))
    classifier, inputs = create_classifier(reference)
    classifier.eval().requires_grad_(False)
    size = (config.image_size, config.image_size) if config.image_size else inputs.size
    if inputs.fixed_size and size != inputs.size:
        raise UserError(f"image_size: {reference.arch} takes {inputs.size[0]} pixels only; leave it out")
    metadata = (
        reference.metadata | ({} if size == inputs.size else {"trained_size": inputs.size}) | {"input_size": size}
    )
    inputs = InputSettings(inputs.mean, inputs.std, size, inputs.interpolation, inputs.fixed_size)
    run = RunDir(config, "export")
    if run.finished_earlier():
        return

    # ---- the files, under temporary names until all of them are checked
    keys = ("arch", "num_classes", "class_names", "mean", "std", "input_size", "crop_pct", "interpolation", "licence")
    facts = {"input": "uint8 RGB [batch, 3, height, width] in 0..255, normalized inside"} | {
        key: public(metadata[key]) for key in (*keys, "content_sha256") if metadata.get(key) is not None
    }
    images = list(_images(config, source, inputs, metadata, run))
    files = {name: run.path / FILES[name] for name in config.formats}
    checks: dict[str, dict[str, float]] = {}
    runs: dict[str, onnx_file.Run] = {}
    with ExitStack() as stack:
        temporary = {name: stack.enter_context(atomically(file)) for name, file in files.items()}
        for name, path in temporary.items():
            if name == "onnx":
                onnx_file.write_onnx(path, classifier, size, facts)
                runs[name] = onnx_file.onnx_runner(path, threads=torch.get_num_threads())
            else:
                onnx_file.write_program(path, classifier, size, facts)
                runs[name] = onnx_file.program_runner(path)
            checks[name] = check = onnx_file.compare(runs[name], classifier, images)
            run.log(
                f"{'ONNX' if name == 'onnx' else 'torch.export'} against torch on {check['images']} images{'' if source else ' of noise'}: "
                f"logits differ by at most {check['largest_difference']:.2e}, {check['relative_difference']:.1e} of the largest; "
                f"same most likely class in {100 * check['top1_agreement']:.2f} %"
            )
            if not check["relative_difference"] <= config.tolerance:
                raise UserError(
                    f"{config.model}: {FILES[name]} and torch differ by {check['relative_difference']:.1e} of the largest logit, more than the "
                    f"tolerance {config.tolerance:g}; raise tolerance to accept it"
                )
        if config.benchmark:
            onnx_file.measure({FILES[name]: call for name, call in runs.items()}, classifier, images[0], run.log)
    written = list(files.values())

    # ---- the hub's folder
    folder = run.path / "hub"
    write_folder(folder, config.model, classifier.net, inputs, metadata, push_to_hub=config.push_to_hub, checks=checks)
    if config.push_to_hub:
        run.log(f"uploaded to {push(folder, config.push_to_hub, private=config.private)}")
    first = next(iter(checks.values()))
    run.finish(first | {"checks": checks}, [*written, *sorted(folder.iterdir())])
    run.log(f"wrote {', '.join(map(str, written))} and {folder}")


def _images(
    config: ExportConfig,
    source: "ImageSource | None",
    inputs: "InputSettings",
    metadata: dict[str, object],
    run: "RunDir",
) -> "Iterator[Tensor]":
    """uint8 [B,3,H,W] batches for the check: evenly spaced images, or noise."""
    import torch

    from ssld.shared.files import spread
    from ssld.stage1_ssld.data.loaders import ValViews, make_loader, val_batches

    if source is None:
        noise = torch.Generator().manual_seed(0)
        for first in range(0, config.check_images, config.batch_size):
            count = min(config.batch_size, config.check_images - first)
            yield torch.randint(0, 256, (count, 3, *inputs.size), dtype=torch.uint8, generator=noise)
        return
    crop = metadata.get("crop_pct") or 0.875
    assert isinstance(crop, float)
    views = ValViews(source, None, image_size=inputs.size[0], val_crop=crop, interpolation=inputs.interpolation)
    order = val_batches(spread(len(source), config.check_images), config.batch_size, 0, 1)
    read = 0
    for batch in make_loader(views, order, workers=config.workers, pin_memory=False):
        for location in batch.unreadable:
            run.log(f"{location}: cannot be read, left out")
        read += len(batch.labels_B)
        if len(batch.labels_B):
            yield batch.pixels_BCHW
    if read == 0:
        raise UserError(f"{source.path}: none of the chosen images can be read")


if __name__ == "__main__":
    sys.exit(main())
