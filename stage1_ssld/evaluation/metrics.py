"""Evaluation of a classifier: top-1 and top-5 where there are labels, agreement and KL where there is a teacher."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ssld.shared.distributed.processes import to_device
from ssld.shared.distributed.ranks import for_sums, sum_dtype, total_over_ranks
from ssld.shared.errors import UserError
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch
from ssld.stage1_ssld.distillation.losses import kl

_NAMES = ("labeled", "top1", "top5", "teacher_top1", "teacher_top5", "images", "agreement", "kl")


@torch.no_grad()
def evaluate(
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor] | None,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_unreadable: Callable[[list[str]], None] | None = None,
) -> dict[str, float]:
    """Evaluate a student, and the teacher on the same views, over this rank's batches; the result covers all ranks.

    Args:
        student: pixels [B,3,H,W] -> logits [B,K], in evaluation mode.
        teacher: the teacher's logits of the same pixels; None without one.
        dtype: precision of the student's forward pass, by autocast.
        on_unreadable: called with the locations of this rank's images that could not be read.

    Returns:
        `images`; `unreadable`, if some were left out; with labels `top1`, `top5` (fractions), and `teacher_top1`, `teacher_top5` of the teacher; with
        a teacher `agreement` (share of images with the same top-1) and `kl`, the mean KL(teacher||student) in nats.
    """
    sums = torch.zeros(len(_NAMES), dtype=sum_dtype(device), device=device)
    unreadable = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        unreadable += len(batch.unreadable)
        if on_unreadable and batch.unreadable:
            on_unreadable(batch.unreadable)
        pixels, labels = to_device(batch.pixels_BCHW, device), to_device(batch.labels_B, device)
        if len(batch.labels_B) == 0:
            continue
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = student(pixels).float()
        teacher_logits = teacher(pixels) if teacher else None
        known = labels != NO_LABEL
        images = known.new_full((), len(labels), dtype=torch.int64)  # filled on the device; new_tensor would copy there
        row = [known.sum(), *_top(logits, labels, known)]
        if teacher_logits is None:
            row += [known.new_zeros(())] * 2 + [images] + [known.new_zeros(())] * 2
        else:
            same = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
            row += [*_top(teacher_logits, labels, known), images, same, kl(logits, teacher_logits)]
        sums += torch.stack([for_sums(value) for value in row])
    total = dict(zip(_NAMES, total_over_ranks(sums).tolist(), strict=True))
    result: dict[str, float] = {"images": int(total["images"])}
    skipped = int(total_over_ranks(unreadable).item())
    if skipped:
        result["unreadable"] = skipped
    if total["labeled"]:
        names = ("top1", "top5", "teacher_top1", "teacher_top5") if teacher else ("top1", "top5")
        result |= {name: total[name] / total["labeled"] for name in names}
    if teacher and total["images"]:
        result |= {name: total[name] / total["images"] for name in ("agreement", "kl")}
    return result


def _top(logits_BK: Tensor, labels_B: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
    """Number of labeled images whose class is the most likely one, and among the five most likely ones."""
    best = logits_BK.topk(min(5, logits_BK.shape[1]), dim=-1).indices == labels_B[:, None]
    return (best[:, 0] & known_B).sum(), (best.any(-1) & known_B).sum()


def describe(metrics: dict[str, float]) -> str:
    """Format metrics as a log line."""
    parts = []
    for name in ("top1", "top5", "teacher_top1", "teacher_top5", "agreement", "knn_top1"):
        if name in metrics:
            parts.append(f"{name} {100 * metrics[name]:.2f} %")
    if "kl" in metrics:
        parts.append(f"kl {metrics['kl']:.4f}")
    skipped = f" ({metrics['unreadable']} unreadable left out)" if "unreadable" in metrics else ""
    return f"{', '.join(parts) or 'nothing measured'} on {metrics['images']} images{skipped}"


def score_of(metrics: dict[str, float], best_by: str | None) -> float:
    """Return the number by which evaluations are compared, higher is better: `best_by`, else top-1, else agreement."""
    if best_by is not None and best_by not in metrics:
        raise UserError(f"best_by: {best_by} is not measured (measured: {', '.join(metrics)}); leave it out")
    return metrics[best_by] if best_by else metrics.get("top1", metrics.get("agreement", float("-inf")))
