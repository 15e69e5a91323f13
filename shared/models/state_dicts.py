"""Weights from files, renamed to the names and shapes of a network: wrappers and prefixes are removed, timm converts, then all is compared.

Files often hold a network's state dict under other names: below `state_dict` or `model_state_dict` of a training checkpoint, with the
`module.` of a distributed run or the `timm_model.` of transformers before every name, or in the names of the network's authors. Every tensor of
the network has to be present, in its shape; a misfit is an error that names the first differences, so nothing is loaded in part.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from ssld.shared.errors import UserError
from ssld.shared.models.damage import incomplete, is_cut_short, refuse_damaged
from ssld.shared.models.model_file import begins_as_safetensors, is_pickle, read_tensors
from ssld.shared.wording import count, some

Tensors = dict[str, Tensor]
# Where training checkpoints keep the network, the average before the network itself.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
)
_DEEPEST = 4
_EMPTY = ("meta, without values", "sparse")  # of tensors that cannot be copied into a network
_COUNTER = "num_batches_tracked"  # of BatchNorm, which older files lack; nothing reads it
_ZERO = 0.1  # largest share of matrices of zeros: trained ones are rare, and heads, which start like that, do not count
# Of BatchNorm; finite, like trained parameters. Other buffers, such as masks, need not be.
_STATISTICS = ("running_mean", "running_var")


def read_state_dict(path: Path) -> tuple[Tensors, str]:
    """Read (tensors of a network by name, their place in the file, "" for its top level).

    Raises UserError for what is neither safetensors nor a pickle of plain tensors, for several networks in one file, and for none.
    """
    refuse_damaged(path)
    if not is_pickle(path):
        return read_tensors(path), ""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints keep their arguments in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage may fail in any way
        if path.stat().st_size > 9 and begins_as_safetensors(path):
            raise UserError(
                f"{path}: is a safetensors file named {path.suffix}: rename it to {path.with_suffix('.safetensors').name}"
            ) from None
        if is_cut_short(error):
            raise UserError(incomplete(path)) from None
        # Of torch's text only the name: the rest advises to open the file without protection.
        asked = re.search(r"GLOBAL ([\w.]{1,120})(?!\S)", str(error))
        why = (
            f"it asks for {asked[1]} while being opened, which could run code"
            if asked
            else "the pickle is damaged, or holds other objects than tensors"
        )
        keep = f"torch.save({{'state_dict': torch.load('{path.name}', map_location='cpu', weights_only=False)['state_dict']}}, 'weights.pth')"
        advice = (
            f'; where you trust it, keep its weights alone, in an environment that has its project: python -c "import torch; {keep}"'
            if asked
            else ""
        )
        raise UserError(f"{path}: cannot be read as a plain state dict of tensors ({why}){advice}") from None
    return _unwrapped(content, path, "")


def _unwrapped(content: Any, path: Path, where: str) -> tuple[Tensors, str]:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict of tensors by name")
    if content.keys() == {"state", "param_groups"}:
        raise UserError(f"{path}: holds the state of an optimizer, not a network; give the file of the network")
    inner = {
        str(key): value for key, value in content.items() if isinstance(value, Mapping) and "optim" not in str(key)
    }
    sizes = {key: _tensors_in(value) for key, value in inner.items()}
    own = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if len(own) > max(sizes.values(), default=0):
        return own, where
    networks = [key for key in inner if sizes[key]]
    chosen = next((key for key in _WRAPPERS if key in networks), None) or (networks[0] if len(networks) == 1 else None)
    if chosen:
        return _unwrapped(inner[chosen], path, f"{where}.{chosen}" if where else chosen)
    if networks:
        raise UserError(
            f"{path}: holds several networks ({some(networks, 4)}); save only the network you want: "
            f"torch.save(torch.load({path.name!r})[{networks[0]!r}], 'one.pth')"
        )
    raise UserError(f"{path}: holds no tensors by name; a state dict is needed")


def _tensors_in(content: Mapping[Any, Any], depth: int = 1) -> int:
    """Largest number of tensors by name in a mapping or in one inside it."""
    own = sum(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    deeper = [value for value in content.values() if isinstance(value, Mapping)] if depth < _DEEPEST else []
    return max([own, *(_tensors_in(value, depth + 1) for value in deeper)])


@dataclass(frozen=True)
class Fitted:
    """Weights under the names of a network.

    Attributes:
        tensors: all of its state dict.
        classes: rows of its classification layer, 0 where the weights have none.
        notes: prefixes removed and tensors left out, in words.
    """

    tensors: Tensors
    classes: int
    notes: list[str] = field(default_factory=list)


def fit(
    tensors: Tensors,
    arch: str,
    args: Mapping[str, Any],
    source: object,
    *,
    trained_with: Mapping[str, Any] | None = None,
    convert_first: bool = False,
) -> Fitted:
    """Rename weights to the network that timm builds as `arch` with `args`; see the module's docstring.

    Args:
        trained_with: arguments that the weights were trained with, where `args` differ: position embeddings are resampled from their grid.
        convert_first: run timm's conversion before the plain comparison, as for the weights that timm offers itself.

    Raises:
        UserError: a tensor of the network is missing, has another shape or type or is not finite, or one of the file is unknown to it; matrices of
            zeros; `args` that the network does not have; weights that fit below several prefixes.
    """
    odd = next((name for name in tensors if not name.isprintable()), None)
    if odd is not None:
        raise UserError(f"{source}: a tensor is called {odd[:80]!r}, which cannot be printed; the file is damaged")
    target = _Target(arch, dict(args), dict(trained_with or args), source)
    fits: list[tuple[str, Fitted]] = []
    worst: _Fault | None = None
    level = [("", tensors)]
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, Tensors]] = []
        for prefix, inside in level:
            attempt = target.attempt(inside, convert_first)
            if isinstance(attempt, Fitted):
                fits.append((prefix, attempt))
                continue
            if worst is None or attempt.missing < worst.missing:
                worst = attempt
            deeper += [(f"{prefix}{head}.", part) for head, part in _below(inside).items() if len(part) >= target.least]
        if fits:
            break
        level = deeper
    if not fits:
        assert worst is not None
        raise UserError(f"{source}: does not hold a {arch} ({worst.text})")
    if len(fits) > 1:
        raise UserError(
            f"{source}: holds a {arch} several times, below {some([prefix for prefix, _ in fits])}; save the tensors of one of them alone "
            "(of a DINO training those of the teacher)"
        )
    prefix, fitted = fits[0]
    outside = [name for name in tensors if not name.startswith(prefix)]
    notes = [f"read below {prefix!r}"] if prefix else []
    notes += [f"{count(len(outside), 'tensor')} outside of it left out (first: {outside[0]})"] if outside else []
    return replace(fitted, notes=[*notes, *fitted.notes])


def _below(tensors: Tensors) -> dict[str, Tensors]:
    """Group tensors by the first part of their names, which is removed."""
    groups: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        head, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(head, {})[rest] = tensor
    return groups


@dataclass(frozen=True)
class _Fault:
    missing: int
    text: str


class _Target:
    """A network on the meta device, with any number of classes, and timm's conversion of foreign weights for it."""

    def __init__(self, arch: str, args: dict[str, Any], trained_with: dict[str, Any], source: object) -> None:
        self._arch, self._args, self._trained_with, self._source = arch, args, trained_with, source
        self._nets: dict[int | None, nn.Module] = {}
        self._convert: Callable[..., Any] | None = None
        net = self._net(None)
        cfg: Any = net.default_cfg
        head = cfg.get("classifier")
        self._head = str(head[0] if isinstance(head, tuple | list) else head)
        self._offset = int(cfg.get("label_offset") or 0)
        self.least = len([name for name in net.state_dict() if not name.endswith(_COUNTER)]) // 2

    def attempt(self, tensors: Tensors, convert_first: bool) -> Fitted | _Fault:
        """Return the tensors as they are, or converted by timm."""
        faults: list[_Fault] = []
        for converted in (True, False) if convert_first else (False, True):
            candidate = self._converted(tensors) if converted else tensors
            if candidate is None:
                continue
            own = convert_first and (converted or self._convert is None)
            result = self._compare(candidate, self._offset if own else 0)
            if isinstance(result, Fitted) and converted and not convert_first:
                result = _resampled(tensors, result)
            if isinstance(result, Fitted):
                return result
            faults.append(result)
        return min(faults, key=lambda fault: fault.missing)

    def _compare(self, tensors: Tensors, offset: int) -> Fitted | _Fault:
        weight = tensors.get(f"{self._head}.weight")
        notes: list[str] = []
        if weight is None:  # what is left of a head of another kind, as of self-supervised training
            rest = [name for name in tensors if self._in_head(name) and name not in self._net(0).state_dict()]
            tensors = {name: tensor for name, tensor in tensors.items() if name not in rest}
            notes += [f"{count(len(rest), 'tensor')} of another head left out (first: {rest[0]})"] if rest else []
        elif offset and weight.ndim and len(weight) > offset:  # a background class that timm does without
            cut = [name for name in (f"{self._head}.weight", f"{self._head}.bias") if name in tensors]
            tensors = tensors | {name: tensors[name][offset:] for name in cut}
        weight = tensors.get(f"{self._head}.weight")
        classes = int(weight.shape[0]) if weight is not None and weight.ndim else 0
        net = self._net(classes)
        expected = net.state_dict()
        buffers = {name for name, _ in net.named_buffers()} - expected.keys()  # made anew, but kept by older versions
        tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
        counters = {name: torch.tensor(0) for name in expected if name.endswith(_COUNTER) and name not in tensors}
        tensors = tensors | counters
        missing = [f"{name} missing" for name in expected if name not in tensors]
        extra = [f"{name} unknown" for name in tensors if name not in expected]
        both = [name for name in expected if name in tensors]
        other = [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in both
            if tensors[name].shape != expected[name].shape
        ]
        kinds = [
            f"{name} of type {_kind(tensors[name])}"
            for name in both
            if expected[name].is_floating_point() != _is_float(tensors[name]) or _kind(tensors[name]) in _EMPTY
        ]
        if missing or extra or other or kinds:
            counts = f"{len(missing)} missing, {len(extra)} unknown, {len(other)} of another shape"
            counts += f", {len(kinds)} of another type" if kinds else ""
            first = "; ".join([*missing[:2], *other[:2], *extra[:2], *kinds[:2]])
            return _Fault(len(missing) + len(other), f"{counts}: {first}")
        learnt = {name for name, _ in net.named_parameters()}
        broken = [
            name
            for name in both
            if (name in learnt or name.endswith(_STATISTICS)) and not bool(torch.isfinite(tensors[name]).all())
        ]
        if broken:
            raise UserError(
                f"{self._source}: {count(len(broken), 'tensor')} with values that are not finite, first {broken[0]}; "
                "the file is damaged, or its training diverged"
            )
        matrices = [
            name for name in learnt if name.endswith(".weight") and tensors[name].ndim > 1 and not self._in_head(name)
        ]
        zero = [name for name in expected if name in matrices and not bool(tensors[name].any())]
        if len(zero) > _ZERO * len(matrices):
            new = self._zero_at_first(classes)
            zero = [name for name in zero if name not in new]
        if len(zero) > _ZERO * len(matrices):
            raise UserError(
                f"{self._source}: {len(zero)} of {len(matrices)} weight matrices hold only zeros, first {zero[0]}; the file is damaged, like an "
                "unfinished download whose space was reserved; download it again"
            )
        return Fitted({name: tensors[name] for name in expected}, classes, notes)

    def _zero_at_first(self, classes: int) -> set[str]:
        """Return the parameters that hold only zeros in a network that timm has just created, as the last ones of a branch. The state of
        the random generators stays."""
        with torch.random.fork_rng(devices=[]):
            net = create(self._arch, self._source, **self._args | {"num_classes": classes})
        return {name for name, parameter in net.named_parameters() if not bool(parameter.any())}

    def _in_head(self, name: str) -> bool:
        return name.startswith(f"{self._head}.")

    def _converted(self, tensors: Tensors) -> Tensors | None:
        """Convert the tensors by timm; None where timm has no conversion for this network, or where it fails."""
        if self._convert is None:
            return None
        net = self._net(None)
        for arguments in ((dict(tensors), net), (dict(tensors),)):
            try:
                converted = self._convert(*arguments)
            except TypeError:  # older conversions take the tensors alone
                continue
            except Exception:  # tensors that timm does not know
                return None
            named = isinstance(converted, Mapping) and all(isinstance(value, Tensor) for value in converted.values())
            return dict(converted) if named and not any(value.is_meta for value in converted.values()) else None
        return None

    def _net(self, classes: int | None) -> nn.Module:
        """Create the network with this number of classes; None: with its own."""
        if classes not in self._nets:
            args = self._args if classes is None else self._args | {"num_classes": classes}
            with torch.device("meta"), _loading_noted() as noted:
                net = create(self._arch, self._source, pretrained=True, **args)
            self._convert = noted[0] if noted else None
            net.pretrained_model_args = self._trained_with
            self._nets[classes] = net
        return self._nets[classes]


