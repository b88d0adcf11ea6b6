"""The kinds of chart, as Vega-Lite specifications that Altair checks. Their rows come separately: one specification
serves every metric, in the page and in a PNG."""

import functools
from typing import Any

import altair as alt

# after Okabe and Ito (2008), which the colour-blind tell apart; none is near the dark or the light background
COLOURS = ("#2f86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
ALARM = "#d62728"
HEIGHT = 170
QUARTERS = [0, 0.25, 0.5, 0.75, 1]
LINE = 26  # of a chart that has a line for each row, whose height comes with its rows
SHIFT = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"  # without it the page scrolls
SPLITS = ("training", "held out")


@functools.cache
def specifications(series: tuple[str, ...], legend: bool = False) -> dict[str, dict[str, Any]]:
    """Kind of chart -> its specification over the data set "rows" (and, of curves, "alarms").

    Args:
        series: what is told apart by colour, in the order of COLOURS: the runs, or of one run training and held out.
        legend: whether the chart names them itself; in the page they are named once, above all charts.
    """
    colour = alt.Color(
        "series:N",
        scale=alt.Scale(domain=[*series], range=[COLOURS[n % len(COLOURS)] for n in range(len(series))]),
        legend=alt.Legend(title=None, orient="top", labelLimit=300) if legend and len(series) > 1 else None,
    )
    charts = {
        "curve": curve(colour, zero=False),
        "share": curve(colour, zero=True),
        "frontier": frontier(colour),
        "calibration": calibration(colour),
        "histogram": histogram(colour),
        "phases": phases(),
        "win_rates": win_rates(colour),
    }
    return {name: chart.properties(width="container", height=HEIGHT).to_dict() for name, chart in charts.items()}


def curve(colour: alt.Color, zero: bool) -> Any:
    """A metric over the iterations: training as a line, held-out rows as dots on a dashed line, alarms as rules."""
    x = alt.X("step:Q", axis=alt.Axis(title=None, tickMinStep=1, grid=False), scale=alt.Scale(nice=False))
    y = alt.Y("value:Q", axis=alt.Axis(title=None, tickCount=5), scale=alt.Scale(zero=zero))
    rows = alt.Chart(alt.NamedData(name="rows"))
    near = alt.selection_point(nearest=True, on="pointerover", fields=["step"], empty=False, clear="pointerout")
    zoom = alt.selection_interval(bind="scales", translate=SHIFT, zoom="wheel![event.shiftKey]")
    told = [
        alt.Tooltip("run:N"),
        alt.Tooltip("split:N"),
        alt.Tooltip("step:Q"),
        alt.Tooltip("value:Q", format=",.4~g"),
    ]
    common = {"x": x, "y": y, "color": colour, "detail": "run:N"}
    training = rows.transform_filter("datum.split === 'training'").mark_line(strokeWidth=1.6, clip=True)
    held_out = rows.transform_filter("datum.split !== 'training'")
    dashed = held_out.mark_line(strokeWidth=1.4, strokeDash=[4, 3], clip=True)
    dots = held_out.mark_point(filled=True, opacity=1, size=34, clip=True)
    under = rows.mark_point(filled=True, size=45, clip=True).encode(
        **common, opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0)), tooltip=told
    )
    alone = rows.transform_joinaggregate(count="count()", groupby=["run", "split"])
    alone = alone.transform_filter("datum.count === 1").mark_point(filled=True, opacity=1, size=34)
    rules = alt.Chart(alt.NamedData(name="alarms")).mark_rule(color=ALARM, strokeDash=[2, 2], strokeWidth=1.5)
    rules = rules.encode(x="step:Q", tooltip=[alt.Tooltip("run:N"), alt.Tooltip("step:Q"), alt.Tooltip("alarm:N")])
    lines = [layer.encode(**common) for layer in (training, dashed, dots, alone)]
    return alt.layer(lines[0].add_params(zoom), *lines[1:], under.add_params(near), rules)


def frontier(colour: alt.Color) -> Any:
    """The score against the distance from the reference; evaluations are joined in their order."""
    rows = alt.Chart(alt.NamedData(name="rows")).encode(
        x=alt.X(
            "kl:Q",
            axis=alt.Axis(title="KL from the reference, nats", grid=False, tickCount=6),
            scale=alt.Scale(nice=False, padding=8),
        ),
        y=alt.Y("score:Q", axis=alt.Axis(title="score", tickCount=5), scale=alt.Scale(zero=False)),
        color=colour,
        detail=["run:N", "split:N"],
        tooltip=[alt.Tooltip(f"{name}:N") for name in ("run", "split", "step")]
        + [alt.Tooltip(f"{name}:Q", format=",.4~g") for name in ("kl", "score")],
    )
    lines = rows.transform_filter("datum.split !== 'training'").mark_line(strokeWidth=1.2, opacity=0.6)
    lines = lines.encode(order="step:Q")
    dots = rows.mark_point(filled=True, opacity=0.8).encode(
        size=alt.condition("datum.split === 'training'", alt.value(14), alt.value(60))
    )
    return alt.layer(lines, dots)


