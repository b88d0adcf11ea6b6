"""Hostile input: every reader succeeds or raises one ValueError of one line, soon and in little memory.

Each target reads inputs that hypothesis makes or damages; FOUND keeps those that once broke it. The default tier tries
a few of each, nightly thousands (FUZZ_EXAMPLES: how many a target)."""

import copy
import functools
import json
import os
import resource
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrlhf.config.load import load, parse
from jaxrlhf.config.overrides import split_override
from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.data import chat, files, readers, tokenizer
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.families.wrappers import WRAPPERS
from jaxrlhf.models.files import gguf, hf_config, hf_folder, hf_headers
from jaxrlhf.serve import dialogue

CONFIG = Path("configs/tiny/ppo.yaml").read_text()
ROWS = [{"prompt": "a b", "response": "c", "n": 3, "messages": [{"role": "user", "content": "x"}]}] * 3
MOST_MEMORY = 2**30  # more than the process has when it begins: bytes


# ---- the contract ---------------------------------------------------------------------------------------------------


def hold(read: Callable[[], Any]) -> None:
    """``read`` succeeds, or raises ValueError in one line (a config: a line a mistake), and takes no gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
    except ValueError as error:
        kind = type(error)
        assert kind in (ValueError, BadRecord, ConfigError, chat.TooCostly), f"{kind.__name__}: {error}"
        assert str(error).strip() and (kind is ConfigError or "\n" not in str(error)), str(error)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def in_file(name: str, content: bytes, read: Callable[[Path], Any]) -> None:
    """``hold`` of a reader of files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        hold(lambda: read(path))


