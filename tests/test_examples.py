"""The scripts of examples/ do on tiny data what they say."""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ssld.shared.run_dir import read_result
from ssld.stage1_ssld import data_config, distill
from ssld.stage2_detect.detector_file import load_detector
from tests.conftest import TinyData
from tests.docs_sandbox import ROOT, save_random_detector, write_coco

EXAMPLES = ROOT / "examples"


def main_of(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = script(name).main
    return main


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_script_is_listed_and_tested() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = sorted(file.stem for file in EXAMPLES.glob("*.py"))
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]", page, flags=re.MULTILINE)) == scripts
    own = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in scripts if f'main_of("{name}")' not in own] == []
    for name in scripts:
        head = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
        assert f"python examples/{name}.py " in head


def test_train_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path / "train.json", tmp_path / "photos", 0, 6)
    write_coco(tmp_path / "val.json", tmp_path / "photos", 1, 4)
    recipe = {
        "steps": 40,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "resize": {"train_short_sides": [64], "train_long_side": 64, "short_side": 64, "long_side": 64},
        "model": {"kind": "retinanet", "fpn_channels": 16, "freeze_norm": False, "dense": {"convolutions": 1}},
        "optim": {"name": "adamw", "lr": 0.003, "reference_batch": 4},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flags = {"backbone": "random:test_resnet", "output": tmp_path / "run", "recipe": tmp_path / "tiny.yaml"}
    flags |= {"images": tmp_path / "photos", "train": tmp_path / "train.json", "val": tmp_path / "val.json"}
    per_class = main_of("train_detector")([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    result = read_result(tmp_path / "run")
    assert result
    assert per_class == result["metrics"]["per_class"]
    printed = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split() for line in printed] == [[name, f"{100 * ap:.1f}"] for name, ap in per_class.items()]
    assert max(per_class.values()) > 0.0


def test_backbone_in_timm(teacher_file: Path, tiny: TinyData, capsys: pytest.CaptureFixture[str]) -> None:
    image = tiny.val / "ring" / "ring_000.png"
    answer = main_of("backbone_in_timm")([str(teacher_file), str(image)])
    net: Any = timm.create_model("test_resnet", num_classes=3).eval()
    net.load_state_dict(load_file(teacher_file))
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with Image.open(image) as opened, torch.no_grad():
        expected = net(transform(opened.convert("RGB")).unsqueeze(0)).softmax(-1)[0]
    names = ("disc", "ring", "stripes")
    assert dict(answer) == pytest.approx({name: float(p) for name, p in zip(names, expected, strict=True)})
    assert [probability for _, probability in answer] == sorted((p for _, p in answer), reverse=True)
    assert capsys.readouterr().out.count("feature map [1, ") == 5


def test_predict_loop(tmp_path: Path) -> None:
    write_coco(tmp_path / "train.json", tmp_path / "photos", 0)
    file = tmp_path / "detector.safetensors"
    save_random_detector(file, "gfl", tmp_path / "train.json")
    out = tmp_path / "out"
    names = [photo.name for photo in sorted((tmp_path / "photos").iterdir())]
    for name, other in zip(names, ("A.JPG", "b.jpeg"), strict=False):
        (tmp_path / "photos" / name).rename(tmp_path / "photos" / other)
    total = main_of("predict_loop")(
        [str(file), str(tmp_path / "photos"), "--output", str(out), "--score_threshold", "0.005"]
    )
    photos = sorted((tmp_path / "photos").iterdir())
    assert {"A.JPG", "b.jpeg"} <= {photo.name for photo in photos}
    expected = [detections.names for detections in load_detector(file).predict(photos, score_threshold=0.005)]
    assert total == Counter(name for names in expected for name in names)
    assert sum(total.values()) > 0
    assert sorted(image.name for image in out.iterdir()) == [f"{photo.stem}.png" for photo in photos]


def test_predict_loop_names_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main_of("predict_loop")(["detector", str(tmp_path / "gone"), "--output", str(tmp_path / "out")])
    assert f"error: {tmp_path / 'gone'}: no such folder, or no .jpg, .jpeg, .png file in it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_distill_own_loss(
    teacher_file: Path, tiny: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics_of: Any
) -> None:
    monkeypatch.setattr(data_config, "LOSSES", dict(data_config.LOSSES))  # the script adds one for the whole process
    words = ["--images", str(tiny.train), "--teacher", str(teacher_file), "--student", "random:test_convnext"]
    small: dict[str, Any] = {"steps": 2, "train_epochs": None, "batch_size": 8, "workers": 0, "threads": 1}
    small |= {"device": "cpu", "log_every": 1}
    small |= {"precision": "fp32", "channels_last": False, "data.image_size": 32}
    result = main_of("distill_own_loss")([*words, "--output", str(tmp_path / "run")], **small)
    terms = [(term["name"], term["weight"]) for term in result["config"]["losses"]]
    assert terms == [("symmetric_kl", 1.0), ("reverse_kl", 0.5)]
    for line in metrics_of(tmp_path / "run"):
        assert line["reverse_kl"] > 0
        assert line["loss"] == pytest.approx(line["symmetric_kl"] + 0.5 * line["reverse_kl"], rel=1e-4)


def test_distill_own_loss_as_documented(tiny: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the script's first lines, without other settings: only the training itself is left out."""
    monkeypatch.setattr(data_config, "LOSSES", dict(data_config.LOSSES))
    given: dict[str, Any] = {}

    monkeypatch.setattr(distill, "distill", lambda config: given.update(config=config))
    words = ["--images", str(tiny.train), "--teacher", "timm:resnet50d", "--student", "random:resnet18d"]
    main_of("distill_own_loss")([*words, "--output", str(tmp_path / "run")])
    assert (given["config"].batch_size, given["config"].train_epochs) == (64, 100)


def test_the_own_loss_is_what_it_says() -> None:
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(size=(2, 5, 7)) * 3
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (student, teacher))
    expected = (p * np.log(p / q)).sum()
    loss = script("distill_own_loss").reverse_kl(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_serve_names_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The service itself is tested in test_serve.py."""
    with pytest.raises(SystemExit, match="2"):
        main_of("serve")([str(tmp_path / "detector.onnx")])
    assert (
        f"error: {tmp_path / 'detector.onnx'}: no such file; both are written by `ssld export`"
        in capsys.readouterr().err
    )
