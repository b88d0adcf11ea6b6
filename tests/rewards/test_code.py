"""Programs that are run against tests: what passes, and what hangs, crashes, forks, prints or takes too much."""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jaxrlhf.hosts.call_timeout import TimedOut, interruptible
from jaxrlhf.rewards import code
from jaxrlhf.rewards.code import MISSING, CodeLimits, RunCode, program_in


def run(program: str, limits: CodeLimits, **test: str) -> dict[str, Any]:
    (found,) = code.run(program, [test or {"input": ""}], limits, False, False, threading.Event())
    return found


def passes(program: str, test: str | dict[str, str], limits: CodeLimits, packages: bool = False) -> bool:
    (found,) = code.passes(program, [test], limits, packages)
    return found


SMALL = CodeLimits(cpu_seconds=5, seconds=20.0, memory_mib=256, file_mib=1, processes=6)
POINT = "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int\n"
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def protections() -> dict[str, bool]:
    """What this machine's kernel allows."""
    found: dict[str, bool] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "say_what_is_missing", lambda path: found.update(json.loads(path.read_text())))
        assert passes("", "pass", SMALL)
    return found


# ---- what passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "test", "expected"),
    [
        (ADD, "assert add(1, 2) == 3", True),
        (ADD, "assert add(1, 2) == 4", False),
        (ADD, "for n in range(9):\n    assert add(n, 1) == n + 1", True),
        (ADD, "assert add('a', 'é\\n') == 'aé\\n'", True),
        (ADD + "if __name__ == '__main__':\n    raise SystemExit", "assert add(1, 2) == 3", True),
        ("def add(a, b) return", "assert True", False),
        ("", "assert True", True),
        ("print(sum(map(int, input().split())))", {"input": "1 2\n", "output": "3"}, True),
        ("print(sum(map(int, input().split())))", {"input": "1 2\n", "output": "4"}, False),
        ("if __name__ == '__main__':\n    print('a  ')\n    print()", {"input": "", "output": "a\n"}, True),
        ("print('a b')", {"input": "", "output": "a  b"}, False),
        ("import sys\nprint(sys.stdin.read(), end='')", {"input": "é\n" * 50_000, "output": "é\n" * 50_000}, True),
        ("from __future__ import annotations\n" + POINT, "assert Point(1).x == 1", True),
        (POINT + "print(Point(int(input())))", {"input": "1", "output": "Point(x=1)"}, True),
        ("print(1)\nraise SystemExit", {"input": "", "output": "1"}, True),
        ("print(1)\nraise SystemExit('no')", {"input": "", "output": "1"}, False),
        ("print(1)\nraise ValueError", {"input": "", "output": "1"}, False),
    ],
)
def test_what_passes(program, test, expected):
    assert passes(program, test, SMALL) == expected


def test_the_share_of_tests_and_all_of_them():
    tests = ["assert add(1, 2) == 3", "assert add(1, 1) == 3", "assert add(0, 0) == 0", "assert add(0, 1) == 1"]
    responses = [f"So:\n```python\n{ADD}```", ADD, "```\ndef add(a, b):\n    return 3\n```", "no idea", "x"]
    records = [{"tests": tests}, {"tests": tests[0]}, {"tests": tests}, {"tests": tests}, {"tests": None}]
    assert RunCode(parallel=2)(responses, records) == [0.75, 1.0, 0.5, 0.0, None]
    assert RunCode(score="all")(responses, records) == [0.0, 1.0, 0.0, 0.0, None]


def test_tests_know_nothing_of_each_other():
    """Each starts the program anew, in an empty folder, whatever became of those before it."""
    program = "import os\nseen = [*os.listdir('.')]\nopen('mine', 'w').write('x')\n"
    program += "if input() if __name__ == '__main__' else 0: print(*seen)"
    tests = [
        "assert not seen",
        "while True: pass",
        {"input": "1", "output": ""},
        "import os; os._exit(0)",
        "pass",
        "1 / 0",
    ]
    limits = CodeLimits(seconds=1.0, memory_mib=256)
    assert code.passes(program, tests, limits) == [True, False, True, False, True, False]
    assert code.passes(program, tests, limits, stop=True) == [True, False, False, False, False, False]
    assert code.passes("def f(:", tests, limits) == [False] * 6


