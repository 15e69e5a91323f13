"""The rows of benchmarks/gpu.py that no other benchmark measures, each started by it as a process: about, waits, frames, evaluation."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import timm
import torch
import torchvision

from benchmarks.side_by_side import rounds
from ssld.shared.config.yaml_files import read_recipe
from ssld.shared.models.backbones import InputSettings, place
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.inference import for_inference
from tests.simulated_cuda import networks, table

CONFIGS = ROOT / "stage2_detect" / "configs"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIB = 2**20


def about() -> None:
    """Name of the device and versions, as JSON."""
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    text = ", ".join(f"{name} {version}" for name, version in versions.items()) + f", timm {timm.__version__}"
    name = f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_properties(0)
        name = device.name
        text += f"; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {device.total_memory // MIB} MiB"
        text += f", capability {device.major}.{device.minor}"
    text += f"; {os.cpu_count()} CPU cores"
    print(json.dumps({"device": DEVICE.type, "name": name, "versions": text}))


def waits(*, few: bool) -> None:
    """Waits of the host as CUDA reports them (uploads that block are among them), beside those of the simulated device."""
    works: dict[str, tuple[dict[str, table.Waits], Callable[..., Callable[[], None]]]] = {
        "training step": (table.TRAINING, networks.training_step),
        "prediction": (table.PREDICTION, networks.prediction),
    }
    for name, (expected, make) in works.items():
        for kind in list(expected)[:: 5 if few else 1]:
            for images in (1, 4):
                step = make(kind, images, DEVICE.type)
                step()
                reported = _reported(step)
                counted = "not reported by a CPU" if reported is None else f"{reported.total()}"
                simulated = sum(expected[kind].of(images))
                print(f"{kind}, {name}, {images} images: waits {counted}, simulated {simulated}")
                if reported and reported.total() != simulated:
                    print("\n".join(f"    {number} at {where}" for where, number in reported.most_common()))


def _reported(step: Callable[[], None]) -> Counter[str] | None:
    """Lines at which torch warns that the host waits; None without a GPU."""
    if DEVICE.type != "cuda":
        step()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    return Counter(lines)


def frames(*, few: bool) -> None:
    """Images/s of detectors in bf16, from uint8 on the device to detections there, at 640 x 640."""
    side, count = (96, 2) if few else (640, 20)
    for recipe in ("pss_faster_dcn_r50vd", "pss_cascade_dcn_r50vd", "faster_rcnn_r50vd_1x"):
        torch.manual_seed(0)
        config = DetectorConfig.model_validate(read_recipe(CONFIGS / f"{recipe}.yaml").get("model", {}))
        inputs = InputSettings.of_detector((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        body = timm.create_model("resnet50d", features_only=True)
        model = build_detector(config, classes=80, body=body, arch="resnet50d", inputs=inputs)
        fast = for_inference(place(model, DEVICE, channels_last=True).eval())
        for batch in (1, 8) if not few else (1,):
            pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
            given = ImageBatch(pixels, torch.tensor([[side, side]] * batch), torch.ones(batch)).to(DEVICE)

            def detect(fast: Any = fast, given: ImageBatch = given) -> None:
                with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                    fast(given)

            detect()
            seconds = [one["detect"] for one in rounds({"detect": detect}, count, DEVICE)]
            rate = batch / statistics.median(seconds)
            peak = torch.cuda.max_memory_allocated() // MIB if DEVICE.type == "cuda" else 0
            print(f"{recipe}, {side} px, batch {batch}: {rate:.1f} images/s, peak memory {peak} MiB")


def evaluation(work: Path, count: int) -> None:
    """Seconds of evaluate.py over `count` images: the drawn scenes under many names, and the detector that an earlier row trained."""
    from ssld.stage2_detect.evaluate import main as evaluate

    detector = next(iter(sorted(work.glob("*/detector.safetensors"))), None)
    if detector is None:
        raise SystemExit("evaluation: no earlier row has written a detector file")
    source = work / "data" / "stage2"
    content = json.loads((source / "val.json").read_text(encoding="utf-8"))
    images, annotations = content["images"], content["annotations"]
    content["images"], content["annotations"] = [], []
    (work / "many").mkdir()
    for number in range(count):
        image = images[number % len(images)]
        name = f"{number:06d}.jpg"
        os.link(source / "val" / image["file_name"], work / "many" / name)
        content["images"].append(image | {"id": number + 1, "file_name": name})
        own = [one for one in annotations if one["image_id"] == image["id"]]
        content["annotations"] += [
            one | {"id": len(content["annotations"]) + place, "image_id": number + 1}
            for place, one in enumerate(own, 1)
        ]
    (work / "many.json").write_text(json.dumps(content), encoding="utf-8")
    line = ["--model", str(detector), "--annotations", str(work / "many.json"), "--images", str(work / "many")]
    line += ["--output", str(work / "evaluated"), "--batch_size", "16", "--cache_annotations", "false"]
    line += (
        ["--precision", "bf16", "--workers", "8"] if DEVICE.type == "cuda" else ["--workers", "0", "--device", "cpu"]
    )
    begun = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        code = evaluate(line)
    seconds = time.perf_counter() - begun
    if code:
        raise SystemExit(code)
    print(f"{count} images in {seconds:.1f} seconds, {count / seconds:.0f} images/s, data check and scoring included")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_name", choices=["about", "waits", "frames", "evaluation"])
    parser.add_argument("--few", action="store_true", help="smallest size, fewest kinds")
    parser.add_argument("--work", type=Path, help="folder of gpu.py")
    parser.add_argument("--count", type=int, default=5000)
    arguments = parser.parse_args(argv)
    match arguments.work_name:
        case "about":
            about()
        case "waits":
            waits(few=arguments.few)
        case "frames":
            frames(few=arguments.few)
        case "evaluation":
            evaluation(arguments.work, arguments.count)


if __name__ == "__main__":
    main()
