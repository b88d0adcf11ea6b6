"""The first lines of a run, and the last: what is trained on what, what it made, and what to do with it."""

import math
import shlex
from collections.abc import Sequence

import jax

from jaxrlhf.config.batch import describe_batch, describe_learning, describe_precision, describe_sharing
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.data import chat
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.summary import Summary
from jaxrlhf.errors import counted
from jaxrlhf.hosts import processes
from jaxrlhf.models.lora import base_table, own_table
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.run.build import Run
from jaxrlhf.run.epochs import describe_epochs, describe_short_run
from jaxrlhf.run.feed import Feed, describe_data, glue_of, training_prompts
from jaxrlhf.run.origins import base_role
from jaxrlhf.run.runtime import kernels_passed_over
from jaxrlhf.sharding import batch_shards
from jaxrlhf.types import Role


def opening(ready: Run, start: int) -> str:
    """ "runs/x: ppo, llama 1.2M, 1 x cpu, 44 iterations, seed 0"; the model is the policy, or the role that learns."""
    cfg, role = ready.cfg, trained_role(ready.resolved)
    shape, devices = ready.configs[role], ready.mesh.devices
    parts = [
        cfg.algorithm_name,
        f"{shape.family} {short_count(count_of(parameter_table(shape, ready.heads[role])))}",
        f"{devices.size} x {devices.flat[0].device_kind}",
        counted(cfg.length, "iteration") + (f", going on after {start}" if start else ""),
        f"seed {cfg.seed}",
    ]
    return f"{cfg.run_dir}: {', '.join(parts)}"


def count_of(table: dict) -> int:
    """Parameters of the Leafs in ``table``."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, Leaf)))


def describe_adapters(ready: Run) -> list[str]:
    """How many parameters learn and how many are frozen, a line for each base that roles share."""
    bases, lines = ready.resolved.bases, []
    for base in sorted({based.base for based in bases.values()}):
        members = [role for role, based in bases.items() if based.base == base]
        own = {role: count_of(own_table(ready.configs[role], ready.heads[role], bases[role].lora)) for role in members}
        learned = {role: count for role, count in own.items() if role in ready.recipe.optimizers}
        frozen = count_of(base_table(ready.configs[members[0]], {ready.heads[role] for role in members}))
        kind = bases[members[0]].quantization
        each = ", ".join(f"{role} {short_count(count)}" for role, count in learned.items())
        lines.append(
            f"adapters: {short_count(sum(learned.values()))} parameters learn ({each}); {short_count(frozen)} are "
            f"frozen, kept once for {', '.join(members)}" + (f", the layers in {kind}" if kind else "")
        )
    return lines


def first_lines(ready: Run, feed: Feed, held_out: Sequence[Summary], best: Sequence[str]) -> list[str]:
    """What is said before anything is compiled: of data, batch arithmetic, precision, and what may be unexpected.

    ``held_out``: the sources of the evaluation; ``best``: what there is to say of checkpoint.best."""
    cfg, resolved, parts = ready.cfg, ready.resolved, ready.recipe.num_micro
    notes = dict.fromkeys(note for found in ready.weights.values() for note in found.notes)
    rows = describe_rows(ready, feed, held_out)
    return [
        *describe_data(ready),
        *rows,
        describe_epochs(resolved, feed.rows()),
        describe_batch(resolved, parts),
        *describe_short_run(resolved, feed.rows()),
        *describe_sharing(resolved, batch_shards(ready.mesh), parts),
        *best,
        *describe_precision(resolved),
        *describe_adapters(ready),
        *describe_learning(resolved),
        *kernels_passed_over(cfg, ready.mesh, ready.configs),
        *other_endings(ready),
        *spelled_markers(ready),
        *rewritten_turns(ready, feed),
        *notes,
    ]


def describe_rows(ready: Run, feed: Feed, held_out: Sequence[Summary]) -> list[str]:
    """What became of the rows of every source that the run reads, at the end of it too."""
    summaries = [*feed.summaries(), *held_out]
    if last := ready.algorithm.finish(ready.cfg.algorithm):
        prompts = training_prompts(ready, last.samples).summary
        summaries += [prompts] if prompts else []
    return [line for summary in summaries for line in summary.lines()]


def trained_role(resolved: Resolved) -> Role:
    """The policy, or else the first role that learns."""
    trained = resolved.roles.trained
    return "policy" if "policy" in trained else next(iter(trained))


def short_count(number: float) -> str:
    """ "1.2M" of 1,234,567; at least two digits."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit * 0.9995:
            return f"{number / unit:.3g}{name}" if number >= 100 * unit else f"{number / unit:.1f}{name}"
    return str(round(number))