def calibration(colour: alt.Color) -> Any:
    """The probability of preferences that a reward model predicts, and the share that it is right about."""
    scale = alt.Scale(domain=[0, 1])
    diagonal = alt.Chart(alt.InlineData(values=[{"at": 0.5}, {"at": 1}])).mark_line(strokeDash=[4, 4], color="#999")
    diagonal = diagonal.encode(x="at:Q", y=alt.Y("at:Q", scale=scale))
    dots = alt.Chart(alt.NamedData(name="rows")).mark_point(filled=True, opacity=0.85)
    dots = dots.encode(
        x=alt.X(
            "confidence:Q",
            scale=alt.Scale(domain=[0.5, 1]),
            axis=alt.Axis(title="predicted", grid=False, tickCount=5, format=".1f"),
        ),
        y=alt.Y("accuracy:Q", scale=scale, axis=alt.Axis(title="right", tickCount=5)),
        color=colour,
        size=alt.condition("datum.split === 'training'", alt.value(14), alt.value(60)),
        tooltip=["run:N", "split:N", "step:Q", "confidence:Q", "accuracy:Q"],
    )
    return alt.layer(diagonal, dots)


def histogram(colour: alt.Color) -> Any:
    """Scores of held-out responses: at the first evaluation as an outline, at the last filled."""
    rows = alt.Chart(alt.NamedData(name="rows"))
    x = alt.X("low:Q", axis=alt.Axis(title="score", grid=False), scale=alt.Scale(nice=False))
    y = alt.Y("density:Q", axis=alt.Axis(title="density", tickCount=4), stack=None)
    common = {"x": x, "x2": "high:Q", "y": y, "color": colour}
    told = [
        alt.Tooltip("run:N"),
        alt.Tooltip("step:Q"),
        alt.Tooltip("low:Q", format=".3~g"),
        alt.Tooltip("high:Q", format=".3~g"),
        alt.Tooltip("responses:Q"),
    ]
    last = rows.transform_filter("datum.last").mark_rect(opacity=0.5).encode(**common, y2=alt.datum(0), tooltip=told)
    outline = rows.transform_filter("!datum.last").mark_line(
        interpolate="step-after", strokeWidth=1.6, strokeDash=[3, 2]
    )
    return alt.layer(last, outline.encode(x=x, y=y, color=colour, detail="run:N"))


def win_rates(colour: alt.Color) -> Any:
    """A line for each who compared: the share that was won, and its interval."""
    scale = alt.Scale(domain=[0, 1])
    even = alt.Chart(alt.InlineData(values=[{"at": 0.5}])).mark_rule(strokeDash=[4, 4], color="#999")
    told = [alt.Tooltip(f"{name}:N") for name in ("run", "step", "judge", "against", "options")]
    told += [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("rate", "low", "high", "length_controlled")]
    rows = alt.Chart(alt.NamedData(name="rows")).encode(
        y=alt.Y("who:N", axis=alt.Axis(title=None, labelLimit=210), sort=None), color=colour, tooltip=told
    )
    x = alt.X("low:Q", scale=scale, axis=alt.Axis(title=None, format=".0%", values=QUARTERS, grid=False))
    bars = rows.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q")
    dots = rows.mark_point(filled=True, opacity=1, size=60).encode(x=alt.X("rate:Q", scale=scale))
    return alt.layer(even.encode(x=alt.X("at:Q", scale=scale)), bars, dots)


def phases() -> Any:
    """Seconds, by what they went into."""
    colour = alt.Color(
        "phase:N",
        scale=alt.Scale(range=["#54a24b", "#b0a8b9", "#f58518", "#4c78a8", "#72b7b2", "#e0a1c5"]),
        legend=alt.Legend(title=None, orient="bottom", columns=2),
    )
    return (
        alt.Chart(alt.NamedData(name="rows"))
        .mark_bar(size=22)
        .encode(
            x=alt.X("seconds:Q", axis=alt.Axis(title="seconds", tickCount=5)),
            y=alt.Y("run:N", axis=alt.Axis(title=None, labelLimit=110), sort=None),
            color=colour,
            tooltip=["run:N", "phase:N", alt.Tooltip("seconds:Q", format=".3~g")],
        )
    )
