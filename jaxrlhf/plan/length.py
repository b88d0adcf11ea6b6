"""How many iterations the epochs of a config are, where that can be known without fetching anything."""

import dataclasses
import os
import re

from jaxrlhf.config.resolved import Resolved
from jaxrlhf.data.tokenizer import eos_ids
from jaxrlhf.run import saved_run
from jaxrlhf.run.epochs import with_iterations
from jaxrlhf.run.tokenizer import find_tokenizer, tokenizer_origin


def with_length(resolved: Resolved) -> tuple[Resolved, str]:
    """``resolved`` with its iterations, and ""; where its epochs can't be counted here with one iteration, and why."""
    cfg = resolved.cfg
    if cfg.epochs is None:
        return resolved, ""
    why = missing(resolved)
    if not why:
        try:
            tokenizer = find_tokenizer(saved_run.SavedRuns(), cfg)
            return with_iterations(resolved, tokenizer, eos_ids(tokenizer)), ""
        except ValueError as error:
            why = str(error)
    one = dataclasses.replace(resolved, cfg=dataclasses.replace(cfg, iterations=1, epochs=None))
    return one, f"epochs: {cfg.epochs:g}: can't be counted here: {why}"


def missing(resolved: Resolved) -> str:
    """Which of the data and the tokenizer is not on this machine; "" where both are."""
    cfg, where = resolved.cfg, resolved.kinds[0].name
    path = getattr(cfg.data, where).path
    if path is None or re.match(r"\w+://", path):
        return f"data.{where} is no local file"
    named = None if cfg.tokenizer.train_vocab_size else tokenizer_origin(cfg)[0]
    if named and not (os.path.isdir(os.path.expanduser(named)) or saved_run.is_run(named)):
        return f"the tokenizer of {named} is not here"
    return ""
