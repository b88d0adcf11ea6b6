"""The run's sampler, and what ends a response."""

import dataclasses

from jaxrlhf.config.record import Config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.errors import ConfigError
from jaxrlhf.generate import sampler as samplers
from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models import parameters
from jaxrlhf.run.origins import Weights
from jaxrlhf.run.saved_run import SavedRuns
from jaxrlhf.types import Role


def run_sampler(saved_runs: SavedRuns, cfg: Config, tokenizer, weights: dict[Role, Weights]) -> Sampler:
    """The sampler that ``generate`` asks for; its EOS tokens end all the run's rows, learnt or sampled."""
    ask = cfg.generate
    if cfg.acts:  # EOS is no action
        ask = dataclasses.replace(ask, min_new_tokens=ask.max_new_tokens)
    ask = dataclasses.replace(ask, max_new_tokens=cfg.turn_tokens)
    policy, eos_ids = weights.get("policy"), find_eos(saved_runs, cfg, tokenizer, weights)
    size = parameters.padded_vocab(policy.config) if policy else len(tokenizer)
    sampler = sampler_of(ask, tokenizer, eos_ids, size, cfg.batch.samples_per_prompt)
    sampler = sampler._replace(share_prompts=cfg.batch.share_prompts)
    return readable_by_all(sampler, tokenizer, weights) if policy else sampler


def readable_by_all(sampler: Sampler, tokenizer, weights: dict[Role, Weights]) -> Sampler:
    """``sampler``, which never samples a token that another model of the run could not read.

    Raises ConfigError where no response could end."""
    sizes = [found.config.vocab_size for found in weights.values()]
    own = weights["policy"].config.vocab_size
    unread = tokenizers.unreadable(tokenizer)
    banned = sorted({id for id in unread if id < own} | set(range(min(sizes), own)))
    if banned and set(sampler.eos_ids) <= {*banned, *range(own, max(sampler.eos_ids) + 1)}:
        id = sampler.eos_ids[0]
        why = unread.get(id, f"a model's vocab_size is {min(sizes)}")
        raise ConfigError(f"tokenizer: token {id}, which ends responses, is not known to every model: {why}")
    return sampler._replace(sampling=sampler.sampling._replace(banned=tuple(banned)))


def sampler_of(
    ask: GenerateConfig, tokenizer, eos_ids: tuple[int, ...], vocab: int, samples_per_prompt: int = 1
) -> Sampler:
    """The sampler for a model whose (padded) vocabulary has ``vocab`` rows, with its ending tokens and stop texts."""
    pieces = tokenizers.token_bytes(tokenizer) if ask.stop else []
    stops = [stop for text in ask.stop for stop in tokenizers.stop_forms(tokenizer, text)]
    return samplers.make_sampler(ask, eos_ids, tokenizers.pad_id(tokenizer), pieces, vocab, samples_per_prompt, stops)


def find_eos(saved_runs: SavedRuns, cfg: Config, tokenizer, weights: dict[Role, Weights]) -> tuple[int, ...]:
    """What ends a response: of a run with a checkpoint as it was decided; else what the tokenizer, its folder, its chat
    template say, and where the policy, or the reward model, starts."""
    _, extra = saved_runs.own_extra(cfg.run_dir) or (0, {})
    if saved := extra.get("eos_ids"):
        return tuple(saved)
    first = next((weights[role] for role in ("policy", "reward", *weights) if role in weights), None)
    return tokenizers.eos_ids(tokenizer, generation_config(first) if first else None)


def generation_config(start: Weights) -> dict | None:
    """What a model's folder says of the ends of responses; of a run, the EOS tokens that it was trained with."""
    if start.kind == "run":
        return {"eos_token_id": start.record.get("eos_ids")}
    return {"eos_token_id": tokenizers.folder_eos(start.path)} if start.path else None
