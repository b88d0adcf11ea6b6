"""Tokens a second of `jaxrlhf serve`, beside transformers' `generate` and llama.cpp, on one machine at one time.

``python -m jaxrlhf.benchmarks.serving FOLDER --torch PYTHON [--llama PYTHON --gguf FILE]``: FOLDER is a Hugging Face
folder, PYTHON an interpreter with torch and transformers, or with llama-cpp-python. All sample at temperature 1, with
no filter, and each response has as many tokens. Ours and transformers' compute in float32; the server is asked over
HTTP by as many clients as there are rows in a batch of transformers, which therefore joins and ends them all at once.
llama.cpp decodes one response, through its Python API, in float16: FILE, a GGUF of the same model, is rewritten so.
They take turns, round by round, so that what else the machine does meets all.
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

from jaxrlhf.errors import ConfigError

PROMPT = "The old man walked slowly along the beach, and when he came to the harbour he saw that the boats"
# Both read numbers of rows, one a line, and write the seconds that a batch of so many took.
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
LLAMA = """
import itertools, os, sys, tempfile, time, llama_cpp
file, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
with tempfile.TemporaryDirectory() as folder:
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = 1, True  # float16
    half = os.path.join(folder, "f16.gguf")
    if llama_cpp.llama_model_quantize(file.encode(), half.encode(), how):
        sys.exit(f"{file}: llama.cpp could not rewrite it")
    cores = os.cpu_count()
    model = llama_cpp.Llama(half, n_ctx=256, n_threads=cores, n_threads_batch=cores, verbose=False)
ids = model.tokenize(prompt.encode())
print("ready", flush=True)
for line in sys.stdin:
    model.reset()
    began = time.perf_counter()
    made = model.generate(ids, temp=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
    assert len(list(itertools.islice(made, tokens))) == tokens
    print(time.perf_counter() - began, flush=True)
"""


class Measured(NamedTuple):
    """Tokens a second, a number a round."""

    clients: int
    served: list[float]
    others: dict[str, list[float]]  # by what they are

    def ratio(self, name: str) -> float:
        """Of the server to another, the median of the rounds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.served, self.others[name], strict=True))


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
        body = {"model": "served", "prompt": PROMPT, "max_tokens": tokens, "seed": seed, "ignore_eos": True}
        with urllib.request.urlopen(f"{address}/completions", json.dumps(body).encode()) as reply:
            return json.load(reply)["usage"]["completion_tokens"]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        count = sum(pool.map(one, range(clients)))
    return count / (time.perf_counter() - began)


def batched(other: subprocess.Popen[str], rows: int, tokens: int) -> float:
    """Tokens a second that another process makes of a batch of so many rows."""
    assert other.stdin is not None
    print(rows, file=other.stdin, flush=True)
    return rows * tokens / float(line_of(other.stdout))


def measure(
    folder: str, others: dict[str, list[str]], numbers: Sequence[int], tokens: int, rounds: int, seconds: float
) -> Iterator[Measured]:
    """Each number of clients, after a round that is not counted.

    Args:
        others: name -> the command of a process that reads numbers of rows. llama.cpp has one row alone.
        seconds: after which no further round begins; each number of clients has a part of it, and one round at least.
    """
    server = [sys.executable, "-m", "jaxrlhf", "serve", folder, "--port", "0", "--name", "served", "--context", "256"]
    server += ["--slots", str(max(numbers))]
    with contextlib.ExitStack() as stack:
        theirs = {name: stack.enter_context(process(command)) for name, command in others.items()}
        ours = stack.enter_context(process(server))
        for other in theirs.values():
            line_of(other.stdout)
        address = line_of(ours.stdout).split()[0]
        for clients in numbers:
            end = time.monotonic() + seconds / len(numbers)
            asked = {name: other for name, other in theirs.items() if clients == 1 or name != "llama.cpp"}
            found = Measured(clients, [], {name: [] for name in asked})
            for round in range(rounds + 1):
                if round > 1 and time.monotonic() > end:
                    break
                speed = served(address, clients, tokens)
                speeds = {name: batched(other, clients, tokens) for name, other in asked.items()}
                if round:
                    found.served.append(speed)
                    for name, other_speed in speeds.items():
                        found.others[name].append(other_speed)
            yield found


def row_of(found: Measured, names: Sequence[str]) -> str:
    """A row of the table: medians of the rounds, and ratios of each round's."""
    cells = [str(found.clients), str(len(found.served)), f"{statistics.median(found.served):.1f}"]
    for name in names:
        known = name in found.others
        cells += [f"{statistics.median(found.others[name]):.1f}", f"{found.ratio(name):.2f}"] if known else ["", ""]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--torch", required=True, help="an interpreter with torch and transformers")
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python")
    parser.add_argument("--gguf", help="with --llama: the model as a GGUF file")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0, help="of measuring, after which no round begins")
    asked: Any = parser.parse_args(arguments)
    others = {"transformers": [asked.torch, "-c", TRANSFORMERS, asked.folder, PROMPT, str(asked.tokens)]}
    if bool(asked.llama) != bool(asked.gguf):
        raise ConfigError("--llama: needs --gguf, the model that llama.cpp reads, and --gguf needs --llama")
    if asked.llama:
        others["llama.cpp"] = [asked.llama, "-c", LLAMA, asked.gguf, PROMPT, str(asked.tokens)]
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}, {asked.tokens} tokens a response")
    heads = ["clients", "rounds", "served, tokens/s", *(head for name in others for head in (f"{name}", "ratio"))]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for found in measure(asked.folder, others, asked.clients, asked.tokens, asked.rounds, asked.minutes * 60):
        print(row_of(found, [*others]), flush=True)


if __name__ == "__main__":
    main()
