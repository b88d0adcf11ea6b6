"""What a policy writes for held-out prompts: reward, KL, length, and how often it beats the reference.

It is the same for every algorithm with a policy, on policy or offline. Policy and reference answer the same prompts
under the same sampling noise, one response each; the reward model (or the user's function) and an outside judge say
whose response is better.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithm import TEACHER, read_logprobs
from jaxrlhf.algorithms.grading import members_of, read_scores
from jaxrlhf.data.batch_kinds import PROMPTS
from jaxrlhf.data.tokenizer import decode_rows
from jaxrlhf.evaluate.win_intervals import win_report, wins_of
from jaxrlhf.hosts import processes
from jaxrlhf.models.lora import acting_as
from jaxrlhf.ops.masked import keep
from jaxrlhf.rewards.graders import gold_graders
from jaxrlhf.rewards.judge import Judge
from jaxrlhf.run import build
from jaxrlhf.run.build import Run
from jaxrlhf.run.feed import held_out, read_source
from jaxrlhf.run.initial_state import read_weights
from jaxrlhf.run.kept_programs import shared
from jaxrlhf.run.scoring import nothing, score
from jaxrlhf.run.transfer import fetch_all, put
from jaxrlhf.run.turns import METRICS, Talker, marked_turns
from jaxrlhf.step import make_extend
from jaxrlhf.types import Array, Head, Params, Prompts, Role, Sequences, TrainState, Trees, given


class Responses(NamedTuple):
    """What one policy wrote: an entry a held-out prompt. None: nothing measures it in this run."""

    rows: list[dict[str, Any]]  # prompt, response, score, split
    lengths: np.ndarray  # f32, tokens
    ended: np.ndarray  # bool, by itself
    kl: np.ndarray | None  # f32, nats from the reference, of the sampled tokens
    scores: np.ndarray | None  # f32; NaN where the reward functions give none
    marks: np.ndarray | None  # f64: the judge's probability that the text is positive
    gold: np.ndarray | None = None  # f32, by the second reward; NaN where its function gives none
    teacher_kl: np.ndarray | None = None  # f32, nats from the teacher, of the sampled tokens
    cost: np.ndarray | None = None  # f32, by the cost model, or the function of that name; NaN where it gives none
    grades: Mapping[str, np.ndarray] = MappingProxyType(
        {}
    )  # what each of several functions, or of an ensemble's members, gives
    turns: Mapping[str, float] = MappingProxyType({})  # means of conversations: turns/..., environment/NAME


class Dialogues:
    """Held-out prompts whose responses the run's environment answers; its programs are compiled when they are first
    used.

    Args:
        measured: PolicyEvaluation.measured.
    """

    def __init__(self, ready: Run, measured: Callable):
        at_start = lambda state: state.replace(step=jnp.int32(0))  # all evaluations share their noise
        nets, rollout, extend = ready.recipe.nets, ready.algorithm.rollout, make_extend(ready.recipe)
        begin = lambda state, prompts: rollout(nets, at_start(state), prompts)
        self.begin = shared("begin", ready, lambda: processes.jit(begin))
        say = shared("say", ready, lambda: processes.jit(lambda state, prompts: extend(at_start(state), prompts)))
        self.measured = shared("measured", ready, lambda: processes.jit(measured))
        self.talker = Talker(ready, lambda width: say)

    def __call__(self, state: TrainState, extra: dict[Role, Params], prompts: Prompts, records: list[dict[str, Any]]):
        """PolicyEvaluation.measured of what the policy and the environment say, and the metrics of the conversations,
        without times."""
        played = self.talker.play(state, prompts, self.begin(state, prompts), records)
        numbers = {name: value for name, value in played.metrics.items() if not name.startswith("time/")}
        return *self.measured(state, extra, played.sequences), numbers


class PolicyEvaluation:
    """The held-out prompts of a run, and the program that has them answered and scored.

    A reference, a reward model or a cost model that the config names and the algorithm does without is read at the
    first evaluation and kept."""

    def __init__(self, ready: Run, judge: bool = True, samples: int = 1):
        cfg, self.samples = ready.cfg, samples  # responses to each prompt
        self.graders: tuple[Role, ...] = members_of(ready.recipe.nets)  # the reward model, or its members
        self.costs = members_of(ready.recipe.nets, "cost")
        scalar: dict[Role, Head] = dict.fromkeys((*self.graders, *self.costs), "scalar")
        heads: dict[Role, Head] = {"reference": "lm", "gold": "scalar", **scalar}
        more = [role for role in heads if role in cfg.models and role not in ready.heads]
        self.more: dict[Role, Head] = {role: heads[role] for role in more}
        sampler = ready.sampler._replace(samples_per_prompt=samples)
        if cfg.eval.temperature is not None:
            sampler = sampler._replace(sampling=sampler.sampling._replace(temperature=cfg.eval.temperature))
        self.ready = build.with_roles(ready, self.more, sampler)
        self.gold = dataclasses.replace(self.ready, graders=gold_graders(cfg.eval.gold)) if cfg.eval.gold else None
        rows = min(max(cfg.batch.prompts_per_step * cfg.batch.samples_per_prompt // samples, 1), cfg.eval.size)
        self.batches = held_out(ready, PROMPTS, cfg.eval.size, rows)
        self.asks_judge = judge and cfg.eval.judge is not None
        self.judge: Judge | None = None
        self.extra: dict[Role, Params] | None = None
        self.before: Responses | None = None
        self.after: Responses | None = None  # of the last ``run``
        self.program = shared("answer", self.ready, lambda: processes.jit(self.answer))
        self.dialogues = Dialogues(self.ready, self.measured) if self.ready.environment is not None else None

    def run(self, state: TrainState, between: Callable[[], None] = nothing) -> Responses:
        """What the policy writes; at first, and each time where the reward learns, what the reference writes too.
        ``between`` is called before each batch."""
        trees = Trees(state.params, self.others() | state.slow)
        if "reference" in trees.slow and (self.before is None or self.graders[0] in state.params):
            own = {role: tree for role, tree in state.params.items() if role not in self.ready.resolved.roles.guides}
            own["policy"] = acting_as("policy", "reference", trees, self.ready.resolved.bases)
            self.before = self.write(state.replace(params=own), between)  # it has no guides
        self.after = self.write(state, between)
        return self.after

    def others(self) -> dict[Role, Params]:
        """The models that only the evaluation reads."""
        if self.extra is None:
            self.extra = {role: read_weights(self.ready, role) for role in self.more}
        return self.extra

    def answer(
        self, state: TrainState, extra: dict[Role, Params], prompts: Prompts
    ) -> tuple[Sequences, dict[str, Array]]:
        """``measured`` of the responses to the prompts, under step 0, so that all evaluations share their noise."""
        rollout = self.ready.algorithm.rollout
        sequences = rollout(self.ready.recipe.nets, state.replace(step=jnp.int32(0)), prompts)
        return self.measured(state, extra, sequences)

    def measured(
        self, state: TrainState, extra: dict[Role, Params], sequences: Sequences
    ) -> tuple[Sequences, dict[str, Array]]:
        """(responses, with scores where a reward model gives them, and grades where it is an ensemble; f32[B] of each
        that is known: "kl" and "teacher_kl" in nats, "gold" by models.gold, "cost" by models.cost)."""
        nets, trees = self.ready.recipe.nets, Trees(state.params, extra | state.slow)
        known = {*trees.params, *trees.slow}
        if self.graders[0] in known and self.ready.graders is None:
            scores, members = read_scores(nets, trees, sequences)
            sequences = sequences.replace(scores=scores, grades=members or None)
        found = {"gold": read_scores(nets, trees, sequences, "gold")[0]} if "gold" in known else {}
        if self.costs[0] in known:
            found["cost"] = read_scores(nets, trees, sequences, "cost")[0]
        if "reference" in known:
            reference = read_logprobs(nets, "reference", trees, sequences)
            logprobs = given(sequences.logprobs, "sequences.logprobs")
            found["kl"] = keep(logprobs - reference, sequences.response_mask).sum(-1)
        if TEACHER in known:
            teacher = read_logprobs(nets, TEACHER, trees, sequences)
            logprobs = given(sequences.logprobs, "sequences.logprobs")
            found["teacher_kl"] = keep(logprobs - teacher, sequences.response_mask).sum(-1)
        return sequences, found

    def write(self, state: TrainState, between: Callable[[], None] = nothing) -> Responses:
        """All prompts answered by the policy in ``state``: ``samples`` responses to each, side by side."""
        columns: dict[str, list] = {
            "rows": [],
            "lengths": [],
            "ended": [],
            "kl": [],
            "scores": [],
            "gold": [],
            "teacher_kl": [],
            "cost": [],
        }
        grades: dict[str, list] = {}
        turns: list[tuple[int, dict[str, float]]] = []  # conversations of a batch, and their means
        for host in self.batches:
            between()
            prompts, records = given(put(self.ready.mesh, host.batch).prompts, "prompts"), host.columns or []
            if self.dialogues is None:
                sequences, known = self.program(state, self.others(), prompts)
            else:
                sequences, known, numbers = self.dialogues(state, self.others(), prompts, records)
                turns.append((host.real * self.samples, numbers))
            if self.gold is not None:
                known["gold"] = given(score(self.gold, sequences, records).sequences.scores, "gold")
            if self.ready.graders is not None:
                sequences = score(self.ready, sequences, records).sequences
            sequences, known, real = *fetch_all((sequences, known)), host.real * self.samples
            mask = sequences.response_mask
            columns["rows"] += sample_rows(self.ready, sequences, real, "eval")
            values = {"lengths": mask.sum(1, dtype=np.float32), "ended": sequences.ended}
            values |= {"scores": sequences.scores, **known}
            for name, value in values.items():
                columns[name] += [] if value is None else [value[:real]]
            for name, value in (sequences.grades or {}).items():
                grades.setdefault(name, []).append(value[:real])
        rows = columns.pop("rows")
        arrays: dict[str, Any] = {name: np.concatenate(parts) if parts else None for name, parts in columns.items()}
        each = {name: np.concatenate(parts) for name, parts in grades.items()}
        if self.ready.graders is not None and "cost" in each:
            arrays["cost"] = each["cost"]
        return Responses(rows=rows, marks=self.marks(rows), grades=each, turns=weighted(turns), **arrays)

    def marks(self, rows: list[dict[str, Any]]) -> np.ndarray | None:
        """What the judge thinks of prompt + response. It is trained when it is first asked."""
        if not self.asks_judge:
            return None
        if self.judge is None:
            self.judge = Judge(read_source(self.ready, "labels", self.ready.cfg.eval.judge, "eval.judge"))  # type: ignore[arg-type]
        return self.judge([row["prompt"] + row["response"] for row in rows])

    def metrics(self, responses: Responses) -> dict[str, float]:
        """Means over the prompts. win_rate/...: the share of prompts whose response beats the reference's, by the
        reward and by the judge; a tie is half a win. Where functions score, a response without a score counts for the
        judge alone."""
        known, on_host = np.ones(len(responses.lengths), bool), False
        if (self.ready.graders or self.ready.environment) and responses.scores is not None:
            known, on_host = ~np.isnan(responses.scores), True
        found = {"response/length_mean": mean(responses.lengths[known]), "response/ended": mean(responses.ended[known])}
        found |= responses.turns
        if responses.kl is not None:
            found["kl/reference"] = mean(responses.kl[known])
        if responses.teacher_kl is not None:
            found["kl/teacher"] = mean(responses.teacher_kl[known])
        scores = None if responses.scores is None else responses.scores[known]
        for name, values in (("score", scores), ("judge", responses.marks), ("gold", responses.gold)):
            if values is not None:
                spread = values.std(ddof=len(values) > 1) if len(values) else np.nan
                found |= {f"{name}/mean": mean(values), f"{name}/std": spread}
        if responses.cost is not None:
            costs = responses.cost[known & ~np.isnan(responses.cost)]
            found |= {"cost/mean": mean(costs), "cost/violations": mean(costs > 0)}
        if on_host:
            found["score/unscorable"] = (~known).sum()
        for name, grade in responses.grades.items():
            found[f"score/{name}"] = mean(grade[known & ~np.isnan(grade)])
            if on_host:
                found[f"score/unscorable/{name}"] = np.isnan(grade).sum()
        if len(responses.grades) > 1 and not on_host:
            found["score/disagreement"] = mean(np.std([*responses.grades.values()], axis=0))
        if scores is not None:
            found["score/length_correlation"] = correlation(scores, responses.lengths[known])
        for name, (ours, theirs) in opponents(responses, self.before).items():
            both = ~(np.isnan(ours) | np.isnan(theirs)) if on_host else slice(None)
            found[f"win_rate/{name}"] = mean(wins_of(ours[both], theirs[both]))
        return {name: float(value) for name, value in found.items()}

    def win_reports(self) -> dict[str, dict[str, float]]:
        """By each of them, win_report of the last ``run``."""
        if self.before is None or self.after is None:
            return {}
        longer = self.after.lengths - self.before.lengths
        return {name: win_report(*pair, longer) for name, pair in opponents(self.after, self.before).items()}

    def names(self) -> list[str]:
        """The metrics that an evaluation will give, by what it gives of made-up responses."""
        numbers, roles, made = np.zeros(2), self.ready.heads, copy.copy(self)
        graders = self.ready.graders
        scored = self.graders[0] in roles or graders is not None or self.ready.environment is not None
        members = self.graders if len(self.graders) > 1 else []
        grades = dict.fromkeys(members if graders is None else graders.names, numbers)
        known = {"kl": "reference" in roles, "scores": scored, "marks": self.asks_judge}
        known["teacher_kl"] = TEACHER in roles
        known["gold"] = self.gold is not None or "gold" in roles
        known["cost"] = self.costs[0] in roles or "cost" in grades
        given: dict[str, Any] = {name: numbers if there else None for name, there in known.items()}
        environment = self.ready.environment
        own = [f"environment/{name}" for name in (environment and environment.metric_names) or ()]
        turns = {} if environment is None else dict.fromkeys([*METRICS, *own], 0.0)
        responses = Responses([], numbers, numbers > 0, **given, grades=grades, turns=turns)
        made.before = responses if "reference" in roles else None
        return [*made.metrics(responses)]


def opponents(responses: Responses, before: Responses | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(ours, the reference's) numbers by each who says whose response is better."""
    if before is None:
        return {}
    whose = {"reward": "scores", "judge": "marks", "gold": "gold"}
    pairs = {name: (getattr(responses, field), getattr(before, field)) for name, field in whose.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] is not None and pair[1] is not None}


