"""The same count for training steps whose speed is published: how much of such a bound real programs reach.

Published by MaxText (https://github.com/AI-Hypercomputer/maxtext: its README, and in MaxText/configs/{v5e,v5p} the
scripts whose batch, mesh and remat these rows repeat) and in https://github.com/AI-Hypercomputer/tpu-recipes
(training/trillium).
Both attend with a kernel that keeps products of queries and keys out of HBM; shares of the peak are of attention in
full, as plan/cost.py counts it. Their remat is the nearest that there is here: "minimal" keeps matrix products (dots),
and what the steps on v6e offload to the host, and read back while they compute again, is computed again (full).

Decoding: milliseconds between tokens from the benchmark documentation of SGL-JAX
(https://github.com/sgl-project/sglang-jax). Its cache grows with the text, so the count is of the mean length of a row.
"""

from typing import Literal, NamedTuple

from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files.published import LLAMA_2_70B, LLAMA_3_1_8B, LLAMA_3_1_70B, shape
from jaxrlhf.plan.calls import Passes, PlannedPass
from jaxrlhf.plan.cost import Setup, decode_step, phases
from jaxrlhf.plan.roofline import Phase, timed
from jaxrlhf.tpu.peaks import CHIPS


class PublishedStep(NamedTuple):
    """One training step, and how fast it is said to be: a share of the chip's peak, or tokens a second a chip."""

    name: str
    topology: str
    chips: int
    model: ModelConfig
    rows: int  # a chip
    columns: int
    remat: Literal["none", "full", "dots"]
    tensor: int
    mfu: float = 0.0
    tokens: float = 0.0


def maxtext(hidden: int, layers: int, heads: int, mlp: int) -> ModelConfig:
    """Its default model at a global_parameter_scale: heads of 128 features, a gated mlp, 32,000 tokens."""
    return shape("llama", 32000, hidden, layers, heads, heads, mlp, 2048, head_dim=128)


STEPS = (
    PublishedStep("MaxText 16B", "v5e-256", 256, maxtext(4096, 32, 64, 28672), 6, 2048, "full", 1, mfu=0.611),
    PublishedStep("MaxText 32B", "v5e-256", 256, maxtext(8192, 32, 64, 28672), 4, 2048, "full", 1, mfu=0.669),
    PublishedStep("MaxText 64B", "v5e-256", 256, maxtext(8192, 64, 64, 28672), 2, 2048, "full", 1, mfu=0.599),
    PublishedStep("MaxText 32B", "v5p-128", 64, maxtext(8192, 32, 64, 28672), 7, 2048, "dots", 4, mfu=0.715),
    PublishedStep("MaxText 128B", "v5p-256", 128, maxtext(8192, 64, 128, 57344), 1, 2048, "dots", 8, mfu=0.687),
    PublishedStep("Llama 2 70B", "v5p-512", 256, LLAMA_2_70B, 4, 4096, "dots", 1, tokens=692),
    PublishedStep("Llama 3.1 8B", "v6e-256", 256, LLAMA_3_1_8B, 3, 8192, "full", 1, tokens=7207),
    PublishedStep("Llama 3.1 70B", "v6e-256", 256, LLAMA_3_1_70B, 5, 8192, "full", 1, tokens=960),
)


class Compared(NamedTuple):
    """Shares of the chip's peak, counted as plan/cost.py counts FLOPs, and of the prediction."""

    step: PublishedStep
    predicted: float
    published: float

    @property
    def ratio(self) -> float:
        return self.published / self.predicted


def compare(step: PublishedStep) -> Compared:
    """A step of sft as we would compute it, beside what is published."""
    chip, model = CHIPS[step.topology.split("-")[0]], resolve(step.model)
    setup = Setup(
        {"data": 1, "fsdp": step.chips // step.tensor, "tensor": step.tensor},
        moments={"policy": 8},
        remat=step.remat,
        stored_attention=False,
    )
    rows = step.rows * step.chips
    one = PlannedPass("policy", "token_stats", rows, step.columns, step.columns)
    counted = phases(Passes([], [], [one], 1, 1), {"policy": (model, "lm")}, setup)
    seconds = sum(timed(phase, chip).seconds for phase in counted)
    useful = sum(phase.useful for phase in counted)
    tokens = step.rows * step.columns
    published = step.mfu or useful / tokens * step.tokens / chip.flops
    return Compared(step, useful / seconds / chip.flops, published)


def calibrate() -> list[Compared]:
    return [compare(step) for step in STEPS]


class Decode(NamedTuple):
    """Decoding as it is published: ``rows`` at a time, ``prompt`` and ``new`` tokens each, tensor = ``chips``."""

    name: str
    topology: str
    chips: int
    model: ModelConfig
    rows: int
    prompt: int
    new: int
    seconds: float  # between two tokens of a row


QWEN3 = {"family": "qwen3", "vocab": 151936, "kv": 8, "positions": 40960, "head_dim": 128}
QWEN3_8B = shape(hidden=4096, layers=36, heads=32, mlp=12288, **QWEN3)
QWEN3_32B = shape(hidden=5120, layers=64, heads=64, mlp=25600, **QWEN3)
DECODES = (
    Decode("SGL-JAX, Qwen3 8B", "v6e-4", 4, QWEN3_8B, 64, 1024, 1024, 11.11e-3),
    Decode("SGL-JAX, Qwen3 8B", "v6e-4", 4, QWEN3_8B, 256, 1024, 1024, 30.0e-3),
    Decode("SGL-JAX, Qwen3 8B", "v6e-4", 4, QWEN3_8B, 64, 4096, 1024, 21.13e-3),
    Decode("SGL-JAX, Qwen3 32B", "v6e-4", 4, QWEN3_32B, 64, 1024, 1024, 29.48e-3),
)


class DecodeCompared(NamedTuple):
    """Seconds a token: as counted, at best, and as published."""

    decode: Decode
    predicted: float
    published: float

    @property
    def ratio(self) -> float:
        """Share of the predicted speed that the published one reaches."""
        return self.predicted / self.published


def compare_decode(decode: Decode) -> DecodeCompared:
    """One token of every row, by the roofline of plan/cost.py, halfway through the responses."""
    chip = CHIPS[decode.topology.split("-")[0]]
    setup = Setup({"data": 1, "fsdp": 1, "tensor": decode.chips})
    half = PlannedPass("policy", "sample", decode.rows, decode.prompt, decode.new // 2)
    work = decode_step(resolve(decode.model), half, setup)
    return DecodeCompared(decode, timed(Phase("decode", work, work.flops), chip).seconds, decode.seconds)


def calibrate_decoding() -> list[DecodeCompared]:
    return [compare_decode(decode) for decode in DECODES]


def reached() -> tuple[float, float]:
    """The least and the most of a predicted speed that published training steps reach."""
    ratios = [row.ratio for row in calibrate()]
    return min(ratios), max(ratios)
