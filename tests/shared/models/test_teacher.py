"""The frozen teacher: its own normalization, every kind of source, never a gradient."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings, save_backbone
from ssld.shared.models.model_file import content_hash
from ssld.shared.models.teacher import FrozenTeacher, TeacherEnsemble

PIXELS = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_net(seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=4).eval()


@torch.no_grad()
def reference_logits(net: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    x = PIXELS.double() / 255
    x = (x - torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(std, dtype=torch.float64).view(
        3, 1, 1
    )
    logits: torch.Tensor = net(x.float())
    return logits


def test_it_normalizes_with_its_own_mean_and_std(tmp_path: Path) -> None:
    net, mean, std = make_net(), (0.1, 0.4, 0.7), (0.3, 0.2, 0.25)
    inputs = InputSettings(mean, std, (40, 40), "bilinear", False)
    save_backbone(tmp_path / "t.safetensors", net, arch="test_resnet", inputs=inputs, classes=4)
    logits = FrozenTeacher(str(tmp_path / "t.safetensors"))(PIXELS)
    torch.testing.assert_close(logits, reference_logits(net, mean, std), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, reference_logits(net, (0.5,) * 3, (0.5,) * 3), rtol=1e-2)


def test_folder_in_the_hugging_face_layout(tmp_path: Path) -> None:
    net = make_net()
    timm.models.save_for_hf(net, str(tmp_path / "model"), model_config={"num_classes": 4}, safe_serialization=True)
    teacher = FrozenTeacher(str(tmp_path / "model"))
    assert teacher.num_classes == 4
    torch.testing.assert_close(teacher(PIXELS), reference_logits(net, (0.5,) * 3, (0.5,) * 3), rtol=1e-4, atol=1e-5)


def test_plain_state_dict(tmp_path: Path) -> None:
    net = make_net()
    torch.save(net.state_dict(), tmp_path / "t.pth")
    teacher = FrozenTeacher(str(tmp_path / "t.pth"), arch="test_resnet")
    assert teacher.content_sha256() == content_hash(net.state_dict())
    torch.testing.assert_close(teacher(PIXELS), reference_logits(net, (0.5,) * 3, (0.5,) * 3), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="set arch to its timm name"):
        FrozenTeacher(str(tmp_path / "t.pth"))
    with pytest.raises(UserError, match="does not hold a test_convnext"):
        FrozenTeacher(str(tmp_path / "t.pth"), arch="test_convnext")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": make_net().state_dict(), "x": Trap()}, tmp_path / "t.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("t.pth", "raw.pth"):
        with pytest.raises(UserError, match="cannot be read as a plain state dict of tensors") as caught:
            FrozenTeacher(str(tmp_path / name), arch="test_resnet")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_frozen(teacher_file: Path) -> None:
    teacher = FrozenTeacher(str(teacher_file))
    assert not isinstance(teacher, torch.nn.Module)
    before, logits = teacher.content_sha256(), teacher(PIXELS)
    assert not logits.requires_grad
    assert logits.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in teacher._classifier.parameters())
    assert not teacher._classifier.training
    # batch statistics would make an image's logits depend on the other images, and move the running ones
    torch.testing.assert_close(teacher(PIXELS[:1]), logits[:1], rtol=1e-4, atol=1e-4)
    assert teacher.content_sha256() == before


def test_own_size_and_precision(teacher_file: Path) -> None:
    teacher = FrozenTeacher(str(teacher_file))
    larger = FrozenTeacher(str(teacher_file), size=80)
    assert teacher.size is None
    up = torch.nn.functional.interpolate(PIXELS.float(), (80, 80), mode="bilinear", antialias=True)
    torch.testing.assert_close(larger(PIXELS), teacher(up))
    assert not torch.allclose(larger(PIXELS), teacher(PIXELS))
    half = FrozenTeacher(str(teacher_file), dtype=torch.bfloat16)(PIXELS)
    assert half.dtype == torch.float32
    assert not torch.equal(half, teacher(PIXELS))
    torch.testing.assert_close(half, teacher(PIXELS), rtol=0.1, atol=0.3)


def test_fixed_size_teacher_gets_its_size() -> None:
    teacher = FrozenTeacher("random:test_vit")
    assert teacher.size == (160, 160)
    assert teacher(PIXELS).shape == (3, 1000)


def test_random_weights_are_the_same_at_every_start() -> None:
    """A run that continues would have another teacher than it began with, and every rank its own."""
    torch.manual_seed(1)
    first = FrozenTeacher("random:test_resnet")
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # nothing was drawn from the caller's numbers
    assert FrozenTeacher("random:test_resnet").content_sha256() == first.content_sha256()


def test_facts(teacher_file: Path) -> None:
    teacher = FrozenTeacher(str(teacher_file))
    assert teacher.class_names == ["disc", "ring", "stripes"]
    assert teacher.facts() == {
        "reference": str(teacher_file),
        "arch": "test_resnet",
        "licence": "apache-2.0",
        "content_sha256": teacher.content_sha256(),
    }
    assert FrozenTeacher("random:test_resnet").facts()["licence"] == "unknown"  # random weights have none of timm's


def test_offline_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"timm:test_resnet: not on this machine, .*give a file or a folder instead"):
        FrozenTeacher("timm:test_resnet")


def test_classes_by_name_and_by_count(teacher_file: Path) -> None:
    teacher = FrozenTeacher(str(teacher_file))
    before = teacher(PIXELS)
    teacher.match_classes(["stripes", "disc", "ring"], 3, "the images")
    assert torch.equal(teacher(PIXELS), before[:, [2, 0, 1]])
    teacher.match_classes(
        ["ring", "disc", "stripes"], 3, "the images"
    )  # once more: from its own order, not from the last
    assert torch.equal(teacher(PIXELS), before[:, [1, 0, 2]])
    teacher.match_classes(None, 3, "the images")
    assert torch.equal(teacher(PIXELS), before)
    with pytest.raises(UserError, match="its classes are not those of the images: only one of them has 'cube'"):
        teacher.match_classes(["stripes", "disc", "cube"], 3, "the images")
    with pytest.raises(UserError, match="has 3 classes, the images have 4"):
        teacher.match_classes(None, 4, "the images")


def test_embedding_is_what_the_classifier_sees(teacher_file: Path) -> None:
    for folded in (False, True):
        teacher = FrozenTeacher(str(teacher_file), fold_batchnorm=folded)
        embedding = teacher.embed(PIXELS)
        net: Any = teacher._classifier.net
        assert embedding.shape == (3, net.num_features)
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(net.get_classifier()(embedding), teacher(PIXELS), rtol=1e-4, atol=1e-4)
    half = FrozenTeacher(str(teacher_file), dtype=torch.bfloat16, size=80).embed(PIXELS)
    assert half.dtype == torch.float32
    assert half.shape == embedding.shape


def test_a_network_without_a_head_gives_no_logits(tmp_path: Path) -> None:
    net: Any = timm.create_model("test_resnet", num_classes=0)
    inputs = InputSettings((0.5,) * 3, (0.5,) * 3, (40, 40), "bilinear", False)
    save_backbone(tmp_path / "body.safetensors", net, arch="test_resnet", inputs=inputs, classes=0)
    with pytest.raises(UserError, match=r"body\.safetensors: has 0 classes, .*; run `ssld prototypes` first"):
        FrozenTeacher(str(tmp_path / "body.safetensors"))


def test_compiled_it_gives_the_same(teacher_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, features and embeddings; traced, but run by torch itself: a C++ compiler need not be here."""
    traced: list[Any] = []
    compile_ = torch.compile

    def eager(graph: Any, _: Any) -> Any:
        traced.append(graph)
        return graph.forward

    def counted(function: Any) -> Any:
        functions.append(function)
        return compile_(function, backend=eager)

    functions: list[Any] = []
    monkeypatch.setattr(torch, "compile", counted)
    plain, compiled = FrozenTeacher(str(teacher_file)), FrozenTeacher(str(teacher_file))
    compiled.compile()
    torch.testing.assert_close(compiled(PIXELS), plain(PIXELS))
    assert len(traced) == 1
    one, other = plain.features(PIXELS, maps=True), compiled.features(PIXELS, maps=True)
    assert len(traced) == 2
    for name in ("logits_BK", "pooled_BD", "map_BCHW"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name))
    ensemble = TeacherEnsemble([FrozenTeacher(str(teacher_file)) for _ in range(2)])
    before, functions[:] = ensemble(PIXELS), []
    ensemble.compile()
    assert len(functions) == 4  # of each, all of it and the part that gives features
    torch.testing.assert_close(ensemble(PIXELS), before)
