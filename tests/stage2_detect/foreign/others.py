"""Weights as other projects name them, and their networks by these names, in plain functions.

Written from their sources, apart from the converters: facebookresearch/detectron2@60d7a1fd and open-mmlab/mmdetection v3.3.0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
CLASSES, CHANNELS, HIDDEN = 5, 64, 24
FIRST_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


@dataclass
class Project:
    """A state dict in the making; shapes from the project's modules, values at random of a usual scale."""

    name: str
    seed: int = 0
    merged_norms: bool = False
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)

    def conv(self, name: str, inside: int, outside: int, kernel: int, *, bias: bool) -> None:
        scale = math.sqrt(2 / (inside * kernel**2))
        self.state[f"{name}.weight"] = scale * torch.randn(outside, inside, kernel, kernel, generator=self.draw)
        if bias:
            self.state[f"{name}.bias"] = 0.1 * torch.randn(outside, generator=self.draw)

    def linear(self, name: str, inside: int, outside: int) -> None:
        self.state[f"{name}.weight"] = math.sqrt(2 / inside) * torch.randn(outside, inside, generator=self.draw)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(outside, generator=self.draw)

    def norm(self, name: str, channels: int, kind: str = "batch") -> None:
        self.state[f"{name}.weight"] = 0.5 + 0.5 * torch.rand(channels, generator=self.draw)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=self.draw)
        if kind == "group":
            return
        mean, variance = (
            0.1 * torch.randn(channels, generator=self.draw),
            0.5 + torch.rand(channels, generator=self.draw),
        )
        merged = self.merged_norms and name.startswith("backbone")
        self.state[f"{name}.running_mean"] = torch.zeros(channels) if merged else mean
        self.state[f"{name}.running_var"] = torch.ones(channels) if merged else variance
        if self.name == "mmdetection":
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def names(self, stage: int, block: int, part: str) -> tuple[str, str]:
        """Names of a convolution of the ResNet and of its norm; stage 0 is the stem, part 1, 2, 3 or `shortcut`."""
        if self.name == "detectron2":
            layer = "backbone.bottom_up.stem.conv1" if stage == 0 else f"backbone.bottom_up.res{stage + 1}.{block}."
            layer += "" if stage == 0 else ("shortcut" if part == "shortcut" else f"conv{part}")
            return layer, f"{layer}.norm"
        stem = "backbone." if stage == 0 else f"backbone.layer{stage}.{block}."
        return (
            (f"{stem}downsample.0", f"{stem}downsample.1")
            if part == "shortcut"
            else (f"{stem}conv{part}", f"{stem}bn{part}")
        )

    def resnet(self, arch: str) -> list[int]:
        """Add a ResNet; returns the widths of its stages."""
        bottleneck = arch == "resnet50"
        self._conv_norm(0, 0, "1", 3, 64, 7)
        inside, widths = 64, []
        for stage, blocks in enumerate(FIRST_BLOCKS[arch], start=1):
            width = 64 * 2 ** (stage - 1)
            outside = width * (4 if bottleneck else 1)
            for block in range(blocks):
                if bottleneck:
                    for part, (a, b, kernel) in enumerate(
                        ((inside, width, 1), (width, width, 3), (width, outside, 1)), start=1
                    ):
                        self._conv_norm(stage, block, str(part), a, b, kernel)
                else:
                    self._conv_norm(stage, block, "1", inside, width, 3)
                    self._conv_norm(stage, block, "2", width, width, 3)
                if inside != outside:
                    self._conv_norm(stage, block, "shortcut", inside, outside, 1)
                inside = outside
            widths.append(outside)
        return widths

    def _conv_norm(self, stage: int, block: int, part: str, inside: int, outside: int, kernel: int) -> None:
        conv, norm = self.names(stage, block, part)
        self.conv(conv, inside, outside, kernel, bias=False)
        self.norm(norm, outside)


