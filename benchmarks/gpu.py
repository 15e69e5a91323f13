"""Everything that only a GPU can tell, in one command of at most ten minutes, as one page.

    python benchmarks/gpu.py [--images FOLDER] [--budget 600] [--rows NAME ...] [--output docs/benchmarks]
    python benchmarks/gpu.py --device cpu --tiny          the same commands on the CPU at the smallest size: whether they run, not how fast

Run it from the project's folder on a machine with one GPU, with the project installed (`pip install -e ".[test,fast]"`) and no other program on the
GPU. It needs no network and no data: images and boxes are drawn (`pipelines/toy_data.py`), weights are random. `--images` names a folder of photos,
whose decoding is what a loader spends its time on; drawn crops are small. It writes `gpu_<name>_<date>.md` into `--output`.

Each row is a command of its own in a process of its own. On a GPU its time limit is a share of the time that is left, in proportion to `Row.seconds`:
every row gets its time within the budget, and what a row leaves over goes to the later ones. A row that fails or runs out of time stands in the page
with the last line of its output, and the next row runs all the same. Rows are in the order of what they decide. Exit code 0: every row ran to its
end; 1: see the page. Whether a goal is met is for the reader to see: the table has both. Does not import torch, so that the process holds no memory
of the GPU.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import yaml

WORKS = "benchmarks/gpu_works.py"
RATIO = r"\S.*?\s{2,}\d+\.\d+\s+\(.*\)"
"""lines of `side_by_side.show`"""
_SLOWER = 10  # a CPU that others use too
TRAINING = r"(auto_batch|step \d+(/\d+)?): .*|wrote .*|cuda.*|cpu, .*"


@dataclass(frozen=True)
class Row:
    """A command, what it decides, and how long it may take."""

    name: str
    goal: str
    line: list[str]
    """words after the interpreter"""
    seconds: int
    shows: str = RATIO
    """lines of the output that are the result, as a regular expression"""
    cell: str = RATIO
    """those of them that stand in the table"""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a row: "ran" or its restriction, "failed" or "out of time" after so many seconds, with its lines for the page."""

    row: Row
    ended: str
    seconds: float
    lines: list[str]


def rows(work: Path, images: Path, *, tiny: bool, gpu: bool) -> list[Row]:
    """All rows, in the order of what they decide; `work` holds the drawn data and settings."""
    pairs = ["--pairs", "2" if tiny else "10", "--memory-format", "channels_last"]
    size = [*pairs, "--batch", "1", "--sizes", "96x160"] if tiny else [*pairs, "--batch", "8", "--sizes", "800x1333"]
    students = ["--arch", "test_resnet", "--teacher-arch", "test_resnet"] if tiny else []
    distill = "--student resnet10t --teacher resnet10t --size 32 --batch 4 --pairs 3 --workers 1"
    if not tiny:
        distill = "--student resnet50d --teacher resnet101d --size 224 --batch 256 --pairs 10 --workers 8"
    train = ["stage2_detect/train.py", "--config", str(work / "detector.yaml")]
    half = "bf16" if gpu else "fp32"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    tests = ["tests/stage2_detect/models/test_deform.py", "tests/stage2_detect/training/test_waits.py"]
    both = [] if tiny else ["training", "inference"]
    return [
        Row("doctor", "no fault", ["pipelines/doctor.py"], 15, r".+", r".*\bfaults?\b.*"),
        Row(
            "auto_batch",
            "finds a batch, trains, scores, saves",
            [*train, "--auto_batch", "true", "--precision", half, "--output", str(work / "auto")],
            55,
            TRAINING,
            r"auto_batch: .*|wrote .*",
        ),
        Row("waits", "as simulated", [WORKS, "waits", *(["--few"] if tiny else [])], 30, *[r".* waits .*"] * 2),
        Row(
            "faster",
            "training <= 0.50, inference <= 0.50 of torchvision's time, both bf16",
            ["benchmarks/detect.py", "--detectors", "faster", *size, "--modes", *(both or ["training"])],
            60,
        ),
        Row(
            "memory",
            "peak of ours / torchvision's <= 1",
            ["benchmarks/detect.py", "--detectors", "faster", *size, "--modes", "memory"],
            50,
        ),
        Row(
            "mask",
            "training <= 0.50, inference <= 0.50",
            ["benchmarks/detect.py", "--detectors", "mask", *size, "--modes", *(both or ["inference"])],
            50,
        ),
        Row(
            "retinanet",
            "training <= 0.50, inference <= 0.50",
            ["benchmarks/dense.py", *size, *students, "--modes", "training", "inference"],
            40,
        ),
        Row(
            "distill",
            "(a) store step <= 1.05 of a supervised step, (c) <= 0.75 of timm's KD task, (e) share of waiting for images",
            ["benchmarks/distill.py", str(images), *distill.split()],
            55,
            r"\([a-f]\) .*",
            r"\([ace]\) .*",
        ),
        Row(
            "frames",
            "> 600 images/s at batch 8",
            [WORKS, "frames", *(["--few"] if tiny else [])],
            25,
            r".* images/s.*",
            r".* images/s.*",
        ),
        Row(
            "compile",
            "below 1",
            ["benchmarks/detect.py", "--detectors", "faster", *size, "--modes", "compile"],
            60,
        ),
        Row("ld", "<= 1.05", ["benchmarks/dense.py", *size, *students, "--modes", "ld"], 30),
        Row(
            "fp16",
            "trains with GradScaler and an average of the weights, saves",
            [*train, "--precision", "fp16" if gpu else "bf16", "--ema.decay", "0.999", "--output", str(work / "fp16")],
            30,
            TRAINING,
            r"auto_batch: .*|wrote .*",
        ),
        Row(
            "nccl",
            "trains under DDP with one process",
            [*launch, *train, "--precision", half, "--output", str(work / "nccl")],
            30,
            TRAINING,
            r"auto_batch: .*|wrote .*",
        ),
        Row(
            "evaluation",
            "seconds for 5,000 images, scoring included",
            [WORKS, "evaluation", "--work", str(work), "--count", "20" if tiny else "5000"],
            40,
            r".* seconds.*",
            r".* seconds.*",
        ),
        Row(
            "tests",
            "none fails",
            [
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                "-o",
                "addopts=--import-mode=importlib",
                *tests,
                "-k",
                "cuda or gpu",
            ],
            20,
            r".*(passed|skipped|failed).*",
            r".*(passed|skipped|failed).*",
        ),
    ]


