"""The tokenizer in a GGUF file's metadata, written as tokenizer.json and its config, by llama.cpp's rules."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxrlhf.models.files.gguf_cuts import Cut, find_cut

CONTROL, USER_DEFINED = 3, 4  # token types: special tokens, and words that are never cut
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}  # where the file doesn't say, by tokenizer.ggml.model
# tokens that end a generation by what they are called, whatever else the file says
ENDINGS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
TEMPLATE = "tokenizer.chat_template"


def write_tokenizer(metadata: Mapping[str, Any], folder: epath.Path, where: str) -> None:
    """tokenizer.json and its config into ``folder``. Raises ValueError, in one line, for a kind that is not known."""
    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)
    tokens, kind = required(metadata, "tokens", where), required(metadata, "model", where)
    ids = special_ids(metadata, where)
    if kind == "gpt2":
        cut = find_cut(get("pre", ""), where)
        backend = byte_level(tokens, required(metadata, "merges", where), cut)
        add_bos = cut.add_bos
    elif kind == "llama":
        unknown = tokens[ids["unknown"]] if ids["unknown"] is not None else None
        backend = sentence_piece(tokens, get("scores") or [0.0] * len(tokens), get("add_space_prefix", True), unknown)
        add_bos = True
    else:
        raise ValueError(f"{where}: tokenizer.ggml.model: {kind!r} is not supported; expected gpt2 or llama")
    ends = ending_ids(metadata, where)
    add_special_tokens(backend, tokens, get("token_type") or [], ends)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{ours}_token": tokens[ids[theirs]] for ours, theirs in names.items() if ids[theirs] is not None}
    around = {"bos": get("add_bos_token", add_bos), "eos": get("add_eos_token", False)}
    added: dict[str, dict[str, int]] = {"bos": {}, "eos": {}}
    for name in (name for name, wanted in around.items() if wanted):
        if (number := ids[name]) is None:
            raise ValueError(f"{where}: tokenizer.ggml.{name}_token_id: is missing, and a text is to have it")
        added[name] = {tokens[number]: number}
    surround(backend, added["bos"], added["eos"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    if templates := chat_templates(metadata):
        config["chat_template"] = templates
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def required(metadata: Mapping[str, Any], key: str, where: str) -> Any:
    """Raises ValueError where the file doesn't say."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise ValueError(f"{where}: tokenizer.ggml.{key}: is missing")
    return value


def special_ids(metadata: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """The file's special tokens, or the defaults of its kind. Raises ValueError for one outside the vocabulary, and
    where nothing ends a text."""
    size, defaults = len(required(metadata, "tokens", where)), DEFAULT_IDS.get(metadata["tokenizer.ggml.model"], {})
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        given = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if given is not None and given >= size:
            raise ValueError(f"{where}: tokenizer.ggml.{name}_token_id: {given}: the vocabulary has {size} tokens")
        default = defaults.get(name)
        ids[name] = given if given is not None else default if default is not None and default < size else None
    ids["eos"] = ids["eot"] if ids["eos"] is None else ids["eos"]
    if ids["eos"] is None:
        raise ValueError(f"{where}: tokenizer.ggml.eos_token_id: is missing")
    return ids


def ending_ids(metadata: Mapping[str, Any], where: str) -> list[int]:
    """All tokens that end a generation: those that the file says, and those that are called like one."""
    tokens, ids = required(metadata, "tokens", where), special_ids(metadata, where)
    called = {token: ident for ident, token in enumerate(tokens) if token in ENDINGS}
    if {"<|return|>", "<|call|>"} <= called.keys() or {"<|calls|>", "<|flush|>"} <= called.keys():
        called.pop("<|end|>", None)  # there it ends a message, and others may follow
    found = [ids["eos"], ids["eot"], ids["eom"], *called.values()]
    return list(dict.fromkeys(ident for ident in found if ident is not None))


def chat_templates(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or where there are several by name all of them."""
    own = metadata.get(TEMPLATE)
    named = {key.removeprefix(f"{TEMPLATE}."): text for key, text in metadata.items() if key.startswith(f"{TEMPLATE}.")}
    if not named:
        return own
    both = ({"default": own} if own else {}) | named
    return [{"name": name, "template": text} for name, text in both.items()]


def byte_level(tokens: Sequence[str], merges: Sequence[str], cut: Cut) -> Any:
    """Byte-level BPE (GPT-2's), with the cuts that the vocabulary was trained with."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    places = [merge.index(" ", 1) for merge in merges]
    pairs = [(merge[:at], merge[at + 1 :]) for merge, at in zip(merges, places)]
    vocab = {token: ident for ident, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut.ignore_merges))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in cut.expressions]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


def sentence_piece(tokens: Sequence[str], scores: Sequence[float], prefix: bool, unknown: str | None) -> Any:
    """Sentencepiece BPE (Llama 2, Mistral): a space is U+2581, and what is not in the vocabulary goes byte by byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: ident for ident, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocab, merges=merges_of(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces  # type: ignore[assignment]
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))  # type: ignore[assignment]
    return backend


def merges_of(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a vocabulary that lists none: every cut of a word in two words, the best-scored words first."""
    found = []
    for word, ident in vocab.items():
        cuts = [(word[:at], word[at:]) for at in range(1, len(word))]
        cuts = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        found += [(-scores[ident], ident, vocab[left], vocab[right], left, right) for left, right in cuts]
    return [(left, right) for *_, left, right in sorted(found)]


def add_special_tokens(backend: Any, tokens: Sequence[str], kinds: Sequence[int], ends: Sequence[int]) -> None:
    """Tokens that the file marks as control, or that end a generation, and words of the user that stay whole."""
    from tokenizers import AddedToken

    of = lambda wanted: [token for token, kind in zip(tokens, kinds) if kind == wanted]
    special = dict.fromkeys([*of(CONTROL), *(tokens[ident] for ident in ends)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    words = [token for token in of(USER_DEFINED) if token not in special]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in words])


def surround(backend: Any, before: Mapping[str, int], behind: Mapping[str, int]) -> None:
    """Every text begins and ends with these tokens."""
    from tokenizers import processors

    if not before and not behind:
        return
    one = lambda name, place: " ".join(f"{piece}:{place}" for piece in (*before, f"${name}", *behind))
    backend.post_processor = processors.TemplateProcessing(
        single=one("A", 0), pair=f"{one('A', 0)} {one('B', 1)}", special_tokens=[*before.items(), *behind.items()]
    )
