"""A tokenizer of a few letters: one token a letter, and one that ends a text. For tasks whose actions are letters."""

from pathlib import Path
from typing import Any

EOS = "<eos>"  # id 0; padding too, so that every token is an action


def letters_tokenizer(letters: str) -> Any:
    """A transformers fast tokenizer. Letter n is token n + 1; nothing is put before a text."""
    from jaxrlhf.data.tokenizer import sign_tokenizer

    return sign_tokenizer({EOS: 0} | {letter: at for at, letter in enumerate(letters, 1)}, EOS)


def write_letters(letters: str, folder: Path) -> None:
    """letters_tokenizer as a folder that tokenizer.init_from reads."""
    from jaxrlhf.data.tokenizer import save_tokenizer

    save_tokenizer(letters_tokenizer(letters), str(folder))
