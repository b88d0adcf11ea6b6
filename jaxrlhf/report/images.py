"""Charts as PNG files, for papers: the same specifications, drawn without a browser."""

import re
from collections.abc import Sequence

from etils import epath

from jaxrlhf.errors import ConfigError
from jaxrlhf.report import charts
from jaxrlhf.report.content import content_of
from jaxrlhf.report.runs import read_runs

WIDTH, SCALE = 420, 3  # pixels before SCALE: 1260 across, a column of a paper at 360 dots an inch


def write_images(paths: Sequence[str], folder: str) -> list[str]:
    """A file for every chart of the page in ``folder``: their names."""
    import vl_convert

    content, there = content_of(read_runs(paths)), epath.Path(folder)
    try:
        there.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--png {folder}: {error.strerror or error}; expected a folder") from None
    kinds = charts.specifications(tuple(each["name"] for each in content["series"]), legend=True)
    written = []
    for chart in (chart for part in content["parts"] for chart in part["charts"]):
        unit = f" ({chart['unit']})" if chart["unit"] else ""
        marks = [mark for mark in content.get("alarms", []) if chart["title"] in mark["metrics"]]
        kind = kinds[chart["kind"]]
        whole = kind | {
            "width": WIDTH,
            "height": chart.get("height", kind["height"]),
            "title": {"text": chart["title"] + unit, "anchor": "start", "fontSize": 12},
            "datasets": {**kind.get("datasets", {}), "rows": chart["rows"], "alarms": marks},
            "config": {"background": "white", "view": {"stroke": None}},
        }
        name = re.sub(r"\W+", "_", chart["title"]).strip("_") + ".png"
        (there / name).write_bytes(vl_convert.vegalite_to_png(whole, scale=SCALE))
        written.append(name)
    return written
