"""The next action of a policy that is computed from observations."""

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.mlp import observed_states
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling, choose, shape_logits, uniform_noise
from jaxrlhf.sharding import whole_rows
from jaxrlhf.types import Acting, Array, Params


def choose_action(
    params: Params, cfg: ModelConfig, acting: Acting, seed: Array, step: Array, sampling: Sampling, runtime: Runtime
) -> tuple[Array, Array]:
    """(tokens i32[B], log-probs f32[B]) under the distribution that ``sampling`` shapes, as loop.sample has them: the
    noise of an action depends on (seed, step, sample id, position) only."""
    hidden = observed_states(params, cfg, acting.observations[:, None], runtime)
    logits = whole_rows(shape_logits(lm_logits(params, cfg, hidden)[:, 0], sampling, acting.position))
    uniform = uniform_noise(seed, step, acting.sample_id, acting.position[:, None])[:, 0]
    return choose(logits, uniform, greedy=sampling.temperature == 0)
