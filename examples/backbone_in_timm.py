"""Use a student in plain timm: its most probable classes for an image, and its feature maps.

python examples/backbone_in_timm.py runs/mine/student.safetensors photo.jpg
"""

import argparse
from collections.abc import Sequence
from typing import Any

import timm
import torch
from PIL import Image

import ssld


def main(argv: Sequence[str] | None = None) -> list[tuple[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="backbone file")
    parser.add_argument("image", help="image file")
    arguments = parser.parse_args(argv)

    net: Any = ssld.load_backbone(arguments.file)  # a network of timm's, in evaluation mode
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    pixels = transform(Image.open(arguments.image).convert("RGB")).unsqueeze(0)  # [1, 3, H, W]
    with torch.no_grad():
        probabilities = net(pixels).softmax(-1)[0]
    names = net.pretrained_cfg.get("label_names") or [f"class {number}" for number in range(len(probabilities))]
    best = probabilities.topk(min(5, len(names)))
    answer = [(names[index], value) for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    for name, probability in answer:
        print(f"{probability:.3f} {name}")

    body = ssld.load_backbone(arguments.file, features_only=True)
    with torch.no_grad():
        for feature_map in body(pixels):
            print(f"feature map {list(feature_map.shape)}")
    return answer


if __name__ == "__main__":
    main()
