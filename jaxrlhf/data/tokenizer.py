"""Tokenizers: load, train, save, and the ids that the rest needs to know."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrlhf.data.chat import TooCostly, date_of, is_dated, limited, render
from jaxrlhf.errors import one_line

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
GENERATION = "generation_config.json"
BYTES = 256  # a byte-level vocabulary starts with all of them, so that any text round-trips


def load_tokenizer(path: str) -> Any:
    """A fast transformers tokenizer, from a folder (local or remote) or by its name on the Hugging Face hub.

    Code that comes with a tokenizer is never run. Raises ValueError, in one line, when there is none, or no fast one.
    """
    from etils import epath

    if "://" in path:
        with tempfile.TemporaryDirectory() as folder:
            for file in epath.Path(path).iterdir():
                if file.suffix in (".json", ".txt", ".jinja", ".model"):
                    file.copy(epath.Path(folder) / file.name)
            return _load(folder, path)
    folder = os.path.expanduser(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not os.path.isdir(folder):  # the hub would be asked for it, several times over
        raise ValueError(f"tokenizer: {path!r} is not a folder, expected one with tokenizer.json, or a name on the hub")
    return _load(folder if os.path.isdir(folder) else path, path)


def _load(folder: str, path: str) -> Any:
    transformers = import_transformers()
    try:
        # AutoTokenizer loads the same, but its import reads all model files of transformers: 0.6 s
        if is_generic(folder):
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers raises many kinds, each with a page of advice
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"tokenizer: {path!r} can't be loaded: {lines[0]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {path!r} is {type(tokenizer).__name__}, expected a fast one (tokenizer.json)")
    tokenizer.name_or_path = path
    tokenizer.endings = folder_eos(folder)
    return tokenizer


def is_generic(folder: str) -> bool:
    """Whether the folder holds a tokenizer alone, of no class of its own, as ``save_tokenizer`` writes those that were
    trained here."""
    files = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if "config.json" in files or not {"tokenizer.json", "tokenizer_config.json"} <= files:
        return False
    with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as file:
        return json.load(file).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def import_transformers() -> Any:
    """The transformers package. Its advice at import, to install PyTorch for its models, is not printed: only its
    tokenizers are used."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return transformers


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> Any:
    """A byte-level BPE tokenizer: <pad> is 0, <eos> 1, <bos> 2, then the further ``special`` tokens, and what
    encode_text makes of any text decodes to it.

    A text starts with <bos>, a prompt as a demonstration does, so that a policy meets what it was trained on.

    The vocabulary is smaller than ``vocab_size`` where the texts hold too few different pairs.
    Raises ValueError for a ``vocab_size`` below the 256 bytes and 3 special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    reserved = [PAD, EOS, BOS, *special]
    if vocab_size < BYTES + len(reserved):
        raise ValueError(
            f"tokenizer.train_vocab_size: {vocab_size}, expected at least {BYTES + len(reserved)} "
            f"(bytes, {', '.join(reserved)})"
        )
    backend = Tokenizer(models.BPE())
    # without a prefix space: with it "a" and " a" are one, and the round trip is lost
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=reserved, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    start = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[start])  # type: ignore[assignment]
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, bos_token=BOS, clean_up_tokenization_spaces=False
    )


def sign_tokenizer(vocab: Mapping[str, int], eos: str) -> Any:
    """A transformers fast tokenizer of signs, a token each; nothing is put before a text. ``eos``, one of ``vocab``,
    is the padding, too."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=[]))
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: Any, path: str) -> None:
    """Writes tokenizer.json, its config, its chat template and what ends a response (generation_config.json) into the
    folder ``path`` (local or remote)."""
    from etils import epath

    target = epath.Path(path).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    if is_dated(tokenizer):
        date_of(tokenizer)  # from now on it is part of the tokenizer's config
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if ids := _endings(tokenizer):
            with open(os.path.join(folder, GENERATION), "w") as file:
                json.dump({"eos_token_id": list(ids)}, file)
        for file in epath.Path(folder).iterdir():
            file.copy(target / file.name, overwrite=True)


