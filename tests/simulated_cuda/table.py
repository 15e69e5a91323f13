"""How often the host waits for the GPU: the numbers that a change must not raise, in the units of each row.

A wait is an operation that ends only when the GPU has caught up; an upload is a copy to the GPU that is not `non_blocking`. What a row needs at
least stands in its comment where it has more.
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
    "faster_rcnn": Waits(5, 0),  # needs 1: the NMS of all levels and images is one per level and image
    "cascade_rcnn": Waits(5, 0),  # needs 1
    "mask_rcnn": Waits(5, 4, 1),  # needs 2: and the positives whose masks are filled in on the host
    "cascade_mask_rcnn": Waits(5, 4, 1),  # needs 2
    "pss_det": Waits(5, 0),  # needs 1
    "soft_nms": Waits(5, 0),  # needs 1
    "retinanet": Waits(0, 0),
    "gfl": Waits(0, 10, 1),  # needs 0: the positives are chosen by a mask
    "pkd": Waits(5, 0),  # needs 1
    "ld": Waits(0, 10, 1),  # needs 0
    "adl": Waits(0, 0),
}
PREDICTION = {  # LoadedDetector.predict of one batch: from pixels in memory to objects on the host
    "faster_rcnn": Waits(13, 1),  # needs 2 per batch: NMS of the proposals and of the detections, and one copy
    "cascade_rcnn": Waits(13, 1),
    "mask_rcnn": Waits(16, 1),
    "cascade_mask_rcnn": Waits(16, 1),
    "pss_det": Waits(13, 1),
    "soft_nms": Waits(46, 1),  # reads each of 30 candidates; needs 2 per batch: soft NMS is work for the host
    "retinanet": Waits(9, 0),  # needs 1 or 2 per batch
    "gfl": Waits(8, 0),  # needs 1 or 2 per batch
}
LOOPS = {  # a step of the training loops: everything between two logged steps, with B images
    "train.py, faster_rcnn": Waits(5, 0),  # needs 1
    "train.py, gfl": Waits(0, 10, 1),  # needs 0
    "distill.py, live": Waits(0, 0),
    "distill.py, store": Waits(0, 0),
    "distill.py, features": Waits(0, 0),
    "teach.py": Waits(0, 0),
}
BATCHES = {  # a batch of the commands of stage 1: (waits, blocking uploads, non_blocking uploads from pageable memory)
    "write_soft_labels.py": (5, 0, 0),  # needs 1: the records
    "evaluate.py": (0, 1, 0),  # needs no upload
    "curate.py": (3, 0, 1),  # needs 1, from pinned memory
    "prototypes.py": (2, 0, 1),  # needs 1, from pinned memory
}
