"""Small tokenizers and sources for the tests of the data layer."""

import copy
import hashlib
import json

import pytest

from jaxrlhf.data.sources import DataConfig, Source
from jaxrlhf.data.tokenizer import train_bpe

TEXTS = ["the film is good and the plot is thin .", "what a bad film , what a waste of time !", "user assistant system"]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def in_memory(records: list[dict], skipped: int = 0) -> Source:
    fingerprint = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    return Source(records.__getitem__, len(records), "memory", fingerprint, skipped)


def without_bos(tokenizer):
    """The same vocabulary as a tokenizer that has no BOS and puts nothing before a text."""
    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return other


@pytest.fixture(scope="session")
def trained():
    """As train_bpe leaves it: it puts BOS before a text."""
    return train_bpe(TEXTS * 3, 300)


@pytest.fixture(scope="session")
def tokenizer(trained):
    return without_bos(trained)


@pytest.fixture(scope="session")
def letters():
    """It knows bytes only, so that a text has as many tokens as letters."""
    return without_bos(train_bpe(["a"], 259))


@pytest.fixture
def chat(tokenizer):
    """A tokenizer with a chat template that writes a line break behind each turn's EOS."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML
    return other


@pytest.fixture
def add_bos(trained):
    """A tokenizer that puts BOS before and EOS behind what it encodes."""
    from tokenizers import processors

    other = copy.deepcopy(trained)
    special = [("<bos>", other.bos_token_id), ("<eos>", other.eos_token_id)]
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=special
    )
    return other


@pytest.fixture
def config(tmp_path):
    """A DataConfig whose cache is the test's own."""

    def make(**fields) -> DataConfig:
        return DataConfig(**{"cache_dir": str(tmp_path / "cache"), **fields})

    return make


def speaking(tokenizer, template: str, words=()):
    """The tokenizer with a chat template, and special tokens that it writes."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": list(words)})
    other.chat_template = template
    return other
