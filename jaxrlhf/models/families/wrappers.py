"""Models of text and images whose text part is a plain model of a supported family: what their folders look like."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxrlhf.types import Head

# a name of the text part in the file -> the same in a plain model's; the first pattern that fits counts
TEXT_NAMES = (
    (r"language_model\.(model\.|lm_head\.)", r"\1"),
    (r"model\.language_model\.", "model."),
    (r"(lm_head|score)\.", r"\1."),
)


class Wrapper(NamedTuple):
    """A class of transformers that holds a text model, whose fields are in ``text_config``."""

    classes: dict[Head, str]  # the name in "architectures"
    text: str  # model_type of the text part where text_config does not say it
    tied: bool  # tie_word_embeddings where neither config says it


WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        {"lm": "Gemma3ForConditionalGeneration", "scalar": "Gemma3ForSequenceClassification"}, "gemma3_text", True
    ),
    "gemma4": Wrapper({"lm": "Gemma4ForConditionalGeneration"}, "gemma4_text", True),
    "qwen3_5": Wrapper(
        {"lm": "Qwen3_5ForConditionalGeneration", "scalar": "Qwen3_5ForSequenceClassification"}, "qwen3_5_text", False
    ),
    "qwen3_5_moe": Wrapper({"lm": "Qwen3_5MoeForConditionalGeneration"}, "qwen3_5_moe_text", False),
    "llava": Wrapper({"lm": "LlavaForConditionalGeneration"}, "llama", False),
    "llava_next": Wrapper({"lm": "LlavaNextForConditionalGeneration"}, "llama", False),
    "mistral3": Wrapper({"lm": "Mistral3ForConditionalGeneration"}, "mistral", True),
}

# the sizes that transformers assumes of a text_config that leaves them out, as published ones do: a model_type ->
SIZES: dict[str, Mapping[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    "gemma4_text": {
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
    },
    "qwen3_5_text": {
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    },
    "qwen3_5_moe_text": {
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "ministral3": {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
