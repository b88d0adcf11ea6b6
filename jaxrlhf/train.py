"""The only loop: feed the step, write down what it says, save, and stop cleanly when asked to."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxrlhf.config.check import check, profiled_steps
from jaxrlhf.config.load import as_tree, dump, without_place
from jaxrlhf.config.places import check_places
from jaxrlhf.config.record import Config
from jaxrlhf.config.roles import trunks_of
from jaxrlhf.data.tokenizer import unreadable
from jaxrlhf.errors import one_line
from jaxrlhf.evaluate import held_out
from jaxrlhf.evaluate.against_reference import sample_rows
from jaxrlhf.hosts import compiler_flags, heap, memory, processes
from jaxrlhf.hosts.profiler import Profiler
from jaxrlhf.hosts.run_duration import TimeLimit
from jaxrlhf.hosts.signals import Stop
from jaxrlhf.log import bars
from jaxrlhf.log.metrics import MetricsLog
from jaxrlhf.log.progress import open_progress, silent
from jaxrlhf.log.rows import read_rows
from jaxrlhf.log.run_dir import is_local, lock_run_dir
from jaxrlhf.log.trackers import check_installed
from jaxrlhf.plan.device_memory import need_room
from jaxrlhf.rewards.graders import GraderError
from jaxrlhf.run import announce, checkpoint, normalize, quantization_mismatch, saved_run, verified_steps
from jaxrlhf.run.ahead import Ahead
from jaxrlhf.run.bad_batch import NotFinite
from jaxrlhf.run.build import Run, build
from jaxrlhf.run.feed import Feed
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.run.kept_programs import shared
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.run.raised_by_all import raised_by_all
from jaxrlhf.run.resume import OF_DATA, OF_STATE, changes_since_saved, explained, with_new_controls
from jaxrlhf.run.scoring import joined, try_environment, try_graders
from jaxrlhf.run.transfer import fetch_all, put
from jaxrlhf.sharding import current, for_programs
from jaxrlhf.types import Batch, Metrics, Sequences, TrainState

DONE, PREEMPTED, INTERRUPTED = "done", "preempted", "interrupted"
OUT_OF_TIME, ALARMED = "out of time", "alarmed"
GOES_ON = "the same command resumes"
SHARED = "a directory that all processes share: NFS or gs://"


class Step(NamedTuple):
    """One iteration as the host knows it."""

    number: int  # from 1; 0: the evaluation before the first
    metrics: dict[str, float]  # those of the evaluation after it, too: eval/...
    samples: list[dict[str, Any]]  # prompt, response, score, split; where log.samples_every has some


Watch = Callable[[Step], None]


def run(cfg: Config, raw: str = "", stop: Stop | None = None, watch: Watch | None = None) -> str:
    """Train as ``cfg`` says, going on from the run directory's last checkpoint: "done", "preempted" after SIGTERM,
    "interrupted" after SIGINT, "out of time" by max_run_duration, or "alarmed" by alarms.stop, which all save; a
    second SIGINT raises KeyboardInterrupt.

    ``raw`` is the config as the user wrote it, kept beside the resolved one as source.yaml. ``stop``: who listens to
    signals, by default for this run alone. ``watch`` is told of every iteration. Raises ConfigError before any model is
    built, RunDirBusy where another process writes to the run directory; both leave its config and tokenizer alone.
    """
    with Stop(signal.SIGINT, signal.SIGTERM) if stop is None else contextlib.nullcontext(stop) as stop:
        try:
            with verified_steps.reading():
                return train(cfg, raw, stop, watch)
        except KeyboardInterrupt:
            if stop.asked is None or stop.saves:
                raise
            print(f"{stop.asked}: {stop.last_words()}")
            return outcome(stop)
        finally:
            processes.together(stop)  # until the next run begins


def outcome(stop: Stop) -> str:
    """What a run says that stopped before its end."""
    return INTERRUPTED if stop.asked == "Ctrl-C" else PREEMPTED


def train(cfg: Config, raw: str, stop: Stop, watch: Watch | None) -> str:
    """``run`` under ``stop``."""
    patience, cfg = cfg.distributed.heartbeat_timeout, without_place(cfg)
    processes.together(stop)
    stop.last_words = lambda: f"stopped at step {verified_steps.last_committed(cfg.run_dir) or 0}; {GOES_ON}"
    resolved = check(cfg, jax.device_count())
    check_places(cfg)
    check_installed(cfg.log.trackers)
    run_dir, main = epath.Path(cfg.run_dir), processes.is_main()
    lock = processes.on_main(lambda: lock_run_dir(cfg.run_dir))
    start, saved_runs = verified_steps.settle(cfg.run_dir), saved_run.SavedRuns()
    changes = changes_since_saved(saved_runs, resolved)
    processes.agree(f"run_dir: {cfg.run_dir}: latest step", str(start), SHARED)
    if announce.all_done(resolved, start):
        return DONE
    compiler_flags.use_compilation_cache()
    progress = open_progress(cfg.iterations or 0, start, cfg.log.every) if main else silent()
    with contextlib.closing(progress):
        with progress.doing("loading"):
            ready = build(resolved, saved_runs=saved_runs)
        if cfg.epochs is not None:  # counted by now
            cfg, resolved = ready.cfg, ready.resolved
            check(cfg, jax.device_count())
            changes = changes_since_saved(saved_runs, resolved)
            progress.expect(cfg.length)
            if announce.all_done(resolved, start):
                return DONE
        need_room(ready)
        keep, best, mode = cfg.checkpoint.keep, cfg.checkpoint.best, cfg.checkpoint.mode
        saved = checkpoint.Checkpoints(run_dir, keep, best, mode, background=cfg.checkpoint.background)
        with (
            current(ready.mesh),
            MetricsLog(
                cfg.run_dir,
                cfg.log,
                cfg.length,
                start,
                lock=lock,
                main=main,
                progress=progress,
                alarms=cfg.alarms,
                config=as_tree(cfg),
            ) as log,
            processes.naming_the_dead(patience),
        ):
            log.say(announce.opening(ready, start))
            if not is_local(run_dir):
                log.say(f"{cfg.run_dir}: an object store can't be locked: see that nothing else writes to it")
            if changes:
                log.say(f"changed since step {start}: {', '.join(changes)}")
            with log.doing("loading"):
                trainer = Trainer(ready, saved, log, stop, watch)
            return trainer.run(start, raw)


def write_config(cfg: Config, raw: str) -> None:
    """config.yaml, and source.yaml where the user's own text is known: once nothing can be refused any more."""
    file = epath.Path(cfg.run_dir) / "config.yaml"

    def write() -> None:
        file.write_text(dump(cfg))
        if raw:
            (file.parent / "source.yaml").write_text(raw)

    processes.on_main(write)
    processes.agree(f"run_dir: {cfg.run_dir}: config.yaml", str(file.exists()), SHARED)


