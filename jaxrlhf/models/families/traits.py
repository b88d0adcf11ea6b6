"""What distinguishes the blocks of model families, and what Hugging Face calls their config fields and weights."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxrlhf.types import Head


class Module(NamedTuple):
    """Where the tensors of one module (linear map, norm, embedding) are in a safetensors file, and in which layout.

    The file has <name>.weight and <name>.bias, one pair a layer, or ends their names otherwise. ``layout`` names the
    axes of the weight:
        - A blank separates dimensions. A dot joins axes that share a dimension, the slowest first.
        - "heads.head_dim embed" is a torch Linear [H * K, D]; "embed heads.head_dim" is its transpose.
        - A bias has the dimensions that our bias has. "1" is a dimension of that size, which ours lacks.

    Several modules with one name share one fused tensor. ``part`` is the axis that counts them, in the table's order:
        - "part.heads.head_dim embed": all queries, then all keys, then all values; their sizes may differ.
        - "heads.part.head_dim embed": query, key and value of head 0, then those of head 1, and so on.
        - "expert embed_of_expert mlp.part": gate and up of feature 0, then those of feature 1; all experts in one.
    """

    name: str  # {layer} stands for the layer's number, {expert} for the expert's
    layout: str
    weight: str = ".weight"  # behind the name
    bias: str = ".bias"


class Rope(NamedTuple):
    """What config.json says of rotary positions, and under which names; (field, value where absent)."""

    kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "longrope")  # that the family's class computes
    renamed: Mapping[str, str] = {}  # kinds that old files call otherwise
    theta: tuple[str, float] = ("rope_theta", 10000.0)
    fraction: tuple[str, float] | None = None  # None: heads are rotated whole
    local_theta: tuple[str, float] | None = None  # of local layers; rope_parameters then has an object a kind of layer
    query_beta: str | None = None  # of rope_parameters, required: RopeScaling.query_beta; None: queries are not scaled
    old: bool = True  # whether config.json may have it outside rope_parameters too
    original: int | None = None  # original_max_position_embeddings where absent; None: max_positions
    absent: Mapping[str, Any] = {}  # rope_parameters where config.json has neither these nor rope_scaling


class Windows(NamedTuple):
    """How config.json says which layers see a sliding window (local ones) and which see everything (global ones)."""

    size: int | None  # sliding_window where it is absent; None: no window
    optional: bool = True  # whether sliding_window may be null
    switch: str | None = None  # the field without whose consent (by default withheld) no layer has a window
    types: bool = True  # whether layer_types says it a layer; else all are local where there is a window
    first_global: tuple[str, int] | None = None  # without layer_types: so many global ones, then local ones
    global_every: str | None = None  # without layer_types: the field that overrides Family.global_every
    last_global: bool = False  # without layer_types: the last is global, whatever its number


class Uneven(NamedTuple):
    """How config.json says which heads global layers have, where they may have their own."""

    head_dim: tuple[str, int]  # (field, value where it is absent)
    kv_heads: str  # the field; counts only where keys are values
    each: str  # the field that says it a layer instead
    vocabulary: str  # the field with the rows of the embeddings of layers, which are as many as vocab_size here
    unread: str  # regular expression of tensors that layers which read keys do not use; its group is the layer's number


class HuggingFace(NamedTuple):
    """A family in the words of Hugging Face."""

    model_type: str
    classes: dict[Head, str]  # the name in "architectures"
    # of ModelConfig -> (in config.json, value where absent; ...: required). Null is the value where absent, but for
    # fields that ModelConfig may leave open: those stay open
    fields: dict[str, tuple[str, Any]]
    fixed: dict[str, tuple]  # config.json fields that change the maths -> the values supported (the first where absent)
    modules: dict[str, Module]  # path in our parameters -> the same in the file
    prefix: str  # that base-model files leave out of the names
    split: Mapping[str, Module] = {}  # of ``modules``: as files have them whose experts have a tensor each
    ignored: str = "(?!)"  # regular expression: tensors that are no weights (buffers of old versions)
    aliases: Mapping[str, str] = {}  # fields that files may call otherwise -> the name in ``fields``
    counts: Mapping[str, tuple[str, int]] = {}  # as ``fields``, of numbers that may be 0
    rope: Rope = Rope()
    windows: Windows | None = None  # None: no layer has one
    beside: str | None = None  # where Family.experts_beside: the field without whose consent a layer has no experts
    linear_every: str | None = None  # without layer_types: the field that overrides Family.global_every
    # (a list with a 0 for each layer without positions, without that list: the field that overrides Family.nope_every)
    nope: tuple[str, str] | None = None
    uneven: Uneven | None = None  # where Family.uneven
    left: str = "(?!)"  # regular expression: tensors of other parts of the model, which are not read
    quantized: tuple[str, ...] = ()  # values of quantization_config.quant_method whose files are read


class Family(NamedTuple):
    """The traits of a family's decoder block, and its names."""

    norm: Literal["rms", "layer"]
    activation: Literal["silu", "gelu_tanh", "gelu", "clamped"]  # clamped: see feed_forward.clamped_swiglu
    gated: bool  # mlp: down(act(gate(x)) * up(x)), else down(act(up(x)))
    positions: Literal["rope", "learned"]
    hf: HuggingFace
    attention_bias: bool = False  # whether attention's linear maps have biases unless the config says
    out_bias: bool = True  # whether its map out has one where those in have
    mlp_bias: bool = False  # whether the mlp's have biases unless the config says
    norms: Literal["pre", "post", "sandwich"] = "pre"  # of each branch: its input, its output, both
    norm_offset: bool = False  # norms multiply by 1 + scale
    query_key_norm: Literal["none", "head", "all"] = "none"  # over the features of each head, or of all of them
    scaled_embeddings: bool = False  # multiplied by sqrt(hidden_size)
    parallel_residual: bool = False  # x + attention(x) + mlp(x), unless the config says
    value_norm: bool = False  # attention's values are normalised over the features of each head, without a scale
    scaled_products: bool = True  # of queries and keys are divided by the root of a head's features
    layer_scalar: bool = False  # what a layer returns is multiplied by a number that is not learned
    # global layers may have other heads than local ones, the last layers may read keys and values of earlier ones, and
    # layers may have embeddings of their own
    uneven: bool = False
    has_linear: bool = False  # layers are gated delta nets, but for the global ones
    output_gate: bool = False  # attention's queries come with a gate, whose sigmoid its output is multiplied by
    sinks: bool = False  # each head of attention has a learned logit beside its keys' that adds to the softmax's sum
    global_every: int = 0  # where there is a window or are linear layers, every n-th layer is global; 0: none
    nope_every: int = 0  # attention of every n-th layer has no positions (NoPE); 0: of none
    # each layer's mlp is experts behind a router; "normalized": the weights of a token's experts sum to 1 unless the
    # config says otherwise
    experts: Literal["plain", "normalized"] | None = None
    experts_beside: bool = False  # these stand beside the layer's mlp, where the config has any; else in its place
    shared_expert: bool = False  # and one more, which computes every token, weighed by a number of its own
