"""The run's tokenizer: loaded, trained, kept, and the tokens that a model cannot read."""

import functools
import os

from etils import epath

from jaxrlhf.config.environment import spaces_of
from jaxrlhf.config.record import Config
from jaxrlhf.data import chat
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.actions import actions_tokenizer
from jaxrlhf.data.sources import open_source
from jaxrlhf.errors import ConfigError
from jaxrlhf.hosts.processes import agree, is_main
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.files import hf_folder, peft
from jaxrlhf.run import saved_run
from jaxrlhf.run.origins import Weights, base_role, check_tokenizers, located, origin, read_start
from jaxrlhf.run.saved_run import SavedRuns
from jaxrlhf.types import Role


def find_tokenizer(saved_runs: SavedRuns, cfg: Config):
    """That of the environment's actions, where the run has one. Else the run's own if it has a checkpoint; else the one
    that the config names or asks to train, with the chat template of data.chat."""
    if (spaces := spaces_of(cfg)) is not None:
        return actions_tokenizer(spaces.actions, spaces.observation)
    if saved_runs.newest(cfg.run_dir) is not None:
        return tokenizers.load_tokenizer(os.fspath(epath.Path(cfg.run_dir) / "tokenizer"))
    if cfg.tokenizer.train_vocab_size:
        tokenizer = train_tokenizer(cfg, cfg.tokenizer.train_vocab_size)
    else:
        folder = located(functools.partial(tokenizer_of, saved_runs), *tokenizer_origin(cfg))
        tokenizer = tokenizers.load_tokenizer(os.fspath(folder))
    if cfg.data.chat is not None:
        chat.apply_config(tokenizer, cfg.data.chat, adds_bos=bool(tokenizers.leading_ids(tokenizer)))
    return tokenizer


def keep_tokenizer(saved_runs: SavedRuns, cfg: Config, tokenizer) -> None:
    """Save it in the run, where it isn't the run's own already; what a start that came to nothing left is replaced."""
    own = epath.Path(cfg.run_dir) / "tokenizer"
    agree("tokenizer: its hash", tokenizers.fingerprint(tokenizer)[:12], "the same on all hosts")
    if saved_runs.newest(cfg.run_dir) is not None or not is_main():
        return
    if own.exists():
        own.rmtree()
    tokenizers.save_tokenizer(tokenizer, os.fspath(own))


def train_tokenizer(cfg: Config, vocab_size: int):
    """Byte-level BPE on all text of the demonstrations."""
    if cfg.data.demonstrations is None:
        raise ConfigError("tokenizer.train_vocab_size: needs data.demonstrations to train on")
    where, data = "data.demonstrations", cfg.data
    source = open_source(
        cfg.data.demonstrations,
        "demonstrations",
        cache_dir=data.cache_dir,
        skip_bad=data.skip_bad,
        path_in_config=where,
    )
    texts = map(tokenizers.text_of, source.usable(cfg.data.skip_bad))
    return tokenizers.train_bpe(texts, vocab_size, chat.markers(cfg.data.chat))


def tokenizer_origin(cfg: Config) -> tuple[str, str]:
    """(what names the tokenizer, the section that says so): tokenizer.init_from, else where the policy or the reward
    model starts."""
    named, where = cfg.tokenizer.init_from, "tokenizer"
    if named is None:
        roles = [role for role in ("policy", "reward", *cfg.models) if role in cfg.models]
        starts = [(base_role(cfg, role), origin(cfg, role).init_from) for role in roles]
        role, named = next((start for start in starts if start[1]), ("", None))
        where = f"models.{role}"
    if named is None:
        raise ConfigError("tokenizer: no model starts from files; expected tokenizer.init_from or .train_vocab_size")
    return named, where


def tokenizer_of(saved_runs: SavedRuns, named: str):
    """The folder with the tokenizer of a run, a HF folder or a hub name."""
    run_dir, step = split_step(named)
    if not saved_run.is_run(named):
        peft.need_whole(folder := hf_folder.locate(named), "init_from: ")
        return folder
    if step:
        read_start(saved_runs, named)
    return epath.Path(run_dir) / "tokenizer"


def foreign_tokens(saved_runs: SavedRuns, cfg: Config, weights: dict[Role, Weights], tokenizer) -> dict[int, str]:
    """Tokens that some model cannot read -> why: as check_tokenizers finds, and as the run's own checkpoint says."""
    found = check_tokenizers(cfg, weights, tokenizer, functools.partial(tokenizer_of, saved_runs))
    own = (start.record.get("unreadable", {}) for start in weights.values() if start.path == cfg.run_dir)
    return found | {int(id): why for kept in own for id, why in kept.items()}
