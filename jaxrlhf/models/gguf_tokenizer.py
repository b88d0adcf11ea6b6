"""The tokenizer in a GGUF file's metadata, written as tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

CONTROL, USER_DEFINED = 3, 4  # token types: special tokens, and words that are never cut

# how a byte-level vocabulary cuts text before it merges: a name in tokenizer.ggml.pre -> a regular expression
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = None  # the rule that is built into ByteLevel
DIGITS = "digits"  # the same, after each digit is cut off by itself
CUTS: dict[str, str | None] = {
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "gpt-2": GPT2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
}


def write_tokenizer(metadata: Mapping[str, Any], folder: epath.Path, where: str) -> None:
    """tokenizer.json and its config into ``folder``. Raises ValueError, in one line, for a kind that is not known."""
    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)
    for key in ("model", "tokens", "eos_token_id"):
        if get(key) is None:
            raise ValueError(f"{where}: tokenizer.ggml.{key}: is missing")
    kind, tokens = get("model"), get("tokens")
    if kind == "gpt2":
        backend = byte_level(tokens, get("merges", []), get("pre", "gpt-2"), where)
    elif kind == "llama":
        backend = sentence_piece(tokens, get("scores"), get("add_space_prefix", True))
    else:
        raise ValueError(f"{where}: tokenizer.ggml.model: {kind!r} is not supported; expected gpt2 or llama")
    add_special_tokens(backend, tokens, get("token_type", []))
    ids = {"bos": get("bos_token_id"), "eos": get("eos_token_id"), "unk": get("unknown_token_id")}
    ids["pad"] = get("padding_token_id")
    named = {f"{name}_token": tokens[ident] for name, ident in ids.items() if ident is not None}
    if get("add_bos_token", kind == "llama") and ids["bos"] is not None:  # llama.cpp's default for each kind
        start_with(backend, tokens[ids["bos"]], ids["bos"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def byte_level(tokens: Sequence[str], merges: Sequence[str], cut: str, where: str) -> Any:
    """Byte-level BPE (GPT-2's), with the cuts that the vocabulary was trained with."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if cut not in CUTS:
        raise ValueError(f"{where}: tokenizer.ggml.pre: {cut!r} is not supported; expected one of {', '.join(CUTS)}")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={token: ident for ident, token in enumerate(tokens)}, merges=pairs))
    rule, parts = CUTS[cut], pre_tokenizers
    if rule is GPT2:
        backend.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    elif rule == DIGITS:
        first, then = parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = parts.Sequence([first, then])  # type: ignore[assignment]
    else:
        assert rule is not None
        first = parts.Split(Regex(rule), behavior="isolated")
        then = parts.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = parts.Sequence([first, then])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


def sentence_piece(tokens: Sequence[str], scores: Sequence[float], prefix: bool) -> Any:
    """Sentencepiece BPE (Llama 2, Mistral): a space is U+2581, and what is not in the vocabulary goes byte by byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: ident for ident, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocab, merges=merges_of(vocab, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
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


def add_special_tokens(backend: Any, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Tokens that the file marks as control, and words of the user that stay whole."""
    from tokenizers import AddedToken

    of = lambda wanted: [token for token, kind in zip(tokens, kinds) if kind == wanted]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of(CONTROL)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in of(USER_DEFINED)])


def start_with(backend: Any, token: str, ident: int) -> None:
    """Every text begins with this token."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, ident)]
    )
