"""`ssld doctor`: mismatched packages are reported without importing broken ones, settings and data are checked, the exit code is the verdict."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from ssld.pipelines import doctor
from ssld.pipelines.checks import data as checked_data
from ssld.pipelines.checks import machine
from ssld.pipelines.checks.machine import ask_torch, device_lines, machine_lines, pair_lines
from ssld.pipelines.checks.settings import _disk_lines
from ssld.stage2_detect import check_data

SOUND: dict[str, Any] = {"broken": {}, "cuda": None, "threads": 2, "devices": [], "groups": ["gloo"], "mps": False}
H200 = ["NVIDIA H200", 140 * 2**30, 141 * 2**30, 9, 0]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound machine without GPU; processes that import torch would take seconds each."""
    monkeypatch.setattr(doctor, "ask_torch", lambda: SOUND)
    monkeypatch.setattr(checked_data, "run_script", check_data.main)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two images with a box each."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 64, "height": 48} for number in (1, 2)]
    boxes = [{"id": number, "image_id": number, "category_id": 1, "bbox": [4, 4, 30, 20]} for number in (1, 2)]
    for number in (1, 2):
        Image.new("RGB", (64, 48), (50 * number, 9, 9)).save(tmp_path / f"{number}.png")
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("torch", "torchvision", "needs", "broken", "level", "text"),
    [
        ("2.15.0+cu132", "0.30.0+cu132", "==2.15.0", {}, "ok", "0.30.0+cu132 matches torch 2.15.0+cu132"),
        ("2.15.0", "0.29.2", ">=2.14.0", {}, "ok", "0.29.2 matches torch 2.15.0"),
        ("2.11.0", "0.29.2", ">=2.14.0", {}, "warning", "0.29.2 needs torch >=2.14.0, and torch is 2.11.0"),
        (
            "2.9.1",
            "0.25.0",
            "==2.10.0",
            {"torchvision": "x"},
            "fault",
            "0.25.0 needs torch ==2.10.0, and torch is 2.9.1",
        ),
        (
            "2.15.0+cpu",
            "0.30.0+cu132",
            "==2.15.0",
            {},
            "warning",
            "0.30.0+cu132 and torch 2.15.0+cpu are different builds",
        ),
    ],
)
def test_torch_and_torchvision(
    torch: str, torchvision: str, needs: str, broken: dict[str, str], level: str, text: str
) -> None:
    lines = list(pair_lines(torch, torchvision, needs, broken))
    assert lines[0].level == level
    assert text in lines[0].text
    assert len(lines) == 1 + len(broken)