def _resampled(tensors: Tensors, fitted: Fitted) -> Fitted | _Fault:
    """Name the tensors that timm's conversion has interpolated to other sizes; a fault for kernels, as of patches, which belong to another arch."""
    resized = {
        name: f"{name} {tuple(tensors[name].shape)} instead of {tuple(fitted.tensors[name].shape)}"
        for name in fitted.tensors.keys() & tensors.keys()
        if tensors[name].ndim > 1 and tensors[name].numel() != fitted.tensors[name].numel()
    }
    kernels = [text for name, text in resized.items() if fitted.tensors[name].ndim == 4 and name.endswith(".weight")]
    if kernels:
        return _Fault(len(kernels), f"0 missing, 0 unknown, {len(kernels)} of another shape: {kernels[0]}")
    first = min(resized.values(), default="")
    notes = [f"{count(len(resized), 'tensor')} interpolated to another size (first: {first})"] if resized else []
    return replace(fitted, notes=[*fitted.notes, *notes])


def _kind(tensor: Tensor) -> str:
    """Return the dtype of a tensor as text; `_EMPTY` says what a sparse tensor and one on the meta device are instead."""
    if tensor.is_meta:
        return _EMPTY[0]
    return str(tensor.dtype) if tensor.layout == torch.strided else _EMPTY[1]


