"""Layer names of PaddleClas' ResNet_vd, and the timm networks that compute the same.

Two namings are in use: that of PaddleClas@d178931f ppcls/arch/backbone/legendary_models/resnet.py, and the older one of
PaddleClas@032230c6 ppcls/modeling/architectures/resnet_vd.py, in which the Fix files are published. timm's resnet50d, 101d and 152d are the same
networks; 18d, 34d and 200d are not and are refused. Names and shapes do not tell a ResNet_vd from a ResNet_vc, which only pools elsewhere.
"""

import re
from collections.abc import Iterable

from ssld.shared.errors import UserError

DEPTHS = {"resnet50d": (3, 4, 6, 3), "resnet101d": (3, 4, 23, 3), "resnet152d": (3, 8, 36, 3)}
_SHORTCUT = (
    "PaddleClas puts a convolution and a BatchNorm on the shortcut of its first block, timm's {arch} has none there"
)
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


def recognise(names: Iterable[str], asked: str | None, source: str) -> str:
    """timm's name of the ResNet_vd that has parameters of these names.

    Raises UserError when it is none, when timm's network of that depth computes something else, and when it is not `asked`.
    """
    names = list(names)
    parts = [match.groups() for name in names if (match := _BLOCK.match(name))]
    arch = _BY_BLOCKS.get((len({block for block, _ in parts}), any(part == "conv2" for _, part in parts)))
    deep_stem = any(name.startswith(("stem.2.", "conv1_3.")) for name in names)
    if arch is None or not deep_stem:
        raise UserError(
            f"{source}: not a ResNet_vd of PaddleClas (first of its {len(names)} parameters: {names[0] if names else 'none'}); "
            "ResNet50_vd, ResNet101_vd and ResNet152_vd are converted"
        )
    if asked is not None and asked != arch:
        raise UserError(f"{source}: holds a {arch}, but arch says {asked}; leave arch out")
    if arch in _REFUSED:
        why = _REFUSED[arch].format(arch=arch)
        raise UserError(f"{source}: cannot become timm's {arch} without changing what it computes: {why}")
    return arch


def layer_names(arch: str, *, old: bool) -> dict[str, str]:
    """PaddleClas' layers of one of DEPTHS -> timm's modules; `old` is the older naming."""
    convolution, norm = ("_conv", "_batch_norm") if old else ("conv", "bn")
    layers: dict[str, str] = {"out" if old else "fc": "fc"}

    def pair(layer: str, conv: str, bn: str) -> None:
        layers[f"{layer}.{convolution}"], layers[f"{layer}.{norm}"] = conv, bn

    for number, bn in enumerate(("conv1.1", "conv1.4", "bn1")):
        pair(f"conv1_{number + 1}" if old else f"stem.{number}", f"conv1.{3 * number}", bn)
    block = 0
    for stage, depth in enumerate(DEPTHS[arch]):
        for place in range(depth):
            ours, theirs = f"layer{stage + 1}.{place}", f"bb_{stage}_{place}" if old else f"blocks.{block}"
            for number in range(3):
                pair(f"{theirs}.conv{number}", f"{ours}.conv{number + 1}", f"{ours}.bn{number + 1}")
            if place == 0:
                pair(f"{theirs}.short", f"{ours}.downsample.1", f"{ours}.downsample.2")
            block += 1
    return layers
