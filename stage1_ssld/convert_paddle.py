"""Turn an official PaddleClas file of a ResNet50_vd, 101_vd or 152_vd (SSLD v1, v2, Fix) into a backbone file.

    python stage1_ssld/convert_paddle.py --weights ResNet50_vd_ssld_v2_pretrained.pdparams --output runs/ssld_v2

Writes `backbone.safetensors`. PaddleClas normalises with the mean and deviation of ImageNet, as timm does; its weights are under Apache-2.0.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.stage1_ssld.config import ConvertPaddleConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(ConvertPaddleConfig, convert_paddle, argv, program="convert_paddle.py")


def convert_paddle(config: ConvertPaddleConfig) -> None:
    """Write the backbone file; every parameter of the PaddleClas file goes into it, and none of timm's network is left out.

    Raises UserError for a file that is none, or whose network timm does not have.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ssld.shared.files import file_sha256
    from ssld.shared.models.backbones import InputSettings, ModelReference, check_fits, save_backbone
    from ssld.shared.models.paddle_weights import read_paddle_weights, to_torch
    from ssld.shared.run_dir import RunDir
    from ssld.stage1_ssld.paddle_resnet import layer_names, recognise

    source = str(config.weights)
    arrays = read_paddle_weights(config.weights)
    arch = recognise(arrays, config.arch, source)
    tensors = to_torch(arrays, layer_names(arch, old="out.weight" in arrays), source)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    classes = check_fits(ModelReference(source, arch), shapes)
    run = RunDir(config, "convert_paddle")
    if run.status == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    # PaddleClas evaluates at 224 of 256. Of the Fix files it says 320 and publishes no more: with nothing cut off, as in FixRes (arXiv 1906.06423).
    size = config.input_size or (320 if config.weights.name.startswith("Fix_") else 224)
    crop = config.val_crop or (0.875 if size <= 224 else 1.0)
    file = run.path / "backbone.safetensors"
    save_backbone(
        file,
        tensors,
        arch=arch,
        inputs=InputSettings(
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            size=(size, size),
            interpolation="bilinear",
            fixed_size=False,
        ),
        classes=classes,
        crop_pct=crop,
        licence="apache-2.0",
        source={"file": config.weights.name, "sha256": file_sha256(config.weights), "project": "PaddleClas"},
    )
    run.finish({"arrays": len(arrays), "tensors": len(tensors), "classes": classes}, [file])
    run.log(
        f"wrote {file}: {arch}, {classes} classes, {len(arrays)} arrays, all in use; evaluated at {size} px, crop {crop:g}"
    )


if __name__ == "__main__":
    sys.exit(main())
