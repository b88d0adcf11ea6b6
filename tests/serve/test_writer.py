"""Text in, text out; and that an exported folder is the model of its run."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.cli import app
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.models.files import hf_config, hf_weights
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.run import saved_run
from jaxrlhf.run.export import export
from jaxrlhf.run.state import abstract_params
from jaxrlhf.serve import writer
from jaxrlhf.serve.writer import generate_text
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Ask, Params, Sequences, Trees
from tests.support import runs

PROMPTS = ["the film is", "the plot"]  # those of runs.whole
GREEDY = GenerateConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def outputs(root) -> list[str]:
    """What the last commands of the process printed: text of the policy, text of its export."""
    (done,) = runs.whole(root)
    assert done.code == 0, done.errors
    return done.outputs[-2:]


@pytest.fixture(scope="module")
def whole(root, outputs) -> Path:
    return root / "whole"


# ---- text -----------------------------------------------------------------------------------------------------------


def test_a_run_and_its_export_write_the_same(outputs):
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("the film is\n  -> ") and "\nthe plot\n  -> " in outputs[0]


def test_the_command_writes_what_the_function_does(whole, outputs, one_device):
    texts = generate_text(str(whole / "ppo"), PROMPTS, GREEDY)
    assert outputs[0] == "".join(f"{prompt}\n  -> {text}\n" for prompt, text in zip(PROMPTS, texts))
    assert texts[0] != texts[1]


def test_responses_do_not_hang_on_their_company(whole, one_device):
    """Another batch is padded otherwise, and lies otherwise on the devices."""
    alone = generate_text(str(whole / "ppo"), PROMPTS[1:], GREEDY)
    assert alone == generate_text(str(whole / "ppo"), [*PROMPTS, "the scene is cold and"], GREEDY)[1:2]


def test_the_seed_decides(whole, one_device):
    write = lambda seed: generate_text(str(whole / "sft"), PROMPTS, GenerateConfig(max_new_tokens=8), seed)
    assert write(1) == write(1) != write(2)


def test_a_stop_text_ends_a_response(whole, one_device):
    (free,) = generate_text(str(whole / "ppo"), PROMPTS[1:], GREEDY)
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    (found,) = generate_text(str(whole / "ppo"), PROMPTS[1:], GenerateConfig(8, temperature=0.0, stop=("@@", stop)))
    assert free.startswith(found) and len(found) < len(free)
    assert stop in found
    # it ends with the token that completes the stop text
    ids = tokenizers.encode_text(tokenizers.load_tokenizer(str(whole / "ppo" / "tokenizer")), found).ids
    assert len(ids) <= 8


@pytest.mark.nightly  # by day: responses and their company, above
def test_samples_of_many_prompts_do_not_depend_on_batches(whole, one_device, monkeypatch):
    """Nor on how wide and how many rows the programs are; there is one program a width and number of rows."""
    cfg = GenerateConfig(max_new_tokens=8, stop=(" and",))
    records = [{"prompt": text} for text in ("the film is", "the plot", "the scene is cold and", "the", "a")]
    together = writer.Writer(str(whole / "sft"), cfg, seed=3, samples=2)
    programs: Any = together.program
    found = list(together(records))
    assert [len(responses) for responses in found] == [2] * 5
    assert len({response.text for responses in found for response in responses}) > 5
    assert programs._cache_size() == 1
    list(together(iter(records[:3])))  # 4 rows of 32 columns instead of 8
    assert programs._cache_size() == 2
    monkeypatch.setattr(writer, "ROWS", 4)
    apart = writer.Writer(str(whole / "sft"), cfg, seed=3, samples=2, width=64)
    assert apart.rows == 2 and list(apart(records)) == found


def test_why_a_response_ended(whole, one_device):
    """By hand: after a prompt of 1 token an ending token, a stop text, and neither of both."""
    made = writer.Writer(str(whole / "sft"), GenerateConfig(max_new_tokens=3, stop=(" film",)))
    eos = made.sampler.eos_ids[0]
    word = tokenizers.encode_text(made.model.tokenizer, "abc").ids[0]
    tokens = np.array([[7, word, eos, 0], [7, word, word, 0], [7, word, word, word]])
    mask = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]], bool)
    found = made.responses(Sequences(tokens, mask, mask, ended=np.array([True, True, False])))  # type: ignore[arg-type]
    assert [response[1:] for response in found] == [("eos", 2), ("stop", 2), ("length", 3)]
    assert [response.text for response in found] == ["a", "aa", "aaa"]
    (sampled,) = made([{"prompt": "the film is warm"}])
    assert [len(sampled), sampled[0].finish_reason, sampled[0].tokens] == [1, "length", 3]


def test_a_prompt_too_long_for_the_model_is_refused(whole, one_device, monkeypatch):
    monkeypatch.setattr(writer, "row_limit", lambda cfg: 40)
    made = writer.Writer(str(whole / "sft"), GREEDY)
    ids = lambda count: [np.zeros(count, np.int32)]
    assert [made.width_of(ids(count)) for count in (1, 20, 32)] == [32, 32, 32]
    made.width = 8
    assert [made.width_of(ids(count)) for count in (1, 8, 9, 17, 32)] == [8, 8, 16, 32, 32]
    expected = "a prompt of 33 tokens and a response of 8 are 41 columns; the model computes 40 at most"
    with pytest.raises(ValueError, match=expected):
        made.width_of(ids(33))


def test_an_empty_prompt(whole, one_device):
    (text,) = generate_text(str(whole / "ppo"), [""], GREEDY)
    assert text


@pytest.mark.parametrize("name", ["rm", "reward-hf"])
def test_a_reward_model_cannot_write(whole, one_device, name):
    with pytest.raises(ValueError, match=r"with a scalar head can't generate text; expected a"):
        generate_text(str(whole / name), PROMPTS, GREEDY)


def test_no_chat_without_a_template(whole, one_device):
    with pytest.raises(ValueError, match="has no chat template"):
        generate_text(str(whole / "ppo"), PROMPTS, GREEDY, chat=True)


# ---- export ---------------------------------------------------------------------------------------------------------

EXPORTS = {"policy-hf": ("ppo", "policy", "lm"), "reward-hf": ("rm", "reward", "scalar")}


def both(whole: Path, name: str) -> tuple[Params, Params]:
    """(of the run, of its export)."""
    run, role, head = EXPORTS[name]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    cfg, _ = saved_run.model_of(saved_run.read_extra(whole / run)[1]["models"][role])
    with jax.set_mesh(mesh):
        ours = saved_run.restore_role(whole / run, 4, role, abstract_params(cfg, head, jnp.float32, mesh))  # type: ignore[arg-type]
        return ours, hf_weights.load(whole / name, *hf_config.read_config(whole / name), jnp.float32)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_holds_the_same_bits(whole, name):
    run, role, _ = EXPORTS[name]
    assert hf_config.read_config(whole / name) == saved_run.model_of(
        saved_run.read_extra(whole / run)[1]["models"][role]
    )
    ours, theirs = both(whole, name)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)):
        name = jax.tree_util.keystr(path)
        rows = slice(300) if name.endswith("['embedding']") else ...  # without the vocabulary's padding
        np.testing.assert_array_equal(np.asarray(a)[rows], np.asarray(b)[rows], err_msg=name)


def test_an_exported_reward_model_keeps_its_scores(whole):
    """The bias too, for which transformers has no place: normalisation is in it."""
    ours, theirs = both(whole, "reward-hf")
    cfg, _ = hf_config.read_config(whole / "reward-hf")
    assert abs(float(ours["head"]["bias"][0])) > 1e-3
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 300, (6, 12)).astype(np.int32)
    valid = np.arange(12) < rng.integers(3, 13, (6, 1))
    rows = Sequences(jnp.array(tokens), jnp.array(valid), jnp.array(valid))
    nets = make_nets({"reward": cfg}, Runtime(), Sampling(), lambda *_: pytest.fail("nothing is sampled"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        score = jax.jit(lambda tree: nets.read(Trees({"reward": tree}, {}), rows, Ask("reward", "scores"))[0])
        np.testing.assert_array_equal(score(ours), score(theirs))
        off = dict(ours, head=ours["head"] | {"bias": jnp.zeros(1)})
        assert not np.allclose(score(off), score(ours), atol=1e-4)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_complete(whole, name):
    config = json.loads((whole / name / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"], config["bos_token_id"]) == (0, 1, 2)
    assert json.loads((whole / name / "generation_config.json").read_text())["eos_token_id"] in (1, [1])
    run = EXPORTS[name][0]
    ours, theirs = (tokenizers.load_tokenizer(str(path)) for path in (whole / run / "tokenizer", whole / name))
    assert tokenizers.fingerprint(ours) == tokenizers.fingerprint(theirs)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``jaxrlhf export args``; gives what is on stderr, with exit code 2."""

    def call(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["jaxrlhf", "export", *map(str, args)])
        with pytest.raises(SystemExit, match="2"):
            app.main()
        return capsys.readouterr().err

    return call


