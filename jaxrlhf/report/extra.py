"""What the page needs beside what jaxrlhf needs: the extra "report"."""

from importlib.util import find_spec

from jaxrlhf.errors import ConfigError


def need_extra() -> None:
    """Raises ConfigError where Altair or vl-convert, which draws its charts, is not installed."""
    missing = [name for name in ("altair", "vl_convert") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"jaxrlhf report: {' and '.join(missing)} not installed; expected: pip install 'jaxrlhf[report]'"
        )
