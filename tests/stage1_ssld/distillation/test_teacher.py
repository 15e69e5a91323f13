"""The teacher of a configuration, alone or as an ensemble whose soft labels are the mean of all softmax outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import input_settings, save_backbone
from ssld.shared.models.teacher import FrozenTeacher, Teacher, TeacherEnsemble
from ssld.stage1_ssld.data_config import TeacherConfig
from ssld.stage1_ssld.distillation.teacher import make_teacher

PIXELS = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture
def other_file(tmp_path: Path) -> Path:
    """Another network for the same classes in another order, under another licence."""
    return write(tmp_path / "other.safetensors", 1, class_names=["stripes", "disc", "ring"], licence="mit")


def write(path: Path, seed: int, classes: int = 3, **facts: Any) -> Path:
    torch.manual_seed(seed)
    net: Any = timm.create_model("test_efficientnet", num_classes=classes)
    with torch.no_grad():
        net.get_classifier().weight.mul_(100)
    save_backbone(path, net, arch="test_efficientnet", inputs=input_settings(net, {}), classes=classes, **facts)
    return path


def make(config: Any, **options: Any) -> Teacher:
    settings: dict[str, Any] = {"precision": "fp32", "device": CPU, "channels_last": False} | options
    return make_teacher(TeacherConfig.model_validate(config), **settings)


def probabilities(teacher: FrozenTeacher) -> np.ndarray:
    z = teacher(PIXELS).double().numpy()
    result: np.ndarray = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return result


def test_alone(teacher_file: Path) -> None:
    teacher = make(str(teacher_file))
    assert isinstance(teacher, FrozenTeacher)
    assert teacher.folded > 0  # the default
    plain = make({"model": str(teacher_file), "fold_batchnorm": False})
    assert torch.equal(plain(PIXELS), FrozenTeacher(str(teacher_file))(PIXELS))
    torch.testing.assert_close(teacher(PIXELS), plain(PIXELS), rtol=1e-3, atol=1e-3)
    by_batch = make({"model": str(teacher_file), "batchnorm": "batch"})
    assert torch.equal(by_batch(PIXELS), FrozenTeacher(str(teacher_file), batchnorm="batch")(PIXELS))
    assert make({"model": str(teacher_file), "size": 64}).size == (64, 64)  # type: ignore[union-attr]


def test_its_own_size(teacher_file: Path) -> None:
    """`own` resizes any view to the size in the weights' settings, as that size itself does."""
    own, plain = make({"model": str(teacher_file), "size": "own"}), make(str(teacher_file))
    assert isinstance(own, FrozenTeacher)
    assert isinstance(plain, FrozenTeacher)
    side = input_settings(timm.create_model("test_resnet"), {}).size[0]
    assert own.size == own.own_size == plain.own_size == (side, side)
    assert plain.size is None
    assert torch.equal(own(PIXELS), make({"model": str(teacher_file), "size": side})(PIXELS))
    assert not torch.allclose(own(PIXELS), plain(PIXELS))


def test_precision_is_its_own_or_the_students(teacher_file: Path) -> None:
    full, half = FrozenTeacher(str(teacher_file)), FrozenTeacher(str(teacher_file), dtype=torch.bfloat16)
    plain = {"model": str(teacher_file), "fold_batchnorm": False}
    assert torch.equal(make(plain, precision="bf16")(PIXELS), half(PIXELS))
    assert torch.equal(make(plain | {"precision": "fp32"}, precision="bf16")(PIXELS), full(PIXELS))
    assert torch.equal(make(plain | {"precision": "bf16"})(PIXELS), half(PIXELS))


