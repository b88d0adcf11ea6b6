"""Which leaves of a parameter table are matrices, and along which axes: what Muon takes."""

import jax

from jaxrlhf.models.parameters import Leaf, inputs
from jaxrlhf.ops.newton_schulz import Matrices, MatrixAxes


def layer_matrices(table: dict) -> Matrices:
    """The leaves of ``table`` that Muon takes: kernels of the linear maps inside layers, of attention, gated delta
    nets, mlps, routers and experts; one matrix each of all heads. Not embeddings, the head, what reads observations,
    norms, biases and the taps of a convolution; nor A and B of an adapter: it is their product that moves the weights,
    and an orthogonal step of each factor is none of the product."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(table, is_leaf=lambda x: isinstance(x, Leaf)):
        names = tuple(part.key for part in path)
        if names[-1] == "kernel" and leaf.axes[0] == "layers":
            stack = 2 if leaf.axes[1] == "expert" else 1
            found[names] = MatrixAxes(stack, inputs(leaf.axes[stack:]))
    return found
