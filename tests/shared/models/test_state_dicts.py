"""Weights as people bring them: wrapped, prefixed, in other names and types. They load whole, or not at all."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models import backbones
from ssld.shared.models.backbones import create_body, create_classifier, input_settings, save_backbone
from ssld.shared.models.references import parse_reference
from ssld.shared.models.state_dicts import fit
from ssld.shared.models.twins import twins

ARCH = "test_resnet"
X = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Tensors = dict[str, Tensor]


def network(arch: str = ARCH, classes: int = 4, **options: Any) -> Any:
    torch.manual_seed(5)
    net: Any = timm.create_model(arch, num_classes=classes, **options)
    for module in net.modules():  # nothing at its default, so that what is left out shows
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def loads(path: Path, net: Any, arch: str = ARCH, *, head: bool = True) -> str:
    """Load a file and compare classifier (unless it has no head) and body with `net`; returns what the classifier says of its weights."""
    reference = parse_reference(str(path), arch, allow_pickle=True)
    classifier, _ = create_classifier(reference)
    body, _ = create_body(reference)
    with torch.no_grad():
        if head:
            torch.testing.assert_close(classifier.eval()(X), net(classifier.normalized(X)), rtol=1e-5, atol=1e-6)
        expected = net.forward_intermediates(classifier.normalized(X), intermediates_only=True)
        torch.testing.assert_close(body.eval()(classifier.normalized(X))[-1], expected[-1], rtol=1e-5, atol=1e-5)
    return classifier.loaded


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda t: t, ""),
        (lambda t: {"model_state_dict": t, "epoch": 3}, "read from 'model_state_dict'"),
        (lambda t: {"net": t, "acc": torch.tensor(0.5)}, "read from 'net'"),
        (lambda t: {"state_dict": prefixed("module.", t)}, "read from 'state_dict'; read below 'module.'"),
        (lambda t: {"checkpoint": {"weights": t}, "args": Namespace(lr=0.1)}, "read from 'checkpoint.weights'"),
        (lambda t: {"model": {"module": t}, "optimizer": {"state": {"a": t}}}, "read from 'model.module'"),
        (lambda t: {"state_dict": {k: v + 1 for k, v in t.items()}, "state_dict_ema": t}, "read from 'state_dict_ema'"),
        (lambda t: prefixed("_orig_mod.module.", t), "read below '_orig_mod.module.'"),
        (lambda t: prefixed("timm_model.", t), "read below 'timm_model.'"),
        (lambda t: prefixed("student.backbone.", t), "read below 'student.backbone.'"),
        (
            lambda t: prefixed("backbone.", t) | {"neck.weight": torch.zeros(3)},
            "read below 'backbone.'; 1 tensor outside of it left out (first: neck.weight)",
        ),
        (lambda t: {name: tensor for name, tensor in t.items() if "num_batches" not in name}, ""),
        (lambda t: {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in t.items()}, ""),
    ],
)
def test_wrappers_and_prefixes(wrap: Callable[[Tensors], Any], said: str, tmp_path: Path) -> None:
    net = network()
    torch.save(wrap(net.state_dict()), tmp_path / "w.pth")
    line = loads(tmp_path / "w.pth", net)
    assert (
        line
        == f"{tmp_path / 'w.pth'}: loaded 90/90 tensors".replace("90", str(len(net.state_dict())))
        + (f"; {said}" if said else "")
        + "; mean 0.5/0.5/0.5 and std 0.5/0.5/0.5 are timm's for test_resnet, the file names none"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_a_backbone_too(dtype: torch.dtype, tmp_path: Path) -> None:
    net = network()
    halves = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()
    }
    save_file(halves, tmp_path / "w.safetensors")
    net.load_state_dict(halves)
    loads(tmp_path / "w.safetensors", net)


def test_a_head_of_another_kind_is_left_out(tmp_path: Path) -> None:
    tensors = network().state_dict()
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    torch.save(body | {"fc.0.weight": torch.zeros(8, 8), "fc.2.weight": torch.zeros(8, 8)}, tmp_path / "w.pth")
    line = loads(tmp_path / "w.pth", network(), head=False)
    assert "; 2 tensors of another head left out (first: fc.0.weight); " in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda t: {"student": t, "teacher": t}, "holds several networks (student, teacher); save only the network you want"),
        (lambda t: prefixed("online.", t) | prefixed("target.", t), "holds a test_resnet several times, below online., target.; save the"),
        (lambda t: {"epoch": 3}, "holds no tensors by name; a state dict is needed"),
        (lambda t: [1], "holds a list, not a state dict of tensors by name"),
        (lambda t: prefixed("a.", t | {"extra": torch.zeros(1)}), "(0 missing, 1 unknown, 0 of another shape: extra unknown)"),
        (lambda t: {k: v for k, v in t.items() if k != "bn1.weight"}, "(1 missing, 0 unknown, 0 of another shape: bn1.weight missing)"),
        (lambda t: t | {"bn1.weight": t["bn1.weight"] > 0}, "1 of another type: bn1.weight of type torch.bool"),
        (lambda t: t | {"bn1.weight": t["bn1.weight"] * float("nan")}, "1 tensor with values that are not finite, first bn1.weight"),
        (lambda t: t | {"bn1.running_mean": t["bn1.running_mean"] + float("inf")}, "values that are not finite, first bn1.running_mean"),
        (lambda t: t | {"bn1.weight": t["bn1.weight"].to(torch.float8_e4m3fn)}, "1 of another type: bn1.weight of type torch.float8_e4m3fn"),
        (lambda t: {k: v.to("meta") for k, v in t.items()}, "92 of another type: conv1.0.weight of type meta, without values"),
        (lambda t: torch.optim.SGD([t["bn1.weight"]]).state_dict(), "holds the state of an optimizer, not a network; give the file of"),
        (lambda t: {"state_dict": t, "best": Path("x")}, "where you trust it, keep its weights alone"),
        (lambda t: t | {"a\nb": torch.zeros(1)}, "a tensor is called 'a\\nb', which cannot be printed"),
        (lambda t: network("test_convnext").state_dict(), "does not hold a test_resnet ("),
    ],
)  # fmt: skip
def test_what_does_not_load_whole_is_refused(content: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    torch.save(content(network().state_dict()), tmp_path / "w.pth")
    reference = parse_reference(str(tmp_path / "w.pth"), ARCH, allow_pickle=True)
    for use in (create_classifier, create_body):
        with pytest.raises(UserError) as caught:
            use(reference)
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path / 'w.pth'}: ")
        assert "\n" not in str(caught.value)


def test_sparse_tensors_are_named() -> None:
    tensors = network().state_dict()
    with pytest.raises(UserError, match=r"1 of another type: fc\.weight of type sparse"):
        fit(tensors | {"fc.weight": tensors["fc.weight"].to_sparse()}, ARCH, {}, "w.pth")


def test_a_download_that_reserved_its_space_and_stopped(tmp_path: Path) -> None:
    """The header of the file is whole, and zeros stand where tensors would. A new head, or a dead layer, is no damage."""
    tensors = network().state_dict()
    file, whole = tmp_path / "w.safetensors", sum(tensor.nbytes for tensor in tensors.values())
    for share in (0.5, 0.0):
        save_file(tensors, file)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) - int((1 - share) * whole)].ljust(len(content), b"\0"))
        for use in (create_classifier, create_body):
            with pytest.raises(UserError, match=r"weight matrices hold only zeros, first .*; download it again$"):
                use(parse_reference(str(file), ARCH))
    tensors["fc.weight"].zero_()
    tensors["layer1.0.conv1.weight"].zero_()
    save_file(tensors, file)
    create_classifier(parse_reference(str(file), ARCH))


def test_a_larger_network_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    """Every tensor of a resnet18 has its place in a resnet34, in its shape."""
    torch.save(network("resnet34").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"does not hold a resnet18 \(0 missing, 96 unknown"):
        create_classifier(parse_reference(str(tmp_path / "w.pth"), "resnet18", allow_pickle=True))


def test_weights_under_the_names_of_their_authors(tmp_path: Path) -> None:
    """Weights that timm converts: ConvNeXt as published, and Swin with the tables of older versions."""
    net = network("convnext_atto")
    published = {}
    for name, tensor in net.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.").replace("head.fc.", "head.")
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
            name = name.replace(f"stages.{stage}.blocks.", f"stages.{stage}.")
        name = name.replace("conv_dw.", "dwconv.").replace("mlp.fc", "pwconv")
        published[name] = tensor.flatten(1) if "pwconv" in name and tensor.ndim == 4 else tensor
    torch.save({"model": published}, tmp_path / "convnext.pth")
    loads(tmp_path / "convnext.pth", net, "convnext_atto")

    swin: dict[str, Any] = {
        "embed_dim": 8,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
        "img_size": 64,
        "window_size": 2,
    }
    arch = "swin_tiny_patch4_window7_224"
    net = network(arch, **swin)
    tables = {name: buffer for name, buffer in net.named_buffers() if name.endswith("relative_position_index")}
    assert tables
    assert not tables.keys() & net.state_dict().keys()
    (tmp_path / "swin").mkdir()
    save_file(net.state_dict() | tables, tmp_path / "swin" / "model.safetensors")
    timm.models._hub.save_config_for_hf(net, str(tmp_path / "swin" / "config.json"))
    classifier, inputs = create_classifier(parse_reference(str(tmp_path / "swin")))
    assert inputs.size == (64, 64)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(X), net(classifier.normalized(X)), rtol=1e-5, atol=1e-6)


def test_what_was_interpolated_is_told_and_kernels_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of another image size costs little and is told; patches of another size are another network."""
    monkeypatch.setattr(backbones, "twins", lambda *_: ())
    file, arch = tmp_path / "w.pth", "vit_tiny_patch16_224"
    torch.save(timm.create_model(arch, img_size=64).state_dict(), file)
    line = create_classifier(parse_reference(str(file), arch, allow_pickle=True))[0].loaded
    assert "1 tensor interpolated to another size (first: pos_embed (1, 17, 192) instead of (1, 197, 192))" in line
    torch.save(timm.create_model(arch, patch_size=32).state_dict(), file)
    with pytest.raises(UserError) as caught:
        create_classifier(parse_reference(str(file), arch, allow_pickle=True))
    assert "patch_embed.proj.weight (192, 3, 32, 32) instead of (192, 3, 16, 16)" in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "other"),
    [
        ("efficientnet_lite0", "tf_efficientnet_lite0"),  # padding, epsilon, mean and std
        ("resnet18", None),  # resnetblur18 has the same tensors and more layers, so that nobody calls it by this name
        ("vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"),  # activation
        ("deit_tiny_patch16_224", "vit_tiny_patch16_224"),  # mean and std
        ("test_vit", None),
    ],
)
def test_architectures_with_the_same_tensors_are_named(arch: str, other: str | None) -> None:
    found = twins(arch, 10)
    assert (other in found) if other else not found
    assert arch not in found