def detectron2_state(
    kind: str,
    *,
    arch: str = "resnet50",
    merged: bool = False,
    new_baseline: bool = False,
    classes: int = CLASSES,
    seed: int = 0,
) -> State:
    """Weights of detectron2.

    Args:
        new_baseline: with the norms and heads of its configs/new_baselines: SyncBN everywhere, 4 convolutions and 1 layer, 2 convolutions in the RPN.
    """
    p = Project("detectron2", seed, merged)
    widths = p.resnet(arch)
    dense = kind == "retinanet"
    for level, width in list(enumerate(widths, start=2))[dense:]:
        for name, inside, kernel in (
            (f"backbone.fpn_lateral{level}", width, 1),
            (f"backbone.fpn_output{level}", CHANNELS, 3),
        ):
            p.conv(name, inside, CHANNELS, kernel, bias=not new_baseline)
            if new_baseline:
                p.norm(f"{name}.norm", CHANNELS)
    if dense:
        p.conv("backbone.top_block.p6", widths[-1], CHANNELS, 3, bias=True)
        p.conv("backbone.top_block.p7", CHANNELS, CHANNELS, 3, bias=True)
        for number in range(4):
            p.conv(f"head.cls_subnet.{2 * number}", CHANNELS, CHANNELS, 3, bias=True)
            p.conv(f"head.bbox_subnet.{2 * number}", CHANNELS, CHANNELS, 3, bias=True)
        p.conv("head.cls_score", CHANNELS, 9 * classes, 3, bias=True)
        p.conv("head.bbox_pred", CHANNELS, 9 * 4, 3, bias=True)
        return p.state
    rpn = "proposal_generator.rpn_head."
    for name in ("conv.conv0", "conv.conv1") if new_baseline else ("conv",):
        p.conv(rpn + name, CHANNELS, CHANNELS, 3, bias=True)
    p.conv(f"{rpn}objectness_logits", CHANNELS, 3, 1, bias=True)
    p.conv(f"{rpn}anchor_deltas", CHANNELS, 12, 1, bias=True)
    cascade = kind.startswith("cascade")
    for stage in (".0", ".1", ".2") if cascade else ("",):
        head, predictor = f"roi_heads.box_head{stage}.", f"roi_heads.box_predictor{stage}."
        for number in range(4 if new_baseline else 0):
            p.conv(f"{head}conv{number + 1}", CHANNELS, CHANNELS, 3, bias=False)
            p.norm(f"{head}conv{number + 1}.norm", CHANNELS)
        p.linear(f"{head}fc1", CHANNELS * 49, HIDDEN)
        if not new_baseline:
            p.linear(f"{head}fc2", HIDDEN, HIDDEN)
        p.linear(f"{predictor}cls_score", HIDDEN, classes + 1)
        p.linear(f"{predictor}bbox_pred", HIDDEN, 4 if cascade else 4 * classes)
    if "mask" in kind:
        mask = "roi_heads.mask_head."
        for number in range(4):
            p.conv(f"{mask}mask_fcn{number + 1}", CHANNELS, CHANNELS, 3, bias=True)
        p.conv(f"{mask}deconv", CHANNELS, CHANNELS, 2, bias=True)
        p.conv(f"{mask}predictor", CHANNELS, classes, 1, bias=True)
    return p.state


def mmdetection_state(
    kind: str,
    *,
    arch: str = "resnet50",
    merged: bool = False,
    classes: int = CLASSES,
    group_norm: bool = False,
    seed: int = 0,
) -> State:
    """Weights of mmdetection; `group_norm` in pyramid, box and mask head, with 4 convolutions and 1 layer, as of its configs/gn."""
    p = Project("mmdetection", seed, merged)
    widths = p.resnet(arch)
    dense = kind in ("retinanet", "gfl")
    for number, width in enumerate(widths[dense:]):
        for name, inside, kernel in (
            (f"neck.lateral_convs.{number}", width, 1),
            (f"neck.fpn_convs.{number}", CHANNELS, 3),
        ):
            p.conv(f"{name}.conv", inside, CHANNELS, kernel, bias=not group_norm)
            if group_norm:
                p.norm(f"{name}.gn", CHANNELS, "group")
    if dense:
        p.conv("neck.fpn_convs.3.conv", widths[-1] if kind == "retinanet" else CHANNELS, CHANNELS, 3, bias=True)
        p.conv("neck.fpn_convs.4.conv", CHANNELS, CHANNELS, 3, bias=True)
        for number in range(4):
            for branch in ("cls", "reg"):
                p.conv(f"bbox_head.{branch}_convs.{number}.conv", CHANNELS, CHANNELS, 3, bias=kind == "retinanet")
                if kind == "gfl":
                    p.norm(f"bbox_head.{branch}_convs.{number}.gn", CHANNELS, "group")
        if kind == "retinanet":
            p.conv("bbox_head.retina_cls", CHANNELS, 9 * classes, 3, bias=True)
            p.conv("bbox_head.retina_reg", CHANNELS, 9 * 4, 3, bias=True)
        else:
            p.conv("bbox_head.gfl_cls", CHANNELS, classes, 3, bias=True)
            p.conv("bbox_head.gfl_reg", CHANNELS, 4 * 17, 3, bias=True)
            p.state["bbox_head.integral.project"] = torch.linspace(0, 16, 17)
            for level in range(5):
                p.state[f"bbox_head.scales.{level}.scale"] = torch.tensor(0.5 + 0.1 * level)
        return p.state
    p.conv("rpn_head.rpn_conv", CHANNELS, CHANNELS, 3, bias=True)
    p.conv("rpn_head.rpn_cls", CHANNELS, 3, 1, bias=True)
    p.conv("rpn_head.rpn_reg", CHANNELS, 12, 1, bias=True)
    cascade = kind.startswith("cascade")
    for stage in ("0.", "1.", "2.") if cascade else ("",):
        head = f"roi_head.bbox_head.{stage}"
        for number in range(4 if group_norm else 0):
            p.conv(f"{head}shared_convs.{number}.conv", CHANNELS, CHANNELS, 3, bias=False)
            p.norm(f"{head}shared_convs.{number}.gn", CHANNELS, "group")
        p.linear(f"{head}shared_fcs.0", CHANNELS * 49, HIDDEN)
        if not group_norm:
            p.linear(f"{head}shared_fcs.1", HIDDEN, HIDDEN)
        p.linear(f"{head}fc_cls", HIDDEN, classes + 1)
        p.linear(f"{head}fc_reg", HIDDEN, 4 if cascade else 4 * classes)
    if "mask" in kind:
        for number in range(4):
            p.conv(f"roi_head.mask_head.convs.{number}.conv", CHANNELS, CHANNELS, 3, bias=not group_norm)
            if group_norm:
                p.norm(f"roi_head.mask_head.convs.{number}.gn", CHANNELS, "group")
        p.conv("roi_head.mask_head.upsample", CHANNELS, CHANNELS, 2, bias=True)
        p.conv("roi_head.mask_head.conv_logits", CHANNELS, classes, 1, bias=True)
    return p.state


