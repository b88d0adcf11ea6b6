"""Code from outside the package, named "package.module:NAME": installed, in the working directory, or beside a config
that was loaded."""

import importlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxrlhf.errors import nearest, one_line

SHAPE = 'expected "package.module:NAME"'
PACKAGE = Path(__file__).parent
FOLDERS: list[str] = []  # of the configs


def raised_in(package: Path, error: BaseException) -> bool:
    """Whether a raise statement of ``package`` raised ``error``, so that its message was written for the user."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return package in Path(last.filename).parents and (last.line or "").startswith("raise ")


def look_beside(config: os.PathLike | str) -> None:
    """Modules beside this config file can be imported from now on. Not those of a run directory: its folders
    (tensorboard, tokenizer) would pass for packages."""
    path = Path(config).absolute()
    if path.is_file() and not (path.parent / "checkpoints").exists() and str(path.parent) not in FOLDERS:
        FOLDERS.append(str(path.parent))


def folders() -> list[str]:
    """Where modules are looked for that are not installed: the working directory, then beside the configs."""
    return list(dict.fromkeys([os.getcwd(), *FOLDERS]))


def extend_path() -> None:
    """Installed modules come first; the jaxrlhf script, unlike python -m, starts without the working directory."""
    sys.path.extend(folder for folder in folders() if folder not in sys.path)


def find(name: str) -> Any:
    """What is called ``name``. Raises ValueError, in one line, where there is none or its module can't be imported."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ValueError(SHAPE)
    module = load(module_name)
    if not hasattr(module, attribute):
        names = sorted(key for key in vars(module) if not key.startswith("_"))
        raise ValueError(f"{module_name} has no {attribute}; {nearest(attribute, names, SHAPE)}")
    return getattr(module, attribute)


def load(module_name: str) -> ModuleType:
    """The module. Raises ValueError, in one line, where it is missing, or whatever it raises while it is imported."""
    extend_path()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            beside = [path.stem for folder in folders() for path in sorted(Path(folder).glob("*.py"))]
            hint = f"{SHAPE}, of an installed module or of one in {', '.join(folders())}"
            raise ValueError(f"no module {error.name}; {nearest(module_name, beside, hint)}") from None
        raise ValueError(f"importing {module_name}: {describe(error)}") from error  # what it imports is missing
    except Exception as error:
        raise ValueError(f"importing {module_name}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error of code from outside in one line, with the line of that code that it came from."""
    text = one_line(str(error).strip().split("\n\n")[0])
    said = f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    last = frames_outside(error)[-1:]
    return f"{said} ({last[0].filename}:{last[0].lineno})" if last else said


def frames_outside(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of code that is neither ours, nor Python's, nor installed."""
    library = sysconfig.get_path("stdlib")
    known = lambda path: PACKAGE in Path(path).parents or "site-packages" in path or path.startswith((library, "<"))
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not known(frame.filename) and Path(frame.filename).name != "jaxrlhf"]
