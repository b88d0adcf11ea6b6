"""A tokenizer of a few words: one token a word, and one that ends a text. For tasks whose texts are made of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.letters import EOS


def word_tokenizer(words: Sequence[str]) -> Any:
    """A transformers fast tokenizer of words between spaces. EOS, padding too, is token 0, word n token n + 1; nothing
    is put before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from jaxrlhf.data.tokenizer import import_transformers

    vocab = {EOS: 0} | {word: at for at, word in enumerate(words, 1)}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def write_words(words: Sequence[str], folder: Path) -> None:
    """word_tokenizer as a folder that tokenizer.init_from reads."""
    from jaxrlhf.data.tokenizer import save_tokenizer

    save_tokenizer(word_tokenizer(words), str(folder))
