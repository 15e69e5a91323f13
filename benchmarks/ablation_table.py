"""Mean and spread over seeds of the rungs of a pipeline, as a Markdown table.

    python benchmarks/ablation_table.py runs/ssld_ablation

Stages `NAME`, `NAME_1`, `NAME_2` ... are seeds of one rung. Reads the run directories only.
"""

import argparse
import re
import statistics
from pathlib import Path

from shared.run_dir import read_result

_METRICS = ("top1", "agreement", "kl")


def table(runs: Path) -> str:
    """The table, rungs in the order of the stages' start times."""
    rungs: dict[str, list[dict[str, float]]] = {}
    for folder in sorted((path for path in runs.iterdir() if path.is_dir()), key=lambda path: path.stat().st_ctime):
        result = read_result(folder)
        if result and "top1" in result["metrics"]:
            rungs.setdefault(re.sub(r"_\d+$", "", folder.name), []).append(result["metrics"])
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    print(table(parser.parse_args().runs))


if __name__ == "__main__":
    main()
