"""Metadata of a folder, a hub model or a file are kept, and nothing in them reaches the network or other files."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import create_body, create_classifier, licence
from ssld.shared.models.model_file import save_model_file
from ssld.shared.models.references import parse_reference
from ssld.shared.models.timm_names import known_arch

X = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def write_folder(folder: Path, change: Any = None, prefix: str = "", **options: Any) -> Any:
    """A folder as timm writes it, then changed; returns the network."""
    torch.manual_seed(3)
    net: Any = timm.create_model("test_resnet", num_classes=3, **options).eval()
    timm.models.save_for_hf(
        net, str(folder), safe_serialization=True, data_config={"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    )
    if prefix:
        save_file({prefix + name: tensor for name, tensor in net.state_dict().items()}, folder / "model.safetensors")
    if change:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return net


def cache(monkeypatch: pytest.MonkeyPatch, place: Path, repo: str) -> Path:
    """An empty cache of the hub that has one model; returns the folder of its files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = place / f"models--{repo.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    return model / "snapshots" / "abc"


@pytest.mark.parametrize("prefix", ["", "timm_model.", "model."])
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_folder_is_its_network(place: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with another activation, whose loss only changes the outputs, and with other classes on top."""
    folder, text = tmp_path / "model", str(tmp_path / "model")
    if place == "hub":
        folder, text = cache(monkeypatch, tmp_path / "cache", "org/name"), "hf-hub:org/name"
    net = write_folder(folder, lambda config: config.update(label_names=["c", "a", "b"]), prefix, act_layer="silu")
    reference = parse_reference(text)
    assert reference.metadata["class_names"] == ["c", "a", "b"]
    classifier, inputs = create_classifier(reference)
    assert (inputs.mean, inputs.std) == ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    assert classifier.args["act_layer"] == "silu"
    other, _ = create_classifier(reference, num_classes=7)
    body, line = create_body(reference)
    x = classifier.normalized(X)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(X), net(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.net.eval().forward_features(x), net.forward_features(x), rtol=1e-5, atol=1e-6)  # type: ignore[operator]
        torch.testing.assert_close(body.eval()(x)[-1], net.forward_features(x), rtol=1e-5, atol=1e-6)
        plain = timm.create_model("test_resnet", num_classes=3).eval()
        plain.load_state_dict(net.state_dict())
        assert not torch.allclose(plain(x), net(x), rtol=1e-2)
    assert f"loaded {len(body.state_dict())}/" in line
    assert (prefix in line) == (prefix in classifier.loaded)


def test_random_weights_never_pass_for_those_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", prefix="something.", act_layer="silu")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["something.layer1.0.conv1.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    reference = parse_reference(str(tmp_path / "model"))
    for use in (create_body, lambda one: create_classifier(one, num_classes=9)):
        with pytest.raises(
            UserError, match=r"does not hold a test_resnet \(1 missing, 0 unknown, .* layer1.0.conv1.weight missing"
        ):
            use(reference)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ({"0": "a", "1": "b", "2": "c"}, ["a", "b", "c"]),
        ({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]),
        (["a", "b", "a"], None),
        ({"0": "a", "5": "b", "2": "c"}, None),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, None),
    ],
)
@pytest.mark.parametrize("key", ["label_names", "id2label"])
def test_label_names(key: str, names: Any, read: list[str] | None, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", lambda config: config.update({key: names}))
    reference = parse_reference(str(tmp_path / "model"))
    assert reference.metadata.get("class_names") == read
    said = "label names left out" in create_classifier(reference)[0].loaded
    assert said == (read is None and names != {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"})


def test_a_count_of_names_that_is_not_the_weights(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", lambda config: config.update(label_names=["a", "b"]))
    with pytest.raises(UserError, match="model: names 2 classes, but its weights have 3"):
        create_classifier(parse_reference(str(tmp_path / "model")))


def set_args(**args: Any) -> Any:
    return lambda config: config.update(model_args=args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_args(in_chans=1), "in_chans is 1, images have 3 channels"),
        (set_args(pretrained=True), "'pretrained' is not a model argument"),
        (set_args(checkpoint_path="/etc/passwd"), "'checkpoint_path' is not a model argument"),
        (set_args(pretrained_cfg_overlay={"file": "/etc/passwd"}), "'pretrained_cfg_overlay' is not a model argument"),
        (set_args(base_width=float("nan")), "base_width has to be a plain JSON value"),
        (set_args(base_width=10**30), "base_width has to be a plain JSON value"),
        (set_args(act_layer={"a": {"b": {"c": {"d": {"e": 1}}}}}), "act_layer has to be a plain JSON value"),
        (set_args(img_size=[64, 64, 64]), "img_size has to be a side or two sides in pixels"),
        (set_args(act_layer="sillu"), "timm cannot build a test_resnet with act_layer=sillu"),
        (set_args(widht=3), "timm cannot build a test_resnet with widht=3"),
        (lambda config: config.update(model_args=[1]), "model_args: Input should be a valid dictionary"),
        (lambda config: config.pop("architecture"), "names no timm architecture (`architecture`)"),
        (lambda config: config.update(architecture="hf-hub:x/y"), "hf-hub:x/y: timm has no such model"),
        (lambda config: config.update(architecture="local-dir:/etc"), "local-dir:/etc: timm has no such model"),
        (lambda config: config.update(architecture=5), "names no timm architecture"),
        (lambda config: config["pretrained_cfg"].update(std=[0, 1, 1]), "std.0: Input should be greater than"),
        (lambda config: config["pretrained_cfg"].update(std=[float("nan")] * 3), "std.0: Input should be"),
        (lambda config: config["pretrained_cfg"].update(mean="grey"), "mean: Input should be a valid list"),
        (lambda config: config["pretrained_cfg"].update(mean=[10**400, 0, 0]), "mean.0: "),
        (lambda config: config["pretrained_cfg"].update(input_size=[1, 28, 28]), "images have 3 channels"),
        (lambda config: config["pretrained_cfg"].update(input_size=7), "input_size: Input should be a valid list"),
        (lambda config: config.update(pretrained_cfg=[]), "pretrained_cfg is not a JSON object"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used(change: Any, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", change)
    with pytest.raises(UserError) as caught:
        create_classifier(parse_reference(str(tmp_path / "model")))
    assert message in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[1]", b"nonsense", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_none(content: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json: not (a )?JSON"):
        parse_reference(str(tmp_path / "model"))


def test_an_arch_that_is_not_the_weights(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    assert parse_reference(str(tmp_path / "model"), "test_resnet").arch == "test_resnet"
    for text in (str(tmp_path / "model"), "random:test_resnet"):
        with pytest.raises(UserError, match="holds a test_resnet, but arch is resnet18"):
            parse_reference(text, "resnet18")


def test_a_pickle_is_told_by_its_content_too(tmp_path: Path) -> None:
    net = write_folder(tmp_path / "model")
    file = tmp_path / "checkpoint_3"
    torch.save(net.state_dict(), file)
    assert create_classifier(parse_reference(str(file), "test_resnet", allow_pickle=True))[0].net.num_classes == 3
    with pytest.raises(UserError, match="checkpoint_3: is a pickle, which can run code when opened"):
        parse_reference(str(file), "test_resnet")
    (tmp_path / "model" / "model.safetensors").rename(file)
    assert create_classifier(parse_reference(str(file), "test_resnet"))[0].net.num_classes == 3


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(weights.with_name("epoch_3.safetensors"))
    assert parse_reference(str(tmp_path / "model")).file == weights.with_name("epoch_3.safetensors")
    weights.with_name("epoch_4.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"several weight files \(epoch_3.safetensors, epoch_4.safetensors\): rename one to model.safetensors",
    ):
        parse_reference(str(tmp_path / "model"))
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"no weights beside its config\.json \(expected model\.safetensors\)"):
        parse_reference(str(tmp_path / "model"))


def test_an_exported_folder_says_what_its_file_says(tmp_path: Path) -> None:
    net = write_folder(tmp_path / "model", lambda config: config.update(label_names=["a", "b", "c"]))
    facts = {"kind": "backbone", "arch": "test_resnet", "num_classes": 3, "licence": "mit", "prototypes": "x"}
    save_model_file(
        tmp_path / "model" / "model.safetensors", net.state_dict(), facts | {"class_names": ["a", "b", "c"]}
    )
    reference = parse_reference(str(tmp_path / "model"))
    assert reference.metadata["prototypes"] == "x"
    assert licence(reference) == "mit"
    save_model_file(
        tmp_path / "model" / "model.safetensors", net.state_dict(), facts | {"class_names": ["c", "b", "a"]}
    )
    with pytest.raises(UserError, match=r"model.safetensors: its class_names is not that of .*config.json"):
        parse_reference(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no model is named; give timm:NAME"),
        (" ", "no model is named"),
        ("timm:", "timm has no such model"),
        ("random:", "timm has no such model"),
        ("random:test_resnet.nonsense", "timm has no weights called 'nonsense' for test_resnet; it has r160_in1k"),
        ("timm:test_resnet.", "timm has no such model"),
        ("random:hf-hub:x/y", "timm has no such model"),
        ("hf-hub:", "not a valid hf-hub:ORG/NAME"),
        ("hf-hub:name", "not a valid hf-hub:ORG/NAME"),
        ("hf-hub:a/b/c", "not a valid hf-hub:ORG/NAME"),
        ("hf-hub:../../etc/passwd", "not a valid hf-hub:ORG/NAME"),
        ("a" * 5000, "no such file or folder"),
        ("a/" * 3000, "no such file or folder"),
        ("a\0/b", "no such file or folder"),
        ("tëst_resnet", "timm has no such model"),
    ],
)
def test_references_of_no_model(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_reference(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_from_files_reach_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("was built"))
    for name in (
        "hf-hub:x/y",
        "local-dir:/etc",
        "timm/resnet18",
        "../resnet18",
        "resnet18;",
        "resnet18\n",
        "hf_hub:x/y",
    ):
        with pytest.raises(UserError, match=r"model\.safetensors: .*timm has no such model"):
            known_arch(name, "model.safetensors")
    assert known_arch("test_resnet.r160_in1k", "x") == "test_resnet.r160_in1k"
