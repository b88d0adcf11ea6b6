"""The section ``generate`` of a config."""

import dataclasses

from jaxrlhf.models.int8 import Part


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled. The trainer applies the same temperature, top-k and top-p to its log-probs."""

    max_new_tokens: int = 64  # tokens of a response at most
    min_new_tokens: int = 0  # EOS is out of reach before it
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # sample from the likeliest tokens that make up this probability; 1: off
    beta: float = 0.0  # of a run with Q heads: sample from policy * exp(beta * (Q - V)); 1e6: greedily by Q; 0: policy
    stop: tuple[str, ...] = ()  # texts that end a response, besides the EOS tokens
    int8: tuple[Part, ...] = ()  # what decoding reads as 8 bits: weights, cache; the trainer's log-probs are not its
    merge_adapter: bool = True  # once a rollout; false: decode beside the base_quantization: less memory, and slower
    halvings: int = 0  # times, each compiled, that half of the responses (to a prompt; on a device) go on alone
