"""The two audits of `audit.py`: unlabeled photos to annotate next, and labels to look at first."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssld.shared.distributed.processes import DTYPES, describe_processes, start_processes
from ssld.shared.distributed.ranks import from_main_rank, on_main_rank, rank, wait_for_all, world_size
from ssld.shared.errors import UserError
from ssld.shared.run_dir import RunDir
from ssld.shared.wording import count
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.loaders import eval_loader
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.evaluation.label_audit import FILE, write_audit
from ssld.stage2_detect.evaluation.scoring import detect
from ssld.stage2_detect.predict_config import AuditConfig
from ssld.stage2_detect.prediction.annotate_next import (
    Chosen,
    Doubted,
    assemble,
    choose,
    doubt_parts,
    find_photos,
    hashes_of_file,
    write_files,
)
from ssld.stage2_detect.prediction.files import Parts
from ssld.stage2_detect.prediction.part_runs import PartProgress, left_to_do, read_tally, tell_read

if TYPE_CHECKING:
    from ssld.stage2_detect.detector_file import LoadedDetector

PARTLY_LEARNED = (
    "a detector that was trained on these labels has partly learned their mistakes and finds fewer of them; "
    "train on one part and audit the other to find more"
)


def list_next(config: AuditConfig, loaded: "LoadedDetector") -> None:
    """List the photos of `config.images` to annotate next; a killed run continues with the parts that are missing.

    Raises:
        UserError: there are no photos, or none can be read.
    """
    work = find_photos(config)
    accelerator, config = start_processes(config)
    run = RunDir(config, "audit", main=accelerator.is_main_process, scratch=("parts",))
    if run.finished_earlier(from_main_rank(run.status)):
        return
    run.log(*describe_processes(accelerator, config, config.workers))

    # ---- doubts, part by part; parts of a killed run are kept
    parts = Parts(run.path / "parts", work.records, config.batch_size)
    mine, _ = left_to_do(run, work, parts)
    progress = PartProgress(run, parts, mine)
    progress.follow(doubt_parts(config, loaded, accelerator.device, parts, mine, work, progress.add))
    progress.close()
    run.log(*loaded.notes)
    wait_for_all()

    # ---- the files
    def write() -> tuple[dict[str, Any], list[Path]]:
        try:
            photos, unreadable = assemble(config, parts, work)
            chosen = choose(len(photos), config.count, lambda place: hashes_of_file(photos[place].record.path))
            files = write_files(
                run.path, config, loaded, photos, chosen, read_tally(work, unreadable).describe(), run.log
            )
        except UserError:
            parts.delete()  # so that the folder can be used again
            raise
        tell_read(run, config.images, work, unreadable)
        run.log(describe(photos, chosen, files[0]))
        metrics = {
            "photos": len(photos),
            "listed": len(chosen.listed),
            "near_duplicates": len(chosen.copy_of),
            "unreadable": len(unreadable),
            "highest_doubt": photos[0].doubt.total,
            "lowest_doubt_listed": photos[chosen.listed[-1]].doubt.total,
        }
        return metrics, files

    metrics, files = on_main_rank(write)
    accelerator.end_training()
    run.finish(metrics, files)


def describe(photos: list[Doubted], chosen: Chosen, file: Path) -> str:
    """Format the outcome as a line of the log."""
    first, last = (photos[chosen.listed[place]].doubt.total for place in (0, -1))
    copies = f", {count(len(chosen.copy_of), 'near-duplicate')} left out" if chosen.copy_of else ""
    text = f"{count(len(chosen.listed), 'photo')} to annotate next, of {len(photos):,}{copies}: doubt from {first:.2f} to {last:.2f}"
    if first == 0:
        text += " (the detector has no box with a score from the threshold on, so the order says nothing)"
    return f"{text}; {file}"


def check_labels(config: AuditConfig, loaded: "LoadedDetector") -> None:
    """Compare the labels of `config.annotations` with the detector's boxes and list those to look at first.

    Raises:
        UserError: any fault of the file, other classes than the detector's, or an image that cannot be read.
    """
    assert config.annotations is not None
    folder = Path(config.images)
    data = read_coco(
        config.annotations,
        folder,
        training=False,
        class_names=loaded.class_names,
        cache_annotations=config.cache_annotations,
    )
    if not data.images:
        raise UserError(f"{config.annotations}: has no images, so there are no labels to check")
    accelerator, config = start_processes(config)
    run = RunDir(config, "audit", main=accelerator.is_main_process)
    if run.finished_earlier(from_main_rank(run.status)):
        return
    run.log(*describe_processes(accelerator, config, config.workers))
    run.log(data.describe())
    run.tell("annotations", data.file, data.tally)
    sizing = Sizing.of(loaded.resize, short_side=config.short_side, long_side=config.long_side, tta=config.tta)
    loader = eval_loader(
        data, sizing, batch_size=config.batch_size, workers=config.workers, rank=rank(), ranks=world_size()
    )
    detections = detect(
        loaded.model.to(accelerator.device),
        loader,
        device=accelerator.device,
        dtype=DTYPES[config.precision],
        log=run.log,
    )
    metrics, files = {}, []
    if accelerator.is_main_process:
        files = write_audit(run, data, detections, folder=folder, score_threshold=config.least)
        run.log(PARTLY_LEARNED)
        found = json.loads((run.path / FILE).read_text(encoding="utf-8"))
        metrics = {key: found[key] for key in ("images", "labels", "detections", "counts")}
    accelerator.end_training()
    run.finish(metrics, files)