def duration(seconds: float) -> str:
    """ "0:03:12"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def all_done(resolved: Resolved, start: int) -> bool:
    """Whether no iteration is left, which is said; False where epochs have to be counted first."""
    cfg = resolved.cfg
    done = cfg.iterations is not None and start >= cfg.iterations
    if done and processes.is_main():
        some = f"all {start} iterations are done" if start == cfg.iterations else f"{start} iterations are done"
        more = "" if start == cfg.iterations else f", and iterations is {cfg.iterations}"
        print(f"{cfg.run_dir}: {some}{more}; raise iterations= (or epochs=) to go on")
        print("\n".join(next_steps(resolved)))
    return done


def closing(resolved: Resolved, seconds: float, best: int | None) -> str:
    """What a finished run made, and what to do next. ``best``: the step that checkpoint.best kept, where it did."""
    cfg = resolved.cfg
    kept = f"checkpoint of step {cfg.iterations}"
    if best is not None and best != cfg.iterations:
        kept += f" (best {cfg.checkpoint.best}: step {best})"
    files = ["metrics.jsonl", "samples.jsonl"] + ["tensorboard/"] * ("tensorboard" in cfg.log.trackers)
    return "\n".join([f"{cfg.run_dir}: done in {duration(seconds)}: {kept}, {', '.join(files)}", *next_steps(resolved)])


def next_steps(resolved: Resolved) -> list[str]:
    """The commands that take up a finished run."""
    cfg, role = resolved.cfg, trained_role(resolved)
    run, to = shlex.quote(cfg.run_dir), shlex.quote(f"{cfg.run_dir}-hf")
    held_out = [name for name in vars(cfg.data) if name.startswith("eval_") and getattr(cfg.data, name) is not None]
    commands = [*([f"jaxrlhf evaluate {run}"] if held_out else []), f"jaxrlhf report {run}"]
    if not cfg.acts:  # else there is no text to write, and no such Hugging Face model
        commands += [f"jaxrlhf generate {run} --prompt TEXT"] if role == "policy" else []
        commands += [f"jaxrlhf export {run}{'' if role == 'policy' else f' --role {role}'} --to {to}"]
    return [f"{'next:' if index == 0 else '':5} {command}" for index, command in enumerate(commands)]


def other_endings(run: "Run") -> list[str]:
    """What to say of reward models that were trained on rows that end otherwise than the run's responses do."""
    ours, lines = run.sampler.eos_ids, []
    words = lambda ids: ", ".join(map(repr, run.tokenizer.convert_ids_to_tokens(list(ids))))
    for role, found in run.weights.items():
        if role == "policy" or found.kind != "run" or found.path == run.cfg.run_dir or run.heads[role] == "lm":
            continue
        theirs = found.record.get("eos_ids") or ours
        if set(theirs) != set(ours):
            lines.append(
                f"warning: models.{base_role(run.cfg, role)}: {found.path}: was trained on rows that end with "
                f"{words(theirs)}, and responses here end with {words(ours)}; train it on this policy's tokenizer"
            )
    return lines


def rewritten_turns(ready: Run, feed: Feed) -> list[str]:
    """What to say of an environment's conversations that the chat template would write otherwise as a whole."""
    if ready.environment is None or ready.cfg.environment.max_turns == 1:
        return []
    lines = [glue_of(ready).rewrites(record) for record in feed.first_records()[:1]]
    return [line for line in lines if line]


def spelled_markers(run: "Run") -> list[str]:
    """What to say of a chat template by name whose special tokens the tokenizer doesn't have."""
    missing = [word for word in chat.markers(run.cfg.data.chat) if word not in tokenizers.added_tokens(run.tokenizer)]
    if not missing:
        return []
    return [
        f"warning: data.chat.template: the tokenizer has no token {', '.join(missing)}: they are written in letters; "
        "zephyr and plain do without"
    ]
