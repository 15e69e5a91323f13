"""Convert a detector of torchvision to a detector file.

    python stage2_detect/convert_torchvision.py --weights fasterrcnn_resnet50_fpn_v2 --output runs/fasterrcnn_v2

Writes `detector.safetensors`. `--weights` names published weights (trained on COCO: torch hub's cache, or one download) or a state dict, with
`--annotations` for the classes of your own. The settings that make both detectors equal are part of the file. docs/detectors.md lists the names.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import ConvertTorchvisionConfig, ResizeConfig
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.published import PREFIX, PUBLISHED

if TYPE_CHECKING:
    from ssld.stage2_detect.data.coco import CocoData

_COCO_LABELS = 91


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ConvertTorchvisionConfig, convert_torchvision, argv, program="convert_torchvision.py")


def convert_torchvision(config: ConvertTorchvisionConfig) -> None:
    """Write the detector file; every tensor of torchvision's is used, and every tensor of the detector is set.

    Raises UserError for other weights, classes that do not fit, and a published file of another sha256.
    """
    import timm
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ssld.shared.files import file_sha256
    from ssld.shared.models.backbones import InputSettings
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.detector_file import save_detector
    from ssld.stage2_detect.foreign.fitting import check_fits
    from ssld.stage2_detect.foreign.torchvision_weights import convert, find_weights, read_weights, recognize
    from ssld.stage2_detect.models.build import build_detector

    name = config.weights.removeprefix(PREFIX)
    if name not in PUBLISHED and not Path(config.weights).is_file():
        raise UserError(
            f"weights: {config.weights}: no such file, and no published detector; known: {', '.join(PUBLISHED)}"
        )
    file = find_weights(name, "weights") if name in PUBLISHED else Path(config.weights)
    digest = file_sha256(file)
    given = read_weights(file)
    recognized = recognize(given, file)
    about, count = recognized.about, recognized.labels
    data, labels = _classes(config, count, str(file), retinanet=about.model["kind"] == "retinanet")
    norm_eps = config.norm_eps
    if norm_eps is None:
        norm_eps = about.norm_eps if digest.startswith(about.sha256) else 1e-5
    tensors = convert(given, labels, norm_eps=norm_eps, source=file)
    # torchvision's detectors normalize with ImageNet's mean and deviation.
    inputs = InputSettings(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (0, 0), "bilinear", False)
    model_config = DetectorConfig.model_validate(about.model)
    body = timm.create_model(about.arch, features_only=True, pretrained=False, **about.model_args)
    model = build_detector(model_config, classes=len(labels), body=body, arch=about.arch, inputs=inputs)
    check_fits(tensors, model.state_dict(), str(file))
    model.load_state_dict(tensors)

    run = RunDir(config, "convert_torchvision")
    if run.status == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    written = run.path / "detector.safetensors"
    save_detector(
        written,
        model,
        config=model_config,
        resize=ResizeConfig.model_validate(about.resize),
        arch=about.arch,
        inputs=inputs,
        data=data,
        licence="bsd-3-clause" if digest.startswith(about.sha256) else "unknown",
        source={"file": file.name, "sha256": digest, "project": "torchvision", "architecture": recognized.name},
        **({"model_args": about.model_args} if about.model_args else {}),
    )
    run.finish({"tensors": len(tensors), "classes": len(labels), "dropped_labels": count - len(labels)}, [written])
    dropped = [str(label) for label in range(count) if label not in labels]
    run.log(
        f"wrote {written}: {recognized.name}, {len(labels)} classes, {len(given)} tensors; "
        f"epsilon of the backbone's BatchNorm {norm_eps:g}; rows of {len(dropped)} labels without a class dropped "
        f"({', '.join(dropped)}; the background of a two-stage detector is kept apart)"
    )


def _classes(
    config: ConvertTorchvisionConfig, count: int, source: str, *, retinanet: bool
) -> tuple["CocoData", tuple[int, ...]]:
    """Return the classes of the weights, and torchvision's label of each."""
    from ssld.stage2_detect.data.coco import CocoData, read_coco
    from ssld.stage2_detect.foreign.coco_classes import coco_classes

    if config.annotations is None:
        if count != _COCO_LABELS:
            raise UserError(
                f"{source}: has {count} labels, COCO has {_COCO_LABELS}; give --annotations with a COCO JSON of the data it was trained on"
            )
        coco = coco_classes()
        return CocoData("COCO 2017", False, tuple(coco.values()), tuple(coco), images=[]), tuple(coco)
    data = read_coco(config.annotations, None, training=False)
    classes, ids = len(data.class_names), data.category_ids
    if count == classes + 1:
        return data, tuple(range(1, count))
    if retinanet and count == classes:
        return data, tuple(range(count))
    if all(isinstance(one, int) and 0 < one < count for one in ids) and max(int(one) for one in ids) == count - 1:
        return data, tuple(int(one) for one in ids)
    raise UserError(
        f"{source}: has {count} labels; {data.file} has {classes} classes with ids up to {max(map(str, ids))}: neither their number and a "
        "background, nor their ids"
    )


if __name__ == "__main__":
    sys.exit(main())
