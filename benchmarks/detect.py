"""Ratios of our R-CNN to torchvision's, measured side by side in one run on whatever device there is: never an absolute time.

    python benchmarks/detect.py [--pairs 30] [--sizes 480x640 800x1333] [--batch 2] [--detectors faster mask]
                                [--modes training inference memory compile] [--plain]

training    a step, forward and backward and SGD            goal: at most 0.85 of torchvision's on a CPU, 0.5 on a GPU (both bf16 there)
inference   images in memory to detections                  at most 0.85; 0.5
bf16        ours under bf16 autocast / torchvision float32, where the CPU has bf16 instructions    at most 0.55
memory      greatest memory of a process that does one of the two, in processes of their own
compile     a training step with a compiled pyramid / without

Both sides have the same weights, body, frozen norm, anchors, counts and thresholds, and read images that are in memory at their final size; see
benchmarks/torchvision_rcnn.py. Each side works in the memory format in which it was faster on its first rounds. Ours pools RoIs as torchvision does
(two samples per side of a bin, not aligned) in the rows that the goals are about, and as PaddleDetection does in the other rows. In evaluation ours
is the folded copy that evaluate.py runs. Masks end as run-length codes on our side, as full-size maps on torchvision's. The works of a round run one
after the other, in alternating order; printed are the median and the quartiles over the rounds. `--plain` turns our fast kernels off.
"""

import argparse
import contextlib
import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import timm
import torch
import torchvision
from pycocotools import mask as mask_codec
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.side_by_side import Work, rounds, show
from benchmarks.torchvision_rcnn import CLASSES, our_detector, torchvisions_detector
from ssld.stage2_detect.models import kernels
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.inference import for_inference
from ssld.stage2_detect.models.mask_targets import ImageMasks, decode

OURS, REFERENCE, TORCHVISION = "ours", "ours, reference pooling", "torchvision"
FORMATS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
OBJECTS, DETECTIONS, CORNERS = 8, 50, 24


@dataclass(frozen=True)
class Inputs:
    """The same images and objects for both sides."""

    images: ImageBatch
    targets: Targets
    torchvision_images: list[Tensor]
    torchvision_targets: list[dict[str, Tensor]]


