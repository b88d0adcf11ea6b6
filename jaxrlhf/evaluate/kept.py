"""Evaluations beside the run that they are of: a file each, which no other evaluation replaces."""

import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxrlhf.log.run_dir import is_local

FOLDER = "evaluations"


def keep(report: Mapping[str, Any], options: Mapping[str, Any]) -> epath.Path:
    """Writes a report, with the options it was made with, as RUN/evaluations/STEP-TIME.json: its path. Raises OSError
    where it can't be written."""
    folder, now = epath.Path(report["run"]) / FOLDER, time.localtime()
    whole = {"written": time.strftime("%Y-%m-%dT%H:%M:%S", now), "options": dict(options), **report}
    text = json.dumps(whole, ensure_ascii=False).encode("utf-8", errors="replace")
    stem = f"{report['step']:06d}-{time.strftime('%Y%m%d-%H%M%S', now)}"
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"{stem}.json" if at == 1 else f"{stem}-{at}.json" for at in itertools.count(1))
    return next(folder / name for name in names if write_new(folder / name, text))


def write_new(path: epath.Path, text: bytes) -> bool:
    """Writes a file that is not there yet; False where it is."""
    if path.exists():
        return False
    if not is_local(path):
        path.write_bytes(text)
        return True
    try:
        with open(path, "xb") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True