def write_settings(work: Path, *, tiny: bool, gpu: bool) -> None:
    """Drawn data, and `detector.yaml`, the Faster R-CNN that several rows train."""
    from ssld.pipelines.toy_data import ToySizes, write_toy_data

    scenes, crops = (8, 9) if tiny else (256, 512)
    sizes = {
        "labeled": 10,
        "unlabeled": crops,
        "teacher_train": 10,
        "val": 10,
        "train_scenes": scenes,
        "val_scenes": scenes,
    }
    write_toy_data(work / "data", sizes=ToySizes(**sizes))
    data = work / "data" / "stage2"
    settings: dict[str, Any] = {
        "base": str(ROOT / "stage2_detect" / "configs" / "faster_rcnn.yaml"),
        "backbone": "random:resnet50d",
        "data": {
            **{f"{part}_annotations": str(data / f"{part}.json") for part in ("train", "val")},
            **{f"{part}_images": str(data / part) for part in ("train", "val")},
        },
        "channels_last": True,
        "device": "auto",
        "steps": 20,
        "batch_size": 16,
        "workers": 8,
        "val_batch_size": 16,
        "log_every": 5,
        "evaluate_every": None,
    }
    if tiny:
        small = {"train_short_sides": [64], "train_long_side": 64, "short_side": 64, "long_side": 64}
        settings |= {"backbone": "random:test_resnet", "resize": small, "steps": 2, "batch_size": 2, "workers": 0}
        settings |= {"model": {"fpn_channels": 16, "roi": {"hidden": 16}}, "val_batch_size": 4, "log_every": 1}
    if not gpu:
        settings["device"] = "cpu"
    (work / "detector.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def run(row: Row, work: Path, limit: float, environment: dict[str, str]) -> Outcome:
    """Run a row in a process group of its own, which is killed at the limit; its whole output goes to a file in `work`."""
    begun, log = time.monotonic(), work / f"{row.name}.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *row.line],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - begun
    text = log.read_text(encoding="utf-8", errors="replace").replace(f"{work}/", "").replace(str(ROOT), ".")
    output = [line.rstrip() for line in text.splitlines() if line.strip()]
    lines = [line for line in output if re.fullmatch(row.shows, line.strip())]
    if code == 0:
        return Outcome(row, _ended(row, lines), seconds, lines)
    ended = "out of time" if code is None else "failed"
    return Outcome(row, ended, seconds, [*lines, *(output[-1:] if output[-1:] != lines[-1:] else [])])


def _ended(row: Row, lines: Sequence[str]) -> str:
    """Outcome of a row without a fault: "ran", unless that would say too much."""
    if row.name == "fp16" and "bf16" in row.line:
        return "ran (bf16, no scaler)"
    if row.name == "tests" and not any("passed" in line for line in lines):
        return "all skipped"
    return "ran"


def page(outcomes: Sequence[Outcome], missed: Sequence[Row], about: dict[str, str], line: str, *, tiny: bool) -> str:
    """The page as Markdown."""
    gpu = about["device"] == "cuda"
    text = [f"# {about['name']}, {date.today():%Y-%m-%d}", "", f"    {line}", ""]
    if tiny or not gpu:
        where = "on a GPU" if gpu else "on the CPU"
        text += [
            f"**Run {where}{' at the smallest size' if tiny else ''}: the rows show that the commands run, and nothing about speed on a GPU.**",
            "",
        ]
    text += [
        f"{about['versions']}.",
        "",
        "| row | outcome | seconds | goal | measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in outcomes:
        measured = (
            "<br>".join(_cell(line) for line in one.lines if re.fullmatch(one.row.cell, line.strip())) or "see below"
        )
        text.append(f"| {one.row.name} | {one.ended} | {one.seconds:.0f} | {_cell(one.row.goal)} | {measured} |")
    text += [f"| {row.name} | not run: no time was left | - | {_cell(row.goal)} | - |" for row in missed]
    for one in outcomes:
        text += ["", f"## {one.row.name}: {one.ended}", "", "```text", *(one.lines or ["no output"]), "```"]
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def without_output(words: Sequence[str]) -> list[str]:
    """Leave out `--output` and its value."""
    kept = [word for word, before in zip(words, ["", *words], strict=False) if "--output" not in (word, before)]
    return [word for word in kept if not word.startswith("--output=")]


def about(environment: dict[str, str]) -> dict[str, str]:
    """Name of the device and versions, read in a separate process."""
    line = [sys.executable, WORKS, "about"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows and write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes")
    parser.add_argument("--images", type=Path, help="folder of photos for the loader; default: drawn crops")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args(argv)
    begun = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="ssld_gpu_") as folder:
        work = Path(folder)
        machine = about(environment)
        gpu = machine["device"] == "cuda"
        if not gpu and arguments.device == "auto":
            parser.error("torch finds no GPU here; --device cpu --tiny tries the commands on the CPU")
        images = arguments.images or work / "data" / "stage1" / "unlabeled"
        todo = rows(work, images.resolve(), tiny=arguments.tiny, gpu=gpu)
        if unknown := sorted(set(arguments.rows or []) - {row.name for row in todo}):
            parser.error(f"--rows: {unknown[0]}: no such row; there are {', '.join(row.name for row in todo)}")
        todo = [row for row in todo if arguments.rows is None or row.name in arguments.rows]
        write_settings(work, tiny=arguments.tiny, gpu=gpu)
        outcomes: list[Outcome] = []
        for row in todo:
            left = arguments.budget - (time.monotonic() - begun)
            if left <= 0:
                break
            share = left * row.seconds / sum(other.seconds for other in todo[len(outcomes) :])
            outcomes.append(run(row, work, share if gpu else min(_SLOWER * row.seconds, left), environment))
            print(f"{row.name}: {outcomes[-1].ended} after {outcomes[-1].seconds:.0f} s", flush=True)
            print("\n".join(f"    {line}" for line in outcomes[-1].lines), flush=True)
    short = re.sub(r"[^a-z0-9]+", "_", machine["name"].lower()).strip("_") if gpu else "cpu"
    file = arguments.output / f"gpu_{short}_{date.today():%Y-%m-%d}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    line = " ".join(["python benchmarks/gpu.py", *without_output(sys.argv[1:] if argv is None else argv)])
    file.write_text(page(outcomes, todo[len(outcomes) :], machine, line, tiny=arguments.tiny), encoding="utf-8")
    print(f"wrote {file}")
    return (
        0 if len(outcomes) == len(todo) and not any(one.ended in ("failed", "out of time") for one in outcomes) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