def make_inputs(height: int, width: int, batch: int, device: torch.device) -> Inputs:
    """Smooth noise, on which the golden weights detect a hundred objects per image, with some ground truth: ellipses, as polygons."""
    draw = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (batch, 3, -(-height // 8), -(-width // 8)), generator=draw).float()
    pixels = F.interpolate(small, (height, width), mode="bilinear").round().to(torch.uint8)
    padded = F.pad(pixels, (0, -width % 32, 0, -height % 32)).to(device)
    sides = torch.tensor([width, height])
    corners = torch.rand(batch, OBJECTS, 2, generator=draw) * sides * 0.7
    boxes = torch.cat(
        (corners, corners + sides * (0.05 + 0.25 * torch.rand(batch, OBJECTS, 2, generator=draw))), dim=-1
    )
    labels = torch.randint(0, CLASSES, (batch, OBJECTS), generator=draw)
    shapes = [[[ellipse(box)] for box in image] for image in boxes.tolist()]
    bitmaps = [
        decode([mask_codec.frPyObjects(s, height, width)[0] for s in image]).transpose(2, 0, 1) for image in shapes
    ]
    masks = tuple(ImageMasks(tuple(image)) for image in shapes)
    objects = zip(boxes.to(device), labels.to(device), bitmaps, strict=True)
    sizes = torch.tensor([[height, width]] * batch)
    return Inputs(
        ImageBatch(padded, sizes.to(device), torch.ones(batch, device=device), sizes),
        Targets(boxes, labels, torch.arange(batch), masks=masks).to(device),
        [image.float().to(device) / 255 for image in pixels],
        [
            {"boxes": b, "labels": k + 1, "masks": torch.tensor(np.ascontiguousarray(m)).to(device)}
            for b, k, m in objects
        ],
    )


def ellipse(box: list[float]) -> list[float]:
    """A polygon in a box."""
    x1, y1, x2, y2 = box
    turns = [2 * math.pi * corner / CORNERS for corner in range(CORNERS)]
    points = [(x1 + x2 + (x2 - x1) * math.cos(t), y1 + y2 + (y2 - y1) * math.sin(t)) for t in turns]
    return [value / 2 for point in points for value in point]


def build(kind: str, side: str, mode: str, memory_format: torch.memory_format, device: torch.device) -> nn.Module:
    """One side's network, ready to train or to be evaluated."""
    ours = our_detector(kind, torchvisions_pooling=side != REFERENCE).train(mode == "training")
    net: nn.Module = torchvisions_detector(ours) if side == TORCHVISION else ours
    if side != TORCHVISION and mode == "inference":
        net = for_inference(ours)
    return net.to(device).to(memory_format=memory_format)


def call(side: str, net: nn.Module, inputs: Inputs) -> Any:
    """Losses in training, detections in evaluation."""
    if side == TORCHVISION:
        targets = [dict(target) for target in inputs.torchvision_targets] if net.training else None
        return net(list(inputs.torchvision_images), targets)
    return net(inputs.images, inputs.targets if net.training else None)


def work(side: str, net: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Work:
    """A training step or an evaluation of the whole batch."""
    device = inputs.images.pixels_BCHW.device.type
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad] or [torch.zeros(1)], lr=1e-6, momentum=0.9
    )

    def run() -> None:
        with torch.set_grad_enabled(net.training), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            losses = call(side, net, inputs)
        if net.training:
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def fastest(kind: str, side: str, mode: str, inputs: Inputs, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """The network in the memory format that suits it."""
    device = inputs.images.pixels_BCHW.device
    nets = {name: build(kind, side, mode, memory_format, device) for name, memory_format in FORMATS.items()}
    if len(nets) == 1:
        return next((net, name) for name, net in nets.items())
    timings = rounds({name: work(side, net, inputs, dtype) for name, net in nets.items()}, 3, device)
    best = min(FORMATS, key=lambda name: min(seconds[name] for seconds in timings))
    return nets[best], best


def check_detections(detections: list[Detections], expected: list[dict[str, Tensor]]) -> float:
    """Share of our detections that torchvision has too (same class, within half a pixel and 0.01); both need at least `DETECTIONS` per image."""
    agreed = total = 0
    for one, other_on_device in zip(detections, expected, strict=True):
        other = {name: tensor.cpu() for name, tensor in other_on_device.items()}
        assert min(len(one.boxes_N4), len(other["boxes"])) >= DETECTIONS, "too few detections to compare"
        near = (one.boxes_N4[:, None] - other["boxes"][None]).abs().amax(dim=2) < 0.5
        near &= one.labels_N[:, None] == other["labels"][None] - 1
        near &= (one.scores_N[:, None] - other["scores"][None]).abs() < 0.01
        if one.masks is not None:
            check_masks(one.masks, other["masks"][near.long().argmax(dim=1), 0])
        agreed, total = agreed + int(near.any(dim=1).sum()), total + len(one.boxes_N4)
    return agreed / total


def check_masks(codes: list[Any], expected_NHW: Tensor) -> None:
    """Raise AssertionError unless our masks agree with torchvision's where its probability is not near 0.5; it rounds boxes to whole pixels."""
    masks_NHW = torch.from_numpy(decode(codes)).permute(2, 0, 1).bool()
    sure_NHW = (expected_NHW > 0) & ((expected_NHW - 0.5).abs() > 0.05)
    share = ((masks_NHW == (expected_NHW > 0.5)) & sure_NHW).sum() / sure_NHW.sum()
    assert share > 0.9, f"only {share:.0%} of the masks' pixels are torchvision's: the settings differ"


def compare(kind: str, mode: str, inputs: Inputs, pairs: int, label: str, device: torch.device) -> None:
    """The rows of one mode and size."""
    gpu, common = device.type == "cuda", common_dtype(device)
    nets, formats = {}, {}
    for side in (OURS, REFERENCE, TORCHVISION):
        nets[side], formats[side] = fastest(kind, side, mode, inputs, common)
    if mode == "inference":
        with torch.no_grad():
            share = check_detections(call(OURS, nets[OURS], inputs), call(TORCHVISION, nets[TORCHVISION], inputs))
        assert share > 0.95, f"only {share:.0%} of our detections are torchvision's: the settings differ"
        print(f"  {share:.0%} of our detections are torchvision's")
    print(f"  memory formats: {', '.join(f'{side} {name}' for side, name in formats.items())}")
    works = {side: work(side, net, inputs, common) for side, net in nets.items()}
    rough = not gpu and has_bf16()
    if rough:
        works["ours in bf16"] = work(OURS, nets[OURS], inputs, torch.bfloat16)
    timings = rounds(works, pairs, device)
    dtypes = "bf16" if gpu else "float32"
    show(f"{label} {mode}, {dtypes}: ours / torchvision", [r[OURS] / r[TORCHVISION] for r in timings])
    show(f"{label} {mode}, {dtypes}: {REFERENCE} / torchvision", [r[REFERENCE] / r[TORCHVISION] for r in timings])
    if rough:
        show(
            f"{label} {mode}: ours in bf16 / torchvision in float32",
            [r["ours in bf16"] / r[TORCHVISION] for r in timings],
        )


def compiled(kind: str, inputs: Inputs, pairs: int, label: str, device: torch.device) -> None:
    """The row of `compile: true`."""
    nets = {name: build(kind, OURS, "training", torch.channels_last, device) for name in ("eager", "compiled")}
    pyramid: Any = nets["compiled"].pyramid
    pyramid.compile()
    dtype = common_dtype(device)
    timings = rounds({name: work(OURS, net, inputs, dtype) for name, net in nets.items()}, pairs, device)
    show(f"{label} training: compiled pyramid / eager", [r["compiled"] / r["eager"] for r in timings])


def memory(kind: str, size: str, batch: int, device: torch.device) -> None:
    """The rows of the greatest memory; a process of its own for each side and mode."""
    for mode in ("training", "inference"):
        peak = {}
        for side in (OURS, TORCHVISION):
            line = [sys.executable, __file__, "--detectors", kind, "--sizes", size, "--batch", str(batch)]
            line += ["--peak-of", side, mode, *([] if kernels.enabled() else ["--plain"])]
            peak[side] = int(subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-1])
        what = "GPU memory" if device.type == "cuda" else "greatest resident memory"
        ratio = peak[OURS] / peak[TORCHVISION]
        print(
            f"{f'{kind} {size} {mode}: {what}, ours / torchvision':<62} {ratio:.3f}  ({peak[OURS]} / {peak[TORCHVISION]} MB)"
        )


def print_peak(kind: str, side: str, mode: str, inputs: Inputs, device: torch.device) -> None:
    """Three steps, then the greatest memory in MB."""
    step = work(side, build(kind, side, mode, torch.channels_last, device), inputs, common_dtype(device))
    for _ in range(3):
        step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() // 2**20)
        return
    # Not getrusage: its greatest is never less than what the process that started this one had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(status.split("VmHWM:")[1].split()[0]) // 1024)


def common_dtype(device: torch.device) -> torch.dtype:
    """Precision of both sides: bf16 autocast on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; without that, bf16 is slower than float32."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def main(argv: Sequence[str] | None = None) -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=["480x640", "800x1333"], metavar="HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=2)
    modes = ["training", "inference", "memory", "compile"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--detectors", nargs="+", choices=["faster", "mask"], default=["faster", "mask"])
    parser.add_argument(
        "--memory-format",
        choices=["fastest", "channels_last"],
        default="fastest",
        help="of each side; fastest tries both",
    )
    parser.add_argument("--plain", action="store_true", help="without the fast kernels of stage2_detect/models/kernels")
    parser.add_argument("--peak-of", nargs=2, metavar=("SIDE", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_format == "channels_last":
        FORMATS.pop("contiguous", None)
    with kernels.plain() if arguments.plain else contextlib.nullcontext():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure the detectors, sizes and modes of the flags."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if arguments.peak_of:
        height, width = map(int, arguments.sizes[0].split("x"))
        side, mode = arguments.peak_of
        print_peak(arguments.detectors[0], side, mode, make_inputs(height, width, arguments.batch, device), device)
        return
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{versions}, {name}, {torch.get_num_threads()} threads, batch {arguments.batch}")
    print(f"{arguments.pairs} rounds: median (quartiles)")
    if device.type == "cpu" and not has_bf16():
        print("no bf16 rows: this CPU has no bf16 instructions")
    for kind, size in itertools.product(arguments.detectors, arguments.sizes):
        height, width = map(int, size.split("x"))
        inputs = make_inputs(height, width, arguments.batch, device)
        for mode in arguments.modes:
            if mode == "memory":
                memory(kind, size, arguments.batch, device)
            elif mode == "compile":
                compiled(kind, inputs, arguments.pairs, f"{kind} {size}", device)
            else:
                compare(kind, mode, inputs, arguments.pairs, f"{kind} {size}", device)


if __name__ == "__main__":
    main()
