"""Text in, text out: sample continuations from a run, a HF folder or a hub model."""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.data import encode
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.generate import loop
from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.hosts import compiler_flags
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.attention.kernels import hardware_of
from jaxrlhf.models.config import MLP, ModelConfig, row_limit
from jaxrlhf.models.files import hf_config, hf_folder, hf_headers, hf_weights
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.run import saved_run
from jaxrlhf.run.export import token_ids
from jaxrlhf.run.sampler import sampler_of
from jaxrlhf.run.tokenizer import tokenizer_of
from jaxrlhf.run.transfer import put
from jaxrlhf.run.verified_steps import reading
from jaxrlhf.sharding import MeshConfig, batch_shards, make_mesh
from jaxrlhf.types import Array, Head, Params, Prompts, Role, Sequences, given

ROWS = 64  # responses that are sampled at a time, on one device or on all


class Model(NamedTuple):
    """A language model ready to sample from, under the mesh it was read on."""

    params: Params
    config: ModelConfig
    tokenizer: Any
    ids: hf_config.TokenIds
    chat: bool = False  # whether it was trained on plain-text prompts as turns of a conversation (data.chat)
    guides: tuple[Params, ...] = ()  # heads of action values on its trunk, where they are to guide it
    append_eos: bool = True  # whether the responses that it learned from end with an ending token (data.append_eos)


def read_model(name: str, mesh, dtype=jnp.float32, role: Role = "policy", guided: bool = False) -> Model:
    """A role of a run (RUN, RUN@best, RUN@40), or a HF model: the policy writes, any other role gives scores. ``mesh``
    is the current one. ``guided``: with the run's heads of action values.

    Raises ValueError, in one line, where there is no such model, and Damaged where it isn't what was saved."""
    with reading():
        model = read_found(name, mesh, dtype, role, guided)
    if guided and not model.guides:
        raise ValueError(f"{name}: no action values in it to guide its policy; expected beta 0")
    return model


def read_found(name: str, mesh, dtype, role: Role, guided: bool) -> Model:
    """``read_model``, while the run's steps stay where they are."""
    wanted: Head = "lm" if role == "policy" else "scalar"
    saved_runs = saved_run.SavedRuns()
    found = saved_runs.read_extra(name) if saved_run.is_run(name) else None
    tokenizer = tokenizers.load_tokenizer(str(tokenizer_of(saved_runs, name)))
    if found:
        step, extra = found
        role = saved_run.find_role(extra["models"], role)
        cfg, head = saved_run.model_of(extra["models"][role])
        check_head(f"{name}: its {role} model", head, wanted)
        if cfg.family == MLP:
            raise ValueError(f"{name}: its {role} model acts in an environment; expected a model of text")
        params = saved_run.restore_model(split_step(name)[0], step, extra["models"], role, dtype, mesh)
        ids = token_ids(tokenizer, {"eos_token_id": extra.get("eos_ids")})
        trained = read_yaml(extra["config"], "config").get("data") or {}
        run_dir, models = split_step(name)[0], extra["models"]
        guides = saved_run.restore_guides(run_dir, step, models, dtype, mesh) if guided else ()
        chat, append_eos = trained.get("chat") is not None, trained.get("append_eos", True)
        return Model(params, cfg, tokenizer, ids, chat, guides, append_eos)
    folder = hf_folder.locate(name)
    cfg, head = hf_config.read_config(folder)
    check_head(name, head, wanted)
    ids = token_ids(tokenizer, {"eos_token_id": tokenizers.folder_eos(str(folder))})
    held = hf_headers.examine(folder, cfg, head)
    if head == "scalar" and not held.has_score:
        raise ValueError(f"{name}: its files hold no score head; expected a trained reward model")
    if held.left:
        print(f"{name}: not read: {hf_headers.kinds(held.left)}", file=sys.stderr)
    beyond = [id for id in tokenizer.get_vocab().values() if id >= cfg.vocab_size]
    tokenizers.forbid(tokenizer, dict.fromkeys(beyond, f"its vocab_size is {cfg.vocab_size}"))
    return Model(hf_weights.load(folder, cfg, head, dtype), cfg, tokenizer, ids)


def check_head(what: str, head: Head, wanted: Head) -> None:
    """Raises ValueError, in one line, where a model can't do what is wanted of it."""
    if head != wanted:
        can = (
            "can't generate text; expected a policy (a causal language model)" if wanted == "lm" else "gives no scores"
        )
        raise ValueError(f"{what}: a model with a {head} head {can}")


def export_model(name: str, to: str) -> None:
    """Write the language model ``name`` (gguf:FILE, say) as a Hugging Face folder in float32, tokenizer included."""
    mesh, folder = make_mesh(MeshConfig()), tokenizer_of(saved_run.SavedRuns(), name)
    with jax.set_mesh(mesh):
        model = read_model(name, mesh)
        ids = hf_config.embedded(model.ids, model.config.vocab_size)
        hf_weights.save(model.params, model.config, "lm", to, ids=ids, tokenizer_folder=folder)


class Response(NamedTuple):
    """What a model wrote."""

    text: str
    finish_reason: Literal["eos", "stop", "length"]  # an ending token, a stop text, or max_new_tokens
    tokens: int  # the ending token included


