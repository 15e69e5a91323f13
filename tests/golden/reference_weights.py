"""The weights under which the reference numbers were made: every parameter follows from its PaddlePaddle name.

A parameter is standard normal noise of NumPy's legacy generator, seeded by the CRC-32 of its name plus a salt, and scaled by what it is.
Layouts are PaddlePaddle's: convolutions [out, in, height, width], linear layers [in, out].
"""

import zlib

import numpy as np

# Gain of a convolution by the first part that its name contains.
_GAINS = {
    "conv_offset": 0.5,
    "rpn_rois_score": 1.5,
    "rpn_rois_delta": 0.2,
    "rpn": 1.0,
    "fpn": 0.6,
    "gfl_head_cls": 1.5,
    "retina_cls": 1.5,
    "gfl_head_reg": 2.0,
    "retina_reg": 0.3,
    "": 1.4,
}


def reference_weight(name: str, shape: list[int], salt: int) -> np.ndarray:
    """float32 array of `shape` for one parameter; another `salt` gives another network."""
    seed = (zlib.crc32(name.encode()) + salt) % 2**32
    noise = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    kind = name.split(".")[-1]
    if kind == "_mean":
        value = 0.1 * noise
    elif kind == "_variance":
        value = 1 + 0.2 * np.abs(noise)
    elif kind == "bias":
        value = (0.3 if "offset" in name else 0.05) * noise
        if name in ("head.gfl_head_cls.bias", "head.retina_cls.bias"):
            value = value - 1.5
    elif kind.startswith("scale"):
        value = 1 + 0.1 * noise
    elif noise.ndim == 1:  # the weight of a norm, small at the end of a residual branch
        value = (0.2 if "branch2c" in name else 1.0) * (1 + 0.1 * noise)
    elif noise.ndim == 2:  # centered over the inputs, so that RoIs get different classes
        gain = 4.0 if "bbox_score" in name else 0.35 if "bbox_delta" in name else 1.4
        value = gain * (noise - noise.mean(axis=0)) / np.sqrt(shape[0])
    else:
        gain = next(gain for part, gain in _GAINS.items() if part in name)
        value = gain * noise / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, np.float32)
