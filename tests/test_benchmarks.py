"""The scripts of benchmarks/: their tables for given numbers, and that every measurement runs. Nothing here is timed."""

import importlib.util
import io
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks import gpu
from ssld.pipelines import init
from ssld.pipelines.checks import data as checked_data
from ssld.pipelines.runner.estimate import Rate
from ssld.pipelines.scaffold import weights
from ssld.shared.config.settings import parse_config
from ssld.shared.models.model_file import read_tensors
from ssld.stage2_detect import check_data
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.coco import CocoImage

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def init_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ssld init` in this process, on a machine of known speed: it starts no processes, and no trial of a network of 5 M parameters."""
    monkeypatch.setattr(init, "ask_torch", lambda: {"devices": []})
    for name in ("find_downloads_apart", "faults_apart"):
        monkeypatch.setattr(weights, name, lambda references, **_: [])
    for module in (checked_data, init):
        monkeypatch.setattr(module, "run_script", check_data.main)
    rate = Rate(start=1.0, step=0.01)
    monkeypatch.setattr(init, "trials", lambda facts, files: nullcontext(lambda settings, trained, limit: rate))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finish(run: Path, **metrics: float) -> None:
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"metrics": metrics}))


def test_table_of_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(tmp_path / "kl_2", top1=0.5, agreement=0.6, kl=0.25)
    finish(tmp_path / "kl", top1=0.4, agreement=0.5, kl=0.5)
    finish(tmp_path / "kl_1", top1=0.3, agreement=0.1, kl=0.75)
    finish(tmp_path / "teacher", top1=0.625)  # made last, first in the pipeline
    finish(tmp_path / "curated_images", kept=3)  # no rung
    finish(tmp_path / "another", top1=0.1, agreement=0.2, kl=1)  # a rung that the pipeline's file does not have
    (tmp_path / "supervised").mkdir()  # not finished
    assert script("ablation_table").main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| rung | seeds | top-1 | agreement | KL to the teacher |",
        "| --- | --- | --- | --- | --- |",
        "| teacher | 1 | 62.5 | - | - |",
        "| kl | 3 | 40.0 (30.0 to 50.0) | 40.0 (10.0 to 60.0) | 0.500 (0.250 to 0.750) |",
        "| another | 1 | 10.0 | 20.0 | 1.000 |",
    ]


def test_table_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("ablation_table").main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/nowhere: no such folder\n"
    finish(tmp_path / "curated_images", kept=3)
    assert script("ablation_table").main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no finished run with a top-1 in it; give the folder that pipelines/run.py wrote\n"
    )


def test_rounds_alternate_and_the_first_does_not_count() -> None:
    order: list[str] = []
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    rounds = script("side_by_side").rounds(works, 3, torch.device("cpu"))
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [set(seconds) for seconds in rounds] == [{"a", "b"}] * 3
    assert all(second > 0 for seconds in rounds for second in seconds.values())


def gpu_row(name: str, images: Path) -> gpu.Row:
    """A row of benchmarks/gpu.py at the smallest size."""
    return next(row for row in gpu.rows(images, images, tiny=True, gpu=False) if row.name == name)


def test_every_ratio_is_printed(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row, threads = gpu_row("distill", tiny.train), torch.get_num_threads()
    try:
        script("distill").main(row.line[1:])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines if re.fullmatch(row.cell, line.strip())] == ["(a)", "(c)", "(e)"]
    values = {line[:3]: [float(value) for value in re.findall(r"\d+\.\d{3}", line)] for line in lines}
    for letter in "abcdf":
        middle, low, high = values[f"({letter})"]
        assert 0 < low <= middle <= high
    (share,) = values["(e)"]
    assert 0 <= share <= 1


def test_every_ratio_of_the_detection_loader_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for number, size in enumerate([(60, 40), (40, 60), (50, 50)]):
        Image.new("RGB", size, (number, 90, 200)).save(tmp_path / f"{number}.jpg")
        raw["images"].append({"id": number, "file_name": f"{number}.jpg", "width": size[0], "height": size[1]})
        raw["annotations"].append({"id": number, "image_id": number, "category_id": 1, "bbox": [5, 6, 20, 30]})
    (tmp_path / "data.json").write_text(json.dumps(raw))
    threads = torch.get_num_threads()
    try:
        arguments = [str(tmp_path / "data.json"), str(tmp_path), "--pairs", "2", "--batch", "2", "--short-sides", "48"]
        script("detection_loader").main(arguments)
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    values = {line[:3]: [float(value) for value in re.findall(r"\d+\.\d{3}", line)] for line in lines[1:-3]}
    assert list(values) == [f"({letter})" for letter in "abcdefghi"]
    assert all(low <= middle <= high for middle, low, high in values.values())
    # three images of one color each, but for what JPEG makes of it; and noise
    assert [line.rpartition(": ")[2] for line in lines[-3:-1]] == ["0.00 grey levels in the mean, 0 at most"] * 2
    assert 20 < int(lines[-1].split()[-3]) < 68


def test_the_detection_loaders_opponent_makes_the_same_batch(tmp_path: Path) -> None:
    """Same sizes, flips and padding; on a smooth image that grows, the same pixels to a few levels."""
    benchmark = script("detection_loader")
    y, x = np.mgrid[:60, :90]
    smooth = np.stack([2 * x, 3 * y, 200 - x - y], axis=2).astype(np.uint8)
    raw = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for number in range(4):
        Image.fromarray(smooth).save(tmp_path / f"{number}.png")
        raw["images"].append({"id": number, "file_name": f"{number}.png", "width": 90, "height": 60})
    (tmp_path / "data.json").write_text(json.dumps(raw))
    batches = benchmark.Batches(benchmark.read_coco(tmp_path / "data.json", tmp_path, training=True), 4, [120])
    (ours,) = batches.loader(1, kernel="fast")
    views = [batches.view(record, 0) for record in ours.records]
    assert {view.flip for view in views} == {False, True}
    theirs = benchmark.opponent(ours.records, views, benchmark.InterpolationMode.BICUBIC)
    difference = (benchmark.Normalize(benchmark.MEAN, benchmark.STD)(ours.images) - theirs).abs()
    assert theirs.shape == (4, 3, 128, 192)
    assert difference.max() * 255 * max(benchmark.STD) < 6
    assert difference.mean() * 255 * max(benchmark.STD) < 1
    # A crop too: v2 cuts whole pixels before it resizes, which moves the window by up to one.
    crop = benchmark.AugmentConfig(crop=1.0)
    (ours,) = batches.loader(1, kernel="fast", augment=crop)
    geometry = benchmark.TrainingViews(0, benchmark.ResizeConfig(train_short_sides=[120]), crop).geometry
    views = [geometry(60, 90, one.boxes_N4, image_id=one.image_id, number=0) for one in ours.records]
    assert any(view.cropped and view.top and view.left for view in views)
    theirs = benchmark.opponent_v2(ours.records, views, benchmark.v2.Identity())
    difference = (benchmark.Normalize(benchmark.MEAN, benchmark.STD)(ours.images) - theirs).abs()
    assert difference.max() * 255 * max(benchmark.STD) < 9
    assert difference.mean() * 255 * max(benchmark.STD) < 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), [("faster", "training"), ("mask", "inference")])
def test_every_ratio_of_the_detector_is_printed(
    kind: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script itself asserts that both sides find enough, and nearly the same."""
    row = gpu_row(kind, tmp_path)
    script("detect").main(row.line[1:])
    out = capsys.readouterr().out
    assert any(re.fullmatch(row.cell, line.strip()) for line in out.splitlines())
    for ours in ("ours", "ours, reference pooling"):
        match = re.search(rf"{kind} 96x160 {mode}, float32: {ours} / torchvision +(\S+)  \((\S+) to (\S+)\)", out)
        assert match, out
        middle, low, high = map(float, match.groups())
        assert 0 < low <= middle <= high


def test_the_greatest_memory_of_a_detector_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a process that trains with masks: the test's own."""
    script("detect").main(
        ["--detectors", "mask", "--batch", "1", "--sizes", "64x64", "--peak-of", "torchvision", "training"]
    )
    assert int(capsys.readouterr().out) > 100


def test_plain_turns_the_fast_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    detect, states = script("detect"), []
    monkeypatch.setattr(detect, "print_peak", lambda *_: states.append(detect.kernels.enabled()))
    for more in ([], ["--plain"]):
        detect.main(["--sizes", "64x64", "--batch", "1", "--peak-of", "ours", "training", *more])
    assert states == [True, False]


def test_table_of_the_detector_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {
        "random": (0.1, 0.2),
        "supervised": (0.2, 0.3),
        "supervised-small": (0.1, 0.1),
        "ssld": (0.25, 0.35),
        "ssld-small": (0.4, 0.5),
    }
    for row, aps in scores.items():
        for seed, ap in enumerate(aps):
            finish(tmp_path / f"faster_rcnn-{row}-{seed}", AP=ap, AP50=2 * ap)
            finish(tmp_path / f"cascade_rcnn-dcn-{row}-{seed}", AP=ap if row != "ssld-small" else 0.0, AP50=ap)
    finish(tmp_path / "faster_rcnn-dcn-random-0", AP=0.5, AP50=0.5)  # a seed is missing: no row
    arguments = ["data", "--supervised", "a", "b", "--ssld", "c", "d", "--output", str(tmp_path), "--table-only"]
    assert script("detector_grid").main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "| faster_rcnn | no | random | 1 | 15.0 (10.0 to 20.0) | 30.0 (20.0 to 40.0) | - |",
        "| faster_rcnn | no | supervised | 1 | 25.0 (20.0 to 30.0) | 50.0 (40.0 to 60.0) | - |",
        "| faster_rcnn | no | supervised | small | 10.0 (10.0 to 10.0) | 20.0 (20.0 to 20.0) | - |",
    ]
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 10
    assert lines[-2:] == [
        "- faster_rcnn: +20.0 AP",
        "- cascade_rcnn with DCNv2: +5.0 AP, inside the spread of the seeds",
    ]
    assert script("detector_grid").main([*arguments, "--factors", "1"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 2 + 6
    for seed in range(2):
        finish(tmp_path / f"mask_rcnn-ssld-{seed}", AP=0.5, AP50=0.5, AP_segm=0.25)
    script("detector_grid").main([*arguments, "--kinds", "mask_rcnn"])
    assert capsys.readouterr().out.splitlines()[2].endswith("| 50.0 (50.0 to 50.0) | 25.0 (25.0 to 25.0) |")


def test_mosaics_carry_the_boxes_along(tmp_path: Path) -> None:
    """Each image is white where its object is, and black elsewhere: the canvases have to be white inside the boxes."""
    box = (16, 8, 47, 39)  # first and last pixel
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[box[1] : box[3] + 1, box[0] : box[2] + 1] = 255
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    rows = [{"image": {"bytes": encoded.getvalue(), "path": None}, "label": k % 3, "bbox": list(box)} for k in range(6)]
    for name in ("labeled", "val"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    entries = [{"label": k, "name": f"class {k}"} for k in range(3)]
    (tmp_path / "classes.json").write_text(json.dumps(entries))
    sizes = ["--classes", "2", "--side", "128", "--train-images", "5", "--val-images", "2"]
    for output in ("a", "b"):
        assert script("mosaics").main([str(tmp_path), "--output", str(tmp_path / output), *sizes]) == 0
    content = json.loads((tmp_path / "a" / "train.json").read_text())
    assert [entry["name"] for entry in content["categories"]] == ["class 0", "class 1"]
    assert {entry["category_id"] for entry in content["annotations"]} <= {1, 2}
    assert (tmp_path / "b" / "train.json").read_bytes() == (tmp_path / "a" / "train.json").read_bytes()
    for image in content["images"]:
        canvas = np.asarray(Image.open(tmp_path / "a" / "train" / image["file_name"]))
        inside = np.zeros(canvas.shape[:2], dtype=bool)
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, width, height = entry["bbox"]
                assert width == height
                inner = (slice(int(y) + 2, int(y + height) - 2), slice(int(x) + 2, int(x + width) - 2))
                inside[inner] = True
        assert inside.any()
        assert (canvas[inside] >= 250).all()
        assert len(list((tmp_path / "a" / "val").iterdir())) == 2


@pytest.mark.slow
def test_a_pretrained_student_is_looked_at_and_detected_with(
    tmp_path: Path, shared_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 1, the files made of it, looks, two detectors and both tables, at the smallest size."""
    for name in ("coco-mini", "tinyimagenet100", "imagenet1k-sample"):
        shared_data(name)
    data, benchmark = shared_data("weights").parent, script("pretrained_student")
    common = [str(data), "--output", str(tmp_path), "--tiny", "--rows"]
    assert benchmark.main([*common, "start", "init", "--seeds", "0"]) == 0
    scores = capsys.readouterr().out.splitlines()[-4:]
    assert [line.count("|") for line in scores] == [7] * 4
    assert re.fullmatch(r"\| start \| \d+\.\d \| \d+\.\d \| - \| - \| - \|", scores[2])
    assert re.fullmatch(r"\| init \| (\S+) \| \1 \| [+-]\d+\.\d \([+-]\S+ to [+-]\S+\) \| - \| 0 \|", scores[3])
    made = [f"init/{how}" for how in benchmark.MADE]
    looked_at = ["start", "init", *made, "frozen", "lr5e-5", "own_size", "wide"]
    assert benchmark.main([*common, *looked_at]) == 0
    table = capsys.readouterr().out.splitlines()[-len(looked_at) :]
    assert [line.split(" | ")[0] for line in table] == [f"| {row}" for row in looked_at]

    start = read_tensors(data / "weights" / "efficientnet_lite0.safetensors")
    students = {row: read_tensors(tmp_path / "students" / row / "student.safetensors") for row in ("init", "frozen")}
    files = {row: read_tensors(tmp_path / "made" / f"{row.replace('/', '_')}.safetensors") for row in made}
    for name in ("bn1.running_mean", "blocks.3.0.bn2.running_var"):
        init = students["init"][name]
        assert torch.equal(students["frozen"][name], start[name])
        assert not torch.equal(init, start[name])
        assert torch.equal(files["init/stats_back"][name], start[name])
        assert torch.equal(files["init/weights_back"][name], init)
        torch.testing.assert_close(files["init/half"][name], (start[name] + init) / 2)
        assert not torch.equal(files["init/reestimated"][name], init)
    for name in ("conv_stem.weight", "bn1.weight", "classifier.bias"):
        init = students["init"][name]
        assert not torch.equal(students["frozen"][name], start[name])
        assert torch.equal(files["init/stats_back"][name], init)
        assert torch.equal(files["init/weights_back"][name], start[name])
        assert torch.equal(files["init/reestimated"][name], init)


def test_a_row_of_a_pretrained_student_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script("pretrained_student").main([str(tmp_path), "--output", str(tmp_path), "--rows", "init/other"])
    assert capsys.readouterr().err.endswith("error: --rows: init/other: no such row\n")


def test_table_of_fine_tuning(tmp_path: Path) -> None:
    benchmark = script("finetune")
    numbers = {
        "torchvision": [(0.2, 0.5, 100.0, 1000.0), (0.3, 0.6, 120.0, 1200.0), (0.1, 0.2, 80.0, 1000.0)],
        "ours": [(0.25, 0.5, 50.0, 800.0), (0.35, 0.5, 60.0, 960.0)],  # the other seeds are not finished
    }
    (tmp_path / "bccd").mkdir()
    for side, runs in numbers.items():
        for seed, run in enumerate(runs):
            file = benchmark.result_file(tmp_path, "bccd", side, seed)
            file.write_text(json.dumps(dict(zip(benchmark.NUMBERS, run, strict=True))))
    benchmark.result_file(tmp_path, "bccd", "torchvision", 3).write_text(
        json.dumps({"failed": "the loss is nan in pass 3"})
    )
    assert list(benchmark.table(tmp_path, ["bccd", "coco-mini"], [0, 1, 2, 3])) == [
        "| data | side | seeds | AP | AP50 | processor time, s | greatest memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| bccd | torchvision | seed 3 | the loss is nan in pass 3 | - | - | - |",
        "| bccd | torchvision | 2 | 25.0 (20.0 to 30.0) | 55.0 (50.0 to 60.0) | 110 (100 to 120) | 1100 (1000 to 1200) |",
        "| bccd | ours | 2 | 30.0 (25.0 to 35.0) | 50.0 (50.0 to 50.0) | 55 (50 to 60) | 880 (800 to 960) |",
        "| bccd | ours to torchvision | 2 | +5.0 | -5.0 | x 0.50 | x 0.80 |",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("init_in_a_moment")
def test_fine_tuning_runs_on_both_sides(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """At a tiny size, in this process; each side has the numbers of the table, and ours the settings that `ssld init` wrote."""
    data, benchmark = shared_data("weights").parent, script("finetune")
    benchmark.prepare(data, tmp_path, "coco-mini", {"train": 2, "val": 1})
    content = json.loads((tmp_path / "coco-mini" / "train.json").read_text())
    assert [one["name"] for one in content["categories"]] == ["person", "animal", "vehicle"]
    assert {one["category_id"] for one in content["annotations"]} <= {1, 2, 3}
    assert len(content["images"]) == 2
    threads = torch.get_num_threads()
    line = [str(data), "--output", str(tmp_path), "--rows", "coco-mini", "--side", "64", "--epochs", "1"]
    for side in benchmark.SIDES:
        assert benchmark.main([*line, "--one", side, "0"]) == 0
        result = json.loads(benchmark.result_file(tmp_path, "coco-mini", side, 0).read_text())
        assert result.keys() == benchmark.NUMBERS.keys()
        assert min(result["seconds"], result["peak_mb"]) > 0
    torch.set_num_threads(threads)
    used = parse_config(TrainConfig, ["--config", str(tmp_path / "coco-mini/ours-0/config.yaml")], program="train.py")
    assert (used.optim.name, used.model.fpn_channels, used.unit_scale, used.train_epochs) == ("adamw", 128, True, 1)
    assert (used.resize.train_short_sides, used.resize.short_side) == ([64], 64)


def test_a_flipped_image_keeps_its_objects() -> None:
    """In torchvision's side of the fine-tuning."""
    benchmark = script("finetune")
    pixels = torch.zeros(3, 10, 20, dtype=torch.uint8)
    pixels[:, 2:5, 3:9] = 255
    box, none = np.array([[3.0, 2.0, 9.0, 5.0]], np.float32), np.zeros(1)
    record = CocoImage("image", "image.png", 20, 10, box, np.array([1]), none > 0, none, box, (1,), None)
    with mock.patch.object(benchmark, "load_record", return_value=pixels):
        for seed in range(6):
            torch.manual_seed(seed)
            image, target = benchmark.flipped_at_random(record)
            x1, y1, x2, y2 = target["boxes"][0].int().tolist()
            assert image[:, y1:y2, x1:x2].min() == 1
            assert image.sum() == 3 * 3 * 6
            assert target["labels"].tolist() == [2]
