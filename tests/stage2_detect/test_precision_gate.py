"""INT8 and half precision of detectors: AP decides, further attempts keep the noisiest layers in float32, and what is said about it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.deploy import gate, writing
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.evaluation.scoring import score
from ssld.stage2_detect.export import main
from ssld.stage2_detect.export_config import ExportDetectorConfig, GateFailed

Start = Callable[..., gate.LowerPrecision]


@pytest.fixture(scope="module")
def onnx_file(detector_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained RetinaNet as ONNX, of fixed size, which is traced sooner."""
    path: Path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    writing.write("onnx", path, load_detector(detector_file), (64, 64), lambda line: None)
    return path


@pytest.fixture
def start(onnx_file: Path, detector_file: Path, tiny_coco: Any, tmp_path: Path) -> Start:
    """Files of lower precision, by settings and a list of lines."""

    def build(lines: list[str], **settings: Any) -> gate.LowerPrecision:
        config = ExportDetectorConfig(
            model=detector_file, output=tmp_path / "run", images=str(tiny_coco.train_images), calibration_images=4,
            val_annotations=tiny_coco.val_annotations, val_images=tiny_coco.val_images, **settings,
        )  # fmt: skip
        loaded = load_detector(detector_file)
        data = read_coco(
            tiny_coco.val_annotations, tiny_coco.val_images, training=False, class_names=loaded.class_names
        )
        files = {"onnx": onnx_file, "int8": tmp_path / "int8.onnx", "fp16": tmp_path / "fp16.onnx"}
        return gate.LowerPrecision(config, loaded, data, (64, 64), files, lines.append)

    return build


def test_lower_precision_has_to_be_compared(
    user_error: Any, detector_file: Path, tiny_coco: Any, tmp_path: Path
) -> None:
    def line(*flags: str) -> str:
        message: str = user_error(main, ["--model", str(detector_file), "--output", str(tmp_path / "run"), *flags])
        return message

    evaluation = ["--val_annotations", str(tiny_coco.val_annotations), "--val_images", str(tiny_coco.val_images)]
    assert "int8: is kept only if AP holds: give val_annotations and val_images" in line("--int8", "true")
    assert "int8: needs `images`" in line("--int8", "true", *evaluation)
    assert "formats: int8, fp16 and openvino need onnx" in line("--fp16", "true", *evaluation, "--formats", "torch")
    same = line("--int8", "true", *evaluation, "--images", str(tiny_coco.val_images))
    assert f"images: {tiny_coco.val_images} has no image that is not in val_annotations" in same
    assert not (tmp_path / "run").exists()


