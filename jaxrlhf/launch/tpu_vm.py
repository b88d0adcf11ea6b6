"""TPU VMs: ask for a slice, wait for it, install, train, delete it; and again after a preemption.

Training runs detached on the workers (launch/worker.sh), so a connection may break and come back. What makes all of
this safe to repeat is the run directory: the same command goes on from its last checkpoint.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxrlhf.hosts.exit_codes import EXIT_MISTAKE, EXIT_PREEMPTED
from jaxrlhf.launch import gcloud
from jaxrlhf.launch.bundle import ENVIRONMENT, WORKER, bundle_paths, describe_code, folder, write_bundle
from jaxrlhf.launch.commands import LaunchError, capture, last_line, say, shown, stream
from jaxrlhf.launch.config import Launch

EXIT_SSH = 255  # of ssh itself
DESCRIBE_TRIES = 5  # looks at a resource that may fail in a row


class PlannedCommand(NamedTuple):
    """A command of the plan, and why."""

    why: str
    argv: list[str]


def install(launch: Launch) -> list[list[str]]:
    """Sends the code and installs it; where training runs already, nothing is replaced."""
    files = bundle_paths(launch)
    return [gcloud.copy(launch, files), gcloud.ssh(launch, ["bash", WORKER, "install"])]


def train(launch: Launch, attempt: str) -> list[str]:
    """Starts training on every worker, or finds it running, and follows it. Its exit code is that of training."""
    return gcloud.ssh(launch, ["bash", WORKER, "run", attempt, *launch.arguments])


def plan(launch: Launch) -> Iterator[PlannedCommand]:
    """The commands of a launch in which nothing goes wrong, in order."""
    wait = f"until its state is ACTIVE, every {launch.cfg.retry.poll:g} s"
    yield PlannedCommand("is it there already?", gcloud.describe(launch))
    yield PlannedCommand(f"ask for {launch.cfg.slices} x {launch.cfg.accelerator}", gcloud.create(launch))
    yield PlannedCommand(wait, gcloud.describe(launch))
    send, set_up = install(launch)
    yield PlannedCommand(f"send the code to {launch.machines.hosts} hosts", send)
    yield PlannedCommand("install it there", set_up)
    yield PlannedCommand("train: the log comes here; exit code 75 or a preemption: again", train(launch, "ATTEMPT"))
    yield PlannedCommand("delete the machines", gcloud.delete(launch))


class Launcher:
    """One launch in progress. ``sleep`` is time.sleep but in tests."""

    def __init__(self, launch: Launch, keep: bool = False, sleep: Callable[[float], None] = time.sleep):
        self.launch, self.retry, self.keep, self.sleep = launch, launch.cfg.retry, keep, sleep
        self.name = launch.cfg.name

    def run(self) -> int:
        """From nothing, or whatever is there, to the end of training. Gives its exit code; raises LaunchError."""
        restarts, failures, attempt = 0, 0, new_attempt()
        while True:
            self.wait_until_active()
            begin = time.monotonic()
            code = self.install_and_train(attempt)
            if code == 0:
                return self.finish("training is done", 0)
            reason = self.reason(code)
            if reason == "failed":
                in_a_row = time.monotonic() - begin < self.retry.longest_wait
                failures = failures + 1 if in_a_row else 1
                if code == EXIT_MISTAKE or failures > self.retry.failures:
                    return self.finish(f"training failed with exit code {code}", code)
                say(f"exit code {code}: once more ({failures} of {self.retry.failures})")
                attempt = attempt if code == EXIT_SSH else new_attempt()
            else:
                restarts, failures, attempt = restarts + 1, 0, new_attempt()
                if restarts > self.retry.restarts:
                    return self.finish(f"{reason} {restarts} times", EXIT_PREEMPTED)
                say(f"{reason}: training goes on from its last checkpoint ({restarts} of {self.retry.restarts})")
            self.back_off(max(failures, 1))

    def install_and_train(self, attempt: str) -> int:
        """The exit code of training; that of ssh (255) for an installation that failed."""
        say(f"{self.name}: sending {describe_code(self.launch.root)}, {write_bundle(self.launch)} files")
        send, set_up = install(self.launch)
        code = stream(send)
        (folder(self.launch) / ENVIRONMENT).unlink(missing_ok=True)  # it may hold secrets
        if code or (code := stream(set_up)):
            say(f"installation failed with exit code {code}")
            return EXIT_SSH
        say(f"{self.name}: training; Ctrl-C leaves it running")
        return stream(train(self.launch, attempt))

    def reason(self, code: int) -> str:
        """Why training ended with ``code``: "failed", or what is worth going on after. Deletes machines that are lost.

        The workers die before the service says so: it is asked again after a moment."""
        self.sleep(self.retry.poll)
        status = self.look()
        if lost := status.state in gcloud.LOST or self.lost_node(status):
            say(f"{self.name}: {lost if isinstance(lost, str) else status.state}: deleting what is left")
            self.delete()
            return "preempted"
        return "stopped by SIGTERM" if code == EXIT_PREEMPTED else "failed"

    def lost_node(self, status: gcloud.Status) -> str | None:
        """A node that serves no more, and its state; None where all do."""
        for node in status.nodes:
            done = capture(gcloud.describe_node(self.launch, node))
            if done.code == 0 and (state := done.out.strip()) in gcloud.LOST_NODES:
                return f"{node} is {state}"
        return None

    def wait_until_active(self) -> None:
        """Asks for the machines where they are not there, and waits, and asks again where there are none free."""
        stockouts, said = 0, ""
        while (status := self.look()).state != gcloud.ACTIVE:
            if status.state != said:
                say(f"{self.name}: {status.state}")
            said = status.state
            if status.state not in gcloud.LOST or status.state == gcloud.DELETING:
                self.sleep(self.retry.poll)
                continue
            refused = status.error or "it failed, and did not say why (RESOURCE_EXHAUSTED?)"
            if status.state != gcloud.MISSING:
                self.delete()
            if status.state != gcloud.FAILED:
                done = capture(gcloud.create(self.launch))
                if done.code == 0 or "ALREADY_EXISTS" in done.err:
                    continue
                refused = last_line(done.err)
            if not gcloud.is_stockout(refused):
                raise LaunchError(f"{self.name}: {refused}", EXIT_MISTAKE)
            stockouts += 1
            if stockouts > self.retry.stockouts:
                raise LaunchError(f"{self.name}: {refused} ({stockouts} times); another zone may have some", 1)
            say(f"{self.name}: {refused}")
            self.back_off(stockouts)
        self.check_slice(status)

    def check_slice(self, status: gcloud.Status) -> None:
        """Raises LaunchError where the resource of this name is another slice than the config asks for."""
        slice_ = self.launch.machines.slice
        wanted, found = slice_.accelerator_type if slice_ else "", status.accelerator
        if found and found != wanted:
            raise LaunchError(f"{self.name}: exists as {found}; expected {wanted}; delete it or choose another name")
        if status.nodes and len(status.nodes) != self.launch.cfg.slices:
            many = f"{len(status.nodes)} slices; expected {self.launch.cfg.slices}"
            raise LaunchError(f"{self.name}: exists with {many}; delete it or choose another name")

    def look(self) -> gcloud.Status:
        """Describes the resource, over a bad connection too. Raises LaunchError where that does not work at all."""
        for tries in range(1, DESCRIBE_TRIES + 1):
            try:
                return gcloud.read_status(capture(gcloud.describe(self.launch)))
            except LaunchError as error:
                if tries == DESCRIBE_TRIES or error.code == EXIT_MISTAKE or gcloud.FINAL.search(str(error)):
                    raise
                self.back_off(tries)
        raise AssertionError("the loop above returns or raises")

    def back_off(self, tries: int) -> None:
        """Waits longer after each try, up to a limit."""
        seconds = min(self.retry.wait * 2 ** min(tries - 1, 30), self.retry.longest_wait)
        say(f"next try in {seconds:g} s")
        self.sleep(seconds)

    def delete(self) -> None:
        """Raises LaunchError where that does not work, as it costs money."""
        done = capture(gcloud.delete(self.launch))
        if done.code and "NOT_FOUND" not in done.err:
            text = f"{self.name}: not deleted, and costs money: {last_line(done.err)}"
            raise LaunchError(f"{text}; delete it: {shown(gcloud.delete(self.launch))}", 1)

    def finish(self, why: str, code: int) -> int:
        """Deletes the machines, unless they are to stay."""
        if self.keep:
            say(f"{self.name}: {why}; kept, and costs money until: {shown(gcloud.delete(self.launch))}")
        else:
            say(f"{self.name}: {why}; deleting the machines")
            self.delete()
        return code


def new_attempt() -> str:
    """A name that tells a worker whether it is asked to start training again, or only to follow it again."""
    return uuid.uuid4().hex[:12]


# ---- what cli.py calls ----------------------------------------------------------------------------------------------


def dry_run(launch: Launch) -> str:
    return "\n".join(f"# {step.why}\n{shown(step.argv)}" for step in plan(launch))


def start(launch: Launch, keep: bool) -> int:
    return Launcher(launch, keep).run()


def delete(launch: Launch) -> list[str]:
    return gcloud.delete(launch)