def test_a_broken_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that crashes, or whose torchvision does not load, is reported."""

    def process(code: int, out: str, err: str) -> Callable[..., Any]:
        return lambda *_, **__: subprocess.CompletedProcess([], code, out, err)

    monkeypatch.setattr(machine.subprocess, "run", process(-11, "", "boom\nundefined symbol: x\n"))
    died = ask_torch()
    assert died == {"broken": {"torch": "undefined symbol: x"}}
    assert any(
        line.level == "fault" and "import torch fails: undefined symbol: x" in line.text
        for line in machine_lines(lambda: died)
    )
    facts = SOUND | {"broken": {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}}
    monkeypatch.setattr(machine.subprocess, "run", process(0, f"noise\nFACTS{json.dumps(facts)}\n", ""))
    lines = list(machine_lines(ask_torch))
    assert any(line.level == "fault" and "operator torchvision::nms does not exist" in line.text for line in lines)


@pytest.mark.slow
@pytest.mark.process
def test_this_machine_is_probed_in_another_process() -> None:
    facts = ask_torch()
    assert facts["broken"] == {}
    assert "gloo" in facts["groups"]


@pytest.mark.slow
@pytest.mark.process
def test_operators_that_do_not_load_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    (tmp_path / "torchvision" / "_C.so").write_bytes(b"not a library")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = ask_torch()["broken"]
    assert list(broken) == ["torchvision"]
    assert broken["torchvision"].startswith("OSError: ")


def test_requirements_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.10.1+cu128", "numpy": "2.0.0", "onnx": "1.9.0", "tqdm": "4.70"}
    monkeypatch.setattr(machine, "installed_version", there.get)
    requirements = ["torch>=2.11", "numpy>=2.0", "tqdm (>=4.66)", "jinja2>=3.1"]
    requirements += ['onnx>=1.18; extra == "export"', 'av>=18; extra == "video"']
    assert [(line.level, line.text) for line in machine.requirement_lines(requirements)] == [
        ("warning", "torch 2.10.1+cu128 is not >=2.11; pip install --upgrade 'torch>=2.11'"),
        ("fault", "not installed: jinja2; pip install 'jinja2>=3.1'"),
        ("note", "onnx 1.9.0 is not >=1.18 (for ssld[export]); pip install --upgrade 'onnx>=1.18'"),
    ]
    assert {"av", "torchcodec"} <= machine.OPTIONAL.keys()


@pytest.mark.parametrize(("free", "lines"), [(10 * 10**9, 1), (4 * 10**9, 2)])
def test_disk_space(free: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked_folders: list[Path] = []

    def usage(path: Path) -> Any:
        checked_folders.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    findings = list(_disk_lines({"a": 5 * 10**9, "b": None}, 3, tmp_path / "runs" / "mine"))
    assert checked_folders == [tmp_path]
    assert findings[0].text == "3 stages: about 5.0 GB of disk, and 1 stage of unknown size; data sets not counted"
    assert len(findings) == lines
    if lines == 2:
        assert findings[1].level == "warning"
        assert findings[1].text.startswith(f"output: 4.0 GB free on the disk of {tmp_path}, which is not enough")


def test_devices() -> None:
    lines = list(device_lines(SOUND | {"devices": [H200, [*H200[:1], 10 * 2**30, *H200[2:]]], "cuda": "13.2"}))
    texts = [line.text for line in lines]
    assert texts[0] == "cuda:0 NVIDIA H200, 141 GB (140 GB free), capability 9.0: --precision bf16"
    assert any("cuda:1: another program uses 131 GB" in text for text in texts)
    assert any(line.level == "fault" and "no NCCL" in line.text for line in lines)
    assert any("finds no GPU or no driver" in line.text for line in device_lines(SOUND | {"cuda": "13.2"}))


@pytest.mark.usefixtures("probed")
def test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main([])
    out = capsys.readouterr().out
    assert code == int("\n  fault" in out)
    for topic in ("system", "packages", "device", "processes", "memory", "disk"):
        assert f"  {topic} " in out
    assert "verdict: " in out


@pytest.mark.usefixtures("probed")
def test_data_and_a_cleaned_copy(coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--annotations", str(coco / "train.json"), "--images", str(coco)]
    assert doctor.main(data) == 0
    (coco / "2.png").unlink()
    assert doctor.main([*data, "--fix", str(tmp_path / "clean")]) == 1
    out = capfd.readouterr().out
    assert "fault   train.json: 1 image of 2 not in" in out
    assert out.splitlines()[-1] == (
        f"  fix the faults before you start a run; in {tmp_path / 'clean'} there are copies without those marked --fix"
    )
    assert "[--fix DIR " in out
    assert doctor.main(["--annotations", str(tmp_path / "clean" / "train.json"), "--images", str(coco)]) == 0


@pytest.mark.usefixtures("probed")
def test_images_of_another_folder_cannot_be_left_out(
    coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    data = ["--annotations", str(coco / "train.json"), "--images", str(tmp_path / "elsewhere")]
    assert doctor.main([*data, "--fix", str(tmp_path / "clean")]) == 2
    printed = capfd.readouterr()
    assert "fault   train.json: none of its 2 images is in" in printed.out.partition("verdict: 1 fault")[2]
    assert "no cleaned copy: training would refuse it: 2 of the 2 images" in printed.err
    assert not list((tmp_path / "clean").glob("*.json"))


@pytest.mark.usefixtures("probed")
def test_a_copy_over_another_is_a_mistake(coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--annotations", str(coco / "train.json"), "--images", str(coco), "--fix", str(tmp_path / "clean")]
    assert doctor.main(data) == 0
    before = (tmp_path / "clean" / "train.json").read_bytes()
    for folder, why in ((tmp_path / "clean", "exists already"), (tmp_path / "clean" / "train.json", "is a file")):
        assert doctor.main([*data[:-1], str(folder)]) == 2
        printed = capfd.readouterr()
        assert why in printed.err
        assert "verdict: 1 fault" in printed.out
    assert (tmp_path / "clean" / "train.json").read_bytes() == before


@pytest.mark.usefixtures("probed")
def test_a_data_check_that_breaks_off_is_no_clean_verdict(
    coco: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_data, "run_script", lambda words: check_data.main(words) or 1)
    assert doctor.main(["--annotations", str(coco / "train.json"), "--images", str(coco)]) == 1
    assert "fault   data: " in capfd.readouterr().out


@pytest.mark.usefixtures("probed")
def test_a_loss_that_the_settings_allow_is_no_fault(coco: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = json.loads((coco / "train.json").read_text())
    content["categories"].append({"id": 2, "name": "other"})
    content["annotations"].append({"id": 3, "image_id": 1, "category_id": 2, "bbox": [1, 1, 0, 9]})
    (coco / "train.json").write_text(json.dumps(content))
    file = coco / "train.yaml"
    for allowed, then in ((False, "training stops"), (True, "training continues with the remaining boxes")):
        made = settings(coco)
        made["data"]["allow_loss"] = allowed
        file.write_text(yaml.safe_dump(made))
        assert doctor.main([str(file)]) == int(not allowed)
        cause = "all boxes of class 'other' would be left out: 1 without width or height (first: annotation 3)"
        assert f"{cause}: {then}" in capfd.readouterr().out


@pytest.mark.slow
def test_the_data_check_is_a_process(coco: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, report = checked_data.check_data((coco / "train.json", coco, None, None), "--quick")
    assert code == 0
    assert report is not None
    assert report["files"]["train"]["boxes"] == 2
    assert "2 images, 1 class, 2 boxes" in capfd.readouterr().out
    assert checked_data.check_data((coco / "gone.json", coco, None, None)) == (2, None)


def settings(coco: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output": str(coco / "run"),
        "backbone": "random:test_resnet",
        "data": {"train_annotations": str(coco / "train.json"), "train_images": str(coco)},
        "model": {"freeze_norm": False},
        "steps": 2,
        "batch_size": 2,
        "workers": 1,
        "optim": {"lr": 0.1, "reference_batch": 2},
    } | changes


@pytest.mark.usefixtures("probed")
def test_settings_of_a_command(coco: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = coco / "train.yaml"
    file.write_text(yaml.safe_dump(settings(coco)))
    assert doctor.main([str(file)]) == 0
    out = capfd.readouterr().out
    assert "valid, and fit this machine" in out
    assert "2 images, 1 class, 2 boxes" in out  # its data are looked over too
    file.write_text(
        yaml.safe_dump(settings(coco, precision="bf16", workers=1000, trackers=["wandb"], backbone="gone.safetensors"))
    )
    assert doctor.main([str(file)]) == 1
    out = capfd.readouterr().out
    assert "precision: bf16 is slow or unsupported without a GPU" in out
    assert "workers: 1000 decoding processes on" in out
    assert "backbone: gone.safetensors: no such file or folder" in out
    file.write_text(yaml.safe_dump(settings(coco, model={})))
    assert doctor.main([str(file)]) == 0
    assert (
        "backbone: random:test_resnet has random weights; its BatchNorm layers, if it has any,"
        in capfd.readouterr().out
    )
    file.write_text(yaml.safe_dump(settings(coco, stepz=3)))
    assert doctor.main([str(file)]) == 1
    assert "stepz: unknown key; did you mean 'steps'?" in capfd.readouterr().out


@pytest.mark.usefixtures("probed")
@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("predict", {"model": "FILE", "images": "DIR", "score_threshold": 0.5}),
        ("audit", {"model": "FILE", "images": "DIR", "count": 5}),
        ("curate", {"pool": [{"path": "DIR"}], "teacher": {"model": "random:test_resnet"}, "keep": 3}),
        ("evaluate_detector", {"model": "FILE", "annotations": "JSON", "images": "DIR", "workers": 1}),
        ("evaluate_backbone", {"model": "FILE", "data": {"path": "DIR"}}),
        ("export_detector", {"model": "FILE", "formats": ["onnx"], "score_tolerance": 0.1}),
        ("convert_data", {"source": "DIR", "splits": ["train"]}),
    ],
)
def test_settings_of_every_command(
    command: str, values: dict[str, Any], coco: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (coco / "d.safetensors").write_bytes(b"x")
    places = {"FILE": coco / "d.safetensors", "DIR": coco, "JSON": coco / "train.json"}
    text = json.dumps(values)
    for word, path in places.items():
        text = text.replace(word, str(path))
    file = coco / "x.yaml"
    for content in (text, "base: below.yaml\n"):  # as it stands, and from another file
        file.write_text(content)
        code, out = doctor.main([str(file)]), capfd.readouterr().out
        assert f"of the command {command}\n" in out
        assert code == 0, out
        assert ("2 images" in out) == (command == "curate")
        (coco / "below.yaml").write_text(text)
    (coco / "below.yaml").write_text("lr: 3\nepochs: 4\nnet: resnet\n")
    assert doctor.main([str(file)]) == 1
    assert "these keys fit no command; commands: toy_data, " in capfd.readouterr().out


@pytest.mark.usefixtures("probed")
def test_a_detector_with_masks_needs_them(coco: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = coco / "train.yaml"
    for kind in ("faster_rcnn", "mask_rcnn"):
        file.write_text(yaml.safe_dump(settings(coco, model={"kind": kind})))
        assert doctor.main([str(file)]) == int(kind == "mask_rcnn")
        assert ("2 boxes without a usable segmentation" in capfd.readouterr().out) == (kind == "mask_rcnn")


@pytest.mark.usefixtures("probed")
def test_a_pipeline(coco: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flat = settings(coco)
    flat.pop("output")
    stages = {
        "one": {"command": "train", "set": flat},
        "two": {"like": "one", "command": "train", "set": {"workers": "${many}"}},
    }
    file = coco / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"output": str(coco / "runs"), "variables": {"many": None}, "stages": stages}))
    assert doctor.main([str(file)]) == 1
    assert "variable many has no value" in capfd.readouterr().out
    assert doctor.main([str(file), "--variable", "many=1000"]) == 0
    out = capfd.readouterr().out
    assert "2 stages: 2 stages of unknown size; data sets not counted" in out
    assert "two: workers: 1000 decoding processes on" in out
    assert out.count("2 images, 1 class, 2 boxes") == 1  # the same data of both stages: once
    shutil.rmtree(coco / "runs", ignore_errors=True)


@pytest.mark.usefixtures("probed")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--annotations", "a.json"], "give --annotations and --images together"),
        (["--fix", "x"], "--fix: give the data too"),
        (["nowhere.yaml"], "nowhere.yaml: no such file; settings are a YAML file"),
        (["--look_alikes"], "--look_alikes: unknown flag; did you mean '--near_duplicates'?"),
        (["--anotations", "a.json"], "--anotations: unknown flag; did you mean '--annotations'?"),
        (["x.yaml", "--variable", "three"], "--variable three: expected NAME=VALUE"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
