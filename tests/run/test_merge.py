"""The mean of several models' weights as a folder that a run starts from; what can't be averaged is refused."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models.files import hf_weights
from jaxrlhf.models.files.hf_config import read_config
from jaxrlhf.run.build import build
from jaxrlhf.run.manifest import write
from jaxrlhf.run.merge import merge
from jaxrlhf.run.verified_steps import BESIDE
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support import runs


@pytest.fixture(scope="module")
def whole(root) -> Path:
    runs.whole(root)
    return root / "whole"


@pytest.mark.usefixtures("one_device")
def test_it_is_the_mean_and_a_run_starts_from_it(whole, root, tmp_path):
    models, _ = merge([f"{whole}/rm", f"{whole}/rm@2"], "reward", tmp_path / "merged")
    assert models == [f"{whole}/rm, step 4", f"{whole}/rm@2, step 2"]
    cfg, head = read_config(tmp_path / "merged")
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        found = hf_weights.load(tmp_path / "merged", cfg, head)
    states = [runs.read_state(whole / "rm", step) for step in (2, 4)]
    for name in ("head/kernel", "layers/mlp/up/kernel", "final_norm/scale"):
        leaf = found
        for key in name.split("/"):
            leaf = leaf[key]
        expected = np.mean([state[f"params.reward/{name}"] for state in states], axis=0)
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    grpo = runs.config("grpo", root, tmp_path, f"models.reward.init_from={tmp_path}/merged")
    assert build(resolve_config(grpo), jax.devices()[:1]).weights["reward"].head == "scalar"


def test_models_that_differ_are_refused(whole, root, tmp_path):
    for names, role, text in [
        ([f"{whole}/rm"], "reward", "merge: 1 model: expected two or more"),
        ([f"{whole}/rm", f"{whole}/sft"], "reward", f"--role reward: {whole}/sft has no such role; it has: policy"),
        ([f"{whole}/rm", f"{whole}/gone"], "reward", f"{whole}/gone: no checkpoint in it"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            merge(names, role, tmp_path / "merged")
        assert text in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_another_tokenizer_is_refused(whole, tmp_path):
    run = tmp_path / "foreign"
    shutil.copytree(whole / "rm", run)
    tokenizers.save_tokenizer(tokenizers.train_bpe(["zebra zebras zoo zoom"] * 9, 300), str(run / "tokenizer"))
    for step in run.glob("checkpoints/*"):
        write(step, {}, BESIDE)
    with pytest.raises(ValueError, match=f"{run}: another tokenizer than {whole}/rm; expected models trained with"):
        merge([f"{whole}/rm", str(run)], "reward", tmp_path / "merged")
