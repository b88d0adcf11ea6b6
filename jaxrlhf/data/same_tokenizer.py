"""Whether the ids of two tokenizers mean the same text: what matters where one model reads what another wrote."""

import json
from itertools import zip_longest
from typing import Any

from jaxrlhf.data.tokenizer import encode_text

SHOWN = 8  # ids that an error lists
PROBES = (  # what normalizers and pre-tokenizers treat differently
    "Hello world",
    " Hello  World ",
    "\tdef f(x):\n    return x\n\n\n",
    "I'll say it's DON'T, they've",
    "1234567 3.14 1,000 12:30",
    "caf\u00e9 cafe\u0301 \u212b \ufb01",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f44d\U0001f3fd a\u00a0b\u200bc",
    '...!!! <tag> </tag> {"a": [1]} a_b-c/d\\e',
    "x\r\ny",
)


def foreign_ids(ours: Any, theirs: Any) -> dict[int, str]:
    """The ids of ``ours`` that ``theirs`` has no token for, or another added one -> what they are in ``theirs``.

    Whichever tokens pad or end a text, and the flags of added tokens, make no difference. Raises ValueError, in one
    line, where an id of the vocabulary itself, or the ids of some text, are others."""
    words = [{id: word for word, id in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs)]
    added = added_ids(ours) | added_ids(theirs)
    found: dict[int, str] = {}
    for id, word in sorted(words[0].items()):
        other = words[1].get(id)
        if other == word:
            continue
        if id not in added:
            missing = "no token" if other is None else repr(other)
            raise ValueError(f"id {id} is {word!r} in the run's tokenizer and {missing} in its own")
        found[id] = "no token" if other is None else repr(other)
    (merges, rules), (their_merges, their_rules) = (merges_and_rules(tokenizer) for tokenizer in (ours, theirs))
    if merges != their_merges:
        at, one, other = next(
            (at, *pair) for at, pair in enumerate(zip_longest(merges, their_merges)) if len({*pair}) > 1
        )
        raise ValueError(f"merge {at} is {one!r} in the run's tokenizer and {other!r} in its own")
    if rules != their_rules:
        compare_texts(ours, theirs, [word for id, word in words[0].items() if id not in added])
    return found


def added_ids(tokenizer: Any) -> set[int]:
    """Of the tokens beside the vocabulary: special ones, and those that were added to it."""
    return set(tokenizer.added_tokens_decoder)


def merges_and_rules(tokenizer: Any) -> tuple[list[str], str]:
    """(the merges of the vocabulary in their order; as JSON all else that turns text into pieces of it)."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {name: value for name, value in state["model"].items() if name != "vocab" or isinstance(value, list)}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.pop("merges", None) or []]
    return merges, json.dumps([model, state.get("normalizer"), state.get("pre_tokenizer")], sort_keys=True)


def compare_texts(ours: Any, theirs: Any, words: list[str]) -> None:
    """Raises ValueError for the first text whose ids differ, of PROBES and of each token's own text."""
    texts = [*PROBES, *(text for word in words if (text := ours.convert_tokens_to_string([word])))]
    for text in texts:
        here, there = (encode_text(tokenizer, text).ids for tokenizer in (ours, theirs))
        if here != there:
            shown = lambda ids: f"{ids[:SHOWN]}{' and others' if len(ids) > SHOWN else ''}"
            raise ValueError(f"{text!r} is ids {shown(here)} in the run's tokenizer and {shown(there)} in its own")
