"""Turn an official PaddleDetection file of an R-CNN detector (ResNet-vd with FPN: SSLD, PSS-DET, plain) into a detector file.

    python stage2_detect/convert_paddle.py --weights faster_rcnn_r50_vd_fpn_ssld_1x_coco.pdparams \\
        --config stage2_detect/configs/faster_rcnn_r50vd_ssld_1x.yaml --output runs/faster_official

Writes `detector.safetensors`. The recipe says what the weights do not: anchors, thresholds, sizes; what it says about training is not looked at.
docs/detectors.md lists the files and their recipes. PaddleDetection's weights are under Apache-2.0.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import ConvertPaddleConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ssld.stage2_detect.data.coco import CocoData


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ConvertPaddleConfig, convert_paddle, argv, program="convert_paddle.py")


def convert_paddle(config: ConvertPaddleConfig) -> None:
    """Write the detector file; every parameter of the PaddleDetection file goes into it, and none of ours is left out.

    Raises UserError for a file that is none, and for a recipe or classes that are not the file's.
    """
    import timm
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ssld.shared.files import file_sha256
    from ssld.shared.models.backbones import InputSettings
    from ssld.shared.models.paddle_weights import read_paddle_weights, to_torch
    from ssld.shared.run_dir import RunDir
    from ssld.stage2_detect.detector_file import save_detector
    from ssld.stage2_detect.models.build import build_detector
    from ssld.stage2_detect.paddle_names import check_recipe, class_count, our_module, recognise

    source = str(config.weights)
    arrays = read_paddle_weights(config.weights)
    arch = recognise(arrays, source)
    check_recipe(arrays, config.model, source)
    data = _classes(config, class_count(arrays, source))
    layers = {name.rpartition(".")[0] for name in arrays}
    modules = {layer: our_module(layer, deep_stem=arch.endswith("d")) for layer in layers}
    tensors = to_torch(arrays, {layer: module for layer, module in modules.items() if module}, source)
    # PaddlePaddle's readers normalise with ImageNet's mean and deviation, as timm does.
    inputs = InputSettings(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (0, 0), "bilinear", False)
    body = timm.create_model(arch, features_only=True, pretrained=False)
    model = build_detector(config.model, classes=len(data.class_names), body=body, arch=arch, inputs=inputs)
    _check_fits(tensors, model.state_dict(), source)
    model.load_state_dict(tensors)

    run = RunDir(config, "convert_paddle")
    if run.status == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    file = run.path / "detector.safetensors"
    save_detector(
        file,
        model,
        config=config.model,
        resize=config.resize,
        arch=arch,
        inputs=inputs,
        data=data,
        licence="apache-2.0",
        source={"file": config.weights.name, "sha256": file_sha256(config.weights), "project": "PaddleDetection"},
    )
    run.finish({"arrays": len(arrays), "tensors": len(tensors), "classes": len(data.class_names)}, [file])
    run.log(
        f"wrote {file}: {config.model.kind} on {arch}, {len(data.class_names)} classes, {len(arrays)} arrays, all in use"
    )


def _classes(config: ConvertPaddleConfig, count: int) -> "CocoData":
    """Names and category ids of the file's classes."""
    from ssld.stage2_detect.coco_classes import COCO_CLASSES
    from ssld.stage2_detect.data.coco import CocoData, read_coco

    if config.annotations:
        data = read_coco(config.annotations, None, training=False)
    else:
        data = CocoData("COCO 2017", False, tuple(COCO_CLASSES.values()), tuple(COCO_CLASSES), images=[])
    if len(data.class_names) != count:
        hint = "" if config.annotations else "; give --annotations with a COCO JSON of the data it was trained on"
        raise UserError(f"{config.weights}: has {count} classes, {data.file} has {len(data.class_names)}{hint}")
    return data


def _check_fits(tensors: Mapping[str, "Tensor"], expected: Mapping[str, "Tensor"], source: str) -> None:
    """Raise UserError, naming the first differences, where names or shapes are not those of the detector."""
    wrong = [f"{name} missing" for name in expected if name not in tensors]
    wrong += [f"{name} unknown to the recipe" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if wrong:
        more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: does not fit the recipe's detector (by our names): {'; '.join(wrong[:3])}{more}")


if __name__ == "__main__":
    sys.exit(main())
