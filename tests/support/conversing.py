"""Tiny runs of a policy that converses with an environment: letters are tokens, and digits end a response."""

import json
from pathlib import Path
from typing import Any

from jaxrlhf import api
from jaxrlhf.benchmarks.letters import write_letters
from jaxrlhf.config.record import Config
from jaxrlhf.rewards.turns import Turn

LETTERS = "0123>?higerlow"
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 64}


class Show:
    """Answers the first response with the secret digit; the second one earns 1 where it ends with that digit."""

    def __init__(self, price: float = 0.0):
        self.price = price  # of the first response

    def reset(self, records):
        return [{"secret": record["secret"], "said": []} for record in records]

    def step(self, states, responses):
        turns = []
        for state, text in zip(states, responses):
            state["said"].append(text)
            if len(state["said"]) == 1:
                turns.append(Turn(f"{state['secret']}>", -self.price, False))
            else:
                turns.append(Turn("", float(text[-1:] == state["secret"]), True))
        return turns

    def metrics(self, states):
        return {"right": sum(state["said"][-1][-1:] == state["secret"] for state in states) / len(states)}


def config(folder: Path, name: str = "grpo", **changes: Any) -> Config:
    """A run in ``folder`` of the algorithm ``name``: 8 prompts, 4 responses to each."""
    if not (folder / "letters").exists():
        write_letters(LETTERS, folder / "letters")
        rows = [{"prompt": f"{n}?", "secret": str(m), "number": m} for n in range(4) for m in range(4)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run_dir": str(folder / name),
        "iterations": 2,
        "algorithm": {"name": name, "old_logprobs": "recompute"},  # kl/sampler_mismatch compares both
        "models": {"policy": {"architecture": SHAPE}},
        "tokenizer": {"init_from": str(folder / "letters")},
        "data": {
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "prompt_buckets": [4],
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"prompts_per_step": 8, "samples_per_prompt": 4},
        "generate": {"max_new_tokens": 10, "stop": list("0123")},  # most responses end with a digit
        "environment": {"function": "tests.support.conversing:Show", "max_turns": 2, "turn_tokens": 4},
        "log": {"trackers": []},
    }
    return api.load_config(tree, changes)
