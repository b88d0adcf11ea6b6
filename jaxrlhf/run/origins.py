"""What the roles of a run start from, and whether they fit together: all loaded, and all of one vocabulary."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxrlhf.algorithm import TEACHER
from jaxrlhf.config.adapters import chain, starting_adapter
from jaxrlhf.config.record import Config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.same_tokenizer import added_ids, foreign_ids
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.files import peft
from jaxrlhf.run.saved_run import SavedRuns
from jaxrlhf.types import Head, Role


class Weights(NamedTuple):
    """Where a role's weights come from, found but not read."""

    kind: str  # "new", "run" or "hf"
    path: str | None
    config: ModelConfig
    head: Head | None  # of the source; another may be needed; None: a reward model's class without its head
    step: int = 0  # run: of the checkpoint
    role: Role = ""  # run: as what they are saved there
    record: Mapping[str, Any] = MappingProxyType({})  # run: the JSON saved with that checkpoint
    notes: tuple[str, ...] = ()  # what to tell of it


def origin(cfg: Config, role: Role):
    """The RoleConfig that ``role`` goes back to, through roles that start from other roles."""
    return cfg.models[base_role(cfg, role)]


def base_role(cfg: Config, role: Role) -> Role:
    """The role at the end of the chain of init_from."""
    return chain(cfg, role)[-1]


# ---- all is loaded --------------------------------------------------------------------------------------------------


def check_loaded(cfg: Config, weights: Mapping[Role, Weights], heads: Mapping[Role, Head], trained: Iterable[Role]):
    """Random weights are for roles that learn; and a language model is never made up. Raises ConfigError.

    A role that stays as it is may copy one that learns, as a reference copies a policy that starts at random."""
    for role, head in heads.items():
        found, base = weights[role], base_role(cfg, role)
        from_role = cfg.models[role].init_from if base != role else None
        where = f"models.{role}.init_from: {from_role or found.path}"
        if head == "lm" and found.head != "lm" and not found.config.tie_embeddings:
            raise ConfigError(
                f"{where}: {described(found)}, and with untied embeddings no language-model head to start from; "
                "expected a causal language model"
            )
        if role in trained:
            continue
        if head == "action" and any(heads[other] == head and base_role(cfg, other) == base for other in trained):
            continue  # it starts as that one does
        if found.kind == "new" and not (base in trained and head == heads[base]):
            raise ConfigError(
                f"models.{role}{'.architecture' if base == role else f'.init_from: {from_role}'}: its weights would be "
                f"random, and {cfg.algorithm_name} does not train {role}; expected init_from: a trained model"
            )
        if head != "lm" and found.head not in ("scalar", "bare") and not adapter_has_head(cfg, role):
            raise ConfigError(
                f"{where}: {described(found)}: the head would be random, and {cfg.algorithm_name} does not train "
                f"{role}; expected a reward model, as a run of `rm` makes it"
            )


def adapter_has_head(cfg: Config, role: Role) -> bool:
    """Whether ``role`` starts with an adapter that holds a scalar head."""
    start = starting_adapter(cfg, role)
    return start is not None and located(peft.has_head, start.init_from, f"models.{role}")


def described(found: Weights) -> str:
    """What was found where a role starts."""
    named = f"the {found.role} of this run " if found.kind == "run" else ""
    if found.head is None:
        return f"{named}is a reward model whose files hold no head (score.weight)"
    return f"{named}is a language model" if found.head == "lm" else f"{named}is a reward model"


# ---- one vocabulary -------------------------------------------------------------------------------------------------


def check_tokenizers(cfg: Config, weights: Mapping[Role, Weights], tokenizer: Any, folder_of) -> dict[int, str]:
    """A model reads what another wrote as token ids, so these must mean the same to all. Raises ConfigError.

    ``folder_of``: path of a model -> that of its tokenizer. Returns the ids that the tokenizer has and some model
    cannot read -> why; rows that hold one are refused."""
    foreign: dict[int, str] = {}
    hash, added = tokenizers.fingerprint(tokenizer), added_ids(tokenizer)
    ids = set(tokenizer.get_vocab().values())
    load = functools.cache(lambda path: tokenizers.load_tokenizer(os.fspath(folder_of(path))))  # of several roles
    for role, found in weights.items():
        role = base_role(cfg, role)  # where the config names the weights
        size, where = found.config.vocab_size, f"models.{role}"
        if (found.kind == "new" and size < len(tokenizer)) or size <= max(ids - added, default=0):
            raise ConfigError(f"{where}: vocab_size {size} is less than the {len(tokenizer)} tokens of the tokenizer")
        foreign |= {id: f"{where}: its vocab_size is {size}" for id in ids if id >= size}
        if found.kind == "new" or found.path is None:
            continue
        theirs = load(found.path)
        if tokenizers.fingerprint(theirs) == hash:
            continue
        try:
            others = foreign_ids(tokenizer, theirs)
        except ValueError as error:
            raise ConfigError(
                f"{where}.init_from: {found.path}: token ids mean other text to it: {error}; "
                "expected a model trained with the same tokenizer"
            ) from None
        foreign |= {id: f"{where}: to it the id is {what}" for id, what in others.items()}
    return foreign


def check_teacher(cfg: Config, weights: Mapping[Role, Weights], tokenizer: Any) -> None:
    """A teacher's distribution is compared with the policy's, token by token. Raises ConfigError where one of the two
    has a token that the other lacks; rows beyond the tokenizer's, which pad a vocabulary, make no difference."""
    if TEACHER not in weights or "policy" not in weights:
        return
    policy, teacher = weights["policy"], weights[TEACHER]
    sizes = [found.config.vocab_size for found in (policy, teacher)]
    if sizes[0] == sizes[1] or min(sizes) > max(tokenizer.get_vocab().values(), default=0):
        return
    where, start = f"models.{base_role(cfg, TEACHER)}.init_from: {teacher.path}", policy.path or "random weights"
    raise ConfigError(
        f"{where}: its vocab_size is {sizes[1]}, and that of the policy ({start}) is {sizes[0]}: the tokenizer's ids "
        f"from {min(sizes)} on are tokens of one alone; expected a teacher with the policy's tokens"
    )


def located(find: Callable[[Any], Any], named: Any, where: str, prefix: str = ""):
    """``find(named)``, whose error ("init_from: ..." after ``prefix``) is told as one of the config's section
    ``where``."""
    try:
        return find(named)
    except ValueError as error:
        raise ConfigError(f"{where}.{prefix}{error}") from None


def read_start(saved_runs: SavedRuns, named: str) -> tuple[int, dict]:
    """(step, its JSON) that the run ``named`` says (RUN, RUN@best, RUN@40). Raises ValueError, as hf_folder.locate says
    it."""
    try:
        return saved_runs.read_extra(named)
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None
