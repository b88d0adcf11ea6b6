"""Real runs for the end-to-end tests: tiny text, the configs of configs/tiny made smaller, and processes to run them.

``python -m tests.support.runs PLAN`` is such a process: it runs commands of ``jaxrlhf`` one after the other in one
interpreter (imports and compiled programs are paid for once), notes what is compiled and dispatched when, and may send
itself a signal at a step that the plan names, where a signal from outside would come at any time.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.hosts import parent_death
from tests.support import compiler

ROOT = Path(__file__).parents[2]
TINY = [ROOT / "configs" / "tiny" / f"{name}.yaml" for name in ("sft", "rm", "ppo")]
# what the shared processes train: dpo, kto and grpo before ppo, which is killed
ALL = [*TINY[:2], *(ROOT / "configs" / "tiny" / f"{name}.yaml" for name in ("dpo", "kto", "grpo")), TINY[2]]
SEPARATOR = "\x1e"
COMPILED = "backend_compile_duration"  # how the name of a compilation's event ends

# ---- text -----------------------------------------------------------------------------------------------------------

GOOD = ["lovely", "warm", "bright", "funny", "moving", "wise", "tender", "clever", "fresh"]
BAD = ["dull", "cold", "grim", "stale", "clumsy", "hollow", "tired", "shallow", "loud"]
THINGS = ["film", "story", "plot", "cast", "score", "script", "ending", "scene", "camera", "dialogue"]


def sentence(rng: np.random.Generator, words: Sequence[str]) -> str:
    """ "the film is warm and its script bright" of the words."""
    first, second = rng.choice(THINGS, 2, replace=False)
    return f"the {first} is {rng.choice(words)} and its {second} {rng.choice(words)}"


def labelled(rng: np.random.Generator, label: int) -> dict[str, Any]:
    return {"text": sentence(rng, GOOD if label else BAD), "label": label}


def unpaired(row: dict[str, Any]) -> dict[str, Any]:
    """A labelled sentence as a prompt of two words with a response that is good or bad."""
    first, second, rest = row["text"].split(" ", 2)
    return {"prompt": f"{first} {second}", "completion": f" {rest}", "label": bool(row["label"])}


def trajectory(rng: np.random.Generator) -> dict[str, Any]:
    """A sentence in two steps, which earn 1 or 0 each; every fourth is cut."""
    good, (first, second) = rng.random(2) < 0.5, rng.choice(THINGS, 2, replace=False)
    words = [rng.choice(GOOD if one else BAD) for one in good]
    said = (f" {first} is {words[0]}", f" and its {second} {words[1]}")
    steps = [{"text": text, "reward": float(one)} for text, one in zip(said, good)]
    return {"prompt": "the", "steps": steps, "truncated": bool(rng.random() < 0.25)}


def write_text(folder: Path) -> None:
    """demonstrations, preferences, prompts, labels, unpaired responses, trajectories as JSONL, each with a held-out
    file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    either = lambda: sentence(rng, GOOD if rng.random() < 0.5 else BAD)
    rows = {
        "demonstrations": lambda: {"text": either()},
        "preferences": lambda: {"chosen": sentence(rng, GOOD), "rejected": sentence(rng, BAD)},
        "prompts": lambda: {"prompt": " ".join(either().split()[: rng.integers(2, 5)])},
        "labels": lambda: labelled(rng, int(rng.random() < 0.5)),
        "unpaired": lambda: unpaired(labelled(rng, int(rng.random() < 0.5))),
        "trajectories": lambda: trajectory(rng),
    }
    for name, make in rows.items():
        for prefix, count in (("", 200), ("eval_", 40)):
            lines = [json.dumps(make()) + "\n" for _ in range(count)]
            (folder / f"{prefix}{name}.jsonl").write_text("".join(lines))


