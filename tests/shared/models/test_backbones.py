"""Model references, the strict check of backbone files, and features equal to the full model's in three families."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ssld.shared.config.settings import Network
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import (
    check_networks,
    create_body,
    create_classifier,
    input_settings,
    load_backbone,
    save_backbone,
)
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.references import parse_reference


def write(path: Path, arch: str, classes: int = 5, **facts: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    net: torch.nn.Module = timm.create_model(arch, num_classes=classes)
    for module in net.modules():  # statistics that are not the defaults, so that a layer left out shows
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
    save_backbone(path, net, arch=arch, inputs=input_settings(net, {}), classes=classes, **facts)
    return net.eval()


@pytest.mark.parametrize("arch", ["resnet10t", "resnet18d", "mobilenetv3_small_050", "convnext_atto", "test_convnext"])
def test_features_are_those_of_the_full_model(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "b.safetensors"
    full: Any = write(path, arch)
    body, line = create_body(parse_reference(str(path)))
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    channels = body.feature_info.channels()  # type: ignore[operator, union-attr]
    with torch.no_grad():
        features = body.eval()(x)
        expected = {tuple(map_.shape): map_ for map_ in full.forward_intermediates(x, intermediates_only=True)}
    assert [feature.shape[1] for feature in features] == channels
    for feature in features[-4:]:
        torch.testing.assert_close(feature, expected[tuple(feature.shape)], rtol=1e-5, atol=1e-6)
    loaded, dropped = len(body.state_dict()), len(full.state_dict()) - len(body.state_dict())
    assert line == f"{path}: loaded {loaded}/{loaded} backbone tensors, {dropped} head tensors dropped"


def test_the_line_counts_exactly(tmp_path: Path) -> None:
    write(tmp_path / "r.safetensors", "resnet18")
    _, line = create_body(parse_reference(str(tmp_path / "r.safetensors")))
    # 20 convolutions and 20 norms of 5 tensors, and a head of weight and bias
    assert line.endswith("r.safetensors: loaded 120/120 backbone tensors, 2 head tensors dropped")


def test_body_by_name() -> None:
    body, line = create_body(parse_reference("random:test_resnet"))
    assert line == "random:test_resnet: random weights"
    assert len(body(torch.zeros(1, 3, 64, 64))) == 5


def test_metadata(tmp_path: Path) -> None:
    write(tmp_path / "b.safetensors", "test_resnet", 5, class_names=list("abcde"), step=3, licence="mit")
    metadata = read_metadata(tmp_path / "b.safetensors", kind="backbone")
    assert metadata["timm_version"] == timm.__version__
    assert (metadata["arch"], metadata["num_classes"], metadata["step"]) == ("test_resnet", 5, 3)
    assert metadata["mean"] == metadata["std"] == [0.5, 0.5, 0.5]
    assert metadata["interpolation"] == "bilinear"
    assert metadata["licence"] == "mit"


def test_head_is_kept_or_made_new(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    full: Any = write(path, "test_resnet")
    reference = parse_reference(str(path))
    same, _ = create_classifier(reference, num_classes=5)
    other, _ = create_classifier(reference, num_classes=7)
    assert torch.equal(same.net.get_classifier().weight, full.get_classifier().weight)  # type: ignore[operator]
    assert other.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 7)
    ours, theirs = other.net.state_dict(), full.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("fc"))


def damaged(tmp_path: Path, arch: str, change: Any) -> UserError:
    path = tmp_path / "b.safetensors"
    write(path, "test_resnet")
    tensors = load_file(path)
    change(tensors)
    facts = read_metadata(path) | {"arch": arch}
    save_file(
        tensors, path, metadata={"ssld": json.dumps({key: facts[key] for key in facts if key != "content_sha256"})}
    )
    reference = parse_reference(str(path))
    errors = []
    for use in (create_classifier, create_body):
        with pytest.raises(UserError) as caught:
            use(reference)
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert "\n" not in str(errors[0])
    return errors[0]


def test_unfitting_files_name_the_first_differences(tmp_path: Path) -> None:
    error = damaged(tmp_path, "test_resnet", lambda tensors: tensors.pop("layer2.0.conv1.weight"))
    assert (
        "does not hold a test_resnet (1 missing, 0 unknown, 0 of another shape: layer2.0.conv1.weight missing)"
        in str(error)
    )
    error = damaged(tmp_path, "test_resnet", lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert "(0 missing, 1 unknown, 0 of another shape: extra unknown)" in str(error)
    wider = torch.zeros(9, 3, 3, 3)
    error = damaged(tmp_path, "test_resnet", lambda tensors: tensors.update({"conv1.0.weight": wider}))
    assert "conv1.0.weight (9, 3, 3, 3) instead of" in str(error)
    error = damaged(tmp_path, "resnet18", lambda tensors: None)
    assert "does not hold a resnet18" in str(error)
    assert "missing" in str(error)
    error = damaged(tmp_path, "test_resnet", lambda tensors: tensors.update({"fc.bias": torch.zeros(4)}))
    assert "fc.bias (4,) instead of (5,)" in str(error)


def test_a_resnet18_is_no_resnet34(tmp_path: Path) -> None:
    """timm itself loads such a file without a word."""
    write(tmp_path / "b.safetensors", "resnet18")
    with pytest.raises(UserError, match="holds a resnet18, but arch is resnet34; leave it out"):
        parse_reference(str(tmp_path / "b.safetensors"), arch="resnet34")


@pytest.mark.parametrize(
    ("key", "arch_key"),
    [
        ("student.model", "student.arch"),
        ("teacher.ensemble.0.model", "teacher.ensemble.0.arch"),
        ("backbone", "arch"),
    ],
)
def test_messages_name_the_setting_by_its_full_key(tmp_path: Path, key: str, arch_key: str) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors")
    file = str(tmp_path / "bare.safetensors")
    with pytest.raises(UserError) as caught:
        check_networks({key: Network(file)})
    assert str(caught.value) == f"{key}: {file}: does not name its architecture; set {arch_key} to its timm name"
    with pytest.raises(UserError) as caught:
        check_networks({key: Network("random:resnet18", "resnet34")})
    message = (
        f"{key}: random:resnet18: holds a resnet18, but {arch_key} is resnet34; leave it out, or name another file"
    )
    assert str(caught.value) == message


def test_references(tmp_path: Path) -> None:
    assert parse_reference("random:resnet18").pretrained is False
    for text, message in (
        ("resnet18e", "timm has no such model; did you mean 'resnet18"),
        ("random:nothing_like_it_at_all", "timm has no such model"),
        ("no/such.safetensors", "no such file"),
        ("no/such.pth", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            parse_reference(text)
    torch.save({}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        parse_reference(str(tmp_path / "m.pth"), arch="resnet18")
    save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="does not name its architecture; set arch to its timm name"):
        parse_reference(str(tmp_path / "bare.safetensors"))
    assert parse_reference(str(tmp_path / "bare.safetensors"), arch="resnet18").arch == "resnet18"


def test_offline_weights_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for text in ("timm:test_resnet", "hf-hub:timm/test_resnet.r160_in1k"):
        with pytest.raises(UserError, match=f"{text}: not on this machine, .* HF_HUB_OFFLINE is set") as caught:
            parse_reference(text)
        assert "\n" not in str(caught.value)


def test_stochastic_depth_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no stochastic depth"):
        create_classifier(parse_reference("random:dla46_c"), drop_path=0.1)
    net, _ = create_classifier(parse_reference("random:test_convnext"), drop_path=0.5)
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert not torch.equal(net.train()(pixels), net(pixels))
        assert torch.equal(net.eval()(pixels), net(pixels))


def test_layers_behind_the_last_feature_map_cause_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = timm.create_model("test_efficientnet", num_classes=3)  # its conv_head follows the last feature map
    file = tmp_path / "net.safetensors"
    save_backbone(file, net, arch="test_efficientnet", inputs=input_settings(net, {}), classes=3)
    create_body(parse_reference(str(file)))
    assert "Unexpected keys (conv_head.weight" in caplog.text  # so the next lines test something
    caplog.clear()
    body = load_backbone(file, features_only=True)
    assert caplog.text == ""
    state = net.state_dict()
    for name, tensor in body.state_dict().items():
        assert torch.equal(tensor, state[name])
    logging.getLogger("timm.models._builder").warning("Unexpected keys")
    assert "Unexpected keys" in caplog.text  # only inside


@pytest.mark.parametrize(
    ("size", "warning"),
    [(64, ""), (72, "do not divide 72, so the last 8 rows and columns of an image are not seen; 64 and 80 ")],
)
def test_patches_that_leave_an_edge_out(size: int, warning: str) -> None:
    """timm leaves out rows and columns that fill no whole patch: the map shows less of the image than the map of a student does."""
    classifier, _ = create_classifier(parse_reference("random:vit_tiny_patch16_224"), image_size=size)
    black = torch.zeros(1, 3, size, size)
    edge = black.clone()
    edge[..., 64:, :] = edge[..., 64:] = 255.0  # pixels beyond the fourth patch; an image of 64 has none
    with torch.no_grad():
        assert torch.equal(classifier.eval()(edge), classifier(black))
    assert classifier.loaded.startswith("random:vit_tiny_patch16_224: random weights")
    assert ("warning" in classifier.loaded, warning in classifier.loaded) == (bool(warning), True)


@pytest.mark.parametrize(
    ("arch", "classes", "timms"),
    [("mobilenetv4_conv_small_035", 8, False), ("mobilenetv4_conv_small_035", 1000, True), ("test_resnet", 8, True)],
)
def test_a_random_classifier_is_sure_of_nothing(arch: str, classes: int, timms: bool) -> None:
    """timm starts some networks with weights as large as few classes make them; all others stay as they are."""
    torch.manual_seed(0)
    plain: Any = timm.create_model(arch, num_classes=classes)
    torch.manual_seed(0)
    net: Any = create_classifier(parse_reference(f"random:{arch}"), num_classes=classes)[0].net
    weight, was = net.get_classifier().weight, plain.get_classifier().weight
    assert torch.equal(weight, was) == timms
    with torch.no_grad():
        logits = net.train()(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert logits.std() < 1