def fingerprint(tokenizer: Any) -> str:
    """sha256 of what turns text into ids: vocabulary, merges, normalizer, pre-tokenizer, added and special tokens.

    The chat template is not in it, nor padding and truncation, which transformers leaves set after a call.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [state.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([parts, special], sort_keys=True).encode()).hexdigest()


def eos_ids(tokenizer: Any, generation_config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Every token that ends a response: one decision for all rows of a run, learnt or sampled.

    The tokenizer's own comes first, and is put behind texts that have none. Then those of ``generation_config``, those
    that the tokenizer's folder names (``folder_eos``), and the one with which its chat template ends a turn.

    Raises ValueError when there is none.
    """
    ids = _endings(tokenizer, generation_config)
    if not ids:
        raise ValueError(f"tokenizer: {tokenizer.name_or_path!r} has no EOS token, expected one that ends a response")
    return ids


def _endings(tokenizer: Any, generation_config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    more = as_ids((generation_config or {}).get("eos_token_id"))
    found = (tokenizer.eos_token_id, *more, *getattr(tokenizer, "endings", ()), turn_end(tokenizer))
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def as_ids(value: Any) -> tuple[int, ...]:
    """eos_token_id of a config: one, several, or null."""
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def folder_eos(folder: str) -> tuple[int, ...]:
    """What generation_config.json in a folder says of the ends of responses, or else config.json, as in transformers.

    Raises ValueError, in one line, where the file is not JSON, or says something else than ids."""
    for name in (GENERATION, "config.json"):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        try:
            with open(path) as file:
                config = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer: {path}: is not JSON: {one_line(error)}") from None
        config = config if isinstance(config, dict) else {}
        inner = config.get("text_config")  # of models that also see images
        for part in (config, inner if isinstance(inner, dict) else {}):
            if found := as_ids(part.get("eos_token_id")):
                if wrong := [id for id in found if type(id) is not int or not 0 <= id < 2**31]:
                    raise ValueError(f"tokenizer: {path}: eos_token_id: {wrong[0]!r}; expected the id of a token")
                return found
    return ()


def turn_end(tokenizer: Any) -> int | None:
    """The token with which the chat template ends a turn of the assistant: the first added token behind the content.
    None where there is no template, or it ends turns with text."""
    if not tokenizer.chat_template:
        return None
    kept, key = getattr(tokenizer, "kept_end", None), (json.dumps(tokenizer.chat_template), len(tokenizer))
    if kept is None or kept[0] != key:  # every row needs it
        tokenizer.kept_end = kept = key, _find_turn_end(tokenizer)
    return kept[1]


def _find_turn_end(tokenizer: Any) -> int | None:
    content = "The answer."
    try:
        with limited(tokenizer):
            text = render(
                [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": content}], tokenizer
            )
    except TooCostly:
        raise
    except ValueError:  # the template wants another conversation
        return None
    before, _, after = text.rpartition(content)
    added = added_tokens(tokenizer)
    word = find_added(after, added) if before else None
    return None if word is None else added[word]


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that are found in a text before it is cut into words: special ones, and words added."""
    kept = getattr(tokenizer, "kept_added", None)  # some vocabularies have thousands, and every row needs them
    if kept is None or kept[0] != len(tokenizer):
        found = {str(token): ident for ident, token in tokenizer.added_tokens_decoder.items()}
        tokenizer.kept_added = kept = len(tokenizer), found
    return kept[1]


def find_added(text: str, added: Iterable[str]) -> str | None:
    """The first of the ``added`` tokens in the text; where two begin at once, the longer."""
    places = [(text.find(word), -len(word), word) for word in added if word and word in text]
    return min(places)[2] if places else None


def pad_id(tokenizer: Any) -> int:
    """The token in empty columns: the tokenizer's pad, or else its EOS. It means nothing: masks say what is padding.

    A pad that some model has no embedding for is not used."""
    own = tokenizer.pad_token_id
    return int(_own_eos(tokenizer) if own is None or own in unreadable(tokenizer) else own)


def forbid(tokenizer: Any, ids: Mapping[int, str]) -> None:
    """From now on rows that hold one of ``ids`` are refused; with the reason why some model cannot read it."""
    tokenizer.unreadable = {**unreadable(tokenizer), **ids}


def unreadable(tokenizer: Any) -> dict[int, str]:
    """The ids that ``forbid`` was told of."""
    return getattr(tokenizer, "unreadable", {})


def why_unreadable(tokenizer: Any, ids: Iterable[int]) -> str | None:
    """What is wrong with a row of these ids; None where every model can read them."""
    bad = unreadable(tokenizer)
    id = next((int(id) for id in ids if int(id) in bad), None) if bad else None
    if id is None:
        return None
    return (
        f"holds token {id}, {tokenizer.convert_ids_to_tokens(id)!r}, which not every model can read: {bad[id]}; "
        "expected weights that have it, or text and a chat template (data.chat.template) without it"
    )


def start_id(tokenizer: Any) -> int:
    """The token in front of a text that has nothing before it: BOS, or else EOS (the end of the document before)."""
    return int(_own_eos(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def _own_eos(tokenizer: Any) -> int:
    return eos_ids(tokenizer)[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: [BOS] or nothing."""
    backend = tokenizer.backend_tokenizer
    bare, whole = encode_text(tokenizer, "x").ids, backend.encode("x", add_special_tokens=True).ids
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(bare)] == bare), 0)]


