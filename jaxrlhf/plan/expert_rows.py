"""What the experts of one layer hold on a device besides their weights: rows of tokens, and what is computed of them.

Each device gathers the tokens of its expert group, and has a place for each of their choices, since no token is dropped
and all may choose its experts (models/experts.py). So splitting the experts makes no fewer places: a device has
``expert`` times the choices of its own tokens. Counted from the buffers that are alive at the peaks of programs of
Qwen3-30B-A3B and gpt-oss-20b (libtpu 0.0.52, v6e) and of a small mixture with each policy of remat."""

from typing import NamedTuple

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.parameters import parameter_table
from jaxrlhf.plan.calls import PlannedPass
from jaxrlhf.plan.cost import MASTER, Setup
from jaxrlhf.plan.stored import leaves, local


class ExpertRows(NamedTuple):
    """Bytes of one layer on one device, in units that terms are counted in."""

    gathered: float  # the tokens of the group, hidden_size features each, as activations
    wide: float  # all places, hidden_size features each, as activations
    inner: float  # all places, features of an expert's hidden layer, as activations
    compute: int  # bytes of an activation
    biased: bool  # whether experts have biases

    @property
    def forward(self) -> float:
        """One pass without a gradient: the tokens and the group's results, what goes to the places and comes back, and
        what gate and up make of it."""
        return 2 * self.gathered + 2 * self.wide + 2 * self.inner

    @property
    def backward(self) -> float:
        """The backward pass, with what it computes again.

        - of the group's tokens: they, and the gradient of their results in float32
        - wide: the tokens in their places; what comes out there, and is brought back, of which the router learns; the
          gradients of the latter, of the tokens by gate and by up, and the sum of these two
        - inner: the hidden layer, and the gradients of gate and up; again as the products want them that give the
          gradients of biases"""
        group = self.gathered * (1 + MASTER / self.compute)
        return group + 7 * self.wide + (5 if self.biased else 3) * self.inner

    @property
    def kept_products(self) -> float:
        """What remat ``dots`` keeps for the backward pass: the products of gate, up and down."""
        return 2 * self.inner + self.wide

    @property
    def kept_all(self) -> float:
        """What remat ``none`` keeps: the tokens in their places; gate and up, three steps of the activation, the hidden
        layer; what is brought back, in float32."""
        return self.wide + 6 * self.inner + self.wide * MASTER / self.compute


def expert_rows(one: PlannedPass, cfg: ModelConfig, setup: Setup) -> ExpertRows:
    """The rows of one layer's experts in the pass ``one``; of a model without experts: nothing."""
    if not cfg.num_experts:
        return ExpertRows(0, 0, 0, setup.compute, False)
    table = leaves(parameter_table(cfg, "lm"))
    inner = local(table["layers.mlp.experts.up.kernel"], setup.tensor)["mlp"]
    gathered = one.tokens / setup.shards * setup.expert
    places = gathered * cfg.experts_per_token * setup.compute
    biased = "layers.mlp.experts.up.bias" in table
    return ExpertRows(
        gathered * cfg.hidden_size * setup.compute, places * cfg.hidden_size, places * inner, setup.compute, biased
    )