def _is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers as they are; those of 8 bits mean nothing without the scales that quantization keeps elsewhere."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def create(arch: str, source: object, **options: Any) -> Any:
    """Call `timm.create_model`; raise UserError where the architecture does not take the options."""
    try:
        return timm.create_model(arch, **options)
    except Exception as error:  # every family of networks raises other errors
        why = " ".join(str(error).split())[:160] or type(error).__name__
        given = {
            key: value for key, value in options.items() if key not in ("pretrained", "features_only", "num_classes")
        }
        if "drop_path_rate" in why:
            raise UserError(f"{arch}: has no stochastic depth; leave drop_path at 0") from None
        if not given:
            raise
        listed = ", ".join(
            f"{key}={str(value)[:40]}" for key, value in given.items() if key != "pretrained_cfg_overlay"
        )
        raise UserError(f"{source}: timm cannot build a {arch} with {listed} ({why})") from None


@contextmanager
def _loading_noted() -> Iterator[list[Callable[..., Any] | None]]:
    """Context manager: timm builds networks without loading weights; the list receives the conversion that timm applies before loading.

    Only the constructor of a network knows its conversion, and passes it to this function alone.
    """
    noted: list[Callable[..., Any] | None] = []

    def note(*_: Any, filter_fn: Callable[..., Any] | None = None, **__: Any) -> None:
        noted.append(filter_fn)

    with patch("timm.models._builder.load_pretrained", note):
        yield noted
