"""Eight fake CPU devices, or with ``-m gpu`` those that are there, and compiled programs kept between runs of the
suite."""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.support import compiler
from tests.support.shares import in_share

jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "jaxrlhf-test-xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="I/N", help="of the chosen tests, those of share I of N, counted from 0")


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are imported, which may ask for devices. A background job ignores SIGINT, and so would all that it
    starts: tests of signals could not see it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr != "gpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
        compiler.use_cheap_compiler()


# what compiles no model: the tier -m fast
FAST = ("config", "data", "log", "ops", "rewards", "tpu", "test_layers.py", "test_optim.py", "test_sharding.py")
FAST += tuple(f"models/test_{name}.py" for name in ("families", "gguf_tokenizer", "hf_headers", "published"))
FAST += (
    "launch/test_config.py",
    "launch/test_gke.py",
    "plan/test_hlo.py",
    "plan/test_cost.py",
    "serve/test_dialogue.py",
)
# but for what takes seconds there
SLOWER = (
    "test_movie_reviews",
    "test_math_answer",
    "the_nearest_batch_really",
    "the_module_prints",
    "libtpu_counts",
    "rewards/test_remote",
    "rewards/test_http_grader",
    "rewards/test_code.py",
    "rewards/test_calls",
    "rewards/test_written_environments",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of the files and folders of FAST, but for those of SLOWER and the nightly ones; leaves out what
    is not in the share that is asked for."""
    here, kept, left_out = Path(__file__).parent, [], []
    for item in items:
        name = item.path.relative_to(here).as_posix()
        share = config.getoption("share")
        mine = share is None or in_share(item.nodeid.partition("[")[0], share)
        (kept if mine else left_out).append(item)
        slower = any(item.iter_markers("nightly")) or any(word in item.nodeid for word in SLOWER)
        if name.startswith(FAST) and not slower:
            item.add_marker("fast")
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tracing makes many objects, and each full collection looks at all that was imported: seldom, and not at those.

    Where most end-to-end tests run, the first worker starts the runs that they share, so that none waits for them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)
    need = sum("root" in getattr(item, "fixturenames", ()) for item in session.items)
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw0" and need > 50:
        shared = shared_folder(session.config._tmp_path_factory)  # type: ignore[attr-defined]
        threading.Thread(target=start_shared_runs, args=(shared,), daemon=True).start()


def start_shared_runs(folder: Path) -> None:
    from tests.support import runs

    with contextlib.suppress(Exception):  # the test that needs them tries again, and says what is wrong
        runs.parts(folder)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder of the real runs that end-to-end tests share, among the workers of one session too."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def all_programs() -> Iterator[None]:
    """Runs of one worker that are alike compile once."""
    from jaxrlhf.run.kept_programs import share_programs

    with share_programs():
        yield


@pytest.fixture(autouse=True)
def programs(request: pytest.FixtureRequest, all_programs) -> Iterator[None]:
    """``all_programs``, but not for a test that replaces code: its programs are of its own."""
    from jaxrlhf.run.kept_programs import KEPT

    own, every = request.node._fixtureinfo.argnames, request.fixturenames
    if "monkeypatch" not in own and "fake" not in every:
        yield
        return
    token = KEPT.set(None)
    yield
    KEPT.reset(token)


@pytest.fixture
def one_device(monkeypatch) -> None:
    """Runs of this process take the first device alone: their programs compile in a fraction of the time."""
    from jaxrlhf import sharding
    from jaxrlhf.run import build, export
    from jaxrlhf.serve import writer

    for module in (build, export, writer):
        monkeypatch.setattr(module, "make_mesh", lambda cfg, *_: sharding.make_mesh(cfg, jax.devices()[:1]))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``jaxrlhf args`` as the script does, in this process; gives (stdout, stderr)."""
    from jaxrlhf.cli import app

    def call(*args: Any, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxrlhf", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert (stop.value.code or 0) == code
        return capsys.readouterr()

    return call