def test_a_file_without_metadata_says_what_was_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = "mobilenetv3_small_050"
    net = timm.create_model(arch, num_classes=3)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    reference = parse_reference(str(tmp_path / "w.pth"), arch, allow_pickle=True)
    monkeypatch.setattr(backbones, "twins", lambda *_: ("tf_other",))
    for line in (create_classifier(reference)[0].loaded, create_body(reference)[1]):
        assert f"mean 0.485/0.456/0.406 and std 0.229/0.224/0.225 are timm's for {arch}, the file names none; " in line
        assert "warning: its tensors fit tf_other as well, which computes otherwise; give that name as arch if " in line
    save_backbone(tmp_path / "own.safetensors", net, arch=arch, inputs=input_settings(net, {}), classes=3)
    assert "warning" not in create_classifier(parse_reference(str(tmp_path / "own.safetensors")))[0].loaded


def test_position_embeddings_are_resampled(tmp_path: Path) -> None:
    """As timm does it where it builds the network for another size itself."""
    small: dict[str, Any] = {"img_size": 64, "depth": 1, "embed_dim": 12, "num_heads": 1, "dynamic_img_size": False}
    net = network("test_vit", **small)
    timm.models.save_for_hf(net, str(tmp_path / "vit"), safe_serialization=True)
    reference = parse_reference(str(tmp_path / "vit"))
    assert create_classifier(reference)[1].size == (64, 64)
    classifier, inputs = create_classifier(reference, image_size=96)
    assert inputs.size == (96, 96)
    assert classifier.args["img_size"] == [96, 96]
    net.set_input_size(img_size=(96, 96))
    pixels = torch.nn.functional.interpolate(X.float(), (96, 96))
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(pixels), net(classifier.normalized(pixels)), rtol=1e-5, atol=1e-5)


def test_a_new_network_may_begin_with_zeros() -> None:
    """As the last layers of global-context attention do, in 4 of 26 matrices. Zeros elsewhere are damage, in such a network too."""
    arch = "test_byobnet"
    args: dict[str, Any] = {"attn_layer": "gca"}
    torch.manual_seed(0)
    tensors = timm.create_model(arch, **args).state_dict()
    before = torch.get_rng_state()
    assert fit(tensors, arch, args, "w.pth").classes == 1000
    assert torch.equal(torch.get_rng_state(), before)
    stopped = {
        name: torch.zeros_like(tensor) if name.startswith("stages.3") else tensor for name, tensor in tensors.items()
    }
    with pytest.raises(UserError, match=r"w\.pth: \d of 26 weight matrices hold only zeros, first stages\.3"):
        fit(stopped, arch, args, "w.pth")