def test_the_program_in_a_response():
    block = lambda language, text: f"```{language}\n{text}\n```\n"
    assert program_in("print(1)") == "print(1)"
    assert program_in(block("python", "a") + block("Python", "b") + block("bash", "c")) == "b\n"
    assert program_in("text " + block("", "a")) == "text " + block("", "a")  # a fence begins its line
    assert program_in("```python\nunclosed") == "```python\nunclosed"


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"test": "x"}, "code: tests: missing among test"),
        ({"tests": []}, "code: tests: [[]]: expected tests"),
        ({"tests": 5}, "code: tests: 5: expected tests"),
        ({"tests": [{"input": "1"}]}, "code: tests: "),
    ],
)
def test_records_without_tests_are_one_line(record, line):
    with pytest.raises(ValueError, match=line.replace("[]", r"\[\]") if "[[" not in line else r"code: tests: \[\]"):
        code.tests_of(record, "tests")


def test_wrong_arguments_are_one_line():
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"memory": 5}, "code: memory: no such limit; choices: cpu_seconds, file_mib, "),
        ({"seconds": 0}, "code: seconds: 0: expected a number above 0"),
        ({"score": "most"}, 'code: score: "most": expected share or all'),
    ]
    for given, line in wrong:
        with pytest.raises(ValueError, match=line):
            RunCode(**given)


# ---- faults ---------------------------------------------------------------------------------------------------------

FAULTS = {
    "exits before its test": "import sys; sys.exit(0)",
    "ends before its test": "import os; os._exit(0)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "takes all memory": "rows = [bytearray(10**7) for _ in range(10**4)]",
    "prints without end": "while True: print('x' * 10_000)",
    "writes without end": "file = open('big', 'w')\nwhile True: file.write('x' * 10_000)",
    "recurses": "def f(): return f()\nf()",
    "forks without end": "import os\nwhile True: os.fork()",
    "has a null": "\0",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_program_that_fails_passes_nothing(name):
    began = time.monotonic()
    assert not passes(FAULTS[name], "pass", SMALL)
    assert time.monotonic() - began < SMALL.seconds


def test_the_number_of_processes_is_bounded(protections):
    forks = "import os, time\nmade = 0\ntry:\n    for _ in range(200):\n        if os.fork() == 0: time.sleep(60)\n"
    forks += "        made += 1\nexcept OSError: pass\n"
    assert passes(forks, "assert 1 <= made < 6", SMALL) == protections["processes"]


SYSTEM = Path("/usr/bin/python3")


@pytest.mark.skipif(
    os.getuid() != 0 or not SYSTEM.exists(), reason="needs root, to be another user, and a Python of all"
)
def test_an_ordinary_user_has_the_same_limits(protections):
    """The same program, where this process is not root: the namespaces are those that any user may have."""
    checks = "import os\nassert os.getuid() == 65534 and sum(name.isdigit() for name in os.listdir('/proc')) == 3\n"
    checks += "for path in ('/tmp/x', '/var/tmp/x'):\n    try: open(path, 'w'); assert False, path\n"
    checks += "    except OSError: pass\nopen('mine', 'w').write('x')\nprint('fine')"
    job: dict[str, Any] = {"program": checks, "tests": [{"input": ""}], "stop": False, "cpu_seconds": 5, "seconds": 20}
    job |= {"memory": 1 << 28, "file_size": 1 << 20, "processes": 6}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        place = Path(folder)
        place.chmod(0o755)
        (place / "work").mkdir()
        os.chown(place / "work", 65534, 65534)
        (place / "job").write_text(json.dumps(job))
        (place / "runner.py").write_text(code.RUNNER.read_text())
        (place / "results").touch()
        os.chown(place / "results", 65534, 65534)
        command = [str(SYSTEM), "-I", "-S", str(place / "runner.py"), *(str(place / name) for name in code.FILES)]
        done = subprocess.run(command, capture_output=True, text=True, user=65534, group=65534, extra_groups=[])
        status = json.loads((place / "work" / "status.json").read_text())
        result = (place / "results").read_text()
    assert status["network"] == status["processes"]
    if status == dict.fromkeys(MISSING, True):
        assert json.loads(result.strip()) == {"code": 0, "output": "fine\n"}, done.stderr


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input()"])
def test_a_program_that_hangs_is_ended(program):
    limits = CodeLimits(cpu_seconds=5, seconds=0.5, memory_mib=256)
    began = time.monotonic()
    found = run(program, limits, test="")["code"]
    assert found in (124, 1) and 0 < time.monotonic() - began < 10  # 1: there is nothing to input


def test_cpu_time_is_limited_by_itself():
    assert run("while True: pass", CodeLimits(cpu_seconds=1, seconds=60.0))["code"] == 128 + 9


def test_output_beyond_its_limit_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found, printed = run("while True: print('x' * 10_000)", SMALL).values()
    assert found != 0 and len(printed) == 1 << 20 and {*printed} <= {"x", "\n"}


def test_nothing_is_left_behind(tmp_path, monkeypatch, protections):
    """No folder, and no process: neither the children of a program that ends nor those of one that hangs."""
    monkeypatch.setattr(code.tempfile, "tempdir", str(tmp_path))
    leaves = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(77)\n"
    assert passes(leaves, "pass", SMALL)
    run(leaves + "time.sleep(60)", CodeLimits(seconds=0.3))
    assert not [*tmp_path.iterdir()]
    if protections["network"]:  # namespaces of its own
        alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in path.read_bytes().decode()]
        assert not alive