@dataclass
class Network:
    """The networks by their own names: each method is a part of a forward pass in float32."""

    project: Project
    state: State
    stride_in_1x1: bool

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        state = self.state
        if f"{name}.running_mean" in state:
            mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
            return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"], False, 0.0, 1e-5)
        if f"{name}.weight" in state:
            return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
        return x

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def body(self, pixels: Tensor, arch: str) -> list[Tensor]:
        """C2..C5 of a ResNet."""
        x = F.max_pool2d(F.relu(self._conv_norm(pixels, 0, 0, "1", 2)), 3, 2, 1)
        maps = []
        for stage, blocks in enumerate(FIRST_BLOCKS[arch], start=1):
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 1 else 1
                first, second = (stride, 1) if self.stride_in_1x1 or arch == "resnet18" else (1, stride)
                y = F.relu(self._conv_norm(x, stage, block, "1", first))
                y = self._conv_norm(y, stage, block, "2", second)
                if arch == "resnet50":
                    y = self._conv_norm(F.relu(y), stage, block, "3", 1)
                shortcut = block == 0 and (stage > 1 or arch == "resnet50")
                x = F.relu(y + (self._conv_norm(x, stage, block, "shortcut", stride) if shortcut else x))
            maps.append(x)
        return maps

    def _conv_norm(self, x: Tensor, stage: int, block: int, part: str, stride: int) -> Tensor:
        conv, norm = self.project.names(stage, block, part)
        return self.norm(self.conv(x, conv, stride), norm)

    def pyramid(self, maps: list[Tensor], kind: str) -> list[Tensor]:
        """P2..P6 or P3..P7."""
        dense = kind in ("retinanet", "gfl")
        inside = maps[dense:]
        detectron2 = self.project.name == "detectron2"

        def layer(which: str, number: int) -> tuple[str, str]:
            if detectron2:
                name = f"backbone.fpn_{which}{number + 2 + dense}"
                return name, f"{name}.norm"
            name = f"neck.{'lateral' if which == 'lateral' else 'fpn'}_convs.{number}"
            return f"{name}.conv", f"{name}.gn"

        laterals = [
            self.norm(self.conv(one, layer("lateral", n)[0]), layer("lateral", n)[1]) for n, one in enumerate(inside)
        ]
        for number in range(len(laterals) - 2, -1, -1):
            laterals[number] = laterals[number] + F.interpolate(
                laterals[number + 1], size=laterals[number].shape[-2:], mode="nearest"
            )
        out = [
            self.norm(self.conv(one, layer("output", n)[0]), layer("output", n)[1]) for n, one in enumerate(laterals)
        ]
        if not dense:
            return [*out, out[-1][..., ::2, ::2]]
        names = (
            ("backbone.top_block.p6", "backbone.top_block.p7")
            if detectron2
            else ("neck.fpn_convs.3.conv", "neck.fpn_convs.4.conv")
        )
        p6 = self.conv(maps[-1] if kind == "retinanet" else out[-1], names[0], 2)
        return [*out, p6, self.conv(F.relu(p6) if detectron2 else p6, names[1], 2)]

    def rpn(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness [B, 3, H, W] and deltas [B, 12, H, W]."""
        detectron2 = self.project.name == "detectron2"
        head = "proposal_generator.rpn_head." if detectron2 else "rpn_head."
        convs = (
            ["conv.conv0", "conv.conv1"]
            if f"{head}conv.conv0.weight" in self.state
            else ["conv" if detectron2 else "rpn_conv"]
        )
        for name in convs:
            feature = F.relu(self.conv(feature, head + name))
        names = ("objectness_logits", "anchor_deltas") if detectron2 else ("rpn_cls", "rpn_reg")
        return self.conv(feature, head + names[0]), self.conv(feature, head + names[1])

    def box_head(self, pooled: Tensor, stage: int | None) -> tuple[Tensor, Tensor]:
        """Logits [N, K + 1], background last, and deltas [N, K or 1, 4]."""
        if self.project.name == "detectron2":
            at = "" if stage is None else f".{stage}"
            head, predictor = f"roi_heads.box_head{at}.", f"roi_heads.box_predictor{at}."
            convs, layers = [f"{head}conv{n}" for n in range(1, 5)], [f"{head}fc1", f"{head}fc2"]
            norms, last = [f"{name}.norm" for name in convs], (f"{predictor}cls_score", f"{predictor}bbox_pred")
        else:
            head = "roi_head.bbox_head." + ("" if stage is None else f"{stage}.")
            convs, layers = (
                [f"{head}shared_convs.{n}.conv" for n in range(4)],
                [f"{head}shared_fcs.0", f"{head}shared_fcs.1"],
            )
            norms, last = [f"{head}shared_convs.{n}.gn" for n in range(4)], (f"{head}fc_cls", f"{head}fc_reg")
        for conv, norm in zip(convs, norms, strict=True):
            if f"{conv}.weight" in self.state:
                pooled = F.relu(self.norm(self.conv(pooled, conv), norm))
        hidden = pooled.flatten(1)
        for layer in layers:
            if f"{layer}.weight" in self.state:
                hidden = F.relu(self.linear(hidden, layer))
        return self.linear(hidden, last[0]), self.linear(hidden, last[1]).unflatten(1, (-1, 4))

    def mask_head(self, pooled: Tensor) -> Tensor:
        """Logits [N, K, 2 S, 2 S]."""
        if self.project.name == "detectron2":
            convs = [f"roi_heads.mask_head.mask_fcn{n}" for n in range(1, 5)]
            norms, up, last = [""] * 4, "roi_heads.mask_head.deconv", "roi_heads.mask_head.predictor"
        else:
            convs = [f"roi_head.mask_head.convs.{n}.conv" for n in range(4)]
            norms = [f"roi_head.mask_head.convs.{n}.gn" for n in range(4)]
            up, last = "roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits"
        for conv, norm in zip(convs, norms, strict=True):
            pooled = F.relu(self.norm(self.conv(pooled, conv), norm))
        pooled = F.relu(F.conv_transpose2d(pooled, self.state[f"{up}.weight"], self.state[f"{up}.bias"], 2))
        return self.conv(pooled, last)

    def dense(self, features: list[Tensor], kind: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For each level logits [B, shapes * K, H, W] and box values [B, shapes * D, H, W]."""
        if self.project.name == "detectron2":
            towers = [[(f"head.{branch}_subnet.{2 * n}", "") for n in range(4)] for branch in ("cls", "bbox")]
            last = ("head.cls_score", "head.bbox_pred")
        else:
            parts = [[f"bbox_head.{branch}_convs.{n}" for n in range(4)] for branch in ("cls", "reg")]
            towers = [[(f"{name}.conv", f"{name}.gn") for name in names] for names in parts]
            last = (
                ("bbox_head.gfl_cls", "bbox_head.gfl_reg")
                if kind == "gfl"
                else ("bbox_head.retina_cls", "bbox_head.retina_reg")
            )
        for level, feature in enumerate(features):
            out = []
            for tower, name in zip(towers, last, strict=True):
                x = feature
                for conv, norm in tower:
                    x = F.relu(self.norm(self.conv(x, conv), norm))
                out.append(self.conv(x, name))
            scale = self.state[f"bbox_head.scales.{level}.scale"] if kind == "gfl" else 1.0
            yield out[0], out[1] * scale
