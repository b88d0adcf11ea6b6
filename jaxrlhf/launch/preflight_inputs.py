"""What a run starts from, looked at before it: tokenizer, weights, data, reward functions. No weights are read."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxrlhf.config.check import sections_read
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data.batch_kinds import PROMPTS, kind_of_section
from jaxrlhf.data.examples import make_examples
from jaxrlhf.data.sources import Source, open_source
from jaxrlhf.log.run_dir import made_by
from jaxrlhf.rewards.graders import find_graders
from jaxrlhf.run import saved_run, verified_steps
from jaxrlhf.run.origins import check_loaded, origin
from jaxrlhf.run.tokenizer import find_tokenizer, foreign_tokens, tokenizer_origin
from jaxrlhf.run.weights import find_weights

FEW = 32  # records of a section that are encoded
Look = Callable[[], str]


class Inputs:
    """The inputs of one config. ``made``: run directory -> the config that makes it earlier in the same command: it
    need not be there yet."""

    def __init__(self, cfg: Config, made: Mapping[str, str]):
        self.cfg, self.resolved, self.made = cfg, resolve_config(cfg), made
        self.saved_runs = saved_run.SavedRuns()
        self.tokenizer: Any = None  # once it is found
        self.sources: dict[str, Source] = {}  # those that were opened

    def looks(self) -> Iterator[tuple[str, Look]]:
        """(name, what to do), in order. Each returns what it found, and raises where something is wrong."""
        yield "tokenizer", self.find_tokenizer
        yield "weights", self.find_weights
        for section in self.sections():
            yield "data", lambda section=section: self.open_data(section)
        if self.cfg.rewards.on_host:
            yield "rewards", self.try_graders

    def sections(self) -> list[str]:
        """The sections of ``data`` that the run opens; of held-out data those that are given."""
        read = sections_read(self.resolved)
        held_out = [f"eval_{name}" for name in dict.fromkeys([*read, PROMPTS.name])]
        return read + [name for name in held_out if getattr(self.cfg.data, name) is not None]

    def is_made(self, path: str | None) -> bool:
        """Whether ``path`` (RUN, RUN@best) is a run that another config of the command makes, not there yet."""
        run = made_by(path, self.made)
        return run is not None and verified_steps.newest(run) is None

    def find_tokenizer(self) -> str:
        size, resumed = self.cfg.tokenizer.train_vocab_size, verified_steps.newest(self.cfg.run_dir) is not None
        if size and not resumed:
            return f"byte-level BPE of {size:,} tokens, trained when the run starts"
        named = self.cfg.run_dir if resumed else tokenizer_origin(self.cfg)[0]
        if self.is_made(named):
            return f"{named}: made before by {self.made[str(made_by(named, self.made))]}"
        self.tokenizer = find_tokenizer(self.saved_runs, self.cfg)
        return f"{named}: {len(self.tokenizer):,} tokens"

    def find_weights(self) -> str:
        """Finds, or downloads, every role's files; reads which tensors they hold, and whether the tokenizer fits."""
        size = len(self.tokenizer) if self.tokenizer else self.cfg.tokenizer.train_vocab_size or 1
        found: dict[str, list[str]] = {}
        heads, started = self.resolved.roles.heads, {}
        for role, head in heads.items():
            named = origin(self.cfg, role).init_from
            if self.is_made(named):
                shown = f"{named} (made before by {self.made[str(made_by(named, self.made))]})"
            else:
                weights = started[role] = find_weights(self.saved_runs, self.cfg, role, size, head)
                shown = "random" if weights.kind == "new" else f"{named or weights.path} ({weights.config.family})"
            found.setdefault(shown, []).append(role)
        check_loaded(self.cfg, started, {role: heads[role] for role in started}, self.resolved.roles.trained)
        if self.tokenizer:
            foreign_tokens(self.saved_runs, self.cfg, started, self.tokenizer)
        return "; ".join(f"{', '.join(roles)}: {shown}" for shown, roles in found.items())

    def open_data(self, section: str) -> str:
        """Opens the records, and encodes the first of them."""
        data, where, kind = self.cfg.data, f"data.{section}", kind_of_section(section)
        source = open_source(
            getattr(data, section), kind.name, cache_dir=data.cache_dir, skip_bad=data.skip_bad, path_in_config=where
        )
        self.sources[where] = source
        text = f"{where}: {len(source):,} rows, {source.describe()}"
        if self.tokenizer is None:
            return f"{text}; not encoded, there is no tokenizer yet"
        few = dataclasses.replace(source, size=min(FEW, len(source)), fingerprint=f"{source.fingerprint} {FEW}")
        summary = make_examples(kind, few, self.tokenizer, data, where).summary
        return f"{text}; of the first {few.size} {summary.counts['kept']} are kept: {summary.lengths()}"

    def try_graders(self) -> str:
        """Calls the reward functions with a sample response to the first records."""
        graders = find_graders(self.cfg.rewards)
        assert graders is not None, "the config names some"
        prompts = {where: source for where, source in self.sources.items() if where.endswith("prompts")}
        if not prompts:
            raise ValueError("not called: there are no records, as no prompts could be opened")
        for where, source in prompts.items():
            some = [source[index] for index in range(min(2, len(source)))]
            graders.try_on(some, where, self.cfg.generate.max_new_tokens)
        names = ", ".join(function.name for function in graders.functions)
        return f"{names}: called on records of {', '.join(prompts)}"
