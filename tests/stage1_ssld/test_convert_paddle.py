"""PaddleClas' ResNet_vd as backbone files: names and shapes of every depth, and the logits of a whole ResNet50_vd.

The weights are made by rule under PaddleClas' names; what they compute is written out here from the published network (spec: three stem convolutions,
stride on the 3x3 convolution, average pooling before the shortcut's convolution from the second stage on), in float64 and without any timm.
"""

import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import create_classifier
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.references import parse_reference
from ssld.stage1_ssld.convert_paddle import DEPTHS, layer_names, main, recognize, variant_of

GOLDEN = Path(__file__).parents[1] / "golden" / "reference_weights.py"
LEAVES = ("weight", "bias", "_mean", "_variance")


def units(depths: tuple[int, ...], bottleneck: bool, old: bool) -> Iterator[tuple[str, int, int, int]]:
    """(layer, channels in, channels out, kernel) of every convolution with its BatchNorm."""
    for number, (inside, out) in enumerate([(3, 32), (32, 32), (32, 64)]):
        yield (f"conv1_{number + 1}" if old else f"stem.{number}"), inside, out, 3
    channels, block = 64, 0
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        out = 4 * width if bottleneck else width
        for place in range(depth):
            name = f"bb_{stage}_{place}" if old else f"blocks.{block}"
            if bottleneck:
                yield f"{name}.conv0", channels, width, 1
                yield f"{name}.conv1", width, width, 3
                yield f"{name}.conv2", width, out, 1
            else:
                yield f"{name}.conv0", channels, width, 3
                yield f"{name}.conv1", width, width, 3
            if place == 0:
                yield f"{name}.short", channels, out, 1
            channels, block = out, block + 1


def shapes(
    depths: tuple[int, ...], *, bottleneck: bool = True, classes: int = 1000, old: bool = False
) -> dict[str, tuple[int, ...]]:
    convolution, norm = ("_conv", "_batch_norm") if old else ("conv", "bn")
    result: dict[str, tuple[int, ...]] = {}
    for layer, inside, out, kernel in units(depths, bottleneck, old):
        result[f"{layer}.{convolution}.weight"] = (out, inside, kernel, kernel)
        result |= {f"{layer}.{norm}.{leaf}": (out,) for leaf in LEAVES}
    head = "out" if old else "fc"
    return result | {f"{head}.weight": (2048 if bottleneck else 512, classes), f"{head}.bias": (classes,)}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("arch", "depths"), [("resnet50d", (3, 4, 6, 3)), ("resnet101d", (3, 4, 23, 3)), ("resnet152d", (3, 8, 36, 3))]
)
def test_names_and_shapes_of_every_depth(arch: str, depths: tuple[int, ...], old: bool) -> None:
    import timm

    other = shapes(depths, old=old)
    assert recognize(other, None, "file") == arch
    leaf_of = dict(zip(LEAVES, ("weight", "bias", "running_mean", "running_var"), strict=True))
    layers = layer_names(arch, old=old)
    mapped = {}
    for name, shape in other.items():
        layer, _, leaf = name.rpartition(".")
        mapped[f"{layers.pop(layer) if leaf == LEAVES[-1] else layers[layer]}.{leaf_of[leaf]}"] = (
            shape[::-1] if len(shape) == 2 else shape
        )
    with torch.device("meta"):
        state = timm.create_model(arch).state_dict()
    assert mapped == {name: tuple(tensor.shape) for name, tensor in state.items() if "tracked" not in name}
    assert all("conv" in layer or layer in ("fc", "out") for layer in layers)  # every norm was met


