"""Turn an official PaddleClas file of a ResNet50_vd, 101_vd or 152_vd (SSLD v1, v2, Fix) into a backbone file.

    python stage1_ssld/convert_paddle.py --weights ResNet50_vd_ssld_v2_pretrained.pdparams --output runs/ssld_v2

Writes `backbone.safetensors`. PaddleClas normalizes with the mean and standard deviation of ImageNet, as timm does; its weights are under Apache-2.0.

There are two naming schemes: that of PaddleClas@d178931f ppcls/arch/backbone/legendary_models/resnet.py, and the older one of
PaddleClas@032230c6 ppcls/modeling/architectures/resnet_vd.py, in which the Fix files are published. timm's resnet50d, 101d and 152d are the same
networks; 18d, 34d and 200d are not and are refused. A ResNet_vc, which only pools at another place, has the names and shapes of a ResNet_vd.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.errors import UserError
from ssld.stage1_ssld.config import ConvertPaddleConfig

DEPTHS = {"resnet50d": (3, 4, 6, 3), "resnet101d": (3, 4, 23, 3), "resnet152d": (3, 8, 36, 3)}
_SHORTCUT = "PaddleClas puts a convolution and a BatchNorm on the shortcut of its first block, timm's {arch} does not"
_REFUSED = {
    "resnet18d": _SHORTCUT,
    "resnet34d": _SHORTCUT,
    "resnet200d": "PaddleClas' has 3, 12, 48, 3 blocks, timm's {arch} 3, 24, 36, 3",
}
# (blocks, whether they have a third convolution) -> timm name
_BY_BLOCKS = {
    (8, False): "resnet18d",
    (16, False): "resnet34d",
    (16, True): "resnet50d",
    (33, True): "resnet101d",
    (50, True): "resnet152d",
    (66, True): "resnet200d",
}
_BLOCK = re.compile(r"(blocks\.\d+|bb_\d+_\d+)\.(\w+)\.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(ConvertPaddleConfig, convert_paddle, argv, program="convert_paddle.py")


def convert_paddle(config: ConvertPaddleConfig) -> None:
    """Write the backbone file. All parameters of the PaddleClas file are used, and all of timm's network are set.

    Raises UserError for a file that is not a PaddleClas file, or whose network timm does not have.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ssld.shared.files import file_sha256
    from ssld.shared.models.backbones import InputSettings, save_backbone
    from ssld.shared.models.paddle_weights import read_paddle_weights, to_torch
    from ssld.shared.models.state_dicts import fit
    from ssld.shared.run_dir import RunDir

    source, variant = str(config.weights), variant_of(config.weights.name)
    if variant not in (None, "vd"):
        raise UserError(
            f"{source}: is named a ResNet_{variant}, which can have the names and shapes of a ResNet_vd but computes something else; "
            "only ResNet50_vd, ResNet101_vd and ResNet152_vd are converted: rename the file if it is one of these"
        )
    arrays = read_paddle_weights(config.weights)
    arch = recognize(arrays, config.arch, source)
    tensors = to_torch(arrays, layer_names(arch, old="out.weight" in arrays), source)
    classes = fit(tensors, arch, {}, source).classes
    run = RunDir(config, "convert_paddle")
    if run.finished_earlier():
        return
    # PaddleClas evaluates at 224 of 256 pixels. For Fix files it documents 320 pixels only; the whole image is used, as in FixRes (arXiv 1906.06423).
    size = config.input_size or (320 if config.weights.name.startswith("Fix_") else 224)
    val_crop = config.val_crop or (0.875 if size <= 224 else 1.0)
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
        crop_pct=val_crop,
        licence="apache-2.0",
        source={"file": config.weights.name, "sha256": file_sha256(config.weights), "project": "PaddleClas"},
    )
    run.finish({"arrays": len(arrays), "tensors": len(tensors), "classes": classes}, [file])
    if variant is None:
        run.log(
            f"{source}: assumed to be a ResNet_vd; its name does not tell, and a ResNet_vc has the same names and shapes but pools at another place"
        )
    run.log(
        f"wrote {file}: {arch}, {classes} classes, {len(arrays)} arrays, all in use; evaluated at {size} px, crop {val_crop:g}"
    )


def variant_of(file_name: str) -> str | None:
    """ResNet variant in a file name, va to vd; None without one, or with several."""
    variants = set(re.findall(r"v[a-d](?![a-z0-9])", file_name.lower()))
    return variants.pop() if len(variants) == 1 else None


def recognize(names: Iterable[str], arch_setting: str | None, source: str) -> str:
    """Return timm's name of the ResNet_vd with parameters of these names.

    Raises UserError if there is none, if timm's network of that depth computes something else, or if it differs from `arch_setting`.
    """
    names = list(names)
    parts = [match.groups() for name in names if (match := _BLOCK.match(name))]
    arch = _BY_BLOCKS.get((len({block for block, _ in parts}), any(part == "conv2" for _, part in parts)))
    deep_stem = any(name.startswith(("stem.2.", "conv1_3.")) for name in names)
    if arch is None or not deep_stem:
        raise UserError(
            f"{source}: not a ResNet_vd of PaddleClas (first of its {len(names)} parameters: {names[0] if names else 'none'}); "
            "only ResNet50_vd, ResNet101_vd and ResNet152_vd are converted"
        )
    if arch_setting is not None and arch_setting != arch:
        raise UserError(f"{source}: holds a {arch}, but arch is {arch_setting}; leave arch out")
    if arch in _REFUSED:
        why = _REFUSED[arch].format(arch=arch)
        raise UserError(f"{source}: cannot be converted to timm's {arch}, which computes something else: {why}")
    return arch


def layer_names(arch: str, *, old: bool) -> dict[str, str]:
    """Map PaddleClas' layers of a network of DEPTHS to timm's modules; `old` selects the older naming scheme."""
    convolution, norm = ("_conv", "_batch_norm") if old else ("conv", "bn")
    layers: dict[str, str] = {"out" if old else "fc": "fc"}

    def pair(layer: str, conv: str, bn: str) -> None:
        layers[f"{layer}.{convolution}"], layers[f"{layer}.{norm}"] = conv, bn

    for number, bn in enumerate(("conv1.1", "conv1.4", "bn1")):
        pair(f"conv1_{number + 1}" if old else f"stem.{number}", f"conv1.{3 * number}", bn)
    block = 0
    for stage, depth in enumerate(DEPTHS[arch]):
        for place in range(depth):
            timm_block, paddle_block = f"layer{stage + 1}.{place}", f"bb_{stage}_{place}" if old else f"blocks.{block}"
            for number in range(3):
                pair(f"{paddle_block}.conv{number}", f"{timm_block}.conv{number + 1}", f"{timm_block}.bn{number + 1}")
            if place == 0:
                pair(f"{paddle_block}.short", f"{timm_block}.downsample.1", f"{timm_block}.downsample.2")
            block += 1
    return layers


if __name__ == "__main__":
    sys.exit(main())
