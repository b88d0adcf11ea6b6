"""The short names of the graders that come with the package: ``rewards.function: exact_match``."""

BUILT_IN = {
    "math_strict": "jaxrlhf.rewards.math_answer:strict",
    "math_lenient": "jaxrlhf.rewards.math_answer:lenient",
}
