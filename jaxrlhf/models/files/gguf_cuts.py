"""How byte-level vocabularies of GGUF files cut text before they merge, by the names of tokenizer.ggml.pre.

The rules are llama.cpp's, which also ties two settings to a name: whole words of the vocabulary are taken without
merges, and BOS is put before a text.
"""

import difflib
from typing import NamedTuple

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SENTENCES = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def cased(suffix: str, digits: str) -> str:
    """Words that begin a new piece where small letters are followed by capitals."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{UPPER}*{LOWER}+{suffix}|{start}{UPPER}+{LOWER}*{suffix}"
    return words + f"|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """A rule: each expression cuts what the ones before left whole; what it matches stands alone."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


LLAMA3 = WORDS + r"|\p{N}{1,3}" + REST
QWEN2 = WORDS + r"|\p{N}" + REST
RULES: dict[tuple[str, ...], Cut] = {
    ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion"): Cut((GPT2,)),
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"): Cut(
        (r"\p{N}", GPT2)
    ),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): Cut(
        (LLAMA3,), ignore_merges=True, add_bos=True
    ),
    ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"): Cut((LLAMA3,)),
    ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"): Cut((QWEN2,)),
    ("tekken",): Cut((cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2"): Cut((cased(CONTRACTIONS + "?", r"\p{N}{1,3}"),)),
    ("default", ""): Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ("falcon",): Cut((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    ("deepseek-coder",): Cut(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    ("seed-coder",): Cut((WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    ("poro-chat", "bloom", "gpt3-finnish"): Cut((SENTENCES,)),
    ("viking",): Cut((SENTENCES, r"\p{N}")),
}
CUTS = {name: cut for names, cut in RULES.items() for name in names}


def find_cut(name: str, where: str) -> Cut:
    """The rule of this name ("": a file without one). Raises ValueError for one that is not known."""
    if name not in CUTS:
        near = difflib.get_close_matches(name, CUTS, 1, 0.4) or ["llama-bpe"]
        known = ", ".join(sorted(filter(None, CUTS)))
        raise ValueError(
            f"{where}: tokenizer.ggml.pre: {name!r} is not supported; expected one of {known}; nearest: {near[0]}"
        )
    return CUTS[name]
