"""An update of a model shaped like Qwen 3.5, its responses packed and not: memory as it is compiled, and CPU time."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.step import make_learn
from jaxrlhf.types import Batch, Sequences
from tests.support import compiler, tiny

PROMPTS, COPIES, START, ROOM = 2, 8, 128, 240  # 2,048 columns of a prompt and the responses to it
LENGTHS = (40, 60, 85, 105, 130, 150, 180, 210)  # 960 tokens: 1,088 columns
PAIRS = 5
MODEL = resolve(
    ModelConfig(
        "qwen3_5_text",
        vocab_size=2048,
        hidden_size=256,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_size=768,
        max_positions=512,
        linear_key_heads=4,
        linear_value_heads=8,
        linear_key_dim=64,
        linear_value_dim=64,
    )
)


def rows() -> Sequences:
    """The responses to each prompt, in an order of its own, have half of the tokens that there is room for."""
    rng, columns = np.random.default_rng(0), np.arange(START + ROOM)
    lengths = np.array([rng.permutation(LENGTHS) for _ in range(PROMPTS)])
    mask = (columns >= START) & (columns < START + lengths.reshape(-1, 1))
    tokens = rng.integers(3, MODEL.vocab_size, mask.shape)
    tokens[:, :START] = np.repeat(tokens[::COPIES, :START], COPIES, 0)
    valid = mask | (columns < START)
    return Sequences(
        *tiny.put((np.where(valid, tokens, 0).astype(np.int32), valid, mask)),
        logprobs=jnp.full(mask.shape, -7.6),
        scores=jnp.asarray(rng.normal(size=len(mask)), jnp.float32),
        ended=jnp.ones(len(mask), bool),
        response_start=START,
        copies=COPIES,
    )


def compiled(sequences: Sequences):
    """(the program of an update, its state, its batch)."""
    made = tiny.build("grpo", GRPOConfig(kl_coef=0.0), model=MODEL, samples_per_prompt=COPIES)
    nets = make_nets(dict.fromkeys(("policy", "reference"), MODEL), Runtime(remat="full"), Sampling(), lambda *_: None)  # type: ignore[arg-type]
    learn = make_learn(made.recipe._replace(nets=nets))
    batch = Batch(tiny.prompts(PROMPTS, START), sequences)
    program = jax.jit(learn, donate_argnums=0, compiler_options={**compiler.DEFAULT}).lower(made.state, batch)
    return program.compile(), made.state, batch


@pytest.mark.nightly  # by day: that packed responses say what their rows do, tests/models/test_response_packing.py
@pytest.mark.timeout(3000)
def test_a_packed_update_takes_less():
    """In the width that batch.pack_widths: 2 chooses for these rows, and in all columns. Its program has a branch for
    each width: a micro-batch takes the time of its own, and the program the memory of the widest."""
    sequences = rows()
    packed = sequences.replace(width=sum(LENGTHS))
    found = [compiled(one) for one in (sequences, packed)]
    programs, states, batches = map(list, zip(*found))
    memory = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in programs]
    seconds: list[list[float]] = [[], []]
    norms = [0.0, 0.0]
    for turn in range(PAIRS + 1):
        for which in range(2):
            began = time.process_time()
            states[which], metrics = jax.block_until_ready(programs[which](states[which], batches[which]))
            if turn:
                seconds[which].append(time.process_time() - began)
            else:  # to warm up
                norms[which] = float(metrics["policy/grad_norm"])
    whole, narrow = map(statistics.median, seconds)
    ratio = statistics.median(ours / theirs for theirs, ours in zip(*seconds))
    print(f"temporaries, MiB: {memory[0]:.0f} and {memory[1]:.0f}, {memory[1] / memory[0]:.2f}")
    print(f"CPU seconds: {whole:.2f} and {narrow:.2f}, {ratio:.2f}")
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0] > 1e-3
    assert memory[1] < 0.75 * memory[0] and ratio < 0.75
