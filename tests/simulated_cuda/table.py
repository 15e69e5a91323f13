"""How often the host waits for the GPU: the numbers that a change must not raise, in the units of each row.

A wait is an operation that ends only when the GPU has caught up; an upload is a copy to the GPU that is not `non_blocking`.
"""

from typing import NamedTuple


class Waits(NamedTuple):
    """Waits of a batch of B images: B times `per_image`, and `per_batch`; blocking `uploads` per batch."""

    per_image: int
    per_batch: int
    uploads: int = 0

    def of(self, images: int) -> tuple[int, int]:
        """(waits, uploads) of a batch of so many images."""
        return self.per_image * images + self.per_batch, self.uploads


TRAINING = {  # a step: forward and backward pass, optimizer
    "faster_rcnn": Waits(0, 1),  # NMS: how many rounds it takes follows from values
    "cascade_rcnn": Waits(0, 1),
    "mask_rcnn": Waits(0, 2),  # and the positives whose masks are filled in on the host
    "cascade_mask_rcnn": Waits(0, 2),
    "pss_det": Waits(0, 1),
    "soft_nms": Waits(0, 1),
    "retinanet": Waits(0, 0),
    "gfl": Waits(0, 0),
    "pkd": Waits(0, 1),
    "ld": Waits(0, 0),
    "adl": Waits(0, 0),
}
PREDICTION = {  # LoadedDetector.predict of one batch: from pixels in memory to objects on the host
    "faster_rcnn": Waits(0, 2),  # NMS of the proposals, and one copy to the host
    "cascade_rcnn": Waits(0, 2),
    # A third wait for masks: NMS on the host decides on which boxes the mask head runs, and its maps are copied after that.
    "mask_rcnn": Waits(0, 3),
    "cascade_mask_rcnn": Waits(0, 3),
    "pss_det": Waits(0, 2),
    "soft_nms": Waits(0, 2),
    "retinanet": Waits(0, 1),
    "gfl": Waits(0, 1),
}
LOOPS = {  # a step of the training loops: everything between two logged steps, with B images
    "train.py, faster_rcnn": Waits(0, 1),
    "train.py, gfl": Waits(0, 0),
    "distill.py, live": Waits(0, 0),
    "distill.py, store": Waits(0, 0),
    "distill.py, features": Waits(0, 0),
    "teach.py": Waits(0, 0),
}
BATCHES = {  # a batch of the commands of stage 1: (waits, blocking uploads, non_blocking uploads from pageable memory)
    "write_soft_labels.py": (
        2,
        0,
        0,
    ),  # the records; and before the first batch, the check of the teacher, in batches as large
    "evaluate.py": (0, 0, 0),
    "curate.py": (1, 0, 0),
    "prototypes.py": (1, 0, 0),
}