class Writer:
    """A model that answers records ({"prompt": text} or {"messages": [...]}) with ``samples`` responses each.

    Few programs serve all prompts, which the compilation cache keeps: widths of prompts and numbers of rows are powers
    of two, of at least ``width`` and at most ROWS. What a response says does not depend on either.

    Raises ValueError, in one line, where ``name`` holds no language model."""

    def __init__(self, name: str, cfg: GenerateConfig, seed: int = 0, samples: int = 1, width: int = 32):
        compiler_flags.use_compilation_cache()
        self.cfg, self.width, self.seed = cfg, width, jnp.int32(seed)
        self.mesh = make_mesh(MeshConfig())
        with jax.set_mesh(self.mesh):
            self.model = read_model(name, self.mesh, guided=cfg.beta > 0)
        self.shards = batch_shards(self.mesh)
        self.rows = max(ROWS // samples // self.shards, 1) * self.shards  # prompts of the largest batch
        model, runtime = self.model, Runtime(hardware=hardware_of(self.mesh.devices.flat[0]))
        vocab = padded_vocab(model.config)
        self.sampler = sampler_of(cfg, model.tokenizer, model.ids.eos, vocab, samples)

        def sample(params: Params, guides: tuple[Params, ...], prompts: Prompts, seed: Array) -> Sequences:
            return loop.sample(params, model.config, prompts, seed, jnp.int32(0), self.sampler, runtime, guides)

        self.program = jax.jit(sample)

    def __call__(self, records: Iterable[Mapping[str, Any]]) -> Iterator[list[Response]]:
        """The responses to each record, in their order, computed a batch at a time.

        Raises ValueError for a prompt that the model has no room for."""
        records = iter(records)
        for at in itertools.count():
            if not (batch := list(itertools.islice(records, self.rows))):
                return
            ids = [encode_record(self.model, record) for record in batch]
            rows = min(self.shards * 2 ** math.ceil(math.log2(-(-len(ids) // self.shards))), self.rows)
            prompts = left_padded(ids, rows, self.width_of(ids), tokenizers.pad_id(self.model.tokenizer))
            prompts = prompts.replace(sample_id=prompts.sample_id + at * self.rows)
            with jax.set_mesh(self.mesh):
                found = jax.device_get(
                    self.program(self.model.params, self.model.guides, put(self.mesh, prompts), self.seed)
                )
            responses = self.responses(found)
            copies = self.sampler.samples_per_prompt
            yield from (responses[row * copies : (row + 1) * copies] for row in range(len(ids)))

    def width_of(self, ids: Sequence[np.ndarray]) -> int:
        """Columns of the prompts' batch. Raises ValueError where a prompt and its response are too long for a row."""
        longest, room, limit = max(map(len, ids)), self.cfg.max_new_tokens, row_limit(self.model.config)
        if limit is not None and longest + room > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and a response of {room} are {longest + room} columns; "
                f"the model computes {limit} at most"
            )
        width = max(self.width, 2 ** math.ceil(math.log2(longest)))
        return width if limit is None else min(width, limit - room)

    def responses(self, found: Sequences) -> list[Response]:
        """One a row of samples."""
        texts = tokenizers.decode_rows(self.model.tokenizer, found.tokens, found.response_mask)
        rows, by_itself = [], given(found.ended, "ended")
        for text, tokens, mask, ended in zip(texts, found.tokens, found.response_mask, by_itself):
            written = np.asarray(tokens)[np.asarray(mask)]
            by_token = len(written) > 0 and int(written[-1]) in self.sampler.eos_ids
            reason = "length" if not ended else "eos" if by_token else "stop"
            rows.append(Response(text, reason, len(written)))
        return rows


def encode_record(model: Model, record: Mapping[str, Any]) -> np.ndarray:
    """i32[P] of a prompt; a plain one is a user's message where the model was trained on such (data.chat).

    Raises ValueError for tokens that the model has no embedding of."""
    if model.chat and isinstance(record.get("prompt"), str):
        record = as_record(record["prompt"], chat=True)
    ids = encode.encode_prompt(record, model.tokenizer)
    if why := tokenizers.why_unreadable(model.tokenizer, ids):
        raise ValueError(f"prompt {title(record)!r}: {why}")
    return ids


def as_record(text: str, chat: bool, system: str | None = None) -> dict[str, Any]:
    """The record of a prompt; with ``chat`` it is a user's message, behind that of the system."""
    if not chat:
        return {"prompt": text}
    said = [{"role": "system", "content": system}] if system else []
    return {"messages": [*said, {"role": "user", "content": text}]}


def title(record: Mapping[str, Any]) -> str:
    """What is answered: the prompt, or the last message."""
    return record["prompt"] if record.get("prompt") is not None else record["messages"][-1]["content"]


def generate_text(
    name: str, prompts: Sequence[str], cfg: GenerateConfig, seed: int = 0, chat: bool = False
) -> list[str]:
    """A continuation of each prompt. ``chat``: each is a user's message, put into the model's chat template; so it is
    for a run with data.chat too."""
    writer = Writer(name, cfg, seed)
    return [response.text for (response,) in writer([as_record(text, chat) for text in prompts])]


def left_padded(ids: Sequence[np.ndarray], rows: int, width: int, pad: int) -> Prompts:
    """Prompts [rows, width]; rows that fill up are empty."""
    tokens, valid = np.full((rows, width), pad, np.int32), np.zeros((rows, width), bool)
    for row, piece in enumerate(ids):
        tokens[row, width - len(piece) :] = piece
        valid[row, width - len(piece) :] = True
    return Prompts(tokens, valid, np.arange(rows, dtype=np.int32))  # type: ignore[arg-type]
