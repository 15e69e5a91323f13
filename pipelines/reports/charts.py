"""Plots of the report, as inline SVG that takes its colors from the page. Only the report imports this module: matplotlib is slow to load."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Placeholders for the page's text color and its series 0, 1, ...; the page has a light and a dark set of colors.
_INK = "#010203"
_SERIES = tuple(f"#0102{10 + number}" for number in range(6))
COLORS = len(_SERIES)
_SIZE = (3.5, 2.35)  # width, height of one plot in inches


@dataclass(frozen=True)
class Panel:
    """One small plot: title, {metric: label}, and the factor that the values are multiplied by.

    Attributes:
        parts: {word: metrics}: the title names only the words whose metrics are in the plot; empty: `title` as it is.
    """

    title: str
    names: dict[str, str]
    factor: float = 1.0
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def title_of(self, labels: Sequence[str]) -> str:
        """Return the title for a plot of the curves with these labels."""
        plotted = {name for name, label in self.names.items() if label in labels}
        words = [word for word, metrics in self.parts.items() if plotted & set(metrics)]
        return f"{' and '.join(words)} in %" if words else self.title


PANELS = (
    Panel("loss", {"loss": "training", "val_loss": "evaluation"}),
    Panel(
        "accuracy in %",
        {
            "accuracy": "training accuracy",
            "val_top1": "top-1",
            "agreement": "training agreement",
            "val_agreement": "agreement",
        },
        100,
        {"accuracy": ("accuracy", "val_top1"), "agreement": ("agreement", "val_agreement")},
    ),
    Panel("KL to the teacher, nats", {"val_kl": "KL"}),
    Panel("AP in %", {"val_AP": "AP", "val_AP50": "AP50"}, 100),
    Panel("learning rate", {"lr": "learning rate"}),
)


@dataclass(frozen=True)
class Chart:
    """An SVG element, its title and its alternative text."""

    title: str
    svg: str
    alt: str


def curves(stage: str, metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Plot the curves of one stage from its metrics.jsonl, one plot for each panel with data."""
    charts = []
    for panel in PANELS:
        lines = _series(panel, metrics)
        if not lines:
            continue
        with matplotlib.rc_context(_style(f"{stage} {panel.title}")):
            figure, axes = _figure()
            words = []
            for label, steps, values in lines:
                color = _SERIES[list(panel.names.values()).index(label)]  # the same in every stage
                axes.plot(
                    steps, values, color=color, label=label, marker="o" if len(steps) < 8 else None, markersize=3.5
                )
                words.append(f"{label} from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}")
            _dress(axes, legend=len(lines) > 1)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            title = panel.title_of([label for label, _, _ in lines])
            charts.append(Chart(title, _svg(figure), f"{title}, stage {stage}: {'; '.join(words)}."))
    return charts


def precision_recall(
    name: str, recall: Sequence[float], lines: Mapping[str, Sequence[float]], mean: Sequence[float] | None
) -> Chart:
    """Plot precision over recall.

    Args:
        name: name of the stage or group; makes the ids in the SVG unique.
        recall: recall values of all curves.
        lines: {name: precision}. Up to six curves get a color and a legend entry; more are all drawn in pale grey.
        mean: mean of the curves, drawn in the text's color.
    """
    named = len(lines) <= COLORS
    with matplotlib.rc_context(_style(f"{name} precision and recall")):
        figure, axes = _figure()
        for number, (label, precision) in enumerate(lines.items()):
            look: dict[str, Any] = (
                {"color": _SERIES[number], "label": _plain(label)} if named else {"color": _INK, "alpha": 0.18}
            )
            axes.plot(recall, precision, linewidth=1.4, **look)
        if mean is not None:
            axes.plot(recall, mean, color=_INK, linewidth=2.2, label="mean of the classes")
        _dress(axes, legend=named or mean is not None)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        described = dict(lines) if named else {}
        described |= {"mean of the classes": mean} if mean is not None else {}
        words = [f"{label} {100 * sum(values) / len(values):.1f}" for label, values in described.items()]
        alt = f"Precision over recall of {name}; mean precision in %: {', '.join(words)}."
        return Chart("precision over recall", _svg(figure), alt)


def _series(panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int], list[float]]]:
    series = []
    for name, label in panel.names.items():
        points = [
            (line["step"], panel.factor * line[name]) for line in metrics if isinstance(line.get(name), int | float)
        ]
        if len(points) > 1:
            series.append((label, [step for step, _ in points], [value for _, value in points]))
    return series


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _style(name: str) -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # reproducible bytes, and unique ids for every plot of a page
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "lines.linewidth": 1.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _dress(axes: Axes, *, legend: bool) -> None:
    axes.set_facecolor("none")
    axes.grid(alpha=0.15, color=_INK, linewidth=0.6)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_alpha(0.4)
    axes.locator_params(axis="x", nbins=5)
    if legend:
        axes.legend(frameon=False, fontsize=8).set_in_layout(False)  # long names must not shrink the plot


def _plain(label: str, most: int = 26) -> str:
    """Make a name safe for the legend: shortened, since matplotlib parses text between $ as mathematics and hides labels that begin with _."""
    short = label if len(label) <= most else f"{label[: most - 1]}…"
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")


def _svg(figure: Figure) -> str:
    """Return the figure as an SVG element without XML header, without addresses except name spaces, with the page's colors."""
    figure.patch.set_alpha(0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # ids of groups repeat in every figure
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)  # the page sets the size
    for number, color in enumerate(_SERIES):
        svg = svg.replace(color, f"var(--series-{number})")
    return svg.replace(_INK, "currentColor")
