"""Distill with your own loss: the reverse KL divergence, added to the loss of SSLD.

python examples/distill_own_loss.py --images photos --teacher timm:resnet50d --student random:resnet18d --output runs/reverse_kl
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import ssld


def reverse_kl(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """KL(student || teacher) of the softmax of both, summed over the images of the batch."""
    student, teacher = F.log_softmax(student_BK.float(), -1), F.log_softmax(teacher_BK.float(), -1)
    return F.kl_div(teacher, student, reduction="sum", log_target=True)


def main(argv: Sequence[str] | None = None, **settings: Any) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of images; labels are not needed")
    parser.add_argument("--teacher", required=True, help="model reference of the teacher")
    parser.add_argument("--student", required=True, help="model reference of the student")
    parser.add_argument("--output", required=True, help="run directory")
    arguments = parser.parse_args(argv)

    ssld.register_loss("reverse_kl", reverse_kl)
    length = {"batch_size": 64, "train_epochs": 100}  # the recipe's 1024 and 360 are for ImageNet on several GPUs
    return ssld.distill(
        "resnet50d",  # the recipe with the other settings
        data={"train": [arguments.images], "val": None},
        teacher={"model": arguments.teacher},
        student={"model": arguments.student},
        losses=[{"name": "symmetric_kl"}, {"name": "reverse_kl", "weight": 0.5}],
        output=arguments.output,
        **length | settings,
    )


if __name__ == "__main__":
    main()
