"""Ratios of stage 1, measured side by side in one run on whatever device there is: never an absolute time.

    python benchmarks/distill.py FOLDER_OF_IMAGES [--pairs 30] [--student resnet18d --teacher resnet34d --size 64 --batch 16]

(a) a step from a store / a supervised step                          goal: at most 1.05
(b) a step with a live teacher / (its forward pass + a supervised step)   at most 1.02
(c) a step with a live teacher / timm's LogitDistillationTask, same networks and precision   at most 1.00 on a CPU, 0.75 on a GPU
(d) images/s of our views in batches / PIL with torchvision's v1 transforms, normalized, in batches   at least 1.6
    the same with data.decoder: torchcodec, where that is installed
(e) share of a training loop's time spent waiting for images, with --workers loader processes
(f) a step with a live teacher, pooled and spatial terms / one without them   at most 1.05

The works of a round run one after the other, in alternating order; printed are the median and the quartiles over the rounds. timm's task of (c) gets
labeled images, because it takes no others.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.task import LogitDistillationTask
from torch.utils.data import default_collate
from torchvision import transforms

from benchmarks.side_by_side import rounds, show
from ssld.shared.files import require_images
from ssld.shared.images import open_image
from ssld.shared.models.backbones import create_classifier, place
from ssld.shared.models.references import parse_reference
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage1_ssld.data.batch import View, collate
from ssld.stage1_ssld.data.loaders import TrainingData
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data.sources import open_sources
from ssld.stage1_ssld.data.views import training_view
from ssld.stage1_ssld.data_config import DataConfig, LossConfig, TeacherConfig
from ssld.stage1_ssld.distillation.features import FeatureHeads, Learner
from ssld.stage1_ssld.distillation.objective import Objective
from ssld.stage1_ssld.distillation.teacher import make_teacher

KEPT = 10


def steps(arguments: argparse.Namespace, device: torch.device) -> None:
    """(a), (b), (c) and (f)."""
    size, batch, dtype = arguments.size, arguments.batch, torch.bfloat16 if device.type == "cuda" else torch.float32
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    reference = parse_reference(f"random:{arguments.student}")
    student = place(create_classifier(reference)[0].train(), device, channels_last=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)
    plain = Learner(student, None)
    teacher_config = TeacherConfig(model=f"random:{arguments.teacher}")
    precision = "bf16" if device.type == "cuda" else "fp32"
    teacher = make_teacher(teacher_config, precision=precision, device=device, channels_last=True)
    objective, supervised = Objective([LossConfig(name="symmetric_kl")], 0.0), Objective([], 1.0)
    best = F.log_softmax(teacher(pixels), dim=-1).topk(KEPT, dim=-1)
    rest = torch.log1p(-best.values.exp().sum(-1).clamp(max=1 - 1e-6))
    soft = SoftLabels(torch.cat([best.values, rest[:, None]], dim=-1), best.indices)

    terms = [LossConfig.model_validate(name) for name in ("symmetric_kl", "pooled", "spatial")]
    featured = place(create_classifier(reference)[0].train(), device, channels_last=True)
    heads = FeatureHeads(terms[1:], featured, teacher, size=size, name=arguments.student)
    learner, objective_of_all = Learner(featured.train(), heads), Objective(terms, 0.0)
    featured_optimizer = torch.optim.SGD(learner.parameters(), lr=1e-4, momentum=0.9)

    def learn(loss_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, _ = plain(pixels)
        (loss_of(logits) / batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def from_store() -> None:
        learn(lambda z: objective(z, soft, labels)["loss"])

    def from_labels() -> None:
        learn(lambda z: supervised(z, None, labels)["loss"])

    def live() -> None:
        learn(lambda z: objective(z, SoftLabels(teacher(pixels)), labels)["loss"])

    def with_features() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, said = learner(pixels)
        taught = teacher.features(pixels, maps=True)
        assert taught.logits_BK is not None
        parts = objective_of_all(logits, SoftLabels(taught.logits_BK), labels, features=heads.pairs(said, taught))
        (parts["loss"] / batch).backward()
        featured_optimizer.step()
        featured_optimizer.zero_grad(set_to_none=True)

    def teacher_alone() -> None:
        teacher(pixels)

    opponent = timm.create_model(arguments.student)
    task = LogitDistillationTask(opponent, timm.create_model(arguments.teacher), loss_type="kl")
    task = task.to(device).to(memory_format=torch.channels_last).train()
    task_optimizer = torch.optim.SGD(opponent.parameters(), lr=1e-4, momentum=0.9)
    mean, std = student.mean_3, student.std_3

    def timms() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = task((pixels.float() - mean) / std, labels)["loss"]
        loss.backward()
        task_optimizer.step()
        task_optimizer.zero_grad(set_to_none=True)
        loss.item()  # its training script reads the loss every step

    works = {"store": from_store, "labels": from_labels, "live": live, "teacher": teacher_alone, "timm": timms}
    works["features"] = with_features
    timings = rounds(works, arguments.pairs, device)
    show("(a) store step / supervised step", [r["store"] / r["labels"] for r in timings])
    show(
        "(b) live step / (teacher forward + supervised step)",
        [r["live"] / (r["teacher"] + r["labels"]) for r in timings],
    )
    show("(c) live step / timm's LogitDistillationTask", [r["live"] / r["timm"] for r in timings])
    show("(f) live step with feature terms / live step", [r["features"] / r["live"] for r in timings])


def loader(arguments: argparse.Namespace) -> None:
    """(d)."""
    files = [arguments.folder / name for name in require_images(arguments.folder)]
    files = files[:: max(1, len(files) // 20)][:20]
    data = DataConfig.model_validate({"train": [str(arguments.folder)], "image_size": 224})
    crop = transforms.RandomResizedCrop(224, data.crop_area, data.crop_ratio)
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    chain = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])

    def ours(decoder: str) -> None:
        views = [training_view(open_image(file, decoder=decoder), str(file), 0, data, 0) for file in files]
        collate([View(view, 0, "", []) for view in views])

    def torchvisions() -> None:
        views = []
        for file in files:
            with Image.open(file) as image:
                views.append((chain(image.convert("RGB")), 0))
        default_collate(views)

    works: dict[str, Callable[[], None]] = {"pil": lambda: ours("pil"), "torchvision": torchvisions}
    if importlib.util.find_spec("torchcodec"):
        works["torchcodec"] = lambda: ours("torchcodec")
    timings = rounds(works, arguments.pairs, torch.device("cpu"))
    for decoder in sorted(set(works) - {"torchvision"}):
        label = f"(d) images/s of our views / torchvision's v1 transforms, {decoder}"
        show(label, [r["torchvision"] / r[decoder] for r in timings])


def waiting(arguments: argparse.Namespace, device: torch.device) -> None:
    """(e)."""
    config = DistillConfig.model_validate(
        {
            "output": "unused",
            "data": {"train": [str(arguments.folder)], "image_size": arguments.size},
            "student": f"random:{arguments.student}",
            "teacher": f"random:{arguments.teacher}",
            "steps": arguments.pairs,
            "batch_size": arguments.batch,
            "workers": arguments.workers,
            "optim": {"lr": 1e-4, "reference_batch": arguments.batch},
        }
    )
    sources = open_sources(config.data.train, "data.train")
    student = place(create_classifier(parse_reference(config.student.model))[0].train(), device, channels_last=True)
    assert config.teacher is not None
    dtype, precision = (torch.bfloat16, "bf16") if device.type == "cuda" else (torch.float32, "fp32")
    teacher = make_teacher(config.teacher, precision=precision, device=device, channels_last=True)
    objective = Objective(config.losses, 0.0)
    waited = worked = 0.0
    training = TrainingData(config, sources, [None])
    with closing(training.batches(0, arguments.pairs, rank=0, ranks=1, pin_memory=device.type == "cuda")) as stream:
        for number in range(arguments.pairs):
            requested = time.perf_counter()
            batch = next(stream)
            arrived = time.perf_counter()
            pixels = batch.pixels_BCHW.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = student(pixels)
            objective(logits, SoftLabels(teacher(pixels)), batch.labels_B.to(device))["loss"].backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first batch waits for the loader to start
                waited, worked = waited + arrived - requested, worked + time.perf_counter() - arrived
    label = f"(e) share of the loop spent waiting, loader processes: {arguments.workers}"
    print(f"{label:<66} {waited / (waited + worked):.3f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--student", default="resnet18d")
    parser.add_argument("--teacher", default="resnet34d")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of (e)")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {device}, {arguments.pairs} rounds: median (quartiles)")
    print(f"{arguments.student} from {arguments.teacher} at {arguments.size} px, batch {arguments.batch}")
    steps(arguments, device)
    loader(arguments)
    waiting(arguments, device)


if __name__ == "__main__":
    main()
