"""One HTML file with all that it needs: the charts' library, the numbers, the texts. It asks no server for anything."""

import functools
import json
import os
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from etils import epath

from jaxrlhf.errors import ConfigError
from jaxrlhf.report.content import content_of, packed
from jaxrlhf.report.runs import read_runs


def write_page(paths: Sequence[str], out: str) -> int:
    """Writes the page of the runs to ``out``, a path or gs://: how many bytes it has."""
    html = page_of(content_of(read_runs(paths))).encode()
    file = epath.Path(out)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(html)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror or error}; expected a file that can be written") from None
    return len(html)


def page_of(content: dict[str, Any]) -> str:
    """The page, whose numbers are ``content``."""
    parts = {
        "STYLE": read("page.css"),
        "CONTENT": escaped(packed(content)),
        "LIBRARY": library(),
        "SCRIPT": read("page.js"),
    }
    html = read("page.html")
    for name, text in parts.items():  # in one pass each: what is put in may hold another's mark
        before, after = html.split(f"/*{name}*/", 1)
        parts[name], html = before + text, after
    return "".join(parts.values()) + html


def read(name: str) -> str:
    return resources.files("jaxrlhf.report").joinpath(name).read_text("utf-8")


def escaped(content: dict[str, Any]) -> str:
    """JSON that can't end the script element that it is in, whatever a response holds."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").encode("utf-8", errors="replace").decode()


GLOBALS = "window.vegaEmbed = vegaEmbed;"


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script, 0.9 MB. To bundle them takes seconds, so they are kept in
    ~/.cache/jaxrlhf for each version."""
    import vl_convert

    kept = Path(os.path.expanduser("~/.cache/jaxrlhf")) / f"vega-{version('vl-convert-python')}.js"
    if kept.exists():
        return kept.read_text("utf-8")
    script = vl_convert.javascript_bundle(GLOBALS).replace("</script", "<\\/script")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(script, "utf-8")
        os.replace(beside, kept)
    except OSError:  # a home that can't be written: bundled again the next time
        pass
    return script
