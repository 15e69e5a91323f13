"""Train a detector from Python and print the AP of each class.

python examples/train_detector.py --backbone runs/mine/student.safetensors --images photos --train train.json --val val.json --output runs/example
"""

import argparse
from collections.abc import Sequence

import ssld


def main(argv: Sequence[str] | None = None) -> dict[str, float | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="backbone file, timm:NAME or random:NAME")
    parser.add_argument("--images", required=True, help="folder of the images of both files")
    parser.add_argument("--train", required=True, help="COCO JSON to train on")
    parser.add_argument("--val", required=True, help="COCO JSON to evaluate on")
    parser.add_argument("--output", required=True, help="run directory")
    parser.add_argument("--recipe", default="faster_rcnn", help="YAML file, or a name in stage2_detect/configs")
    arguments = parser.parse_args(argv)
    result = ssld.train(
        arguments.recipe,
        backbone=arguments.backbone,
        data={
            "train_annotations": arguments.train,
            "train_images": arguments.images,
            "val_annotations": arguments.val,
            "val_images": arguments.images,
        },
        batch_size=4,
        output=arguments.output,
    )
    per_class: dict[str, float | None] = result["metrics"]["per_class"]  # None: no object of this class in the images
    for name, ap in per_class.items():
        print(f"{name:20} {'-' if ap is None else f'{100 * ap:.1f}'}")
    return per_class


if __name__ == "__main__":
    main()
