"""The record that the sampler's program depends on, made of a config and a vocabulary."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.generate.stop_texts import Automaton, stop_automaton
from jaxrlhf.ops.sampling import Sampling


class Sampler(NamedTuple):
    """All that the sampler's program depends on, besides its arrays."""

    sampling: Sampling
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    stops: tuple[Automaton, ...] = ()  # what ends a response besides eos_ids: the stop texts
    samples_per_prompt: int = 1
    share_prompts: bool = True  # what learns from the samples computes a prompt once for all of them
    halvings: int = 0  # see GenerateConfig
    beta: float = 0.0  # weight of the action values that guide what is sampled, where there are any
    keeps_routing: bool = False  # Sequences.routing is given: which experts computed each token

    @property
    def copies(self) -> int:
        """Sequences.copies of what is sampled."""
        return self.samples_per_prompt if self.share_prompts else 1


def make_sampler(
    ask: GenerateConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    pieces: list[bytes],
    vocab: int,
    samples_per_prompt: int,
    stops: Sequence[str | Sequence[str | int]] | None = None,
) -> Sampler:
    """The sampler that ``ask`` describes.

    Args:
        pieces: what each token writes, read where there are stop texts.
        vocab: rows of the model's (padded) vocabulary.
        stops: the stop texts as stop_automaton takes them; those of ``ask`` by default.
    """
    sampling = Sampling(ask.temperature, ask.top_k, ask.top_p, ask.min_new_tokens, eos_ids)
    automata = tuple(stop_automaton(stop, pieces, vocab) for stop in (ask.stop if stops is None else stops))
    return Sampler(
        sampling,
        ask.max_new_tokens,
        eos_ids,
        pad_id,
        automata,
        samples_per_prompt,
        halvings=ask.halvings,
        beta=ask.beta,
    )
