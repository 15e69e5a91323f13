"""PaddlePaddle's files: every form an array is pickled in, and everything else refused without being run."""

import builtins
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssld.shared.errors import UserError
from ssld.shared.models.paddle_weights import read_paddle_weights, to_torch

ARRAYS: dict[str, np.ndarray] = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "stem.weight": np.asfortranarray(np.linspace(-1, 1, 24).reshape(2, 3, 2, 2)),
    "bn._mean": np.array([1.5, -2.5], ">f4"),
    "half": np.array([0.5], np.float16),
    "none": np.empty((0, 3), np.float32),
    "number": np.array(3.0, np.float32),
}


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_arrays_of_every_protocol(protocol: int, container: Any, tmp_path: Path) -> None:
    record = {"StructuredToParameterName@@": {name: f"linear_0.{name}" for name in ARRAYS}}
    read = read_paddle_weights(write(tmp_path / "a.pdparams", container(ARRAYS | record), protocol))
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)


def test_a_file_of_numpy_1_and_one_of_python_2(tmp_path: Path) -> None:
    file = write(tmp_path / "new.pdparams", {"w": ARRAYS["fc.weight"]}, 2)
    assert b"numpy._core" in file.read_bytes()
    (tmp_path / "old.pdparams").write_bytes(file.read_bytes().replace(b"numpy._core", b"numpy.core"))
    np.testing.assert_array_equal(read_paddle_weights(tmp_path / "old.pdparams")["w"], ARRAYS["fc.weight"])

    values = np.array([1.25, -7.0], "<f4")  # Python 2 pickles bytes as text
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01K\x02\x85" + kind + b"\x89U\x08" + values.tobytes() + b"tb"
    (tmp_path / "two.pdparams").write_bytes(b"\x80\x02}U\x01w" + array + state + b"s.")
    np.testing.assert_array_equal(read_paddle_weights(tmp_path / "two.pdparams")["w"], values)


def test_named_tensors_and_slices(tmp_path: Path) -> None:
    whole = np.arange(12, dtype=np.float32)
    cut = {"big@@.0": whole[:8], "big@@.1": whole[8:]}
    record = {"UnpackBigParamInfor@@": {"big": {"OriginShape": (3, 4), "slices": list(cut)}}}
    read = read_paddle_weights(write(tmp_path / "a.pdparams", {"w": ("linear_0.w_0", whole[:3]), **cut, **record}))
    assert set(read) == {"w", "big"}
    np.testing.assert_array_equal(read["big"], whole.reshape(3, 4))
    np.testing.assert_array_equal(read["w"], whole[:3])
    record["UnpackBigParamInfor@@"]["big"]["OriginShape"] = (5, 4)
    with pytest.raises(UserError, match="record of sliced parameters does not fit"):
        read_paddle_weights(write(tmp_path / "b.pdparams", cut | record))


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "run"
    attacks = {
        f"{os.system.__module__}.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(builtins.eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "getattr": Calls(getattr, "text", "upper"),
        "numpy.load": Calls(np.load, str(marker)),
        "memmap": Calls(np.memmap, str(marker), "u1", "w+", 0, 4),
    }
    for name, attack in attacks.items():
        file = write(tmp_path / "evil.pdparams", {"fc.weight": ARRAYS["fc.weight"], "x": attack}, protocol)
        with pytest.raises(UserError, match=r"evil.pdparams: asks for .* which could run code") as caught:
            read_paddle_weights(file)
        assert name.rsplit(".", 1)[-1] in str(caught.value)
        assert not marker.exists()
    pickle.loads(pickle.dumps(attacks["eval"]))  # the attack is one
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cnumpy\nndarray\n}S'_make'\nNsb.", "sets the state of a function"),
        (b"cnumpy\nndarray\n)\x81.", "not a .pdparams file"),  # as a class
        (b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "text encoded by 'rot13'"),
        (b"cnumpy.core.numeric\n_frombuffer\n(S'abc'\ncnumpy\ndtype\n(S'f4'\ntR(K\x01tS'C'\ntR.", "buffer size"),
        (b"cmultiarray\n_reconstruct\n.", "asks for multiarray._reconstruct"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "it remembers under number 4294967295 after 2 steps"),
        (b"]p4294967294\n.", "it remembers under number 4294967294 after 1 steps"),
        (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "more than 64 values inside each other"),  # a key
        (b"\x80\x02}K\x05)" + b"\x85" * 100_000 + b"s.", "more than 64 values inside each other"),
        (b"\x80\x02}" + b"]q\x00" + b"(h\x00lq\x00" * 100_000 + b"s.", "not a .pdparams file"),
        (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"abc.", "the file is damaged or not complete (15 bytes)"),
        (b"\x80\x02}(K\x01K\x02u.", "keys must be parameter names (found int)"),
        (pickle.dumps({"a\nb": ARRAYS["half"]}), "a parameter is called 'a\\nb', which cannot be printed"),
        (pickle.dumps(ARRAYS["half"]).replace(b"ndarray", b"ndarr\x07y"), "asks for"),
        (b"not a pickle", "not a .pdparams file"),
        (b"", "the file is damaged or not complete (0 bytes)"),
        (pickle.dumps(ARRAYS)[:100], "the file is damaged or not complete (100 bytes)"),
        (pickle.dumps([1]), "holds a list, not the parameters"),
        (pickle.dumps({"a": {"b": ARRAYS["half"]}}), "'a' is a dict, an array is expected"),
        (pickle.dumps({"a": 1.5}), "'a' is a float, an array is expected"),
        (pickle.dumps({"a": np.array([None, 1])}), "array of type 'O8'"),
        (pickle.dumps({"a": np.array(["text"])}), "array of type 'U4'"),
    ],
)
def test_anything_but_arrays_by_name_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pdparams"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_paddle_weights(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_thousand_arrays_are_no_nesting(protocol: int, tmp_path: Path) -> None:
    arrays = {f"layer_{number}.weight": np.full(3, number, np.float32) for number in range(1000)}
    read = read_paddle_weights(write(tmp_path / "a.pdparams", arrays, protocol))
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.pdparams: No such file"):
        read_paddle_weights(tmp_path / "gone.pdparams")


