"""Mean and range over seeds of the rungs of pipelines/ssld_ablation.yaml, as a Markdown table.

    python benchmarks/ablation_table.py runs/ssld_ablation

Stages `NAME`, `NAME_1`, `NAME_2` ... are seeds of one rung; a run that is not finished is left out. Of the pipeline's file only the order of the
stages is read, of a run directory only result.json.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ssld.shared.config.command import USER_ERROR
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import UserError
from ssld.shared.run_dir import read_result

PIPELINE = Path(__file__).resolve().parents[1] / "pipelines" / "ssld_ablation.yaml"
_METRICS = ("top1", "agreement", "kl")


def table(runs: Path, order: Sequence[str] = ()) -> str:
    """The table of the finished runs below a folder: rungs in the order of these names of stages, those without one at the end by name.

    Raises UserError where no run is finished.
    """
    rank = {name: number for number, name in enumerate(order)}
    results = {folder.name: read_result(folder) for folder in runs.iterdir() if folder.is_dir()}
    rungs: dict[str, list[dict[str, float]]] = {}
    for name in sorted(results, key=lambda name: (rank.get(name, len(rank)), name)):
        result = results[name]
        if result and "top1" in result["metrics"]:
            rungs.setdefault(re.sub(r"_\d+$", "", name), []).append(result["metrics"])
    if not rungs:
        raise UserError(f"{runs}: no finished run with a top-1 in it; give the folder that pipelines/run.py wrote")
    lines = ["| rung | seeds | top-1 | agreement | KL to the teacher |", "| --- | --- | --- | --- | --- |"]
    for name, runs_of_rung in rungs.items():
        cells = []
        for metric in _METRICS:
            values = [metrics[metric] for metrics in runs_of_rung if metric in metrics]
            scale = 1 if metric == "kl" else 100
            cells.append(_spread([scale * value for value in values], 3 if metric == "kl" else 1))
        lines.append(f"| {name} | {len(runs_of_rung)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    arguments = parser.parse_args(argv)
    try:
        if not arguments.runs.is_dir():
            raise UserError(f"{arguments.runs}: no such folder")
        print(table(arguments.runs, list(read_yaml(PIPELINE)["stages"])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