def encode_text(tokenizer: Any, text: str) -> Any:
    """The ``tokenizers.Encoding`` (ids, offsets) of a text as it stands: nothing added, nothing cut."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        backend.no_truncation()  # a call of the tokenizer with truncation=True leaves it on for everyone
        backend.no_padding()
    return backend.encode(text, add_special_tokens=False)


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token writes, as UTF-8 bytes; nothing for special tokens. Stop texts are looked for in these.

    Byte-level vocabularies spell bytes with printable stand-ins; sentencepiece ones write a space as U+2581 and single
    bytes as <0xNN>. Added words are spelled as they are."""
    special, added = set(tokenizer.all_special_ids), set(tokenizer.added_tokens_decoder)
    size = 1 + max((*tokenizer.get_vocab().values(), *added))
    words = tokenizer.convert_ids_to_tokens(list(range(size)))
    byte_of = _byte_level_alphabet() if '"ByteLevel"' in tokenizer.backend_tokenizer.to_str() else {}

    def spell(number: int, word: str) -> bytes:
        if byte_of and number in added:
            return word.encode()
        if byte_of and all(letter in byte_of for letter in word):
            return bytes(byte_of[letter] for letter in word)
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return bytes([int(word[3:5], 16)])
        return word.replace("\u2581", " ").encode()

    return [b"" if number in special or word is None else spell(number, word) for number, word in enumerate(words)]


def stop_forms(tokenizer: Any, text: str) -> list[str | list[str | int]]:
    """A stop text as it is looked for: as text; and where it is or holds added tokens (<|im_end|>), as their ids and
    the text between them too. A policy may say either."""
    added = added_tokens(tokenizer)
    parts: list[str | int] = []
    rest = text
    while (word := find_added(rest, added)) is not None:
        before, _, rest = rest.partition(word)
        parts += [before, added[word]] if before else [added[word]]
    return [text, [*parts, rest] if rest else parts] if parts else [text]


def _byte_level_alphabet() -> dict[str, int]:
    """The stand-in letter of each byte in byte-level BPE (GPT-2): printable bytes stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def text_of(record: Mapping[str, Any]) -> str:
    """All text of a demonstration, for training a tokenizer on."""
    words = [("prompt", "response"), ("messages",), ("text",)]
    form = next(form for form in words if all(record.get(word) is not None for word in form))
    if all(isinstance(record[word], str) for word in form):
        return "".join(record[word] for word in form)
    return "\n".join(message.get("content") or "" for word in form for message in record[word])


def decode_rows(tokenizer: Any, tokens: Any, mask: Any) -> list[str]:
    """The text of each row's masked tokens, special ones left out: arrays i32[B, S] and bool[B, S]."""
    return [tokenizer.decode(row[here], skip_special_tokens=True) for row, here in zip(tokens, mask, strict=True)]