LAYERS = {"conv": "body.0", "bn": "body.1", "fc": "head"}


def parameters() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 3, 1, 1), "fc.weight": (4, 5), "fc.bias": (5,)}
    shapes |= {f"bn.{leaf}": (4,) for leaf in ("weight", "bias", "_mean", "_variance")}
    return {name: 1 + 0.3 * generator.standard_normal(shape) for name, shape in shapes.items()}


def test_layers_compute_in_torch_what_they_did_in_paddle() -> None:
    arrays = parameters()
    tensors = to_torch(arrays, LAYERS, "file")
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4))
    net = torch.nn.ModuleDict({"body": body, "head": torch.nn.Linear(4, 5)})
    net.load_state_dict(tensors)  # strict: nothing missing, nothing left
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if "tracked" not in name)
    image = np.random.default_rng(1).standard_normal((2, 3))
    y = image @ arrays["conv.weight"][:, :, 0, 0].T
    y = (y - arrays["bn._mean"]) / np.sqrt(arrays["bn._variance"] + 1e-5) * arrays["bn.weight"] + arrays["bn.bias"]
    expected = y @ arrays["fc.weight"] + arrays["fc.bias"]
    net.eval()
    out = net["head"](
        F.adaptive_avg_pool2d(net["body"](torch.from_numpy(image).float()[:, :, None, None]), 1)[..., 0, 0]
    )
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-5)


def test_every_parameter_is_accounted_for() -> None:
    def error(arrays: dict[str, np.ndarray]) -> str:
        with pytest.raises(UserError) as caught:
            to_torch(arrays, LAYERS, "file")
        return str(caught.value)

    arrays = parameters()
    assert "1 unknown, 0 layers missing: extra.weight unknown" in error(arrays | {"extra.weight": np.ones(2)})
    assert "1 unknown, 0 layers missing: fc.scale unknown" in error(arrays | {"fc.scale": np.ones(2)})
    assert "0 unknown, 1 layers missing: conv missing" in error({k: v for k, v in arrays.items() if "conv" not in k})
    assert "fc.bias holds values that are not finite" in error(arrays | {"fc.bias": np.array([1, np.nan])})
    assert "fc.bias holds int64 values" in error(arrays | {"fc.bias": np.array([1, 2])})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "it remembers under number 2147483647 after 2 steps"),  # a table of 17 GB
        (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "more than 64 values inside each other"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.", "damaged or not complete (13 bytes)"),
        (b"\x80\x02p99999999999999999999\n.", "it remembers under number 99999999999999999999 after 1 steps"),
    ],
)
def test_a_few_bytes_do_not_ask_for_gigabytes(content: bytes, why: str, tmp_path: Path) -> None:
    file = tmp_path / "w.pdparams"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"not a \.pdparams file|damaged or not complete") as caught:
        read_paddle_weights(file)
    assert why in str(caught.value)