def test_ap_before_and_after(start: Start) -> None:
    lines: list[str] = []
    lower = start(lines, int8=True, fp16=True, max_ap_drop=100)
    facts = lower.write()
    assert list(lower.runs) == ["detector_fp16.onnx", "detector_int8.onnx"]
    assert facts["float_layers"] == []
    loaded = lower.loaded
    metrics, _ = score(
        loaded.model, lower.data, Sizing.of(loaded.resize), batch_size=1, workers=0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    # Another padding of such small images.
    assert lower.aps["detector.onnx"]["AP"] == pytest.approx(100 * metrics["AP"], abs=3)
    for name in lower.runs:
        form = rf"{name}: AP [\d.]+ -> [\d.]+ \([+-][\d.]+\), allowed -100"
        assert sum(re.fullmatch(form, line) is not None for line in lines) == 1
    assert f"detector_int8.onnx: {facts['layers']} of {facts['layers']} layers in INT8" in lines
    assert not any("attempt" in line for line in lines)


def fake_ap(lower: gate.LowerPrecision, monkeypatch: pytest.MonkeyPatch, drops: list[float]) -> list[int]:
    """Replace AP: 40 in float32, then less by each of the drops; returns a list of the layers in INT8 in each file measured."""
    counts: list[int] = []

    def of_files(runs: Any, *_: Any) -> dict[str, dict[str, float]]:
        if list(runs) == ["detector.onnx"]:
            return {"detector.onnx": {"AP": 40.0}}
        model = onnx.load(lower.files["int8"])
        counts.append(sum(tensor.name.endswith(".weight_quantized") for tensor in model.graph.initializer))
        return {name: {"AP": 40.0 - drops[len(counts) - 1]} for name in runs}

    monkeypatch.setattr(gate, "ap_of_files", of_files)
    return counts


def test_the_noisiest_layers_stay_in_float_until_ap_holds(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    lower = start(lines, int8=True)
    counts = fake_ap(lower, monkeypatch, [0.75, 0.6, 0.5])
    facts = lower.write()
    total = facts["layers"]
    assert counts == [total, total - 4, total - 8]
    assert len(set(facts["float_layers"])) == 8
    refused = "detector_int8.onnx: loses 0.75 points of AP, max_ap_drop is 0.5"
    assert f"{refused}; attempt 1 of 3 with the 4 noisiest layers in float32" in lines
    ratios = re.findall(r"[\w.]+ \((\d+) dB\)", lines[-1])
    assert lines[-1].startswith("detector_int8.onnx: in float32 stay, with their signal-to-noise ratio in INT8: ")
    assert len(ratios) == 8
    assert [int(one) for one in ratios] == sorted(int(one) for one in ratios)
    # These layers, and no others, have float32 weights in the file.
    model = onnx.load(lower.files["int8"])
    names = {tensor.name for tensor in model.graph.initializer}
    written = {entry.key: entry.value for entry in model.metadata_props}
    assert set(written["float_layers"].split(", ")) == set(facts["float_layers"])
    for layer in facts["float_layers"]:
        found = [name for name in names if name.removeprefix("model.").startswith(f"{layer}.weight")]
        assert [name.endswith(".weight") for name in found] == [True]


def test_a_lower_precision_that_loses_ap_ends_with_1(
    start: Start, detector_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lower = start([], int8=True, float_rounds=1)
    counts = fake_ap(lower, monkeypatch, [2.0, 0.75])
    message = r"detector_int8.onnx: loses 0.75 points of AP, max_ap_drop is 0.5, with 4 of \d+ layers in float32; layers with the lowest"
    with pytest.raises(GateFailed, match=message) as failed:
        lower.write()
    assert len(counts) == 2
    assert len(re.findall(r"(?:pyramid|dense)\.[\w.]+ \(\d+ dB\)", str(failed.value))) == 5
    half = start([], fp16=True)
    monkeypatch.setattr(gate, "ap_of_files", lambda runs, *_: {name: {"AP": 40.0 - ("16" in name)} for name in runs})
    with pytest.raises(GateFailed, match=r"detector_fp16.onnx: loses 1.00 points of AP.*--fp16 false leaves this file"):
        half.write()

    def fail(config: ExportDetectorConfig) -> None:
        raise GateFailed("too much")

    monkeypatch.setattr("ssld.stage2_detect.export.export_detector", fail)
    capsys.readouterr()
    assert main(["--model", str(detector_file), "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: too much\n"


def test_the_attempts() -> None:
    assert gate.float_counts(60, 4) == [0, 4, 8, 16, 32]
    assert gate.float_counts(16, 4) == [0, 4, 8]  # not all of them
    assert gate.float_counts(60, 0) == [0]
    tried: list[list[str]] = []

    def attempt(kept: Any) -> str | None:
        tried.append(list(kept))
        return None if "c" in kept else "too much"

    assert gate.search(attempt, lambda: "abcdef", [0, 1, 4, 5], lambda line: None) == (list("abcd"), None)
    assert tried == [[], ["a"], list("abcd")]
    assert gate.search(attempt, lambda: "abdef", [0, 2], lambda line: None) == (["a", "b"], "too much")


def test_the_time_of_int8() -> None:
    lines: list[str] = []
    latency = {"torch": 0.1, "detector.onnx": 0.08, "detector_int8.onnx": 0.12, "detector_int8.onnx by OpenVINO": 0.05}
    ratios = gate.int8_ratios(latency, lines.append)
    assert ratios == pytest.approx({"detector_int8.onnx": 1.2, "detector_int8.onnx by OpenVINO": 0.5})
    assert lines == ["detector_int8.onnx by OpenVINO takes 0.50 of torch's time"]
    del latency["detector_int8.onnx by OpenVINO"]
    gate.int8_ratios(latency, lines.append)
    assert lines[1:] == [
        "detector_int8.onnx takes 1.20 of torch's time",
        "INT8 gains nothing here: detector.onnx takes 0.80 of torch's time",
    ]