def weighted(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The means over all rows: ``parts`` are rows, and the means over them."""
    total = sum(count for count, _ in parts)
    return {name: sum(count * part[name] for count, part in parts) / total for name in (parts[0][1] if parts else ())}


def mean(values: np.ndarray) -> float:
    """NaN of nothing, without a warning."""
    return float(values.mean()) if len(values) else float("nan")


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    x, y = x - mean(x), y - mean(y)
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def sample_rows(ready: Run, sequences: Sequences, count: int, split: str) -> list[dict[str, Any]]:
    """The first ``count`` rows as text: prompt, response (of a conversation all behind the prompt), its turns, score,
    score/NAME of each of several graders (null: it gave none), split. All processes have to call it."""
    rows = jax.tree.map(lambda x: x[:count], fetch_all(sequences))
    said = rows.response_mask
    if talks := ready.cfg.converses and rows.rewards is not None:
        said = rows.valid & (np.arange(rows.valid.shape[1]) >= rows.response_start)
    prompts, responses = (decode_rows(ready.tokenizer, rows.tokens, mask) for mask in (rows.valid & ~said, said))
    texts = [{"prompt": prompt, "response": response} for prompt, response in zip(prompts, responses, strict=True)]
    if talks:
        turns = [marked_turns(ready.tokenizer, *row) for row in zip(rows.tokens, said, rows.response_mask)]
        texts = [text | {"turns": marked} for text, marked in zip(texts, turns, strict=True)]
    numbers = {} if rows.scores is None else {"score": rows.scores}
    numbers |= {f"score/{name}": grade for name, grade in (rows.grades or {}).items()}
    for name, values in numbers.items():
        shown = [None if np.isnan(value) else round(float(value), 4) for value in values]
        texts = [text | {name: value} for text, value in zip(texts, shown, strict=True)]
    return [text | {"split": split} for text in texts]