class Reference:
    """ResNet_vd with bottlenecks, from PaddleClas' arrays."""

    def __init__(self, arrays: dict[str, np.ndarray], depths: tuple[int, ...], old: bool) -> None:
        self.arrays = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
        self.depths, self.old = depths, old

    def unit(self, x: torch.Tensor, layer: str, stride: int = 1) -> torch.Tensor:
        convolution, norm = ("_conv", "_batch_norm") if self.old else ("conv", "bn")
        weight = self.arrays[f"{layer}.{convolution}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        scale, shift, mean, variance = (self.arrays[f"{layer}.{norm}.{leaf}"][:, None, None] for leaf in LEAVES)
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(3):
            x = self.unit(x, f"conv1_{number + 1}" if self.old else f"stem.{number}", 2 if number == 0 else 1).relu()
        x, block = F.max_pool2d(x, 3, 2, 1), 0
        for stage, depth in enumerate(self.depths):
            for place in range(depth):
                name = f"bb_{stage}_{place}" if self.old else f"blocks.{block}"
                stride = 2 if stage and place == 0 else 1
                y = self.unit(x, f"{name}.conv0").relu()
                y = self.unit(self.unit(y, f"{name}.conv1", stride).relu(), f"{name}.conv2")
                if place == 0:
                    if stage:
                        x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
                    x = self.unit(x, f"{name}.short")
                x, block = (x + y).relu(), block + 1
        head = "out" if self.old else "fc"
        return x.mean((2, 3)) @ self.arrays[f"{head}.weight"] + self.arrays[f"{head}.bias"]


def by_rule(names: dict[str, tuple[int, ...]], salt: int) -> dict[str, np.ndarray]:
    spec = importlib.util.spec_from_file_location("reference_weights", GOLDEN)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arrays = {name: module.reference_weight(name, list(shape), salt) for name, shape in names.items()}
    for name in names:  # the end of a residual branch stays small, as in the detectors
        if name.endswith(("conv2.bn.weight", "conv2._batch_norm.weight")):
            arrays[name] *= np.float32(0.2)
    return arrays


@pytest.mark.parametrize(
    ("old", "size", "name", "side", "crop"),
    [(False, 65, "Fix_ResNet50_vd_ssld_v2.pdparams", 320, 1.0), (True, 64, "ResNet50_vd_ssld.pdparams", 224, 0.875)],
)
def test_a_converted_resnet50_answers_as_paddleclas_does(
    old: bool, size: int, name: str, side: int, crop: float, call: Any, tmp_path: Path
) -> None:
    depths = DEPTHS["resnet50d"]
    arrays = by_rule(shapes(depths, classes=7, old=old), salt=5)
    weights = tmp_path / name
    record = {"StructuredToParameterName@@": {name: f"parameter_{name}" for name in arrays}}
    weights.write_bytes(pickle.dumps(arrays | record, protocol=2))
    output = tmp_path / "run"
    argv = ["--weights", str(weights), "--output", str(output), "--threads", "1"]
    assert call(main, argv) == 0
    file = output / "backbone.safetensors"
    assert f"resnet50d, 7 classes, {len(arrays)} arrays, all in use" in (output / "log.txt").read_text()

    metadata = read_metadata(file, kind="backbone")
    assert (metadata["arch"], metadata["licence"], metadata["input_size"]) == ("resnet50d", "apache-2.0", [side, side])
    assert metadata["crop_pct"] == crop
    assert metadata["source"]["file"] == weights.name
    net, inputs = create_classifier(parse_reference(str(file)))
    assert (inputs.size, inputs.interpolation) == ((side, side), "bilinear")
    pixels = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    mean, std = (torch.tensor(v).double()[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = Reference(arrays, depths, old)((pixels.double() / 255 - mean) / std)
    with torch.no_grad():
        logits = net.eval()(pixels)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert call(main, argv) == 0
    assert "nothing to do" in (output / "log.txt").read_text()


@pytest.mark.parametrize(
    ("depths", "bottleneck", "reason"),
    [
        ((2, 2, 2, 2), False, "timm's resnet18d, which computes something else: PaddleClas puts a convolution"),
        ((3, 4, 6, 3), False, "timm's resnet34d, which computes something else: PaddleClas puts a convolution"),
        ((3, 12, 48, 3), True, "timm's resnet200d, which computes something else: PaddleClas' has 3, 12, 48, 3"),
    ],
)
def test_near_fits_are_refused_with_the_reason(depths: tuple[int, ...], bottleneck: bool, reason: str) -> None:
    for old in (False, True):
        with pytest.raises(UserError) as caught:
            recognize(shapes(depths, bottleneck=bottleneck, old=old), None, "file")
        assert reason in str(caught.value)


def test_mistakes(user_error: Any, tmp_path: Path) -> None:
    small = {name: np.ones((1,) * len(shape), np.float32) for name, shape in shapes((3, 4, 6, 3)).items()}

    def line(arrays: dict[str, np.ndarray], *flags: str) -> str:
        (tmp_path / "a.pdparams").write_bytes(pickle.dumps(arrays))
        message: str = user_error(
            main, ["--weights", str(tmp_path / "a.pdparams"), "--output", str(tmp_path / "run"), *flags]
        )
        assert not (tmp_path / "run").exists()
        return message

    assert "holds a resnet50d, but arch is resnet101d" in line(small, "--arch", "resnet101d")
    assert "does not hold a resnet50d" in line(small)
    assert "its parameters are not those of the network (1 unknown, 0 layers missing: fc.extra" in line(
        small | {"fc.extra": np.ones(1)}
    )
    shallow = {name: array for name, array in small.items() if not name.startswith(("stem.1", "stem.2"))}
    assert "not a ResNet_vd of PaddleClas (first of its" in line(shallow)
    assert "not a ResNet_vd of PaddleClas (first of its 1 parameters: conv.weight)" in line({"conv.weight": np.ones(1)})
    assert "no such file" in user_error(main, ["--weights", "gone.pdparams", "--output", str(tmp_path / "run")]).lower()


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("ResNet50_vc_pretrained.pdparams", "vc"),
        ("resnet101-vb.pdparams", "vb"),
        ("ResNet50_vd_ssld_v2_pretrained.pdparams", "vd"),
        ("Fix_ResNet50_vd_ssld_v2.pdparams", "vd"),
        ("weights_v2.pdparams", None),
        ("vcpu.pdparams", None),
    ],
)
def test_the_variant_in_a_name(name: str, variant: str | None, tmp_path: Path, user_error: Any) -> None:
    """Of a ResNet50_vc no name and no shape tells that it is no ResNet50_vd."""
    assert variant_of(name) == variant
    if variant not in (None, "vd"):
        line = user_error(main, ["--weights", str(tmp_path / name), "--output", str(tmp_path / "run")])
        assert f"{name}: is named a ResNet_{variant}, which can have the names and shapes of a ResNet_vd" in line
