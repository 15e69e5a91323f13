"""The backbone of a detector in training, with what its file says about it: for `ssld train` and for detectors of one's own training loop."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ssld.shared.models.backbones import InputSettings, body_args, create_body, input_settings, licence, network_args
from ssld.shared.models.references import parse_reference


@dataclass(frozen=True)
class Body:
    """A features-only backbone with its weights.

    Attributes:
        module: timm's network, whose output is a list of maps.
        arch, model_args: timm's name of it, and the arguments that it was built with.
        inputs: mean and deviation of its input.
        licence: licence of its weights; empty for random ones.
        origin: reference and content hash of its weights, for the metadata of a detector file.
        loaded: line for the log on the weights; empty where others replace them.
    """

    module: nn.Module
    arch: str
    inputs: InputSettings
    licence: str
    model_args: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    loaded: str = ""


def open_body(backbone: str, arch: str | None, **options: Any) -> Body:
    """Create the backbone of a reference: a file, a folder, `timm:NAME`, `hf-hub:ORG/NAME` or `random:NAME`.

    Args:
        arch: timm's name of the network, for a file that does not say it.
        options: further arguments for timm, such as `drop_path_rate`; they are no part of `model_args`.

    Raises:
        UserError: see `parse_reference` and `create_body`.
    """
    reference = parse_reference(backbone, arch)
    module, loaded = create_body(reference, **options)
    return Body(
        module=module,
        arch=reference.arch,
        inputs=input_settings(module, reference.metadata),
        licence=licence(reference) or "",
        model_args=body_args(network_args(reference, None)),
        origin={"reference": backbone, "content_sha256": reference.metadata.get("content_sha256")},
        loaded=loaded,
    )
