"""Shapes of models that are not here: from folders, runs, configs of runs to come, the table; what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from jaxrlhf.config.load import parse
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files.hf_config import describe
from jaxrlhf.models.files.published import LLAMA_3_1_8B
from jaxrlhf.plan import shapes
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.run.feed import Feed
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support import runs

ON_THE_HUB = shapes.on_the_hub
SHAPE = resolve(ModelConfig(vocab_size=100, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No hub."""

    monkeypatch.setattr(shapes, "on_the_hub", lambda name: None)


def config(models: str, run_dir: str = "runs/here", tokenizer: str = "{init_from: somewhere}") -> Config:
    text = f"""
run_dir: {run_dir}
iterations: 1
algorithm: {{name: ppo}}
models: {models}
tokenizer: {tokenizer}
data: {{prompts: {{path: p.jsonl}}, prompt_buckets: [8]}}
batch: {{prompts_per_step: 8}}
generate: {{max_new_tokens: 4}}
"""
    return parse(read_yaml(text, "test"), "test")


def found(cfg: Config, role: str, *others: Config) -> shapes.Found:
    return shapes.find_shape(cfg, role, shapes.configs_by_run(others))


def test_a_folder_is_read_for_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(describe(SHAPE, "lm")))
    cfg = config(f"{{policy: {{init_from: {tmp_path}}}, reward: {{init_from: policy}}}}")
    assert found(cfg, "policy") == (SHAPE, str(tmp_path))


def test_a_name_of_the_hub_is_in_the_table():
    cfg = config("{policy: {init_from: meta-llama/Llama-3.1-8B-Instruct}, reward: {init_from: policy}}")
    shape = found(cfg, "policy")
    assert shape.config == resolve(LLAMA_3_1_8B) and "published shape" in shape.source


class Hub:
    """Answers one name with a config.json, others with 404, or not at all."""

    def __init__(self, config: dict | None):
        self.config, self.asked = config, []

    def get(self, url: str, **_):
        self.asked.append(url)
        if self.config is None:
            raise OSError("Name or service not known")
        found = "Llama-3.1-8B-Instruct" in url
        return SimpleNamespace(status_code=200 if found else 404, json=lambda: self.config if found else {"error": ""})


@pytest.fixture
def hub(monkeypatch):
    """Puts a Hub in the place of the real one, and asks it."""

    def put(config: dict | None) -> Hub:
        made = Hub(config)
        monkeypatch.setattr(shapes, "on_the_hub", ON_THE_HUB)
        monkeypatch.setattr("huggingface_hub.get_session", lambda: made)
        return made

    return put


def test_the_hub_goes_before_the_table(hub):
    asked = hub(describe(SHAPE, "lm")).asked
    cfg = config("{policy: {init_from: meta-llama/Llama-3.1-8B-Instruct}, reward: {init_from: policy}}")
    assert found(cfg, "policy").config == SHAPE
    assert len(asked) == 1 and asked[0].endswith("meta-llama/Llama-3.1-8B-Instruct/resolve/main/config.json")


@pytest.mark.parametrize("config", [None, {}])
def test_a_hub_that_has_it_not_or_does_not_answer_is_asked_once(hub, config):
    asked = hub(config).asked
    shape = shapes.shape_of("Qwen/Qwen2.5-0.5B")
    assert shape is not None and "published shape" in shape.source and len(asked) == 1
    assert shapes.shape_of("gs/is/no/name/of/a/model") is None and len(asked) == 1


def test_a_run_to_come_is_shaped_by_the_config_that_makes_it():
    """reward <- runs/rm <- runs/sft <- the table; and a run that has only a config.yaml."""
    sft = config("{policy: {init_from: EleutherAI/pythia-1b}, reward: {init_from: policy}}", "runs/sft")
    rm = config("{reward: {init_from: runs/sft}, policy: {init_from: reward}}", "runs/rm")
    cfg = config("{policy: {init_from: runs/sft}, reward: {init_from: runs/rm}}")
    shape = found(cfg, "reward", sft, rm)
    assert (shape.config.hidden_size, shape.config.num_layers) == (2048, 16)
    assert shape.source.startswith("runs/rm, not there yet, which starts from runs/sft, not there yet")


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text((runs.ROOT / "configs/tiny/sft.yaml").read_text())
    cfg = config(f"{{policy: {{init_from: {tmp_path}}}, reward: {{init_from: policy}}}}")
    assert found(cfg, "policy").config.vocab_size == 512, "its tokenizer's"


