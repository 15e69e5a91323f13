"""The heads between a student's features and a teacher's: grids, statistics and gradients, held against NumPy and timm's own forward passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import Classifier, InputSettings, create_classifier, save_backbone
from ssld.shared.models.references import parse_reference
from ssld.shared.models.teacher import FrozenTeacher, TeacherFeatures
from ssld.stage1_ssld.data.batch import View, collate
from ssld.stage1_ssld.data_config import LossConfig
from ssld.stage1_ssld.distillation.features import FeatureHeads, Learner, student_features
from ssld.stage1_ssld.distillation.objective import Objective

SIZE = 64
Network = Callable[..., Path]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """A function from a tiny arch to a file of it for 64 px, without classes."""
    folder = tmp_path_factory.mktemp("networks")

    def write(arch: str, **model_args: Any) -> Path:
        torch.manual_seed(3)
        args = ({"img_size": SIZE} if "vit" in arch else {}) | model_args
        net = timm.create_model(arch, num_classes=0, **args)
        inputs = InputSettings((0.5,) * 3, (0.5,) * 3, (SIZE, SIZE), "bilinear", False)
        path = folder / f"{arch}{len(list(folder.iterdir()))}.safetensors"
        save_backbone(path, net, arch=arch, inputs=inputs, classes=0, model_args=args)
        return path

    return write


def teacher_of(file: Path, **options: Any) -> FrozenTeacher:
    return FrozenTeacher(str(file), classes=False, **options)


def heads_of(student: Classifier, teacher: FrozenTeacher, *terms: Any) -> FeatureHeads:
    torch.manual_seed(0)
    given = [LossConfig.model_validate(term) for term in terms]
    return FeatureHeads(given, student, teacher, size=SIZE, name="student")


def student_of(file: Path) -> Classifier:
    return create_classifier(parse_reference(str(file)))[0].eval()


def pixels(images: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def loss_of(heads: FeatureHeads, student: Classifier, teacher: FrozenTeacher, x: Tensor, *terms: Any) -> Tensor:
    logits, predictions = Learner(student, heads)(x)
    pairs = heads.pairs(predictions, teacher.features(x, maps=True))
    objective = Objective([LossConfig.model_validate(term) for term in terms], 0.0)
    return objective(logits, None, torch.zeros(len(x)).long(), features=pairs)["loss"]


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_mambaout"])
@pytest.mark.parametrize("term", ["pooled", "spatial"])
def test_no_loss_and_no_gradient_where_student_and_teacher_are_one(network: Network, arch: str, term: str) -> None:
    """Heads that change nothing; maps of a CNN before, of a ViT after the last norm, so there the norm is put in their place."""
    file = network(arch)
    student, teacher = student_of(file), teacher_of(file)
    settings = {"name": term} | ({"levels": ["c4" if "vit" in arch else "c5"]} if term == "spatial" else {})
    heads = heads_of(student, teacher, settings)
    net: Any = student.net
    last: nn.Module = net.norm if "vit" in arch and term == "spatial" else nn.Identity()
    heads.heads[term] = nn.ModuleList([last])
    loss = loss_of(heads, student, teacher, pixels(), settings)
    assert abs(loss.item()) < 1e-6
    loss.backward()
    gradients = [parameter.grad.abs().max() for parameter in student.parameters() if parameter.grad is not None]
    assert gradients
    assert max(gradients) < 1e-5
    other = teacher.features(pixels() // 8, maps=True)
    logits, predictions = Learner(student, heads)(pixels())
    objective = Objective([LossConfig.model_validate(settings)], 0.0)
    assert (
        objective(logits, None, torch.zeros(3).long(), features=heads.pairs(predictions, other))["loss"].item() > 1e-4
    )


@pytest.mark.parametrize(
    ("student_arch", "teacher_arch", "grids"),
    [
        ("test_resnet", "test_vit", [4, 4, 2]),  # the student's 8, 4 and 2, the teacher's 4
        ("test_vit", "test_resnet", [2]),
        ("test_convnext", "test_mambaout", [2, 2, 2]),
    ],
)
def test_features_of_another_architecture(
    network: Network, student_arch: str, teacher_arch: str, grids: list[int]
) -> None:
    """Value and gradient of both terms against float64 NumPy, from the features alone."""
    student, teacher = student_of(network(student_arch)), teacher_of(network(teacher_arch))
    heads = heads_of(student, teacher, "pooled", "spatial")
    x = pixels()
    taught = teacher.features(x, maps=True)
    assert taught.map_BCHW is not None
    for name in ("pooled", "spatial"):
        generator = torch.Generator().manual_seed(5)
        width = len(getattr(heads, f"{name}_mean_D"))
        getattr(heads, f"{name}_mean_D").copy_(torch.randn(width, generator=generator))
        getattr(heads, f"{name}_deviation_D").copy_(torch.rand(width, generator=generator) + 0.5)
    _, pooled, maps = student_features(student, x, heads.places)
    pooled, maps = pooled.detach().requires_grad_(), [one.detach().requires_grad_() for one in maps]
    pairs = heads.pairs(heads(pooled, maps), taught)
    objective = Objective([LossConfig.model_validate(name) for name in ("pooled", "spatial")], 0.0)
    parts = objective(torch.zeros(3, 0), None, torch.zeros(3).long(), features=pairs)

    def head(features: np.ndarray, module: Any) -> np.ndarray:
        norm, linear = module
        deviation = np.sqrt(features.var(-1, keepdims=True) + norm.eps)
        normed = (features - features.mean(-1, keepdims=True)) / deviation
        result: np.ndarray = normed @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
        return result

    def means_of(features: np.ndarray, side: int) -> np.ndarray:
        """[B,N,C] of [B,C,H,W] by blocks."""
        block = features.shape[-1] // side
        blocks = features.reshape(*features.shape[:2], side, block, side, block).mean((3, 5))
        return blocks.reshape(*features.shape[:2], side * side).transpose(0, 2, 1)

    def standard(features: np.ndarray, name: str) -> np.ndarray:
        mean, deviation = (getattr(heads, f"{name}_{what}_D").double().numpy() for what in ("mean", "deviation"))
        result: np.ndarray = (features - mean) / deviation
        return result

    modules: Any = heads.heads

    def pooled_form(p: np.ndarray) -> float:
        a, b = head(p, modules["pooled"][0]), standard(taught.pooled_BD.double().numpy(), "pooled")
        return float((1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).sum())

    def spatial_form(level: int, features: np.ndarray) -> float:
        a = head(means_of(features, grids[level]), modules["spatial"][level])
        assert taught.map_BCHW is not None
        away = np.abs(a - standard(means_of(taught.map_BCHW.double().numpy(), grids[level]), "spatial"))
        return float(np.where(away < 1, away**2 / 2, away - 0.5).mean((1, 2)).sum())

    assert len(maps) == len(grids)
    arrays = [one.detach().double().numpy() for one in maps]
    expected = [spatial_form(level, array) for level, array in enumerate(arrays)]
    assert parts["pooled"].item() == pytest.approx(pooled_form(pooled.detach().double().numpy()), rel=1e-5)
    assert parts["spatial"].item() == pytest.approx(np.mean(expected), rel=1e-5)
    parts["loss"].backward()
    step, chosen = 1e-6, np.random.default_rng(0)
    for level, (one, array) in enumerate(zip(maps, arrays, strict=True)):
        direction = chosen.standard_normal(array.shape)
        slope = spatial_form(level, array + step * direction) - spatial_form(level, array - step * direction)
        assert one.grad is not None
        actual = float((one.grad.double().numpy() * direction).sum())
        assert actual == pytest.approx(slope / (2 * step) / len(maps), rel=2e-3, abs=1e-5)
    array = pooled.detach().double().numpy()
    direction = chosen.standard_normal(array.shape)
    slope = pooled_form(array + step * direction) - pooled_form(array - step * direction)
    assert pooled.grad is not None
    assert float((pooled.grad.double().numpy() * direction).sum()) == pytest.approx(slope / (2 * step), rel=2e-3)


def test_statistics_are_those_of_all_images(network: Network) -> None:
    """Of every cell of every image, whatever the batches; a channel that hardly moves keeps a hundredth of the common deviation."""
    teacher = teacher_of(network("test_vit"))
    heads = heads_of(student_of(network("test_resnet")), teacher, "pooled", "spatial")
    x = pixels(7)
    original = teacher.features

    def one_channel_stands_still(pixels_BCHW: Tensor, *, maps: bool) -> TeacherFeatures:
        taught = original(pixels_BCHW, maps=maps)
        taught.pooled_BD[:, 3] = 2.5
        return taught

    teacher.features = one_channel_stands_still  # type: ignore[method-assign]
    views = [View(view, 0, str(number), []) for number, view in enumerate(x)]
    line = heads.measure(teacher, [collate(views[:4]), collate([]), collate(views[4:])])
    assert line.endswith("standardized with 7 views; the statistics are kept in the checkpoints")
    taught = teacher.features(x, maps=True)
    assert taught.map_BCHW is not None
    by_name = {"pooled": taught.pooled_BD, "spatial": taught.map_BCHW.permute(0, 2, 3, 1).flatten(0, 2)}
    for name, values in by_name.items():
        expected = values.double().numpy()
        deviation = expected.std(0)
        floor = 0.01 * np.sqrt((deviation**2).mean())
        np.testing.assert_allclose(getattr(heads, f"{name}_mean_D").numpy(), expected.mean(0), rtol=1e-4, atol=1e-5)
        actual = getattr(heads, f"{name}_deviation_D").numpy()
        np.testing.assert_allclose(actual, np.maximum(deviation, floor), rtol=1e-3, atol=1e-6)
        assert (actual[3] == pytest.approx(floor, rel=1e-4)) == (name == "pooled")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "its features are not finite; set teacher.precision: fp32, or check its weights"),
        (1.0, r"its features \(pooled\) are the same for every image: wrong weights, or images of one color"),
    ],
)
def test_features_that_say_nothing(network: Network, value: float, message: str) -> None:
    teacher = teacher_of(network("test_resnet"))
    heads = heads_of(student_of(network("test_resnet")), teacher, "pooled")
    prediction = TeacherFeatures(None, torch.full((2, 96), value), None)
    teacher.features = lambda *_, **__: prediction  # type: ignore[method-assign]
    batch = collate([View(view, 0, "", []) for view in pixels(2)])
    with pytest.raises(UserError, match=message):
        heads.measure(teacher, [batch])
    with pytest.raises(UserError, match=r"data\.train: no image could be read"):
        heads.measure(teacher, [])


def test_levels_of_a_student(network: Network) -> None:
    teacher = teacher_of(network("test_vit"))
    cnn, vit = student_of(network("test_resnet")), student_of(network("test_vit"))
    assert heads_of(cnn, teacher, {"name": "spatial", "levels": ["c5", "c3"]}).places == [4, 2]
    assert heads_of(cnn, teacher, "spatial").places == [2, 3, 4]
    assert heads_of(vit, teacher, "spatial").places == [5]  # the last of its blocks
    assert heads_of(student_of(network("test_vit", patch_size=32)), teacher, "spatial").places == [5]
    small_patches = student_of(network("test_vit", patch_size=4))  # a stride that no level has
    assert heads_of(small_patches, teacher, "spatial").places == [5]
    message = r"losses: spatial: student has no level c3 \(8 pixels\), its maps have strides of 16; name others, or leave levels out"
    with pytest.raises(UserError, match=message):
        heads_of(vit, teacher, {"name": "spatial", "levels": ["c4", "c3"]})


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout"])
def test_a_student_answers_as_timm_has_it(network: Network, arch: str) -> None:
    """Logits beside features are those of the network alone, and so are the pooled features."""
    args: dict[str, Any] = {"img_size": SIZE} if "vit" in arch else {}
    net: Any = timm.create_model(arch, num_classes=5, **args).eval()
    student = Classifier(net, mean=(0.4,) * 3, std=(0.3,) * 3).eval()
    logits, pooled, maps = student_features(student, pixels(), [1, 3])
    torch.testing.assert_close(logits, student(pixels()))
    features = net.forward_features(student.normalized(pixels()))
    torch.testing.assert_close(pooled, net.forward_head(features, pre_logits=True))
    _, expected = net.forward_intermediates(student.normalized(pixels()), indices=[1, 3], output_fmt="NCHW")
    torch.testing.assert_close(maps, expected)
    bare, _, none = student_features(student_of(network(arch)), pixels(), [])
    assert bare.shape == (3, 0)
    assert none == []