# ---- inputs ---------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**9, 10**400, 1e308, 5e-324]),
)
words = st.one_of(st.text(max_size=12), st.sampled_from(["", "\0", "\ud800", "a:b", "os:system", "gs://x", "[", "nan"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def damaged(draw, whole: bytes, edits: int = 4) -> bytes:
    """``whole`` with bytes flipped, cut out, doubled, or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, edits))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "double", "insert", "end"]))
        if kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 40))]
        elif kind == "double":
            content[at:at] = content[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=9))
        else:
            del content[at:]
    return bytes(content)


@st.composite
def edited(draw, whole: dict[str, Any]) -> dict[str, Any]:
    """``whole`` with some values, at any depth, replaced or removed, and keys added."""
    tree = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = tree
        while True:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 4)):
                place[key] = draw(values)
            elif isinstance(place, dict) and draw(st.booleans()):
                place[draw(words)] = draw(values)
            else:
                del place[key]
            break
    return tree


def parquet() -> bytes:
    """A small table, of pages that are compressed and dictionaries."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 10), sink)
    return sink.getvalue().to_pybytes()


def weights() -> bytes:
    from safetensors.numpy import save

    return save({"model.norm.weight": np.ones(4, np.float32), "lm_head.weight": np.ones((2, 4), np.float16)})


def gguf_file(kind: str = "llama") -> bytes:
    """A model of one layer with a small vocabulary; ``kind``: llama, qwen3moe or gpt-oss."""
    from gguf import GGUFWriter, RopeScalingType

    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(f"{folder}/a.gguf", kind)
        if kind != "llama":
            writer.add_expert_count(2)
            writer.add_expert_used_count(1)
            writer.add_expert_feed_forward_length(4)
            writer.add_sliding_window(4)
            writer.add_rope_scaling_type(RopeScalingType.YARN if kind == "gpt-oss" else RopeScalingType.NONE)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(16)
            for part in ("gate", "up", "down"):
                writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", np.ones((2, 4, 4), np.float32))
        writer.add_context_length(64)
        writer.add_embedding_length(4)
        writer.add_block_count(1)
        writer.add_feed_forward_length(4)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", "<|endoftext|>"])
        writer.add_token_merges(["a b"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_eos_token_id(3)
        writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(f"{folder}/a.gguf").read_bytes()


def model_config(family: str) -> dict[str, Any]:
    """A config.json of the family, of tiny sizes."""
    names = FAMILIES[family].hf
    sizes = {theirs: 4 for theirs, _ in names.fields.values()}
    return {
        "architectures": [names.classes["lm"]],
        "model_type": names.model_type,
        "eos_token_id": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 1e4},
        "layer_types": ["full_attention"],
    } | sizes


def wrapped_config(kind: str) -> dict[str, Any]:
    """A config.json of a model of text and images."""
    wrapper = WRAPPERS[kind]
    text = model_config(next(name for name, family in FAMILIES.items() if family.hf.model_type == wrapper.text))
    return {"architectures": [wrapper.classes["lm"]], "model_type": kind, "text_config": text}


# ---- targets --------------------------------------------------------------------------------------------------------


def read_config(tree: dict[str, Any]) -> None:
    hold(lambda: parse(tree, "c.yaml"))


def read_text(content: bytes) -> None:
    hold(lambda: parse(read_yaml(content, "c.yaml"), "c.yaml"))


def read_override(text: str) -> None:
    hold(lambda: load("configs/tiny/ppo.yaml", [text]) if split_override(text) else None)


def read_rows(name: str) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        parser = lambda path: [*files.Parser(files.tables_of([path]), "demonstrations", {}, True, "data.x")]
        in_file(f"a.{name}", content, parser)

    return read


def read_prompts(content: bytes) -> None:
    in_file("a.jsonl", content, lambda path: [*dialogue.read_records(str(path), False, None)])
    in_file("a.txt", content, lambda path: [*dialogue.read_records(str(path), True, "s")])


def read_weights(content: bytes) -> None:
    from etils import epath

    def read(path: Path) -> None:
        for tensor in hf_headers.open_weights(epath.Path(path.parent)).values():
            assert np.prod(tensor.get_shape()) <= len(content)

    in_file("model.safetensors", content, read)


def read_model_config(raw: dict[str, Any]) -> None:
    in_file("config.json", json.dumps(raw).encode(), lambda path: hf_config.read_config(path.parent))


def read_json_file(content: bytes) -> None:
    in_file("config.json", content, lambda path: hf_config.read_config(path.parent))
    in_file("config.json", content, lambda path: hf_folder.read_json(path.parent, "config.json"))
    in_file("generation_config.json", content, lambda path: tokenizer.folder_eos(str(path.parent)))


def read_gguf(content: bytes) -> None:
    from etils import epath

    in_file("a.gguf", content, lambda path: gguf.write_folder(str(path), epath.Path(path.parent)))


def read_template(text: str) -> None:
    spoken = copy.deepcopy(letters())
    spoken.chat_template = text

    def accept_and_write() -> None:
        chat.apply_config(spoken, chat.ChatConfig(template=text or "x"), adds_bos=False)
        if "range" not in text:  # rows have no limit of time
            chat.render([{"role": "user", "content": "x"}], spoken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "TRIAL", 2.0)
        hold(lambda: tokenizer.eos_ids(spoken))
        hold(accept_and_write)


@functools.cache
def letters() -> Any:
    return tokenizer.train_bpe(["a"], 259)


jinja = st.lists(
    st.sampled_from(
        [*("{{", "}}", "{%", "%}", "{#", "#}", " for m in messages ", " endfor ", " if ", " endif ", " set x = ", "'")]
        + [
            "messages",
            "m['content']",
            "bos_token",
            "range(10**9)",
            "range(99999)",
            "*10**6",
            "*10**9",
            "|center(10**10)",
            "{{ 'a'*10**9 }}",
            "{% set n = namespace(t='a') %}",
            "{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
            "{{ n.t|length }}",
            "|tojson",
            ".__class__",
            "\n",
            "x",
            "raise",
        ]
    ),
    max_size=12,
).map("".join)
TREE = read_yaml(CONFIG, "ppo.yaml")
JSONL = "\n".join(map(json.dumps, ROWS)).encode()
CSV = b'prompt,response,n\n"a ""b""",c,1\nd,e\n"f\ng",h,2\n'
LEAVES = [f"{section}.{key}" for section, inside in TREE.items() if isinstance(inside, dict) for key in inside]

MODELS = [*map(model_config, FAMILIES), *map(wrapped_config, WRAPPERS)]

TARGETS: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any]]] = {
    "config": (read_config, edited(TREE)),
    "yaml": (read_text, damaged(CONFIG.encode())),
    "override": (read_override, st.builds("{}={}".format, st.sampled_from([*TREE, *LEAVES]) | words, values)),
    "jsonl": (read_rows("jsonl"), damaged(JSONL)),
    "json": (read_rows("json"), damaged(json.dumps(ROWS).encode())),
    "csv": (read_rows("csv"), damaged(CSV)),
    "gzip": (read_rows("jsonl.gz"), damaged(__import__("gzip").compress(JSONL))),
    "parquet": (read_rows("parquet"), damaged(parquet())),
    "values": (lambda rows: read_rows("jsonl")(json.dumps(rows).encode()), edited(ROWS[0])),
    "prompts": (read_prompts, damaged(JSONL)),
    "safetensors": (read_weights, damaged(weights())),
    "config.json": (read_model_config, st.sampled_from(MODELS).flatmap(edited)),
    "config.json bytes": (read_json_file, damaged(json.dumps(model_config("llama")).encode())),
    "gguf": (read_gguf, damaged(gguf_file())),
    "gguf experts": (read_gguf, st.sampled_from(("qwen3moe", "gpt-oss")).map(gguf_file).flatmap(damaged)),
    "template": (read_template, jinja),
}
# (target, input) that once raised something else
FOUND: list[tuple[str, Any]] = [
    ("config.json", model_config("llama") | {"model_type": []}),
    ("config.json", wrapped_config("gemma3") | {"text_config": [1]}),
    ("config.json", model_config("mistral") | {"num_hidden_layers": 10**9}),
    ("config.json", model_config("llama") | {"auto_map": 3}),
    ("config.json", model_config("gemma2") | {"layer_types": [[]]}),
    ("gguf", gguf_file().replace(b"<|endoftext|>", b"<|endofte\xff\xfe|>")),
    ("gguf", gguf_file().replace(b"a b", b"abc")),
    # a list of 2^48 numbers, which the reader goes on to make behind the end of the file
    ("gguf", gguf_file().replace(struct.pack("<IQ", 5, 4), struct.pack("<IQ", 5, 2**48))),
    ("jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}"),
    ("values", {"messages": "[" + "9" * 5000 + "]", "tools": "[" + "9" * 5000 + "]"}),
    ("values", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": "9" * 5000}]}),
    ("prompts", b'{"prompt": "\xff"}'),
    ("prompts", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}"),
    ("prompts", b"[" * 100_000),
    ("config", TREE | {"iterations": 10**400}),
    ("template", "{{ 'a' | center(10**10) }}"),
]
# each of them takes all of its memory or of its time; by day: data/test_chat.py
FOUND_AT_LENGTH = [
    "{{ 'a' * 10**9 }}",
    "{% set n = namespace(t='a') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "{% set n = namespace(t='a') %}" + "{% set t %}{{ n.t }}{{ n.t }}{% endset %}{% set n.t = t %}" * 40,
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
]


def examples(count: int) -> Any:
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=10_000, database=None, suppress_health_check=health, print_blob=False)


def search(name: str, count: int) -> None:
    target, inputs = TARGETS[name]
    examples(count)(given(inputs)(target))()


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs_of_each_kind(name):
    search(name, 5 if name == "config" else 25)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs_of_each_kind(name):
    search(name, int(os.environ.get("FUZZ_EXAMPLES", "7200")))


LONG = [pytest.param("template", text, marks=pytest.mark.nightly) for text in FOUND_AT_LENGTH]


@pytest.mark.parametrize(("name", "content"), [*FOUND, *LONG])
def test_inputs_that_once_broke_a_reader(name, content):
    TARGETS[name][0](content)


def test_the_contract_can_be_broken():
    """Else the tests above would show nothing."""
    for wrong in (KeyError("x"), ValueError("two\nlines"), ValueError(""), RecursionError("x")):
        with pytest.raises((AssertionError, type(wrong))):
            hold(lambda wrong=wrong: (_ for _ in ()).throw(wrong))
    assert readers.READERS.keys() >= {".jsonl", ".json", ".csv", ".parquet"}
