"""What a soak trains: a tiny run, and its data, tokenizer and reward function, all made on the fly."""

import json
import os
import random
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.benchmarks.soak_process import SAID

RUN, CONFIG = "run", "run.yaml"  # in the folder of a run, which is the working directory of its processes
FUNCTION = "jaxrlhf.benchmarks.soak_run:vowels"
WORDS = ["film", "story", "plot", "cast", "is", "was", "warm", "dull", "bright", "grim", "and", "its", "the", "a"]
ROWS = 200  # prompts
EVERY = 3  # iterations between two checkpoints
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {
        "algorithm": {"num_epochs": 2, "num_minibatches": 2, "kl_controller": "adaptive", "kl_horizon": 100},
        "batch": {"prompts_per_step": 8},
    },
    "grpo": {
        "algorithm": {"num_minibatches": 2},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 4},
    },
}


def vowels(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The reward: vowels of a response, over 7. It tells whoever started the run when a call begins and ends, and what
    it scored, on stdout, which a full disk leaves alone."""
    import time

    rows = [{"prompt": record["prompt"], "response": text} for text, record in zip(responses, records)]
    tell(SAID + json.dumps(rows))
    time.sleep(0.03)  # so that a signal finds it at work
    tell(SAID)
    return [sum(letter in "aeiou" for letter in text) / 7 for text in responses]


def tell(line: str) -> None:
    """Writes the line to stdout at once: what the handler of a signal prints can't stand in the middle of it."""
    os.write(1, f"{line}\n".encode())


def make_data(folder: Path, seed: int) -> None:
    """The prompts, and a tokenizer that is trained on them, in ``folder``."""
    from jaxrlhf.data.tokenizer import train_bpe

    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 4))) for _ in range(ROWS)]
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    train_bpe(texts, 300).save_pretrained(folder / "tokenizer")


def make_run(folder: Path, algorithm: str, iterations: int, seed: int) -> None:
    """The config of a run in ``folder``, which is made; the data lie beside it."""
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_positions": 64}
    own = ALGORITHMS[algorithm]
    tree = {
        "run_dir": RUN,
        "iterations": iterations,
        "seed": seed,
        "deterministic": True,
        "algorithm": {"name": algorithm, **own["algorithm"]},
        "models": {"policy": {"architecture": shape}},
        "tokenizer": {"init_from": "../tokenizer"},
        "optimizer": {"default": {"learning_rate": 1e-3}},
        "rewards": {"function": FUNCTION},
        "data": {
            "prompts": {"path": "../prompts.jsonl"},
            "eval_prompts": {"path": "../prompts.jsonl"},
            "prompt_buckets": [12],
            "max_length": 32,
        },
        "batch": own["batch"],
        "generate": {"max_new_tokens": 8},
        "eval": {"every": 4 * EVERY, "size": 8},
        "checkpoint": {"every": EVERY},
        "log": {"samples": 2, "samples_every": 1, "trackers": []},
    }
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False))
