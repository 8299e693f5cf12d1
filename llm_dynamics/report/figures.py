"""Figures: frames in, plotly figures out. They draw on transparent ground, so that any page can carry them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llm_dynamics.frames import family_curves, squeezing_curves
from llm_dynamics.report.families import FamilyStyle, ordered, style_of
from llm_dynamics.report.text import for_plotly, token_label
from llm_dynamics.report.tokens import TokenHistory, token_histories
from llm_dynamics.runlog import RunLog, RunLogs

DIVERGING = [[0.0, "#b93a06"], [0.25, "#e9a27e"], [0.5, "#f4f2ee"], [0.75, "#86b4dd"], [1.0, "#0b5cad"]]
"""Fall to rise, distinguishable with every common colour vision."""


@dataclass(frozen=True)
class Panel:
    """One small multiple of the squeezing figure.

    Attributes:
        column: The column of `squeezing_curves`.
        title: What it is called.
        says: What it tells, in one clause.
    """

    column: str
    title: str
    says: str


PANELS = (
    Panel("p_label", "p(y)", "probability of the response's own next token"),
    Panel("p_other", "p(y*)", "probability of the likeliest other token"),
    Panel("collision", "Σ p²", "collision probability: 1 when one token has it all"),
    Panel("tau0", "τ₀", "threshold: tokens likelier than this gain when y is pushed down a little"),
    Panel("riser_mass", "riser mass", "probability already held by the tokens that would gain"),
    Panel("moved_to_other", "moved into y*", "probability that one push-down hands to y*"),
    Panel("log1m_p_other", "log(1 − p(y*))", "nats left for everything but y*"),
    Panel("entropy", "entropy", "nats; 0 when the next token is certain"),
)


def curves_figure(runs: RunLogs, *, per_token: bool = False, delta: bool = True) -> go.Figure:
    """Draw the curve of each family: one panel per run, the y axis shared where changes are shown.

    Args:
        runs: The runs, in the order of the panels.
        per_token: Log-prob per token instead of per response.
        delta: Change since the first observation instead of the value itself.

    Returns:
        The figure. Bands (10th to 90th percentile over probes) are off; a button shows them.
    """
    names = list(runs.runs)
    figure = make_subplots(
        cols=len(names),
        shared_yaxes=delta,
        subplot_titles=[for_plotly(name) for name in names],
        horizontal_spacing=0.05,
    )
    named: set[str] = set()
    for col, name in enumerate(names, start=1):
        for trace in curve_traces(family_curves(runs[name], per_token=per_token, delta=delta)):
            trace.showlegend = trace.meta["role"] == "mean" and trace.name not in named
            named |= {trace.name} if trace.showlegend else set()
            figure.add_trace(trace, row=1, col=col)
    bands = [place for place, trace in enumerate(figure.data) if trace.meta["role"] == "band"]
    buttons = [
        {"label": label, "method": "restyle", "args": [{"visible": shown}, bands]}
        for label, shown in (("mean", False), ("mean and 10–90 % of probes", True))
    ]
    figure.update_layout(
        **_plain(), height=480, updatemenus=[{"buttons": buttons, "type": "buttons", "direction": "left", "y": 1.2}]
    )
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(title_text=curve_title(per_token=per_token, delta=delta), col=1)
    return figure


def curve_title(*, per_token: bool, delta: bool) -> str:
    """Return the title of the y axis of a curve."""
    return f"{'change of ' if delta else ''}log-prob, nats per {'token' if per_token else 'response'}"


def curve_traces(curves: pd.DataFrame) -> list[go.Scatter]:
    """Return two traces per family of a `family_curves` frame: its band (not visible) and its mean.

    Each carries `meta = {"family": ..., "role": "band" | "mean"}`.
    """
    traces = []
    for family in ordered(curves["family"]):
        own = curves[curves["family"] == family]
        style = style_of(family)
        shared: dict[str, Any] = {"name": for_plotly(family), "legendgroup": family}
        finite = own[own["n"] > 0]
        steps = finite["step"].tolist()
        band = go.Scatter(
            x=steps + steps[::-1],
            y=_short(finite["high"]) + _short(finite["low"][::-1]),
            mode="lines",
            line={"width": 0, "color": style.light},
            fill="toself",
            fillcolor=_faint(style.light),
            hoverinfo="skip",
            visible=False,
            showlegend=False,
            meta={"family": family, "role": "band"},
            **shared,
        )
        mean = go.Scatter(
            x=own["step"].tolist(),
            y=_short(own["mean"]),
            customdata=list(zip(_short(own["low"]), _short(own["high"]), own["n"].tolist(), strict=True)),
            hovertemplate=(
                f"<b>{for_plotly(family)}</b><br>step %{{x}}: %{{y:.4~g}} nats<br>"
                "10–90 %: %{customdata[0]:.4~g} … %{customdata[1]:.4~g}<br>over %{customdata[2]} probes<extra></extra>"
            ),
            meta={"family": family, "role": "mean"},
            **_line(style),
            **shared,
        )
        traces += [band, mean]
    return traces


def squeezing_figure(runs: RunLogs) -> go.Figure:
    """Draw the squeezing statistics of chosen and rejected as small multiples, two rows of panels per run."""
    names, n_cols = list(runs.runs), 4
    n_rows = math.ceil(len(PANELS) / n_cols)
    titles = [f"{for_plotly(name)}: {panel.title}" for name in names for panel in PANELS]
    figure = make_subplots(rows=n_rows * len(names), cols=n_cols, subplot_titles=titles, horizontal_spacing=0.06)
    for run_place, name in enumerate(names):
        curves = squeezing_curves(runs[name])
        for place, panel in enumerate(PANELS):
            for trace in panel_traces(curves, panel):
                trace.showlegend = place == 0 and run_place == 0
                figure.add_trace(trace, row=run_place * n_rows + place // n_cols + 1, col=place % n_cols + 1)
    figure.update_layout(**_plain(), height=260 * n_rows * len(names))
    return figure


def panel_traces(curves: pd.DataFrame, panel: Panel) -> list[go.Scatter]:
    """Return one trace per family of interest of a `squeezing_curves` frame for one panel."""
    traces = []
    for family in squeezing_families(curves["family"]):
        own = curves[curves["family"] == family]
        if own[panel.column].isna().all():
            continue  # not measured
        traces.append(
            go.Scatter(
                x=own["step"].tolist(),
                y=_short(own[panel.column]),
                name=for_plotly(family),
                legendgroup=family,
                hovertemplate=f"<b>{for_plotly(family)}</b><br>step %{{x}}: %{{y:.4~g}}<extra></extra>",
                meta={"family": family, "role": "mean"},
                **_line(style_of(family)),
            )
        )
    return traces


def squeezing_families(families: Iterable[str]) -> list[str]:
    """Return the families whose squeezing is shown: chosen and rejected, or else the first two there are."""
    seen = ordered(families)
    return [family for family in ("chosen", "rejected") if family in seen] or seen[:2]


def token_heatmap(run: RunLog, probe_id: str) -> go.Figure:
    """Draw how the log-prob of each token of one probe changed since the first observation.

    Args:
        run: The run log.
        probe_id: A probe that kept its tokens; `pick_heatmap_probe` finds one.

    Returns:
        Tokens across in their order, observations down, colour = change in nats on a symmetric diverging scale.

    Raises:
        ValueError: Where the run kept no tokens of this probe.
    """
    histories = token_histories(run, [probe_id])
    if not histories:
        raise ValueError(f"the run log at {run.path} keeps no tokens of probe {probe_id!r}; see meta.json")
    history = histories[0]
    figure = go.Figure(
        go.Heatmap(
            z=[_short(row) for row in history.change],
            y=[str(step) for step in history.steps],
            customdata=_hover(history),
            colorscale=DIVERGING,
            zmin=-history.limit,
            zmax=history.limit,
            colorbar={"title": {"text": "Δ nats"}, "thickness": 12},
            hovertemplate=(
                "<b>%{customdata[0]}</b> at step %{y}<br>change %{z:+.3f} nats<br>log-prob %{customdata[1]}, "
                "rank %{customdata[2]}<br>greedy token: %{customdata[3]}<extra></extra>"
            ),
        )
    )
    labels = [for_plotly(token_label(token)) for token in history.tokens]
    figure.update_layout(**_plain(), height=min(180 + 20 * len(history.steps), 720))
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=-60, showgrid=False)
    figure.update_yaxes(title_text="optimizer step", type="category", autorange="reversed", showgrid=False)
    return figure


def _hover(history: TokenHistory) -> list[list[list[Any]]]:
    tokens = [for_plotly(token_label(token, 40)) for token in history.tokens]
    return [
        [
            [token, f"{logp:.3f}", int(rank), for_plotly(token_label(greedy, 40))]
            for token, logp, rank, greedy in zip(tokens, *columns, strict=True)
        ]
        for columns in zip(history.logp, history.rank, history.greedy, strict=True)
    ]


def _line(style: FamilyStyle) -> dict[str, Any]:
    return {
        "mode": "lines+markers",
        "line": {"color": style.light, "dash": style.dash, "width": style.width},
        # a few markers tell lines apart; one per observation would hide them
        "marker": {"symbol": style.symbol, "size": 6, "color": style.light, "maxdisplayed": 6},
    }


def _plain() -> dict[str, Any]:
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 60, "r": 20, "t": 60, "b": 60},
        "font": {"size": 13},
    }


def _faint(color: str) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"


def _short(values: Iterable[float]) -> list[float | None]:
    """Round to six significant digits, with None for what is not finite: JSON knows neither NaN nor infinity."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
