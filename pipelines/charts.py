"""The report's curves, as inline SVG that takes its text colour from the page. Only the report imports this: matplotlib is slow to load."""

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.table import Row

# Okabe and Ito's colours: told apart by most eyes, readable on white and on black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_INK = "#010203"  # stands for the page's text colour


@dataclass(frozen=True)
class Panel:
    """One small diagram: its title, the metrics it shows by name, and the factor they are shown with."""

    title: str
    names: dict[str, str]
    factor: float = 1.0


PANELS = (
    Panel("loss", {"loss": "loss"}),
    Panel(
        "accuracy in %",
        {
            "accuracy": "training accuracy",
            "val_top1": "top-1",
            "agreement": "training agreement",
            "val_agreement": "agreement",
        },
        100,
    ),
    Panel("AP", {"val_AP": "AP", "val_AP50": "AP50"}, 100),
    Panel("learning rate", {"lr": "learning rate"}),
)


@dataclass(frozen=True)
class Chart:
    """An SVG element and the words that stand for it."""

    svg: str
    alt: str


def curves(stage: str, metrics: list[dict[str, Any]]) -> Chart | None:
    """The curves of one stage from its metrics.jsonl; None when it logged nothing that is drawn."""
    panels = [(panel, found) for panel in PANELS if (found := _series(panel, metrics))]
    if not panels:
        return None
    with matplotlib.rc_context(_style(stage)):
        figure = Figure(figsize=(3.1 * len(panels), 2.4), layout="constrained")
        words = []
        for axes, (panel, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for label, steps, values in found:
                colour = COLOURS[list(panel.names.values()).index(label)]  # the same in every stage
                axes.plot(
                    steps, values, color=colour, label=label, marker="o" if len(steps) < 4 else None, markersize=4
                )
                words.append(f"{label} from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}")
            _dress(axes, panel.title, legend=len(found) > 1)
            axes.set_xlabel("step")
        return Chart(_svg(figure), f"Curves of stage {stage}: {'; '.join(words)}.")


def bars(rows: list[Row]) -> Chart | None:
    """Top-1 and AP of the table's rows side by side; None when there is no number yet."""
    measures = [("top-1 in %", 0), ("detector AP", 2)]
    drawn = [
        (title, [(row.name, 100 * value) for row in rows if (value := row.values[column]) is not None])
        for title, column in measures
    ]
    drawn = [(title, values) for title, values in drawn if values]
    if not drawn:
        return None
    colours = {row.name: COLOURS[number % len(COLOURS)] for number, row in enumerate(rows)}
    with matplotlib.rc_context(_style("table of results")):
        figure = Figure(
            figsize=(4.2 * len(drawn), 0.5 + 0.36 * max(len(values) for _, values in drawn)), layout="constrained"
        )
        words = []
        for axes, (title, values) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            names = [name for name, _ in values]
            container = axes.barh(
                names, [value for _, value in values], color=[colours[name] for name in names], height=0.6
            )
            axes.bar_label(container, fmt="%.1f", padding=3, color=_INK)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            _dress(axes, title, legend=False)
            axes.grid(visible=False)
            axes.xaxis.set_visible(False)
            words.append(f"{title}: " + ", ".join(f"{name} {value:.1f}" for name, value in values))
        return Chart(_svg(figure), f"Bars. {'; '.join(words)}.")


def _series(panel: Panel, metrics: list[dict[str, Any]]) -> list[tuple[str, list[int], list[float]]]:
    found = []
    for name, label in panel.names.items():
        points = [
            (line["step"], panel.factor * line[name]) for line in metrics if isinstance(line.get(name), int | float)
        ]
        if points:
            found.append((label, [step for step, _ in points], [value for _, value in points]))
    return found


def _style(name: str) -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # the same bytes for the same curves, other ids in every chart of a page
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _dress(axes: Axes, title: str, *, legend: bool) -> None:
    axes.set_title(title, loc="left")
    axes.set_facecolor("none")
    axes.grid(alpha=0.2, color=_INK, linewidth=0.6)
    if legend:
        axes.legend(frameon=False, fontsize=8)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element: no XML header, no outside address but the name spaces, ink in the page's colour."""
    figure.patch.set_alpha(0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # of groups, the same in every figure
    return svg.replace(_INK, "currentColor")