class Dispatched(NamedTuple):
    """One dispatched iteration, its numbers still on the device."""

    step: int
    metrics: Metrics  # and a time that the host measured
    sequences: Sequences | None
    host: Batch  # what it was given; of several rollouts the first
    epoch: float  # passes over the data up to it


class Trainer:
    """One run in progress: what the loop needs between iterations."""

    def __init__(
        self, ready: Run, saved: checkpoint.Checkpoints, log: MetricsLog, stop: Stop, watch: Watch | None = None
    ):
        self.ready, self.cfg, self.saved, self.log, self.stop = ready, ready.cfg, saved, log, stop
        self.watch, self.noted = watch, Step(0, {}, [])
        self.feed = Feed(ready)
        self.ahead = Ahead(self.cfg, ready.mesh, self.feed) if self.cfg.rewards.sample_ahead else None
        if ready.graders or ready.environment:
            records = self.feed.first_records()
            try_graders(ready, "data.prompts", records)
            try_environment(ready, "data.prompts", records)
        # of the first process: JAX writes a perfetto trace where only one process has been
        steps = profiled_steps(self.cfg.profile) if processes.is_main() else range(0)
        self.profiler = Profiler(epath.Path(self.cfg.run_dir) / "profile", steps)
        self.evaluation = held_out.HeldOut(ready)
        if self.evaluation.policy:
            records = self.evaluation.policy.batches[0].columns or []
            try_graders(ready, "data.eval_prompts", records)
            try_environment(ready, "data.eval_prompts", records)
        self.pending: Dispatched | None = None
        self.last_time = time.perf_counter()
        self.scores: tuple[int, dict[str, float]] = (0, {})  # step and numbers of the newest evaluation
        self.unmeasured: int | None = None  # a step that was saved in the midst of its evaluation
        self.agreed = False  # several processes: all of them stop here
        self.not_finite = NotFinite(self.cfg, log.say)
        self.limit = TimeLimit(self.cfg.max_run_duration, stop.began)
        self.began, self.best = time.perf_counter(), None  # best: the step that checkpoint.best kept

    def run(self, start: int, raw: str = "") -> str:
        """From iteration ``start`` to the end, or to a signal. ``raw``: the config as the user wrote it.

        Raises ConfigError, before anything is compiled, where checkpoint.best is none of the metrics."""
        cfg, resolved = self.cfg, self.ready.resolved
        held_out.check_best(self.ready, self.evaluation)
        with self.log.doing("loading"):
            held = self.evaluation.summaries(), held_out.describe_best(cfg)
            self.log.say("\n".join(announce.first_lines(self.ready, self.feed, *held)))
            state = for_programs(self.restore(start) if start else initial_state(self.ready), self.ready.mesh)
            if not start:
                quantization_mismatch.tell(self.ready, state, self.feed, self.log)
        write_config(cfg, raw)
        for line in checkpoint.describe_room(cfg.run_dir, state, cfg.checkpoint.keep):
            self.log.say(line)
        with self.log.doing("compiling"):
            programs = self.compile(state)
        with self.saving(), contextlib.closing(self.profiler):
            if start == 0 and cfg.eval.every:
                self.evaluate(0, state)
            heap.fill_holes()
            self.save_at_signals()
            step = self.loop(state, start, programs)
        self.log.close()  # the bar gives way to the last numbers
        if step < cfg.length:
            if (alarm := self.log.alarms.stop) and not self.stop.asked:
                self.log.say(f"alarms.stop: {alarm.name}: stopped at step {step}, which is saved; {GOES_ON}")
                return ALARMED
            late = self.limit.over and not self.stop.asked
            name = "max_run_duration" if late else self.stop.asked or "SIGTERM"  # of another process
            self.log.say(f"{name}: stopped at step {step}; {GOES_ON}")
            return OUT_OF_TIME if late else outcome(self.stop)
        self.log.say(announce.closing(resolved, time.perf_counter() - self.began, self.best))
        if cfg.bars and processes.is_main():
            for found in bars.results(cfg.bars, read_rows(cfg.run_dir, "metrics")):
                self.log.say(str(found))
        return DONE

    def loop(self, state: TrainState, start: int, programs: dict[Any, Callable]) -> int:
        """Iterations up to the last one, or to a signal: the step that it came to, which is saved."""
        cfg, step = self.cfg, start
        if self.ahead is not None:
            self.ahead.done = start
        self.last_time = time.perf_counter()
        while step < cfg.length and not (self.asked_to_stop() or self.limit.reached() or self.log.alarms.stop):
            position = self.feed.get_state()
            host, records = self.feed.next()
            batch = put(self.ready.mesh, host)
            self.profiler.before(step + 1, self.flush)
            try:  # the iteration before is logged while this one runs
                state, metrics, sequences = programs[shapes(batch)](state, batch, records, self.flush)
            except Exception as error:
                self.feed.set_state(position)
                self.rescue(step, state, error, f"step {step + 1}")
                break
            step += 1
            self.pending = Dispatched(step, metrics, sequences, host, self.feed.epoch())
            self.profiler.after(step, self.flush)
            last = step == cfg.length
            if last:
                self.flush()
                with self.log.doing("normalizing"):
                    state = normalize.finish(self.ready, state, self.log.say)
            if self.evaluates(step):
                self.flush()
                self.evaluate(step, state)
            if last or step % cfg.checkpoint.every == 0:
                self.flush()
                self.save(step, state)
        if step > (self.saved.latest() or 0) or step == self.unmeasured:  # a signal came between two saves
            self.flush()
            self.save(step, state)
        return step

    def rescue(self, step: int, state: TrainState, error: Exception, left_out: str) -> None:
        """Saves the state at ``step``, where it is whole, as what follows (``left_out``) raised ``error``: a reward
        function raised. Of several processes all are here, or none.

        Raises ``error`` except where Ctrl-C was pressed: it reaches the processes that a function has started, too."""
        whole_state = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        if not raised_by_all(error) or isinstance(error, FloatingPointError) or not whole_state:
            raise error
        if step > (self.saved.latest() or 0):
            self.flush()
            self.save(step, state)
        what = str(error) if isinstance(error, GraderError) else f"{type(error).__name__}: {one_line(error)}"
        if not any(processes.everywhere(self.stop.asked or "")):
            if step:
                self.log.say(f"stopped at step {step}, which is saved; once the error is mended, {GOES_ON}")
            raise error
        self.log.say(f"{left_out} was left out: {what}")

    def compile(self, state: TrainState) -> dict[Any, Callable]:
        """The iteration for every shape of batch that can come, before the first is run: (state, batch, records) ->
        (state, metrics, responses) in one program, or in two where the host scores the responses between them."""
        started, found, count = time.perf_counter(), {}, 0
        for batch in self.feed.shapes():
            compiled = lambda batch=batch: compile_programs(self.ready, state, batch)
            programs = shared("iteration", self.ready, compiled, state, batch)
            if self.ahead is not None:
                self.ahead.serve(batch, programs["rollout"].run)
            found[shapes(batch)] = joined(self.ready, programs, self.feed.next, self.ahead)
            count += len(programs)
        processes.wait()
        self.log.say(f"compiled {count} program{'s' if count > 1 else ''} in {time.perf_counter() - started:.1f} s")
        return found

    # ---- stopping -------------------------------------------------------------------------------------------------

    def save_at_signals(self) -> None:
        """From here on there is something to save: a signal lets the iteration end."""
        self.stop.saves, self.stop.tell = True, self.log.say
        run_dir = self.cfg.run_dir

        def last_words() -> str:
            kept = verified_steps.last_committed(run_dir)
            where = "starts again" if kept is None else f"goes on from step {kept}, the last one that was saved whole"
            return f"stopped at once; the same command {where}"

        self.stop.last_words = last_words

    def asked_to_stop(self) -> bool:
        """Whether to stop before the next iteration; all processes answer alike."""
        if processes.several():
            self.agreed = self.agreed or processes.stop_agreed()
            return self.agreed
        return self.stop.asked is not None

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Waits at the end until what is saved is whole; also where something was raised, by a user's reward function
        say. Not where other processes have part in it: they may be gone, and without them it never is whole."""
        try:
            yield
        except BaseException as error:
            if raised_by_all(error):
                self.finish_saving()
            raise
        self.finish_saving()

    def finish_saving(self) -> None:
        with self.log.doing("saving"):
            self.best = self.saved.best_step()
            self.saved.close()

    # ---- what is written down -------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait for the pending iteration and log it. Raises FloatingPointError as NotFinite.check."""
        if self.pending is None:
            return
        step, metrics, sequences, host, epoch = self.pending
        self.pending = None
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        numbers["time/iteration"], self.last_time = now - self.last_time, now
        if "response/tokens" in numbers:
            numbers["throughput/response_tokens_per_second"] = numbers["response/tokens"] / numbers["time/iteration"]
        numbers |= {"data/epoch": epoch} | self.feed.counts() | memory.used()
        self.log.write(step, numbers)
        self.not_finite.check(step, numbers, lambda: (host, fetch_all(sequences)), self.saved.latest())
        shown = sequences if self.samples_due(step) else None
        rows = [] if shown is None else sample_rows(self.ready, shown, self.cfg.log.samples, "train")
        self.log.samples(step, rows)
        self.note(step, numbers, rows, whole=not self.evaluates(step))

    def note(self, step: int, numbers: dict[str, float], samples: list[dict[str, Any]], whole: bool) -> None:
        """Tells ``watch`` of an iteration, once all that belongs to it is known (``whole``)."""
        _, metrics, rows = self.noted
        self.noted = Step(step, metrics | numbers, [*rows, *samples])
        if whole:
            if self.watch and self.noted.metrics:
                self.watch(self.noted)
            self.noted = Step(step, {}, [])

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows the iteration."""
        return step == self.cfg.length or bool(self.cfg.eval.every and step % self.cfg.eval.every == 0)

    def samples_due(self, step: int) -> bool:
        return self.cfg.log.samples > 0 and step % self.cfg.log.samples_every == 0

    def evaluate(self, step: int, state: TrainState) -> None:
        """Held-out metrics and samples, where the config names held-out data. A signal in the midst of it saves the
        state at once, where the evaluation may last longer than whoever sent it waits."""

        def save_at_a_signal() -> None:
            if self.stop.asked and not processes.several() and step > (self.saved.latest() or 0):
                self.save(step, state)
                self.unmeasured = step

        began = time.perf_counter()
        with self.log.doing("evaluating"):
            try:
                result = self.evaluation.run(state, save_at_a_signal)
            except Exception as error:
                self.rescue(step, state, error, f"the evaluation after step {step}")
                result = None
        if result is None:
            self.note(step, {}, [], whole=True)
            return
        scores = {f"eval/{name}": value for name, value in result.metrics.items()}
        self.scores = step, scores
        self.log.write(step, scores | {"eval/time/evaluation": time.perf_counter() - began})
        self.log.histogram(step, "score", (row.get("score") for row in result.samples))
        samples = result.samples[: self.cfg.eval.samples]
        self.log.samples(step, samples)
        self.note(step, scores, samples, whole=True)
        self.last_time = time.perf_counter()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, step: int, state: TrainState) -> None:
        """The whole state, and what is not an array. Raises RunDirBusy where another process writes here by now."""
        ready = self.ready
        self.saved.check_owner(self.log.check_owner)
        extra = {
            "config": dump(self.cfg),
            "models": saved_run.models_record(
                ready.configs, ready.heads, trunks_of(self.cfg), ready.dtypes, ready.resolved.bases
            ),
            "eos_ids": list(self.ready.sampler.eos_ids),
            "unreadable": {str(id): why for id, why in unreadable(self.ready.tokenizer).items()},
            "data": self.feed.get_state(),
        }
        evaluated, scores = self.scores
        with self.log.doing("saving"), self.limit.saving():
            known = scores if evaluated == step else None
            failed = self.saved.save(step, state, extra, known, first=self.log.flush)  # those rows will not come again
        if failed:
            self.log.say(failed)
        self.unmeasured = None
        self.last_time = time.perf_counter()

    def restore(self, step: int) -> TrainState:
        """The state and the data positions of ``step``."""
        _, extra = self.ready.saved_runs.read_step(self.cfg.run_dir, step)
        with explained(self.cfg, step, extra["config"], OF_STATE, "its state does not fit"):
            state = checkpoint.restore(self.cfg.run_dir, step, abstract_state(self.ready))
        state = state.replace(controls=with_new_controls(self.ready.resolved, extra["config"], state.controls))
        with explained(self.cfg, step, extra["config"], OF_DATA, "its place in the data would mean other rows"):
            self.feed.set_state(extra["data"])
        self.log.say(f"resumed from step {step}")
        return state


def shapes(batch: Batch) -> tuple:
    """What a compiled program is looked up by."""
    return tuple(x.shape for x in jax.tree.leaves(batch))
