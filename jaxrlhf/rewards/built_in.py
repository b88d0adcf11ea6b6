"""The short names of the graders that come with the package: ``rewards.function: exact_match``."""

BUILT_IN = {
    "math_strict": "jaxrlhf.rewards.math_answer:strict",
    "math_lenient": "jaxrlhf.rewards.math_answer:lenient",
    "llm_pairwise": "jaxrlhf.rewards.llm_judge:Pairwise",
    "llm_pointwise": "jaxrlhf.rewards.llm_judge:Pointwise",
    "http": "jaxrlhf.rewards.http_grader:HttpGrader",
    "reward_model_server": "jaxrlhf.rewards.http_grader:RewardModelServer",
}
