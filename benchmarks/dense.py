"""Ratios of our one-stage detectors, measured side by side in one run on whatever device there is: never an absolute time.

    python benchmarks/dense.py [--pairs 30] [--sizes 480x640 800x1333] [--batch 2] [--modes training inference ld atss]

training    a RetinaNet step, forward and backward and SGD / torchvision's    goal: at most 0.90 on a CPU; on a GPU, both bf16, at most 0.5
inference   images in memory to detections, ours / torchvision's              the same
ld          a GFL step under LD / (the student's step + the teacher's forward pass)    at most 1.05
atss        greatest memory of a process that assigns 64 images of 100 objects each at 800x1333, with LD's valuable region    below 2 GB

torchvision's side is its RetinaNet class with the settings of retinanet_resnet50_fpn and our weights, timm body, P6 and P7, anchors, frozen norm and
100 detections; it keeps its own transform (without the resize), head, matcher, losses and post-processing, and its losses are divided image by image.
The heads' last layers are scaled so that a thousand pairs of anchor and class per image pass the threshold. Each side works in the memory format in
which it was faster on its first rounds; in evaluation ours is the folded copy that evaluate.py runs. Works of a round run one after the other, in
alternating order; printed are the median and the quartiles over the rounds. `--processor-time` counts the seconds that the process computed, for a
CPU that others use too: give it one thread (OMP_NUM_THREADS=1), since waiting threads compute.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
import torchvision
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as ReferenceRetinaNet

from benchmarks.detect import FORMATS, Inputs, check_detections, make_inputs
from benchmarks.side_by_side import Work, rounds, show
from benchmarks.torchvision_rcnn import CLASSES, FrozenBackbone
from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.distill_config import LDConfig
from ssld.stage2_detect.distillation import regions
from ssld.stage2_detect.distillation.dense import DistilledDense
from ssld.stage2_detect.distillation.teacher import FrozenDetector
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import atss
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.dense import DenseDetector, grids_of
from ssld.stage2_detect.models.gfl import GFL
from ssld.stage2_detect.models.inference import for_inference

Clock = Callable[[], float]
OURS, TORCHVISION = "ours", "torchvision"
_INPUTS = InputSettings.of_detector(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_PASSING = 1000  # pairs of anchor and class per image above the score threshold
_LIMIT = -2.944  # logit of 0.05
_ATSS_IMAGES, _ATSS_OBJECTS, _ATSS_GRIDS = 64, 100, [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]


def our_detector(kind: str, arch: str, inputs: Inputs, seed: int = 0) -> DenseDetector:
    """A detector of the kind, with torchvision's thresholds, that finds something in these images."""
    torch.manual_seed(seed)
    config = DetectorConfig.model_validate(
        {"kind": kind, "freeze_stages": 2, "freeze_norm": True, "dense": {"relu_before_p7": True, "nms_iou": 0.5}}
    )
    body = timm.create_model(arch, features_only=True, pretrained=False)
    model = build_detector(config, classes=CLASSES, body=body, arch=arch, inputs=_INPUTS)
    assert isinstance(model, DenseDetector)
    model.to(inputs.images.pixels_BCHW.device)
    head = model.dense.head
    with torch.no_grad():
        logits_BAK, values = model.dense(model.features(inputs.images))
        scale = 1 / logits_BAK.std()
        head.logits.weight.mul_(scale)
        head.logits.bias.zero_()  # type: ignore[union-attr]
        logits_BAK = model.dense(model.features(inputs.images))[0]
        least = logits_BAK.flatten().topk(_PASSING * len(logits_BAK)).values[-1]
        head.logits.bias.fill_(_LIMIT - least.item())  # type: ignore[union-attr]
        head.boxes.weight.mul_(0.2 / values.std())
    return model


def torchvisions_detector(ours: DenseDetector) -> ReferenceRetinaNet:
    """The same network and settings in torchvision's classes; labels are ours."""
    reference = ReferenceRetinaNet(
        FrozenBackbone(ours.pyramid),
        num_classes=CLASSES,
        anchor_generator=_OurAnchors(ours),
        score_thresh=ours.score_threshold,
        nms_thresh=ours.nms_iou,
        detections_per_img=ours.detections_per_image,
        topk_candidates=ours.candidates,
    )
    reference.transform.resize = lambda image, target: (image, target)  # images come at their size
    head, reference_head = ours.dense.head, reference.head
    for tower, branch in (
        (head.class_tower, reference_head.classification_head),
        (head.box_tower, reference_head.regression_head),
    ):
        for place, block in enumerate(branch.conv):
            block[0].load_state_dict(tower[2 * place].state_dict())
    reference_head.classification_head.cls_logits.load_state_dict(head.logits.state_dict())
    reference_head.regression_head.bbox_reg.load_state_dict(head.boxes.state_dict())
    reference_head.regression_head._loss_type = "l1"
    return reference


class _OurAnchors(AnchorGenerator):
    def __init__(self, ours: DenseDetector) -> None:
        super().__init__(((32, 40, 50),) * 5, ((0.5, 1.0, 2.0),) * 5)  # only their number counts
        self.dense = [ours.dense]  # in a list: not to be a submodule

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return [self.dense[0].anchors(grids_of(feature_maps), feature_maps[0].device)] * len(image_list.image_sizes)


def call(side: str, net: nn.Module, inputs: Inputs) -> Any:
    """Losses in training, detections in evaluation."""
    if side == OURS:
        return net(inputs.images, inputs.targets if net.training else None)
    targets = (
        [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in inputs.torchvision_targets] if net.training else None
    )
    return net(list(inputs.torchvision_images), targets)