def test_a_role_that_the_run_does_not_have(whole, tmp_path, command):
    err = command(whole / "ppo", "--role", "critic", "--to", tmp_path / "out")
    assert err == f"--role critic: {whole}/ppo has no such role; it has: policy, reference, reward, value\n"
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint(whole, tmp_path, command):
    run = runs.copy_run(whole / "sft", tmp_path / "sft", 0)
    err = command(run, "--to", tmp_path / "out")
    assert err == f"{run}: no checkpoint in it; a run saves one every checkpoint.every iterations\n"


# ---- an earlier checkpoint ------------------------------------------------------------------------------------------


def test_an_earlier_checkpoint_is_exported_and_sampled_from(whole, tmp_path, one_device, capsys, monkeypatch):
    """By RUN@STEP and by --step; the command says which one it was."""
    run, out = whole / "sft", tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "export", str(run), "--step", "2", "--to", str(out)])
    with pytest.raises(SystemExit, match="0"):
        app.main()
    assert capsys.readouterr().out == f"policy of {run}, step 2, written to {out}\n"
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        saved = [writer.read_model(name, mesh).params for name in (f"{run}@2", f"{run}@4", str(run), str(out))]
    kernels = [np.asarray(tree["layers"]["mlp"]["up"]["kernel"]) for tree in saved]
    np.testing.assert_array_equal(kernels[0], kernels[3])
    np.testing.assert_array_equal(kernels[1], kernels[2])
    assert np.any(kernels[0] != kernels[1])


def test_a_step_that_the_run_does_not_have(whole, tmp_path, command):
    for options in ([f"{whole}/sft@3"], [f"{whole}/sft", "--step", "3"]):
        err = command(*options, "--to", tmp_path / "out")
        assert err == f"{whole}/sft@3: no step 3; {whole}/sft has: 2, 4\n"


# ---- where it is written --------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_not_written_over(whole, tmp_path, command, one_device, monkeypatch):
    out, file = tmp_path / "out", tmp_path / "file"
    out.mkdir()
    (out / "chat_template.jinja").write_text("of another model")
    file.write_text("")
    err = command(f"{whole}/sft", "--to", out)
    assert err == (f"--to {out}: holds chat_template.jinja; expected a new folder, or --force to write over it\n")
    assert command(f"{whole}/sft", "--to", file) == f"--to {file}: a file; expected a folder\n"
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "export", f"{whole}/sft", "--to", str(out), "--force"])
    with pytest.raises(SystemExit, match="0"):
        app.main()
    assert "chat_template.jinja" not in {path.name for path in out.iterdir()}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(whole, tmp_path, one_device, umask):
    before = os.umask(umask)
    try:
        export(f"{whole}/sft", "policy", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}, modes
