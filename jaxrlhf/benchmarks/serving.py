"""Tokens a second of `jaxrlhf serve`, beside transformers' `generate`, on one machine at one time.

``python -m jaxrlhf.benchmarks.serving FOLDER --torch PYTHON``: FOLDER is a Hugging Face folder, PYTHON an interpreter
with torch and transformers. Both compute in float32 and sample at temperature 1. The server is asked over HTTP by as
many clients as there are rows in a batch of transformers, which therefore joins and ends them all at once. They take
turns, round by round, so that what else the machine does meets both.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

PROMPT = "The old man walked slowly along the beach, and when he came to the harbour he saw that the boats"
# reads numbers of rows, one a line, and writes the seconds that a batch of so many took
TRANSFORMERS = """
import sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = tokenizer(prompt, return_tensors="pt").input_ids
print("ready", flush=True)
for line in sys.stdin:
    rows = ids.repeat(int(line), 1)
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, min_new_tokens=tokens,
                       max_new_tokens=tokens, pad_token_id=0)
    print(time.perf_counter() - began, flush=True)
"""


class Measured(NamedTuple):
    """Tokens a second, a number a round."""

    clients: int
    served: list[float]
    transformers: list[float]

    @property
    def ratio(self) -> float:
        """Of the server to transformers, the median of the rounds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.served, self.transformers))


@contextlib.contextmanager
def process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended behind the block."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.terminate()


def line_of(stream: IO[str] | None) -> str:
    """Raises RuntimeError where the process has ended."""
    assert stream is not None
    if not (line := stream.readline()):
        raise RuntimeError("serving: a process ended before its time; its messages are above")
    return line.strip()


def served(address: str, clients: int, tokens: int) -> float:
    """Tokens a second that so many clients get together, each for one request."""

    def one(seed: int) -> int:
        body = {"model": "served", "prompt": PROMPT, "max_tokens": tokens, "seed": seed}
        with urllib.request.urlopen(f"{address}/completions", json.dumps(body).encode()) as reply:
            return json.load(reply)["usage"]["completion_tokens"]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        count = sum(pool.map(one, range(clients)))
    return count / (time.perf_counter() - began)


def measure(folder: str, torch: str, numbers: Sequence[int], tokens: int, rounds: int) -> Iterator[Measured]:
    """Each number of clients, after a round that is not counted."""
    server = [sys.executable, "-m", "jaxrlhf", "serve", folder, "--port", "0", "--name", "served", "--context", "256"]
    server += ["--slots", str(max(numbers))]
    with process([torch, "-c", TRANSFORMERS, folder, PROMPT, str(tokens)]) as theirs, process(server) as ours:
        line_of(theirs.stdout)
        address = line_of(ours.stdout).split()[0]
        for clients in numbers:
            found = Measured(clients, [], [])
            for round in range(rounds + 1):
                speed = served(address, clients, tokens)
                assert theirs.stdin is not None
                print(clients, file=theirs.stdin, flush=True)
                other = clients * tokens / float(line_of(theirs.stdout))
                if round:
                    found.served.append(speed)
                    found.transformers.append(other)
            yield found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--torch", required=True, help="an interpreter with torch and transformers")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    asked: Any = parser.parse_args(arguments)
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}, {asked.tokens} tokens a response")
    print("| clients | served, tokens/s | transformers, tokens/s | ratio |\n|---|---|---|---|")
    for found in measure(asked.folder, asked.torch, asked.clients, asked.tokens, asked.rounds):
        ours, theirs = statistics.median(found.served), statistics.median(found.transformers)
        print(f"| {found.clients} | {ours:.1f} | {theirs:.1f} | {found.ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
