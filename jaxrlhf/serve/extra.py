"""What serving over HTTP needs beside what jaxrlhf needs: the extra "serve"."""

from importlib.util import find_spec

from jaxrlhf.errors import ConfigError


def need_extra() -> None:
    """Raises ConfigError where starlette, uvicorn or prometheus_client is not installed."""
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"jaxrlhf serve: {' and '.join(missing)} not installed; expected: pip install 'jaxrlhf[serve]'"
        )