def test_what_a_program_can_reach(tmp_path, protections):
    """Where the kernel allows it: no network, no file but its own, no other process; nothing of our environment."""
    server = socket.create_server(("127.0.0.1", 0))
    connects = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
    assert passes(connects, "pass", SMALL) != protections["network"]
    tmp_path.chmod(0o777)
    writes = f"open({str(tmp_path / 'x')!r}, 'w').write('x')"
    assert passes(writes, "pass", SMALL) != protections["files"]
    assert passes("open('mine', 'w').write('x')", "assert open('mine').read() == 'x'", SMALL)
    assert passes("import os", "assert {*os.environ} <= {'PATH', 'LANG', 'LC_CTYPE'}", SMALL)
    if sys.platform == "linux" and protections["network"]:
        assert passes("import os", "assert sum(name.isdigit() for name in os.listdir('/proc')) == 3", SMALL)


def test_packages_are_there_on_demand():
    assert not passes("import numpy", "pass", SMALL)
    assert passes("import json, random, math", "pass", SMALL)
    assert passes("import yaml", "pass", SMALL, packages=True)


def test_what_is_not_in_force_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(code, "SAID", set())
    (tmp_path / "status").write_text('{"network": false, "processes": true, "files": false}')
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            code.say_what_is_missing(tmp_path / "status")
    assert len(caplog.messages) == 2 and "programs can reach the network" in caplog.messages[0]


def test_several_run_at_once():
    began = time.monotonic()
    slow = "import time; time.sleep(1)"
    assert RunCode(parallel=4)([slow] * 4, [{"tests": "pass"}] * 4) == [1.0] * 4
    assert time.monotonic() - began < 4  # one after the other would take 4 s


def test_an_interrupted_call_ends_its_programs():
    """As rewards.timeout does, from the main thread."""
    began = time.monotonic()
    with pytest.raises(TimedOut), interruptible(0.5):
        RunCode(parallel=1, seconds=30.0)(["import time; time.sleep(60)"] * 5, [{"tests": ["pass"] * 5}] * 5)
    assert time.monotonic() - began < 8


def test_a_machine_that_begins_no_test_is_no_fault_of_the_program(monkeypatch, tmp_path):
    (tmp_path / "runner.py").write_text("raise OSError('no processes left')")
    monkeypatch.setattr(code, "RUNNER", tmp_path / "runner.py")
    with pytest.raises(RuntimeError, match=r"^code: no test was begun: OSError: no processes left$"):
        passes("", "pass", SMALL)


def test_a_program_that_spoils_its_folder_spoils_no_other_test(caplog):
    spoils = "import os; os.mkdir('x'); open('x/y', 'w'); os.chmod('x', 0); os.chmod('.', 0)"
    assert code.passes("", [spoils, "pass"], SMALL) == [True, True]


def test_without_namespaces_the_tests_run_all_the_same(monkeypatch, tmp_path, caplog):
    """As in a container, or on another kernel; other processes of the user count, and forbid a program's alone."""
    text = code.RUNNER.read_text()
    namespaces = "def enter_namespaces(libc: ctypes.CDLL, as_root: bool) -> bool:"
    for name in (namespaces, "def user_of_program() -> int | None:"):
        assert name in text
        text = text.replace(name, f"{name}\n    return {'False' if 'bool' in name else 'None'}")
    (tmp_path / "runner.py").write_text(text)
    monkeypatch.setattr(code, "RUNNER", tmp_path / "runner.py")
    monkeypatch.setattr(code, "SAID", set())
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "while True: pass", "pass"]
    assert code.passes(ADD, tests, CodeLimits(seconds=1.0)) == [True, False, False, True]
    assert {*code.SAID} == {*MISSING} and len(caplog.messages) == 3
