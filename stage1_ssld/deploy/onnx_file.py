"""A classifier as an ONNX file and a `torch.export` program, and their answers against those of the classifier.

Pixels go in as they come out of a decoder, uint8 [batch, 3, height, width]: the normalisation is inside. Only the batch is dynamic: timm's networks
resolve what depends on the image size while they are traced.
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
"""What an exported file answers to uint8 [B,3,H,W]: logits."""


def write_onnx(path: Path, classifier: Classifier, size: tuple[int, int], facts: dict[str, Any]) -> None:
    """Write a classifier in evaluation mode for images of `size` (height, width); `facts` become metadata, JSON where they are not text.

    Raises UserError for a network that cannot be traced, or too large for one file.
    """
    graph_files.write_onnx(path, classifier, _example(size), _dynamic(), facts, inputs=[INPUT], outputs=[OUTPUT])


def write_program(path: Path, classifier: Classifier, size: tuple[int, int], facts: dict[str, Any]) -> None:
    """The same as a `torch.export` program. Raises UserError for a network that cannot be traced."""
    graph_files.write_program(path, classifier, _example(size), _dynamic(), facts)


def onnx_runner(path: Path, *, threads: int) -> Run:
    """What runs an ONNX file in ONNX Runtime on the CPU."""
    session = graph_files.session(path, threads=threads)

    def run(pixels_BCHW: Tensor) -> np.ndarray:
        logits: np.ndarray = session.run([OUTPUT], {INPUT: pixels_BCHW.numpy()})[0]
        return logits

    return run


def program_runner(path: Path) -> Run:
    """What runs a `torch.export` program."""
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
    """Median seconds of the classifier in torch and of its files: for the first image alone, and for the batch."""

    def calls(some: Tensor) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: classifier(some)} | {name: lambda run=run: run(some) for name, run in runs.items()}

    latency, throughput = graph_files.interleaved(calls(pixels_BCHW[:1])), graph_files.interleaved(calls(pixels_BCHW))
    B, _, H, W = pixels_BCHW.shape
    log(f"speed on this CPU, {torch.get_num_threads()} threads, {H} x {W} pixels:")
    for line in graph_files.speed_lines(latency, throughput, B):
        log(line)
    return latency, throughput


def _example(size: tuple[int, int]) -> tuple[Tensor]:
    return (torch.zeros(2, 3, *size, dtype=torch.uint8),)  # a batch of one would be taken for a constant


def _dynamic() -> graph_files.Dynamic:
    return ({0: torch.export.Dim("batch")},)


@torch.no_grad()
def compare(run: Run, classifier: Classifier, batches: Iterable[Tensor]) -> dict[str, float]:
    """Answers of an exported file and of the classifier it was written from, on the CPU, to batches of uint8 [B,3,H,W].

    The first image of every batch is asked for alone once more, so that two batch sizes are tried.

    Returns:
        `images`; `largest_difference` of two logits; `largest_logit` of torch's, without its sign; `relative_difference`, the one by the other;
        `top1_agreement`, the share of images with the same first class.
    """
    images, same, difference, largest = 0, 0, 0.0, 0.0
    for pixels in batches:
        ours = classifier(pixels).double()
        theirs = torch.from_numpy(run(pixels)).double()
        alone = torch.from_numpy(run(pixels[:1])).double()
        images += len(pixels)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        # A NaN would lose every comparison: count it as infinitely far.
        gaps = torch.cat([(ours - theirs).abs().flatten(), (ours[:1] - alone).abs().flatten()])
        difference = max(difference, gaps.nan_to_num(nan=float("inf")).max().item())
        largest = max(largest, ours.abs().max().item())
    return {
        "images": images,
        "largest_difference": difference,
        "largest_logit": largest,
        "relative_difference": difference / largest if largest else difference,
        "top1_agreement": same / images if images else 0.0,
    }
