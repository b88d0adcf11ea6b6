"""Weights in MXFP4 beside transformers: what blocks and scales stand for, and a folder of a model."""

import json

import numpy as np
import pytest

from jaxrlhf.models.files import mxfp4
from tests.models.test_gpt_oss import Slice, packed
from tests.parity.both import compute, read, their_output, write_by_law
from tests.parity.cases import VALID, config_of
from tests.parity.checks import close

pytestmark = pytest.mark.torch


def test_blocks_are_what_transformers_makes_of_them():
    """Every byte with every scale but those whose powers are infinite, and parts of the tensor."""
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = np.arange(256, dtype=np.uint8).reshape(1, 4, 4, 16).repeat(2, 0)
    for scale in range(0, 250, 16):
        scales = (scale + np.arange(32).reshape(2, 4, 4) % 5).astype(np.uint8)
        ours = mxfp4.Mxfp4(Slice(blocks), Slice(scales))[slice(0, 2), slice(0, 128), slice(0, 4)]
        assert np.abs(ours.astype(np.float32)).max() > 0
        for dtype in (torch.bfloat16, torch.float32):
            theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=dtype)
            np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())
        part = mxfp4.Mxfp4(Slice(blocks), Slice(scales))[slice(1, 2), slice(37, 90), slice(2, 3)]
        np.testing.assert_array_equal(part, ours[1:, 37:90, 2:3])


def test_a_folder(tmp_path):
    """transformers dequantises it where there is no kernel for it; then it computes what we do."""
    pytest.importorskip("torch")
    import transformers
    from transformers.utils.quantization_config import Mxfp4Config

    raw = config_of("gpt_oss", "lm") | {"intermediate_size": 64}
    write_by_law(tmp_path / "model", raw)
    packed(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    how = Mxfp4Config(dequantize=True)
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=how, dtype="float32"
    ).eval()
    close(compute(*read(tmp_path / "model"))[VALID], their_output(theirs)[VALID], 1)
