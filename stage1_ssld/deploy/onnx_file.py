"""Export of a classifier as an ONNX file and a `torch.export` program, and the comparison of their logits with the classifier's.

The input is decoded pixels, uint8 [batch, 3, height, width]; the normalization is part of the graph. Only the batch is dynamic, because timm's
networks fix everything that depends on the image size during tracing.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssld.shared.deploy import graph_files
from ssld.shared.models.backbones import Classifier

INPUT, OUTPUT = "pixels", "logits"
Run = Callable[[Tensor], np.ndarray]
"""Function of an exported file: uint8 [B,3,H,W] -> logits [B,K]."""


def write_onnx(path: Path, classifier: Classifier, size: tuple[int, int], facts: dict[str, Any]) -> None:
    """Write a classifier in evaluation mode for images of `size` (height, width); `facts` become metadata, as JSON unless they are text.

    Raises UserError for a network that cannot be traced, or too large for one file.
    """
    graph_files.write_onnx(path, classifier, _example(size), _dynamic(), facts, inputs=[INPUT], outputs=[OUTPUT])


def write_program(path: Path, classifier: Classifier, size: tuple[int, int], facts: dict[str, Any]) -> None:
    """Write a classifier as a `torch.export` program; arguments as of `write_onnx`. Raises UserError for a network that cannot be traced."""
    graph_files.write_program(path, classifier, _example(size), _dynamic(), facts)


def onnx_runner(path: Path, *, threads: int) -> Run:
    """Load an ONNX file into ONNX Runtime on the CPU."""
    session = graph_files.session(path, threads=threads)

    def run(pixels_BCHW: Tensor) -> np.ndarray:
        logits: np.ndarray = session.run([OUTPUT], {INPUT: pixels_BCHW.numpy()})[0]
        return logits

    return run


def program_runner(path: Path) -> Run:
    """Load a `torch.export` program."""
    program, _ = graph_files.read_program(path)

    @torch.no_grad()
    def run(pixels_BCHW: Tensor) -> np.ndarray:
        logits: np.ndarray = program(pixels_BCHW).numpy()
        return logits

    return run


@torch.no_grad()
def measure(
    runs: Mapping[str, Run], classifier: Classifier, pixels_BCHW: Tensor, log: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure median seconds of the classifier in torch and of its files: for the first image alone, and for the batch."""

    def calls(some: Tensor) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: classifier(some)} | {name: lambda run=run: run(some) for name, run in runs.items()}

    latency, throughput = graph_files.interleaved(calls(pixels_BCHW[:1])), graph_files.interleaved(calls(pixels_BCHW))
    B, _, H, W = pixels_BCHW.shape
    log(f"speed on this CPU, {torch.get_num_threads()} threads, {H} x {W} pixels:")
    for line in graph_files.speed_lines(latency, throughput, B):
        log(line)
    return latency, throughput


def _example(size: tuple[int, int]) -> tuple[Tensor]:
    return (torch.zeros(2, 3, *size, dtype=torch.uint8),)  # torch.export treats a batch of one as constant


def _dynamic() -> graph_files.Dynamic:
    return ({0: torch.export.Dim("batch")},)


@torch.no_grad()
def compare(run: Run, classifier: Classifier, batches: Iterable[Tensor]) -> dict[str, float]:
    """Compare the logits of an exported file with those of its classifier, on the CPU, on batches of uint8 [B,3,H,W].

    The first image of every batch is also run alone, to check a second batch size.

    Returns:
        `images`; `largest_difference` between two logits; `largest_logit`, the largest absolute logit of torch; `relative_difference`, the ratio of
        the two; `top1_agreement`, the share of images with the same most likely class.
    """
    images, same, difference, largest = 0, 0, 0.0, 0.0
    for pixels in batches:
        expected = classifier(pixels).double()
        exported = torch.from_numpy(run(pixels)).double()
        alone = torch.from_numpy(run(pixels[:1])).double()
        images += len(pixels)
        same += int((expected.argmax(-1) == exported.argmax(-1)).sum())
        # NaN compares as false, so it counts as an infinite difference.
        gaps = torch.cat([(expected - exported).abs().flatten(), (expected[:1] - alone).abs().flatten()])
        difference = max(difference, gaps.nan_to_num(nan=float("inf")).max().item())
        largest = max(largest, expected.abs().max().item())
    return {
        "images": images,
        "largest_difference": difference,
        "largest_logit": largest,
        "relative_difference": difference / largest if largest else difference,
        "top1_agreement": same / images if images else 0.0,
    }
