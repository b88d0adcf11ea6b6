"""Signals: the first is remembered where there is something to save, a second SIGINT stops at once, wherever the main
thread is; and what other code expects of signals stays true."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jaxrlhf.hosts.signals import Stop
from tests.support import runs

BOTH = (signal.SIGINT, signal.SIGTERM)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # for the thread


def test_the_first_is_remembered_and_told_and_a_second_ctrl_c_stops_at_once():
    said: list[str] = []
    with Stop(*BOTH) as stop:
        stop.saves, stop.tell = True, said.append
        for _ in range(2):
            send(signal.SIGTERM)  # an orchestrator may repeat itself
        assert stop.asked == "SIGTERM" and stop.code == 75
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert said == [
        "SIGTERM: stops after this iteration and saves",
        "Ctrl-C: stops after this iteration and saves; again: stops at once",
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_where_there_is_nothing_to_save_the_first_stops_at_once(number, code):
    with pytest.raises(KeyboardInterrupt), Stop(*BOTH) as stop:
        send(number)
    assert stop.code == code


@pytest.mark.parametrize("number", BOTH)
def test_last_words_that_wait_for_a_lock_of_the_main_thread_end_nothing_late(number):
    code = f"""
    import os, threading, time
    from jaxrlhf.hosts import signals
    signals.LAST_WORDS = 0.3
    lock = threading.Lock()
    with signals.Stop({int(number)}, leaves=True) as stop:
        stop.last_words = lambda: lock.acquire() and "never"
        with lock:
            os.kill(os.getpid(), {int(number)})
            time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=30)
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]


def test_handlers_and_the_wake_up_pipe_are_given_back():
    before = [signal.getsignal(number) for number in BOTH]
    with Stop(signal.SIGINT) as outer:
        with Stop(*BOTH):
            assert signal.getsignal(signal.SIGTERM) != before[1]
        assert signal.getsignal(signal.SIGINT) == outer.hear
    assert [signal.getsignal(number) for number in BOTH] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_was_ignored_stays_ignored():
    """A background job ignores SIGINT: Ctrl-C is meant for the job in front."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop(*BOTH) as stop:
            send(signal.SIGINT)
        assert stop.asked is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_heard_outside_the_main_thread():
    found: list[Stop] = []

    def work() -> None:
        with Stop(*BOTH) as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].asked is None


def test_a_forked_child_is_no_part_of_it():
    """A pool of worker processes: Ctrl-C reaches them too and must not count twice, and terminate() must end them."""
    with Stop(*BOTH) as stop:
        stop.saves = True
        for number in BOTH:
            child = os.fork()
            if not child:
                try:
                    time.sleep(20)
                except KeyboardInterrupt:
                    os._exit(2)
                os._exit(0)
            time.sleep(0.1)
            os.kill(child, number)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert ended == {signal.SIGINT: 2, signal.SIGTERM: -15}[number]
        assert stop.asked is None and not any(stop.seen.values())


# ---- the process ----------------------------------------------------------------------------------------------------

BUSY = """
import hashlib, signal, sys
from jaxrlhf.hosts.signals import Stop
if __name__ == "__main__":
    with Stop(signal.SIGINT, leaves=True) as stop:
        stop.saves = {saves}
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # Python runs no handler before it is done
"""


def begin(command: list[str]) -> subprocess.Popen:
    """A process whose stdout and stderr are pipes of text."""
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]


@pytest.mark.parametrize("saves", [False, True])
def test_a_main_thread_that_is_busy_elsewhere_is_ended(saves):
    process = begin([sys.executable, "-c", BUSY.format(saves=saves)])
    assert process.stdout and process.stderr and process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    if saves:
        assert process.stderr.readline() == "Ctrl-C: stops after this iteration and saves; again: stops at once\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "Ctrl-C: stopped\n"
    assert process.returncode == 130


def test_a_signal_in_a_callback_is_not_swallowed():
    """Python prints and forgets what is raised in one."""
    script = """
        import gc, os, signal, time
        from jaxrlhf.hosts.signals import Stop
        def callback(*_):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        with Stop(signal.SIGINT, leaves=True):
            gc.callbacks.append(callback)
            gc.collect()
            time.sleep(10)
    """
    process = begin([sys.executable, "-c", textwrap.dedent(script)])
    assert process.communicate(timeout=60) == ("", "Ctrl-C: stopped\n")
    assert process.returncode == 130


@pytest.mark.parametrize("command", [["generate", "nowhere", "--prompt", "a"], ["evaluate", "nowhere"]])
def test_commands_end_without_a_traceback(command):
    """Wherever they are: here, while they load."""
    script = """
        import builtins, os, signal, sys
        real = builtins.__import__
        def importing(name, *more):
            if name.partition(".")[0] == "etils" or name == "jax":
                builtins.__import__ = real
                os.kill(os.getpid(), signal.SIGINT)
            return real(name, *more)
        builtins.__import__ = importing
        from jaxrlhf.cli.app import main
        main()
    """
    process = begin([sys.executable, "-c", textwrap.dedent(script), *command])
    assert process.communicate(timeout=60) == ("", "Ctrl-C: stopped\n")
    assert process.returncode == 130
