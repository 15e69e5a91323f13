"""Settings that a distillation leaves out, chosen from its images, its student and its device."""

import torch

from ssld.shared.models.backbones import own_size
from ssld.shared.models.references import parse_reference
from ssld.stage1_ssld.config import DistillConfig, TeachConfig


def with_chosen_settings(
    config: DistillConfig | TeachConfig, images: int, notes: list[str], *, device: torch.device, ranks: int
) -> DistillConfig | TeachConfig:
    """Return the settings with everything that was left out, chosen for `images` training images; appends a line on it to `notes`.

    Args:
        config: as the user gave them; those of `teach` have no settings to choose.
        device: a GPU gets larger batches than a CPU.
        ranks: number of processes that share a batch.
    """
    if not isinstance(config, DistillConfig) or config.is_fitted:
        return config
    network = config.student
    size = config.data.image_size
    if config.takes_own_size:
        size = min(own_size(parse_reference(network.model, network.arch)))
    fitted = config.fitted(images, size, gpu=device.type == "cuda", ranks=ranks)
    optim, parts = fitted.optim, []
    if config.optim is None:
        student = "random" if network.model.startswith("random:") else "pretrained"
        parts.append(f"optim {optim.name}, lr {optim.lr:g} for batch {optim.reference_batch} ({student} student)")
    if config.batch_size is None:
        parts.append(f"batch_size {fitted.batch_size}{', split to fit into memory' if fitted.auto_batch else ''}")
    if fitted.steps != config.steps:
        passes = (fitted.steps or 0) * fitted.batch_size / images
        parts.append(f"steps {fitted.steps} ({passes:.3g} passes over {images:,} images)")
    if config.takes_own_size:
        parts.append(f"data.image_size {size} (the student's)")
    notes.append(f"chosen, since not given: {'; '.join(parts)}")
    return fitted
