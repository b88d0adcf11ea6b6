"""A tiny model in a folder, and one engine that has it."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import openai  # pyright: ignore[reportMissingImports]
import pytest

from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_weights
from jaxrlhf.run.export import token_ids
from jaxrlhf.serve.server import Server
from jaxrlhf.serve.service import TextService, read_service
from tests.support import runs, tiny
from tests.support.served import listening

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SLOTS, CONTEXT = 4, 288


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a model that says anything."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("served")
    tokenizer = tokenizers.train_bpe([runs.sentence(rng, runs.GOOD) for _ in range(50)], 320)
    tokenizer.chat_template = TEMPLATE
    tokenizers.save_tokenizer(tokenizer, str(path / "tokenizer"))
    shape = ModelConfig(hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=32, max_positions=512)
    cfg = resolve(shape, len(tokenizer))
    params = jax.tree.map(lambda x: x * 2, tiny.parameters(cfg, "lm", 0))
    hf_weights.save(
        params, cfg, "lm", path / "tiny", ids=token_ids(tokenizer, None), tokenizer_folder=path / "tokenizer"
    )
    scalar = tiny.parameters(cfg, "scalar", 1)
    ids = token_ids(tokenizer, None)
    hf_weights.save(scalar, cfg, "scalar", path / "judge", ids=ids, tokenizer_folder=path / "tokenizer")
    return path / "tiny"


@pytest.fixture(scope="session")
def service(folder) -> Iterator[TextService]:
    """The model served, warm and running, with few slots."""
    made = read_service(str(folder), SLOTS, CONTEXT, waiting=64)
    made.engine.slots.warm_up()
    with made.engine:
        yield made


@pytest.fixture(scope="session")
def address(service) -> Iterator[str]:
    with listening(Server(service)) as found:
        yield found


@pytest.fixture(scope="session")
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as made:
        yield made
