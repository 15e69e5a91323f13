"""The model card holds what is recorded, and nothing about the machine it was written on."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssld.shared.deploy.hub import public, read_recipe, run_facts, table
from ssld.shared.models.model_file import read_metadata
from ssld.stage1_ssld.deploy.card import backbone_card

METADATA: dict[str, Any] = {
    "kind": "backbone",
    "arch": "resnet50d",
    "num_classes": 7,
    "class_names": list("abcdefg"),
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "input_size": [224, 224],
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "content_sha256": "c0ffee",
    "objective": "teacher",
    "start": "random:resnet50d",
    "metrics": {"top1": 0.8234, "agreement": 0.9, "kl": 0.1234, "images": 50000},
    "teacher": {"reference": "/home/me/wsl.pth, timm:vit", "licence": "cc-by-nc-4.0", "arch": "x"},
    "licence": "cc-by-nc-4.0",
}


def front(card: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return settings


def test_a_distilled_backbone_with_its_run(
    arguments: Any, distill_settings: Any, call: Any, tmp_path: Path, tiny: Any, teacher_file: Path
) -> None:
    from ssld.stage1_ssld.distill import main

    assert call(main, arguments(distill_settings)) == 0
    file = tmp_path / "run" / "student.safetensors"
    metadata, recipe = read_metadata(file), read_recipe(file)
    assert recipe is not None
    card = backbone_card(metadata, recipe, push_to_hub="me/small", parameters=1_234_567)
    assert "distilled from teacher.safetensors without human labels" in card
    assert f"| top1 | {100 * metadata['metrics']['top1']:.2f} % |" in card
    assert f"| KL to the teacher, nats | {metadata['metrics']['kl']:.4f} |" in card
    assert "| validation images | 15 |" in card
    assert "| read, " not in card  # without the facts of its run
    rows = dict(run_facts(file))
    assert rows["read, data.val"] == "15 images, 3 classes"
    assert rows["training finished"] == json.loads((file.parent / "result.json").read_text())["finished"][:10]
    assert f"torch {version('torch')}" in rows["versions"]
    told = backbone_card(metadata, recipe, push_to_hub=None, parameters=1, facts=list(rows.items()))
    assert "| read, data.val | 15 images, 3 classes |" in told
    assert "| interval | none: one training" in told
    file.with_name("copy.safetensors").write_bytes(file.read_bytes())
    assert run_facts(file.with_name("copy.safetensors")) == []
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))  # other weights under its name
    assert run_facts(file) == []
    assert "| parameters | 1.23 M |" in card
    assert f"- training: {tiny.train.parent.name}/train" in card
    assert f"- validation: {tiny.val.parent.name}/val" in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (settings["steps"], settings["batch_size"], settings["optim"]["lr"]) == (6, 8, 0.02)
    assert settings["losses"][0]["name"] == "symmetric_kl"
    assert not {"output", "workers", "threads", "device"} & set(settings)
    assert "- the teacher, teacher.safetensors: apache-2.0" in card
    assert "- the weights that training started from: random:test_convnext (none)" in card
    assert front(card)["license"] == "apache-2.0"
    assert str(tmp_path) not in card
    assert str(teacher_file.parent) not in card


def test_what_a_file_says(tmp_path: Path) -> None:
    card = backbone_card(
        METADATA, None, push_to_hub="me/net", parameters=25_576_264, checks={"onnx": {"relative_difference": 2.5e-6}}
    )
    assert front(card)["license"] == "cc-by-nc-4.0"
    assert front(card)["library_name"] == "timm"
    assert card.count("Not recorded.") == 2  # data and recipe
    for line in (
        "# net",
        "| classes | 7: a, b, c, d, e, ... |",
        "| image size | 224 x 224 |",
        "| central crop in evaluation | 0.95 |",
        "| mean, standard deviation | 0.485, 0.456, 0.406; 0.229, 0.224, 0.225 |",
        "| top1 | 82.34 % |",
        "| largest difference of ONNX and torch | 2.5e-06 of the largest logit |",
        "- the teacher, wsl.pth, timm:vit: cc-by-nc-4.0",
    ):
        assert line in card.splitlines()
    assert "/home" not in card


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("Apache-2.0", "apache-2.0"), ("mit AND cc-by-nc-4.0", "other"), (None, "unknown"), ("none: random", "other")],
)
def test_the_licence_as_the_hub_knows_it(licence: str | None, expected: str) -> None:
    assert (
        front(backbone_card(METADATA | {"licence": licence}, None, push_to_hub=None, parameters=1))["license"]
        == expected
    )


def test_converted_labeled_and_bare_files() -> None:
    source = {"file": "ResNet50_vd_ssld.pdparams", "sha256": "abc", "project": "PaddleClas"}
    bare = {key: METADATA[key] for key in ("arch", "num_classes", "mean", "std", "input_size")}
    card = backbone_card(bare | {"source": source, "licence": "apache-2.0"}, None, push_to_hub=None, parameters=1)
    assert "converted from ResNet50_vd_ssld.pdparams of PaddleClas (SHA-256 `abc`)" in card
    assert "- PaddleClas: apache-2.0" in card
    assert "Nothing is recorded." in card
    assert "| classes | 7, without names |" in card
    card = backbone_card(bare | {"objective": "labels"}, None, push_to_hub=None, parameters=1)
    assert "\n# resnet50d\n\nresnet50d, trained on labeled images.\n" in card
    assert 'timm.create_model("local-dir:hub", pretrained=True)' in card
    card = backbone_card(bare, None, push_to_hub=None, parameters=1)
    assert "resnet50d. How it was trained is not recorded." in card
    measured = bare | {"metrics": {"top1": 0.5}, "input_size": [320, 320], "trained_size": [224, 224]}
    assert "| image size | 320 x 320 |" in backbone_card(measured, None, push_to_hub=None, parameters=1)
    assert "| at image size | 224 x 224 |" in backbone_card(measured, None, push_to_hub=None, parameters=1)
    assert "These weights: unknown." in card
    assert "- weights that the file does not record" in card
    weighted = {"path": "s3://bucket/pool", "weight": 0.5}
    card = backbone_card(
        bare, {"data": {"train": [weighted, {"path": "/a/b/c"}]}, "optim": {}}, push_to_hub=None, parameters=1
    )
    assert "- training: s3://bucket/pool, weight 0.5\n- training: b/c\n- validation: none" in card


def test_only_the_run_of_a_training_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "backbone.safetensors"
    assert read_recipe(file) is None
    for text in ("a: [", "- 1", "weights: a.pdparams\noutput: here"):
        (tmp_path / "config.yaml").write_text(text)
        assert read_recipe(file) is None
    (tmp_path / "config.yaml").write_text("optim: {lr: 1}\noutput: here\nseed: 3")
    assert read_recipe(file) == {"optim": {"lr": 1}, "seed": 3}


def test_absolute_paths_are_cut() -> None:
    value = {"a": ["/x/y/z.pth", "runs/z.pth", "hf-hub:me/net", "s3://b/c"], "b": "/x/one, /y/two", "c": 1, "d": None}
    expected = {"a": ["z.pth", "runs/z.pth", "hf-hub:me/net", "s3://b/c"], "b": "one, two", "c": 1, "d": None}
    assert public(value) == expected
    assert public(Path("/x/y")) == "y"
    assert json.loads(json.dumps(public({"size": (1, 2)}))) == {"size": [1, 2]}


def test_names_that_would_break_a_table() -> None:
    assert table([("classes", "a|b\nc")])[2] == r"| classes | a\|b c |"
