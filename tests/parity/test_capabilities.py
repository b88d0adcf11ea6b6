"""Each family's files over a mesh, GGUF, chat template, adapters, 8 bits and splash: see capabilities.py."""

import pytest

from jaxrlhf.models.families import FAMILIES
from tests.parity.capabilities import CAPABILITIES, gguf_file, sharded
from tests.parity.cases import FIRST
from tests.support import chats, ggufs

READ_WITH_TORCH = [case for family, case in FIRST.items() if ggufs.FILES.get(family) in ggufs.READ_THERE]
HERE = [case for case in FIRST.values() if case not in READ_WITH_TORCH or case == FIRST["mixtral"]]


def test_every_family_is_in_every_table():
    """A new family has a case, what its GGUF files are called, and the shape of its chat template."""
    for names in (FIRST, ggufs.FILES, chats.CHATS):
        assert names.keys() == FAMILIES.keys()
    import gguf

    assert set(ggufs.FILES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert set(chats.CHATS.values()) - {None} <= chats.SHAPES.keys()


@pytest.mark.parametrize("case", FIRST.values())
def test_files_over_a_mesh(case):
    sharded(case)


@pytest.mark.parametrize("case", HERE)
def test_gguf_files_that_transformers_does_not_read(case):
    gguf_file(case)


@pytest.mark.parametrize("shape", chats.SHAPES)
def test_chat_templates(shape):
    chats.check(chats.SHAPES[shape])


# by day: adapters, 8 bits and splash of a few families are in tests/models
@pytest.mark.nightly
@pytest.mark.parametrize("case", FIRST.values())
@pytest.mark.parametrize("check", ["int8", "splash"])
def test_decoding_in_8_bits_and_splash(case, check):
    CAPABILITIES[check](case)


@pytest.mark.torch
@pytest.mark.parametrize("case", FIRST.values())
def test_adapters_in_peft(case):
    CAPABILITIES["lora"](case)