def work(side: str, net: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Work:
    """A training step or an evaluation of the whole batch."""
    device = inputs.images.pixels_BCHW.device.type
    trained: list[Tensor] = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained or [torch.zeros(1)], lr=1e-9, momentum=0.9)

    def run() -> None:
        with torch.set_grad_enabled(net.training), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            losses = call(side, net, inputs)
        if net.training:
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def compare(mode: str, arch: str, inputs: Inputs, pairs: int, label: str, clock: Clock) -> None:
    """The row of one mode and size."""
    device = inputs.images.pixels_BCHW.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    nets: dict[str, nn.Module] = {}
    for side in (OURS, TORCHVISION):
        built: dict[str, nn.Module] = {}
        for name, memory_format in FORMATS.items():
            ours = our_detector("retinanet", arch, inputs)
            net: nn.Module = torchvisions_detector(ours) if side == TORCHVISION else ours
            net = for_inference(ours) if side == OURS and mode == "inference" else net
            built[name] = net.train(mode == "training").to(device).to(memory_format=memory_format)
        timings = rounds({name: work(side, net, inputs, dtype) for name, net in built.items()}, 2, device, clock)
        best = min(FORMATS, key=lambda name: min(seconds[name] for seconds in timings))
        nets[side] = built[best]
        print(f"  {side}: {best}")
    if mode == "inference":
        with torch.no_grad():
            expected = [{**one, "labels": one["labels"] + 1} for one in call(TORCHVISION, nets[TORCHVISION], inputs)]
            share = check_detections(call(OURS, nets[OURS], inputs), expected)
        assert share > 0.95, f"only {share:.0%} of our detections are torchvision's: the settings differ"
        print(f"  {share:.0%} of our detections are torchvision's")
    timings = rounds({side: work(side, net, inputs, dtype) for side, net in nets.items()}, pairs, device, clock)
    show(f"{label} {mode}, {str(dtype)[6:]}: ours / torchvision", [r[OURS] / r[TORCHVISION] for r in timings])


def under_ld(arch: str, teacher_arch: str, inputs: Inputs, pairs: int, label: str, clock: Clock) -> None:
    """The row of LD."""
    device = inputs.images.pixels_BCHW.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = FrozenDetector(our_detector("gfl", teacher_arch, inputs, seed=1).to(memory_format=torch.channels_last))
    alone, student = (our_detector("gfl", arch, inputs).train().to(memory_format=torch.channels_last) for _ in range(2))
    distilled = DistilledDense(student, teacher, LDConfig()).train()

    def forward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            teacher.outputs(teacher.features(inputs.images))

    works = {
        "alone": work(OURS, alone, inputs, dtype),
        "teacher": forward,
        "under LD": work(OURS, distilled, inputs, dtype),
    }
    timings = rounds(works, pairs, device, clock)
    show(f"{label} LD step / (student step + teacher forward)", [r["under LD"] / (r["alone"] + r["teacher"]) for r in timings])  # fmt: skip


def assign() -> None:
    """ATSS and the valuable region of many images with many objects."""
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(_ATSS_IMAGES, _ATSS_OBJECTS, 2, generator=draw) * torch.tensor([1000.0, 600.0])
    sides = 8 + torch.rand(_ATSS_IMAGES, _ATSS_OBJECTS, 2, generator=draw) ** 2 * torch.tensor([333.0, 200.0])
    boxes = torch.cat((corners, corners + sides), dim=-1)
    anchors_A4 = GFL(classes=CLASSES).anchors(_ATSS_GRIDS, torch.device("cpu"))
    counts = [rows * columns for rows, columns in _ATSS_GRIDS]
    present = torch.ones(_ATSS_IMAGES, _ATSS_OBJECTS, dtype=torch.bool)
    assigned, thresholds = atss.assign_atss(anchors_A4, counts, boxes, present)
    region = regions.valuable_region(anchors_A4, boxes, thresholds.region_BG)
    assert (assigned.labels_BA == 1).any()
    assert (region > 0).any()


def print_peak_of_assignment() -> None:
    """Greatest memory of this process so far and with the assignment, in MB."""
    before = _peak()
    assign()
    print(before, _peak())


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=["480x640", "800x1333"], metavar="HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=2)
    modes = ["training", "inference", "ld", "atss"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--arch", default="resnet50", help="of all students")
    parser.add_argument("--teacher-arch", default="resnet101")
    parser.add_argument(
        "--memory-format",
        choices=["fastest", "channels_last"],
        default="fastest",
        help="of each side; fastest tries both",
    )
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--peak-of-assignment", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak_of_assignment:
        print_peak_of_assignment()
        return
    if arguments.memory_format == "channels_last":
        FORMATS.pop("contiguous", None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.process_time if arguments.processor_time else time.perf_counter
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{versions}, {name}, {torch.get_num_threads()} threads, batch {arguments.batch}, {arguments.arch}")
    print(f"{arguments.pairs} rounds: median (quartiles)")
    for size in arguments.sizes if set(arguments.modes) - {"atss"} else []:
        height, width = map(int, size.split("x"))
        inputs = make_inputs(height, width, arguments.batch, device)
        for mode in arguments.modes:
            if mode == "ld":
                under_ld(arguments.arch, arguments.teacher_arch, inputs, arguments.pairs, size, clock)
            elif mode != "atss":
                compare(mode, arguments.arch, inputs, arguments.pairs, size, clock)
    if "atss" in arguments.modes:
        line = [sys.executable, __file__, "--peak-of-assignment"]
        before, peak = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
        what = f"ATSS and valuable region of {_ATSS_IMAGES} images x {_ATSS_OBJECTS} objects"
        print(f"{what}: greatest resident memory {peak} MB, of which {before} before it")


if __name__ == "__main__":
    main()
