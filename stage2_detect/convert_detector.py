"""Convert a detector of torchvision, detectron2 or mmdetection to a detector file.

    python stage2_detect/convert_detector.py --weights fasterrcnn_resnet50_fpn_v2 --output runs/fasterrcnn_v2
    python stage2_detect/convert_detector.py --weights model_final_b275ba.pkl --output runs/detectron2_faster

Writes `detector.safetensors`. `--weights` names weights that torchvision publishes (trained on COCO: torch hub's cache, or one download) or a file,
whose project and architecture are recognized by the names of its tensors; with `--annotations` for the classes of your own. The settings that make
both detectors equal are part of the file. docs/detectors.md lists what is converted.
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
from ssld.stage2_detect.config import ConvertForeignConfig, ResizeConfig
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.published import PREFIX, PUBLISHED

if TYPE_CHECKING:
    from torch import Tensor

    from ssld.stage2_detect.data.coco import CocoData
    from ssld.stage2_detect.foreign.fitting import ForeignDetector

_COCO_LABELS = 91


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ConvertForeignConfig, convert_detector, argv, program="convert_detector.py")


def convert_detector(config: ConvertForeignConfig) -> None:
    """Write the detector file; every tensor of the weights is used, and every tensor of the detector is set.

    Raises UserError for other weights, classes that do not fit, and a published file of another sha256.
    """
    import timm
    from pydantic import ValidationError

    from ssld.shared.files import file_sha256
    from ssld.shared.models.backbones import InputSettings
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.detector_file import save_detector
    from ssld.stage2_detect.foreign.detectron2_weights import detectron2_detector
    from ssld.stage2_detect.foreign.files import project_of, read_foreign
    from ssld.stage2_detect.foreign.fitting import check_fits
    from ssld.stage2_detect.foreign.mmdetection_weights import mmdetection_detector
    from ssld.stage2_detect.foreign.torchvision_weights import find_weights
    from ssld.stage2_detect.models.build import build_detector

    name = config.weights.removeprefix(PREFIX)
    if name not in PUBLISHED and not Path(config.weights).is_file():
        raise UserError(
            f"weights: {config.weights}: no such file, and no published detector; known: {', '.join(PUBLISHED)}"
        )
    file = find_weights(name, "weights") if name in PUBLISHED else Path(config.weights)
    digest = file_sha256(file)
    given, meta = read_foreign(file)
    project = project_of(given, file)
    _check_flags(config, project)
    if project == "torchvision":
        detector, data = _torchvision(config, given, digest, file)
    else:
        if project == "detectron2":
            detector = detectron2_detector(given, caffe=config.caffe, source=file)
        else:
            detector = mmdetection_detector(given, meta, caffe=config.caffe, source=file)
        data = _classes(config, detector, str(file))
    inputs = InputSettings.of_detector(detector.mean, detector.std)
    try:
        model_config = DetectorConfig.model_validate(detector.model)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file}: model.{'.'.join(map(str, first['loc']))} would be {first['input']}: {first['msg']}"
        ) from None
    body = timm.create_model(detector.arch, features_only=True, pretrained=False)
    model = build_detector(model_config, classes=detector.classes, body=body, arch=detector.arch, inputs=inputs)
    check_fits(detector.tensors, model.state_dict(), str(file))
    model.load_state_dict(detector.tensors)

    run = RunDir(config, "convert_detector")
    if run.finished_earlier():
        return
    written = run.path / "detector.safetensors"
    save_detector(
        written,
        model,
        config=model_config,
        resize=ResizeConfig.model_validate(detector.resize),
        arch=detector.arch,
        inputs=inputs,
        data=data,
        licence="bsd-3-clause" if any(digest.startswith(one.sha256) for one in PUBLISHED.values()) else "unknown",
        source={"file": file.name, "sha256": digest, "project": project, "architecture": detector.name},
    )
    facts = {"tensors": len(detector.tensors), "classes": detector.classes, "project": project}
    run.finish(facts, [written])
    note = f"; {detector.note}" if detector.note else ""
    run.log(f"wrote {written}: {project}: {detector.name}, {detector.classes} classes, {len(given)} tensors{note}")


def _check_flags(config: ConvertForeignConfig, project: str) -> None:
    if project == "torchvision" and config.caffe is not None:
        raise UserError("caffe: is for weights of detectron2 and mmdetection; torchvision has no such ResNets")
    if project != "torchvision" and config.architecture is not None:
        raise UserError(f"architecture: is for weights of torchvision; the tensors of {project} show theirs")
    if project != "torchvision" and config.norm_eps is not None:
        raise UserError(f"norm_eps: is for weights of torchvision; the norms of {project} have 1e-5")


def _torchvision(
    config: ConvertForeignConfig, given: "dict[str, Tensor]", digest: str, file: Path
) -> tuple["ForeignDetector", "CocoData"]:
    """Return torchvision's detector, its rows those of the classes."""
    from ssld.stage2_detect.foreign.torchvision_weights import (
        choose,
        recognize,
        torchvision_detector,
        with_current_names,
    )

    given = with_current_names(given)
    recognized = choose(recognize(given, file), config.architecture, file=file, digest=digest)
    about = recognized.about
    data, labels = _labels(config, recognized.labels, str(file), retinanet=about.model["kind"] == "retinanet")
    norm_eps = config.norm_eps
    if norm_eps is None:
        norm_eps = about.norm_eps if digest.startswith(about.sha256) else 1e-5
    return torchvision_detector(given, recognized, labels, norm_eps=norm_eps, source=file), data


def _labels(
    config: ConvertForeignConfig, count: int, source: str, *, retinanet: bool
) -> tuple["CocoData", tuple[int, ...]]:
    """Return the classes of torchvision's weights, and its label of each."""
    from ssld.stage2_detect.foreign.coco_classes import GIVE_ANNOTATIONS, classes_of, coco_classes

    data = classes_of(config.annotations)
    if config.annotations is None:
        if count != _COCO_LABELS:
            raise UserError(f"{source}: has {count} labels, COCO has {_COCO_LABELS}{GIVE_ANNOTATIONS}")
        return data, tuple(coco_classes())
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


def _classes(config: ConvertForeignConfig, detector: "ForeignDetector", source: str) -> "CocoData":
    """Return the classes of weights whose rows are those of the classes, in order."""
    from ssld.stage2_detect.foreign.coco_classes import GIVE_ANNOTATIONS, classes_of

    data = classes_of(config.annotations)
    hint = "" if config.annotations else GIVE_ANNOTATIONS
    if len(data.class_names) != detector.classes:
        raise UserError(f"{source}: has {detector.classes} classes, {data.file} has {len(data.class_names)}{hint}")
    for named, given in zip(detector.class_names, data.class_names, strict=False):
        if named != given.replace("_", " "):
            raise UserError(
                f"{source}: names a class {named!r} where {data.file} has {given!r}; the order has to be that of the weights{hint}"
            )
    return data


if __name__ == "__main__":
    sys.exit(main())