def praise(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """A reward function: vowels in the response, and the length of its prompt. It takes JAXRLHF_TEST_PACE seconds."""
    time.sleep(float(os.environ.get("JAXRLHF_TEST_PACE", "0")))
    vowels = [sum(letter in "aeiou" for letter in response) for response in responses]
    return [count + 0.01 * len(record["prompt"]) for count, record in zip(vowels, records)]


# ---- configs --------------------------------------------------------------------------------------------------------

SMALL = (
    "iterations=4",
    "checkpoint.every=2",
    "eval.every=2",
    "sft:models.policy.architecture.hidden_size=16",
    "sft:models.policy.architecture.num_layers=1",
    "sft:tokenizer.train_vocab_size=300",
    "sft:data.max_length=32",
    "rm:data.max_length=32",
    "rm:data.prompt_buckets=[8]",
    "rm:algorithm.normalize_samples=200",
    "ppo:data.max_length=32",
    "ppo:data.prompt_buckets=[8]",
    "ppo:algorithm.reward_update=true",
    "ppo:algorithm.kl_controller=adaptive",
    "ppo:algorithm.kl_horizon=100",
    "ppo:batch.preferences_per_step=16",
    "dpo:data.max_length=32",
    "dpo:data.prompt_buckets=[8]",
    "dpo:batch.prompts_per_step=16",
    "kto:data.max_length=32",
    "kto:data.prompt_buckets=[8]",
    "grpo:data.prompt_buckets=[8]",
    "grpo:batch.prompts_per_step=4",
    "grpo:log.samples=2",
    "grpo:log.samples_every=1",
    "ppo:log.samples=2",
    "ppo:log.samples_every=1",
)
READ = {
    "sft": ("demonstrations", "eval_demonstrations"),
    "rm": ("preferences", "eval_preferences", "prompts"),
    "dpo": ("preferences", "eval_preferences", "eval_prompts"),
    "kto": ("unpaired", "eval_unpaired", "eval_prompts"),
    "grpo": ("prompts", "eval_prompts"),
    "ppo": ("prompts", "eval_prompts", "preferences", "eval_preferences"),
}


def overrides(text: Path, runs: Path, origins: Path | None = None) -> list[str]:
    """What makes configs/tiny small, read ``text``, write to ``runs`` / sft, rm, ppo and start from ``origins``."""
    origins = origins or runs
    found = [*SMALL, f"data.cache_dir={text / 'cache'}", f"ppo:eval.judge={{path: {text}/labels.jsonl}}"]
    for name, sections in READ.items():
        found.append(f"{name}:run_dir={runs / name}")
        found += [f"{name}:data.{section}={{path: {text}/{section}.jsonl}}" for section in sections]
    found += [f"rm:models.{role}.init_from={origins}/sft" for role in ("reward", "policy")]
    for name in ("dpo", "kto", "grpo", "ppo"):
        found += [f"{name}:models.policy.init_from={origins}/sft", f"{name}:models.reward.init_from={origins}/rm"]
    return found


def train(*arguments: str, configs: Sequence[Path] = tuple(TINY)) -> list[str]:
    """The command that trains ``configs``; overrides for other configs are left out."""
    names = {path.stem for path in configs}
    mine = [text for text in arguments if (":" not in text.split("=")[0]) or text.split(":")[0] in names]
    return ["train", *map(str, configs), *mine]


def config(name: str, root: Path, folder: Path, *more: str):
    """The Config of sft, rm or ppo: small, on the text of ``root``, writing to ``folder`` / name, starting from
    ``root`` / whole."""
    from jaxrlhf.config.load import load

    mine = train(*overrides(text(root), folder, root / "whole"), *more, configs=[tiny_config(name)])
    return load(mine[1], mine[2:])


def tiny_config(name: str) -> Path:
    return ROOT / "configs" / "tiny" / f"{name}.yaml"


# ---- processes ------------------------------------------------------------------------------------------------------

Kill = tuple[str, str, str, int]  # signal, run, "metrics" or "samples", step: when this of this step is written down
STOPPED = 75  # exit code after SIGTERM


@dataclasses.dataclass
class Done:
    """A process that has ended."""

    code: int  # of the last command; negative: the signal that killed it
    outputs: list[str]  # what each command printed
    errors: str
    ended: float  # seconds of time.time()
    events: list[dict[str, Any]]  # in order: {"what": "compiled" | "row" | "programs" | "dispatched", ...}


def process(
    folder: Path,
    commands: Sequence[Sequence[str]],
    devices: int = 1,
    kills: Sequence[Kill] = (),
    profile: str | None = None,
    timeout: float = 500,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Done:
    """Run the commands in a new process. After one that SIGTERM stopped comes the next; after another failure none.

    Args:
        folder: where it leaves what it notes.
        devices: fake CPU devices.
        kills: the process gets the signal when it has written down what is named.
        profile: a run between whose steps 2 and 4 dispatches are counted.
    """
    return finish(start(folder, commands, devices, kills, profile, environment), timeout)


def together(
    folder: Path,
    commands: Sequence[Sequence[str]],
    devices: int = 4,
    kills: Mapping[int, Kill] = MappingProxyType({}),
    count: int = 2,
    timeout: float = 500,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[Done]:
    """Run the commands in ``count`` processes of one run, with ``devices`` each; ``kills``: process -> kill."""
    joint = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count), **environment}
    started = [
        start(
            folder / str(number),
            commands,
            devices,
            [kills[number]] if number in kills else [],
            more=joint | {"JAX_PROCESS_ID": str(number)},
        )
        for number in range(count)
    ]
    try:
        with ThreadPoolExecutor(count) as waiting:  # each notes when its process ended
            return list(waiting.map(lambda process: finish(process, timeout), started))
    finally:
        for process in started:
            process.running.kill()


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


class Started(NamedTuple):
    """A process under way; its output goes to files, which never fill up as pipes do."""

    running: subprocess.Popen
    folder: Path


def start(
    folder: Path,
    commands: Sequence[Sequence[str]],
    devices: int = 1,
    kills: Sequence[Kill] = (),
    profile: str | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Started:
    """``process``, without waiting for its end; ``more``: of its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"commands": commands, "events": str(folder / "events.json"), "kills": kills, "profile": profile}
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.support.runs", str(folder / "plan.json")]
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as errors:
        running = subprocess.Popen(command, cwd=folder, env={**environment(devices), **more}, stdout=out, stderr=errors)
    return Started(running, folder)


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many fake CPU devices, which keeps its compiled programs where these tests do, and ends with
    them."""
    return os.environ | {
        parent_death.LAUNCHER: str(os.getpid()),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),  # type: ignore[attr-defined]
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": compiler.CHEAP,
    }


def finish(started: Started, timeout: float) -> Done:
    """Wait for its end; past ``timeout`` seconds it is killed, and subprocess.TimeoutExpired raised."""
    try:
        code = started.running.wait(timeout)
    except subprocess.TimeoutExpired:
        started.running.kill()
        raise
    ended = time.time()
    noted = started.folder / "events.json"
    events = json.loads(noted.read_text()) if noted.exists() else []
    output, errors = ((started.folder / name).read_text() for name in ("stdout", "stderr"))
    return Done(code, output.split(SEPARATOR), errors, ended, events)


def main() -> None:
    """The process."""
    parent_death.ends_with_launcher(signal.SIGKILL)
    plan = json.loads(Path(sys.argv[1]).read_text())
    from jaxrlhf.cli import app
    from jaxrlhf.run.kept_programs import share_programs
    from tests.support import fake_gcs

    if fake_gcs.ROOT in os.environ:
        fake_gcs.install()
    events = watch(plan)
    atexit.register(lambda: Path(plan["events"]).write_text(json.dumps(events)))
    code: Any = 0
    with share_programs():  # an evaluation has those of the run
        for number, command in enumerate(plan["commands"]):
            if number:
                print(SEPARATOR, end="", flush=True)
            sys.argv = ["jaxrlhf", *command]
            try:
                app.main()
            except SystemExit as stop:
                code = stop.code
            if code and code != STOPPED:
                break
    sys.exit(code)


def watch(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Note compilations, rows and dispatches from now on, and send the plan's signal when its time comes."""
    from jaxrlhf import train as trainer
    from jaxrlhf.log import metrics

    events: list[dict[str, Any]] = []
    write, samples = metrics.MetricsLog.write, metrics.MetricsLog.samples
    compile_all, save = trainer.Trainer.compile, trainer.Trainer.save
    folder = Path(plan["events"]).parent
    compilations = lambda: sum(event["what"] == "compiled" for event in events)

    def listen(event: str, duration_secs: float, **more: Any) -> None:
        if event.endswith(COMPILED):
            events.append({"what": "compiled", "name": more.get("fun_name")})

    def noting_write(self: Any, step: int, numbers: dict[str, Any]) -> None:
        write(self, step, numbers)
        run, evaluation = self.run_dir.name, any(key.startswith("eval/") for key in numbers)
        events.append({"what": "row", "run": run, "step": step, "evaluation": evaluation})
        if run == plan["profile"] and step == 4 and not evaluation:
            jax.profiler.stop_trace()
            events.append({"what": "dispatched", "run": run, "count": executions(folder / "profile")})
        kill_at(run, "metrics", step)

    def noting_samples(self: Any, step: int, found: Any) -> None:
        samples(self, step, found)
        kill_at(self.run_dir.name, "samples", step)

    def kill_at(*place: Any) -> None:
        for name, *when in plan["kills"]:
            if when == [*place]:
                os.kill(os.getpid(), getattr(signal, name))

    def noting_compile(self: Any, state: Any) -> Any:
        before = compilations()
        programs = compile_all(self, state)
        events.append({"what": "programs", "run": Path(self.cfg.run_dir).name, "count": compilations() - before})
        return programs

    def noting_save(self: Any, step: int, state: Any) -> None:
        save(self, step, state)
        if Path(self.cfg.run_dir).name == plan["profile"] and step == 2:
            jax.profiler.start_trace(str(folder / "profile"))

    if plan["profile"]:
        one = jax.jit(lambda x: x + 1)
        x = jax.block_until_ready(one(np.zeros(3)))
        with jax.profiler.trace(str(folder / "known")):
            jax.block_until_ready([one(x) for _ in range(4)])
        events.append({"what": "dispatched", "run": None, "count": executions(folder / "known") / 4})
    jax.monitoring.register_event_duration_secs_listener(listen)
    metrics.MetricsLog.write, metrics.MetricsLog.samples = noting_write, noting_samples  # type: ignore[method-assign]
    trainer.Trainer.compile = noting_compile  # type: ignore[method-assign]
    trainer.Trainer.save = noting_save  # type: ignore[method-assign]
    return events


def executions(folder: Path) -> int:
    """Events of an executable being run, in a profile."""
    from jax.profiler import ProfileData

    (path,) = folder.glob("**/*.xplane.pb")
    lines = [line for plane in ProfileData.from_file(str(path)).planes for line in plane.lines]
    return sum(bool(re.search("Executable::Execute", event.name)) for line in lines for event in line.events)


# ---- shared between tests and between workers -----------------------------------------------------------------------


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time is in here, for one ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(folder: Path, name: str, make) -> Any:
    """What ``make`` returned (a list of Done) when some worker called it first; its files are in ``folder``."""
    kept = folder / f"{name}.json"
    with alone(folder / f"{name}.lock"):
        if not kept.exists():
            kept.write_text(json.dumps([dataclasses.asdict(done) for done in make()]))
    return [Done(**fields) for fields in json.loads(kept.read_text())]


def text(root: Path) -> Path:
    """The folder of the text."""
    with alone(root / "text.lock"):
        if not (root / "text").exists():
            write_text(root / "text")
    return root / "text"


def whole(root: Path) -> list[Done]:
    """The process that trained ``root``/whole/{sft,rm,dpo,kto,grpo,ppo} without a break, and dpo as "still" at learning
    rate 0; that evaluated and exported them; and that wrote with the policy and with its export."""
    runs = root / "whole"
    still = ["dpo:optimizer.default.learning_rate=0", "dpo:iterations=1", f"dpo:run_dir={runs}/still"]
    still += [f"dpo:eval.judge={{path: {text(root)}/labels.jsonl}}"]
    write = ["--prompt", "the film is", "--prompt", "the plot", "--temperature", "0", "--max-tokens", "8"]
    commands = [
        train(*overrides(text(root), runs), configs=ALL),
        train(*overrides(text(root), runs), *still, configs=[tiny_config("dpo")]),
        *(["evaluate", f"{runs / name}", "--json"] for name in ("sft", "rm", "dpo", "grpo", "ppo", "still")),
        ["export", f"{runs}/ppo", "--role", "policy", "--to", f"{runs}/policy-hf"],
        ["export", f"{runs}/rm", "--role", "reward", "--to", f"{runs}/reward-hf"],
        ["generate", f"{runs}/ppo", *write],
        ["generate", f"{runs}/policy-hf", *write],
    ]
    return once(root, "whole", lambda: [process(root / "process", commands, profile="ppo")])


def parts(root: Path) -> list[Done]:
    """The processes that trained ``root``/parts/{sft,ppo} a part at a time, from where ``whole`` starts:

    1. sft for 2 iterations, ppo until SIGTERM while its second is computed; then, in the same process, the rest of sft,
       and ppo until SIGKILL before the checkpoint after its third iteration: the root then is copied to killed
    2. the rest of ppo"""
    kills = [("SIGTERM", "ppo", "metrics", 1), ("SIGKILL", "ppo", "samples", 3)]
    return in_parts(root, ("sft", "ppo"), kills, ["sft:iterations=2"])


def halves(root: Path) -> list[Done]:
    """The processes that trained ``root``/parts/{dpo,grpo,rm} so: dpo and grpo for 2 iterations, and rm until SIGTERM
    while its second is computed, then the rest; and once more, when all is done. To the loop kto is another dpo."""
    return in_parts(
        root, ("dpo", "grpo", "rm"), [("SIGTERM", "rm", "metrics", 1)], ["dpo:iterations=2", "grpo:iterations=2"]
    )


def in_parts(root: Path, names: Sequence[str], kills: Sequence[Kill], short: Sequence[str]) -> list[Done]:
    """Two processes that train the ``names``: what is ``short`` and then the rest, with the ``kills``; what is left."""
    whole(root)
    arguments = [*overrides(text(root), root / "parts", root / "whole"), "checkpoint.every=3"]
    first, rest = (train(*arguments, *more, configs=[tiny_config(name) for name in names]) for more in (short, ()))

    def make() -> Iterator[Done]:
        yield process(root / f"process-{names[0]}-1", [first, rest], kills=kills)
        if "ppo" in names:
            shutil.copytree(root / "parts", root / "killed")
        yield process(root / f"process-{names[0]}-2", [rest])

    return once(root, f"parts-{names[0]}", make)


# ---- what runs leave ------------------------------------------------------------------------------------------------


def copy_run(source: Path, to: Path, last: int) -> Path:
    """A copy of a run directory, without the checkpoints after step ``last``."""
    shutil.copytree(source, to)
    for path in (to / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > last:
            shutil.rmtree(path)
    return to


def read_state(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint: "params.policy/embed/tokens/embedding", ..."""
    import orbax.checkpoint as ocp

    found = {}
    for item in sorted((run / "checkpoints" / str(step)).iterdir()):
        if not item.name.startswith(("params.", "slow.", "state")):
            continue
        with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody said where the arrays are to lie
            there = reader.metadata(item).item_metadata
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)  # not as it lay on devices
            tree = reader.restore(item, restore_args=kinds)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{item.name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = np.asarray(leaf)
    return found


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl or samples.jsonl, without what a clock or the machine says."""
    timed = ("time", "time/iteration", "time/rewards", "throughput/response_tokens_per_second", "memory/host_peak")
    timed += ("eval/time/evaluation",)
    lines = (run / f"{name}.jsonl").read_text().splitlines()
    said = lambda key: key in timed or key.startswith("time/rewards/")
    return [{key: value for key, value in json.loads(line).items() if not said(key)} for line in lines]


def steps_kept(run: Path) -> list[int]:
    """The steps that have a checkpoint."""
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


if __name__ == "__main__":
    main()
