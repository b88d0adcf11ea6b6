"""What a language model on a server says of a policy's responses, beside its reference's or the data's."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.errors import ConfigError, nearest
from jaxrlhf.evaluate.against_reference import PolicyEvaluation, Responses
from jaxrlhf.evaluate.win_intervals import win_report
from jaxrlhf.hosts import processes
from jaxrlhf.rewards.llm_judge import PROBE, JudgeConfig, PairJudge, Verdicts, prompt_text
from jaxrlhf.rewards.remote import settings_of

OPTION, KIND = "--judge", "llm:"
SHAPE = "expected llm:MODEL@URL, as in llm:gpt-5-mini@https://api.openai.com/v1, or llm:FILE.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationJudge(JudgeConfig):
    """A judge, and what the policy's responses are compared with."""

    against: str | None = None  # a text column of data.eval_prompts; null: what the reference writes


def read_judge(text: str) -> EvaluationJudge:
    """The judge of --judge: llm:MODEL@URL, or llm:FILE.yaml of its fields. Raises ConfigError, in one line."""
    if not text.startswith(KIND):
        raise ConfigError(f"{OPTION} {text}: {SHAPE}")
    name = text.removeprefix(KIND)
    model, at, address = name.partition("@http")
    if at:
        given = {"model": model, "url": f"http{address}"}
    elif name.endswith((".yaml", ".yml")):
        try:
            given = read_yaml(epath.Path(name).read_bytes(), f"{OPTION} {text}")
        except OSError as error:
            raise ConfigError(f"{OPTION} {text}: {error.strerror or error}; {SHAPE}") from None
    else:
        raise ConfigError(f"{OPTION} {text}: {SHAPE}")
    try:
        return settings_of(EvaluationJudge, given)
    except ValueError as error:
        raise ConfigError(f"{OPTION} {text}: {error}") from None


class LlmJudge:
    """The judge of an evaluation. It is asked once at the start: what is wrong with the server, the key or the model is
    known before anything is computed. Raises ConfigError, in one line."""

    def __init__(self, cfg: EvaluationJudge):
        self.cfg, self.verdicts = cfg, []
        try:
            self.pairs = PairJudge(cfg)
            if processes.is_main():
                self.pairs([PROBE])
        except ValueError as error:
            raise ConfigError(f"{OPTION} {KIND}{cfg.model}: {error}") from None

    def check(self, evaluation: PolicyEvaluation | None) -> None:
        """Raises ConfigError, in one line, where there will be nothing to compare."""
        where = f"{OPTION} {KIND}{self.cfg.model}"
        if evaluation is None:
            raise ConfigError(f"{where}: there are no responses; expected a run with a policy and data.eval_prompts")
        if self.cfg.against is None:
            known = {*evaluation.ready.heads, *evaluation.more}
            if "reference" not in known:
                wanted = "expected against: COLUMN of data.eval_prompts, in llm:FILE.yaml"
                raise ConfigError(f"{where}: the run has no reference; {wanted}")
            return
        if processes.several():
            raise ConfigError(f"{where}: against: {self.cfg.against}: expected one process; found several")
        for record in records_of(evaluation):
            if not isinstance(record.get(self.cfg.against), str):
                columns = sorted(name for name, value in record.items() if isinstance(value, str))
                found = nearest(self.cfg.against, columns)
                raise ConfigError(f"{where}: against: {self.cfg.against}: no text column of data.eval_prompts; {found}")

    def report(self, evaluation: PolicyEvaluation) -> dict[str, Any]:
        """win_report of the policy's last responses, and of the judge: its model, "first_position" (the share of
        verdicts for what stood first, of those that are no tie; 0.5 is no bias), "agreement" (the share of pairs on
        which both orders agree), "unscorable" (the share of pairs without both verdicts), and what it cost.

        Raises ValueError where the server is down. To be called on the first process."""
        after = evaluation.after
        assert after is not None, "nothing has been evaluated"
        prompts, theirs, lengths = self.others(evaluation, after)
        written = [row["response"] for row in after.rows]
        self.verdicts = self.pairs([*zip(prompts, written, theirs, strict=True)])
        wins = np.array([np.nan if pair.win is None else pair.win for pair in self.verdicts])
        found: dict[str, Any] = {"model": self.cfg.model, "against": self.cfg.against or "reference"}
        found |= win_report(wins, np.full(len(wins), 0.5), after.lengths - lengths) | position_report(self.verdicts)
        return found | dataclasses.asdict(self.pairs.usage)

    def others(self, evaluation: PolicyEvaluation, after: Responses) -> tuple[list[str], list[str], np.ndarray]:
        """(prompts, the responses to compare with, their tokens)."""
        prompts = [row["prompt"] for row in after.rows]
        records = [] if processes.several() else records_of(evaluation)  # a process has those of its rows alone
        prompts = [prompt_text(record) for record in records] or prompts
        if self.cfg.against is None:
            before = evaluation.before
            assert before is not None, "there is a reference"
            return prompts, [row["response"] for row in before.rows], before.lengths
        texts = [record[self.cfg.against] for record in records]
        encode = evaluation.ready.tokenizer.encode
        return prompts, texts, np.array([len(encode(text, add_special_tokens=False)) for text in texts], np.float32)


def records_of(evaluation: PolicyEvaluation) -> list[dict[str, Any]]:
    """The records of this process's held-out prompts."""
    return [record for host in evaluation.batches for record in host.columns or []]


def position_report(verdicts: Sequence[Verdicts]) -> dict[str, float]:
    """What the verdicts say of the judge itself."""
    each = [said for pair in verdicts for said in pair if said is not None]
    decided = [said == "first" for said in each if said != "tie"]
    whole = [pair for pair in verdicts if pair.win is not None]
    agreed = [pair in (("first", "second"), ("second", "first"), ("tie", "tie")) for pair in whole]
    found = {"first_position": decided, "agreement": agreed, "unscorable": [pair.win is None for pair in verdicts]}
    return {name: round(float(np.mean(values)), 4) for name, values in found.items() if values}
