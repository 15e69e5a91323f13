"""A training step on random pixels that needs as much memory as any step of the run, for `auto_batch`.

A file of its own beside the loop, as in stage 2, because the loop runs real steps and this a worst case.
"""

from collections.abc import Callable

import torch

from ssld.stage1_ssld.config import EVALUATION_BATCH, DistillConfig, TeachConfig
from ssld.stage1_ssld.distillation.objective import Objective
from ssld.stage1_ssld.distillation.student import Student
from ssld.stage1_ssld.distillation.targets import Targets


def whole_step(
    config: DistillConfig | TeachConfig,
    student: Student,
    targets: Targets,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[int], None]:
    """Make a function of the number of images: forward pass of student and live teacher, backward pass, optimizer step, evaluation.

    With a store, random labels replace the soft labels, whose memory is small.
    """
    size = config.data.image_size
    objective = Objective([], 1.0) if targets.store else objective

    def attempt(images: int) -> None:
        pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device)
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        student.train_mode()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, predictions = student.learner(pixels)
        soft, features = (None, None) if targets.store else targets.for_batch(pixels, None)
        pairs = student.heads.pairs(predictions, features) if student.heads and features else None
        (objective(logits, soft, labels, features=pairs)["loss"] / images).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        net = student.evaluated.eval()
        shape = (min(config.batch_size, EVALUATION_BATCH), 3, size, size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            net(pixels)
            if targets.teacher:
                targets.teacher(pixels)

    return attempt
