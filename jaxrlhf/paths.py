"""Which paths can be opened here: local ones, and those of the object stores whose library is installed."""

import os

STORES = {"gs": "jaxrlhf[gcs]", "s3": "s3fs"}  # scheme -> what to install for it
EXPECTED = "expected a local path or gs://BUCKET/PATH"


def malformed(path: os.PathLike | str) -> str | None:
    """Why ``path`` is none that can be opened on any machine; None where it may be one."""
    text = os.fspath(path)
    if "\0" in text:
        return f"holds a NUL character; {EXPECTED}"
    scheme, mark, rest = text.partition("://")
    if mark and scheme not in STORES:
        return f"{scheme}:// can't be opened; {EXPECTED}"
    return f"names no bucket; {EXPECTED}" if mark and not rest.strip("/") else None


def unreachable(path: os.PathLike | str) -> str | None:
    """Why nothing can be opened at ``path`` on this machine, whatever is there; None where something can."""
    scheme, mark, _ = os.fspath(path).partition("://")
    if (why := malformed(path)) or not mark:
        return why
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        install = f"pip install '{STORES[scheme]}'"
        return f"no library for {scheme}:// is installed; expected a local path, or after: {install}"
    return None


def need_reachable(path: os.PathLike | str, where: str) -> None:
    """Raises ValueError, in one line that starts with ``where``, if nothing can be opened at ``path``."""
    if why := unreachable(path):
        raise ValueError(f"{where}: {os.fspath(path)!r}: {why}")