def test_an_ensemble_is_the_mean_of_softmax(teacher_file: Path, other_file: Path) -> None:
    first, second = FrozenTeacher(str(teacher_file)), FrozenTeacher(str(other_file))
    # the second gives its logits in the order of the first one's names: disc, ring, stripes
    mean = (probabilities(first) + probabilities(second)[:, [1, 2, 0]]) / 2
    teacher = make({"model": str(teacher_file), "ensemble": [str(other_file)], "fold_batchnorm": False})
    assert isinstance(teacher, TeacherEnsemble)
    np.testing.assert_allclose(teacher(PIXELS).double().numpy(), np.log(mean), atol=1e-4)
    assert teacher.class_names == ["disc", "ring", "stripes"]
    assert teacher.num_classes == 3
    assert torch.equal(teacher.embed(PIXELS), first.embed(PIXELS))
    teacher.match_classes(["ring", "stripes", "disc"], 3, "the images")
    np.testing.assert_allclose(teacher(PIXELS).double().numpy(), np.log(mean[:, [1, 2, 0]]), atol=1e-4)
    with pytest.raises(UserError, match="only one of them has 'cube'"):
        teacher.match_classes(["cube", "stripes", "disc"], 3, "the images")


def test_a_member_without_names_keeps_its_order(teacher_file: Path, tmp_path: Path) -> None:
    nameless = write(tmp_path / "nameless.safetensors", 2)
    first, second = FrozenTeacher(str(teacher_file)), FrozenTeacher(str(nameless))
    mean = (probabilities(first) + probabilities(second)) / 2
    for files in ([teacher_file, nameless], [nameless, teacher_file]):
        teacher = make({"model": str(files[0]), "ensemble": [str(files[1])], "fold_batchnorm": False})
        assert teacher.class_names == ["disc", "ring", "stripes"]
        np.testing.assert_allclose(teacher(PIXELS).double().numpy(), np.log(mean), atol=1e-4)
        teacher.match_classes(["ring", "stripes", "disc"], 3, "the images")
        np.testing.assert_allclose(teacher(PIXELS).double().numpy(), np.log(mean[:, [1, 2, 0]]), atol=1e-4)


def test_an_ensemble_that_is_very_sure(teacher_file: Path) -> None:
    """Logits far apart: the logarithm is taken without the probabilities, so nothing is infinite."""
    sure = [FrozenTeacher(str(teacher_file)) for _ in range(2)]
    with torch.no_grad():
        for member, bias in zip(sure, ([1e4, 0.0, 0.0], [0.0, 0.0, 1e4]), strict=True):
            net: Any = member._classifier.net
            net.get_classifier().bias.copy_(torch.tensor(bias))
    prediction = TeacherEnsemble(sure)(PIXELS)
    assert prediction.isfinite().all()
    torch.testing.assert_close(prediction.softmax(-1), torch.tensor([[0.5, 0.0, 0.5]]).expand(4, -1))


def test_members_of_other_classes(teacher_file: Path, tmp_path: Path) -> None:
    cubes = write(tmp_path / "cubes.safetensors", 1, class_names=["cube", "disc", "ring"])
    with pytest.raises(
        UserError, match=r"cubes\.safetensors: its classes are not those of .*: only one of them has 'cube'"
    ):
        make({"model": str(teacher_file), "ensemble": [str(cubes)]})
    five = write(tmp_path / "five.safetensors", 1, classes=5)
    with pytest.raises(UserError, match=r"five\.safetensors: has 5 classes, .* have 3"):
        make({"model": str(teacher_file), "ensemble": [str(five)]})


def test_facts_of_an_ensemble(teacher_file: Path, other_file: Path) -> None:
    teacher = make({"model": str(teacher_file), "ensemble": [str(other_file), str(teacher_file)]})
    facts = teacher.facts()
    assert facts["reference"] == f"{teacher_file}, {other_file}, {teacher_file}"
    assert facts["arch"] == "test_resnet, test_efficientnet, test_resnet"
    assert facts["licence"] == "apache-2.0 AND mit"
    assert facts["content_sha256"] == teacher.content_sha256()
    pairs = ((teacher_file, other_file), (other_file, teacher_file))
    hashes = {make({"model": str(a), "ensemble": [str(b)]}).content_sha256() for a, b in pairs}
    assert len(hashes | {teacher.content_sha256()}) == 3


def test_it_never_waits_for_the_device(teacher_file: Path, other_file: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    names: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    teacher = make({"model": str(teacher_file), "size": 48, "ensemble": [str(other_file)], "batchnorm": "batch"})
    teacher.match_classes(["ring", "stripes", "disc"], 3, "the images")
    with Names():
        teacher(PIXELS)
    assert "convolution" in names
    assert not names & {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select"}