def test_a_run_that_nothing_makes_is_assumed_to_be_like_the_policy():
    cfg = config("{policy: {init_from: Qwen/Qwen2.5-0.5B}, reward: {init_from: runs/nowhere/rm}}")
    shape = found(cfg, "reward")
    assert shape.config.hidden_size == 896
    assert shape.source.startswith("runs/nowhere/rm is not there: ASSUMED to be shaped like the policy")


@pytest.mark.parametrize("name", ["runs/nowhere/sft", "somebody/unknown"])
def test_a_policy_that_is_known_nowhere_is_one_line(name):
    cfg = config(f"{{policy: {{init_from: {name}}}, reward: {{init_from: policy}}}}")
    with pytest.raises(ConfigError) as error:
        found(cfg, "policy")
    text = str(error.value)
    assert text.startswith(f"models.policy.init_from: {name}: ") and "EleutherAI/pythia-1b" in text and "\n" not in text


def test_runs_that_start_from_each_other_end():
    one = config("{policy: {init_from: runs/two}, reward: {init_from: policy}}", "runs/one")
    two = config("{policy: {init_from: runs/one}, reward: {init_from: policy}}", "runs/two")
    with pytest.raises(ConfigError, match="no folder, no run"):
        found(one, "policy", one, two)


def test_a_vocabulary_that_is_not_given_is_the_tokenizer_s():
    random = "{policy: {architecture: {hidden_size: 16}}, reward: {init_from: policy}}"
    assert found(config(random, tokenizer="{init_from: Qwen/Qwen2.5-7B}"), "policy").config.vocab_size == 152064
    with pytest.raises(ConfigError, match=r"^tokenizer\.init_from: nowhere: can't be read"):
        found(config(random, tokenizer="{init_from: nowhere}"), "policy")


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_batches_are_shaped_as_the_data_makes_them(root, tmp_path, name, one_device):
    """What a plan compiles for is what training is given."""
    from jaxrlhf.run.build import build

    text = f"data.demonstrations={{path: {runs.text(root)}/demonstrations.jsonl}}"
    random = [
        f"models.{role}={{architecture: {{hidden_size: 16, max_positions: 64}}}}" for role in ("policy", "reward")
    ]
    more = [] if name == "sft" else [text, "tokenizer.train_vocab_size=300", *random]
    ready = build(resolve_config(runs.config(name, root, tmp_path, *more)))
    host, _ = Feed(ready).next()
    (described,) = batch_shapes(ready.resolved, ready.mesh)
    assert jax.tree.structure(host) == jax.tree.structure(described)
    for ours, theirs in zip(jax.tree.leaves(described), jax.tree.leaves(host)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_there_is_a_batch_for_every_prompt_bucket():
    cfg = config("{policy: {architecture: {vocab_size: 64}}, reward: {init_from: policy}}")
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    widths = [batch.prompts.tokens.shape for batch in batch_shapes(resolve_config(cfg), mesh)]
    assert widths == [(8, 8)]


def test_no_bucket_is_compiled_that_no_prompt_of_the_data_needs(root, tmp_path, one_device):
    """By hand: the longest prompt that is kept has five tokens, BOS and four bytes."""
    from jaxrlhf.run.build import build

    texts = ["~" * 4, "~" * 3, "~" * 99]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    more = [f"models.{role}={{architecture: {{hidden_size: 16, max_positions: 128}}}}" for role in ("policy", "reward")]
    more += [f"data.demonstrations={{path: {runs.text(root)}/demonstrations.jsonl}}", "tokenizer.train_vocab_size=300"]
    more += [f"data.prompts={{path: {tmp_path}/p.jsonl}}", "data.eval_prompts=null"]
    more += ["data.too_long=drop"]
    ready = build(resolve_config(runs.config("ppo", root, tmp_path, *more)))
    buckets = {(8, 16, 64): [8], (4, 16, 64): [4, 16], (5,): [5], (2, 4, 5): [2, 4, 5], (2, 6, 7): [2, 6]}
    cases = [("drop", given, left) for given, left in buckets.items()]
    for too_long, widths, compiled in [*cases, ("truncate", (8, 16, 64), [8, 16, 64])]:
        data = dataclasses.replace(ready.cfg.data, prompt_buckets=widths, too_long=too_long)
        changed = dataclasses.replace(ready.resolved, cfg=dataclasses.replace(ready.cfg, data=data))
        feed = Feed(dataclasses.replace(ready, resolved=changed))
        assert [batch.prompts.tokens.shape[1] for batch in feed.shapes()] == compiled
