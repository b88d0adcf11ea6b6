"""The model families. To add one whose block has these traits: a row in one of the tables, and its name in ModelConfig.

models/hf*.py read and write by these tables alone."""

from jaxrlhf.models.families import gemma, gpt, llama, mixtures, qwen3_5
from jaxrlhf.models.families.traits import Family, HuggingFace, Module, Rope, Uneven, Windows

__all__ = ["FAMILIES", "Family", "HuggingFace", "Module", "Rope", "Uneven", "Windows"]

FAMILIES: dict[str, Family] = llama.FAMILIES | qwen3_5.FAMILIES | gpt.FAMILIES | gemma.FAMILIES | mixtures.FAMILIES
