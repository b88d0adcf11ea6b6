"""A pad token of its own for an exported reward model.

The classifiers of transformers take the score at the last token that is not ``pad_token_id``. So padding must be a
token that no text holds: with pad = EOS the score is taken before the EOS, where none was trained.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.files import hf_config, hf_weights
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.types import Params

NAME = "<|pad|>"
UNUSED = (r"pad", r"reserved|unused|placeholder|dummy")  # in names of tokens that no text holds; the best first


def with_own_pad(
    tokenizer: Any, params: Params, cfg: ModelConfig, ids: hf_config.TokenIds
) -> tuple[Any, Params, ModelConfig, hf_config.TokenIds, list[str]]:
    """The same model with a pad token that no row holds: its own, an unused one of the vocabulary, or a new one.

    Returns (tokenizer, params, config, ids, what was changed); rows are padded on the right by default."""
    changed, pad = copy.deepcopy(tokenizer), tokenizer.pad_token_id
    changed.padding_side = "right"
    notes = []
    if FAMILIES[cfg.family].positions == "learned":
        notes.append(f"pad on the right: transformers' {cfg.family} counts positions from the start of a padded row")
    if usable(tokenizer, pad, ids.eos, cfg.vocab_size):
        return changed, params, cfg, ids._replace(pad=pad), notes
    named = "no pad token" if pad is None else f"{tokenizer.pad_token!r}, which may end a row"
    found = find_unused(tokenizer, ids.eos, cfg.vocab_size)
    if found is not None:
        changed.pad_token = found
    else:
        name = next(word for word in (NAME, *(f"<|pad_{i}|>" for i in range(99))) if word not in tokenizer.get_vocab())
        changed.add_special_tokens({"pad_token": name})
    pad = int(changed.pad_token_id)
    if pad >= cfg.vocab_size:
        params, cfg = grown(params, cfg, pad + 1)
    why = "transformers takes the score at the last token that is no pad"
    notes.append(f"pad_token: {changed.pad_token!r}, id {pad}, in place of {named}: {why}")
    return changed, params, cfg, ids._replace(pad=pad), notes


def usable(tokenizer: Any, id: int | None, eos: Iterable[int], vocab: int) -> bool:
    """Whether ``id`` has an embedding, and no row holds it."""
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, *eos)
    return id is not None and id < vocab and id not in starts and id not in tokenizers.unreadable(tokenizer)


def find_unused(tokenizer: Any, eos: tuple[int, ...], vocab: int) -> str | None:
    """A special token of the tokenizer that is made for padding, or for nothing, and that no chat template writes."""
    template = str(tokenizer.chat_template or "")
    added = {id: token.content for id, token in sorted(tokenizer.added_tokens_decoder.items())}
    for pattern in UNUSED:
        for id, word in added.items():
            fits = re.search(pattern, word, re.IGNORECASE) and word not in template
            if fits and usable(tokenizer, id, eos, vocab):
                return word
    return None


def grown(params: Params, cfg: ModelConfig, vocab: int) -> tuple[Params, ModelConfig]:
    """The model with ``vocab`` rows of embeddings, the new ones 0."""
    wider = dataclasses.replace(cfg, vocab_size=vocab)
    table = hf_weights.to_numpy(params["embed"]["tokens"]["embedding"])
    table = np.pad(table, ((0, padded_vocab(wider) - len(table)), (0, 0)))
    return params | {"embed": params["embed"] | {"tokens": {"embedding": table}}}, wider
