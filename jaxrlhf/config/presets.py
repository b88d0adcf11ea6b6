"""Values of many keys under one name: ``preset: NAME`` stands for the defaults of another library, or for a method as
its paper has it.

Precedence: the defaults of the dataclasses < the preset < the YAML file < ``a.b.c=value`` on the command line. The
resolved config holds every value, and the preset's name. Number formats, meshes, models and data are never a preset's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxrlhf.errors import ConfigError, nearest, show


class Preset(NamedTuple):
    """Values under one name."""

    about: str  # what they are, in a line
    source: str  # where they are published
    tree: dict[str, Any]  # as YAML has it

    @property
    def algorithm(self) -> str:
        """The name of its algorithm."""
        return self.tree["algorithm"]["name"]


PEERS = {
    "trl-grpo": Preset(
        "the defaults of TRL's GRPOConfig",
        "TRL 1.9, trl/trainer/grpo_config.py and grpo_trainer.py (loss_type dapo)",
        {
            "algorithm": {
                "name": "grpo",
                "num_epochs": 1,
                "num_minibatches": 1,
                "advantages": "mean_std",
                "std_eps": 1e-4,
                "clip_range_low": 0.2,
                "clip_range_high": 0.2,
                "aggregation": "token-mean",
                "kl_coef": 0.0,
                "kl_estimator": "k3",
                "kl_in": "loss",
                "entropy_coef": 0.0,
                "old_logprobs": "recompute",
            },
            "batch": {"samples_per_prompt": 8},
            "generate": {"max_new_tokens": 512, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "optimizer": {
                "default": {
                    "learning_rate": 1e-6,
                    "schedule": "linear",
                    "final_fraction": 0.0,
                    "warmup_steps": 0,
                    "b1": 0.9,
                    "b2": 0.999,
                    "eps": 1e-8,
                    "weight_decay": 0.0,
                    "clip_norm": 1.0,
                }
            },
        },
    ),
    "openrlhf-ppo": Preset(
        "the defaults of OpenRLHF's train_ppo_ray",
        "OpenRLHF 0.11, openrlhf/cli/train_ppo_ray.py, openrlhf/models/loss.py and utils.py",
        {
            "algorithm": {
                "name": "ppo",
                "num_epochs": 1,
                "num_minibatches": 8,
                "clip_range": 0.2,
                "value_clip_range": 0.5,
                "gamma": 1.0,
                "gae_lambda": 1.0,
                "kl_coef": 0.01,
                "kl_estimator": "k1",
                "kl_controller": "fixed",
                "score_clip": 10.0,
                "whiten_advantages": "biased",
                "whiten_rewards": False,
                "entropy_coef": 0.0,
                "old_logprobs": "recompute",
            },
            "batch": {"prompts_per_step": 1024, "samples_per_prompt": 1},
            "generate": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "optimizer": {
                role: {
                    "learning_rate": rate,
                    "schedule": "cosine",
                    "final_fraction": 0.1,
                    "b1": 0.9,
                    "b2": 0.95,
                    "eps": 1e-8,
                    "weight_decay": 0.0,
                    "clip_norm": 1.0,
                }
                for role, rate in (("default", 1e-6), ("value", 9e-6))
            },
        },
    ),
    "verl-grpo": Preset(
        "the defaults of verl's trainer with adv_estimator grpo",
        "verl 0.8, verl/trainer/config/_generated_ppo_trainer.yaml and verl/trainer/ppo/core_algos.py",
        {
            "algorithm": {
                "name": "grpo",
                "num_epochs": 1,
                "num_minibatches": 4,
                "advantages": "mean_std",
                "std_eps": 1e-6,
                "clip_range_low": 0.2,
                "clip_range_high": 0.2,
                "dual_clip": 3.0,
                "aggregation": "token-mean",
                "kl_coef": 0.0,
                "kl_estimator": "k3",
                "kl_in": "loss",
                "entropy_coef": 0.0,
                "old_logprobs": "recompute",
            },
            "batch": {"prompts_per_step": 1024},
            "generate": {"max_new_tokens": 512, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "optimizer": {
                "default": {
                    "learning_rate": 1e-6,
                    "schedule": "constant",
                    "b1": 0.9,
                    "b2": 0.999,
                    "eps": 1e-8,
                    "weight_decay": 0.01,
                    "clip_norm": 1.0,
                }
            },
        },
    ),
    "tunix-grpo": Preset(
        "the defaults of Tunix's GRPOConfig and its rollout",
        "Tunix 0.1.7, tunix/rl/grpo/grpo_learner.py and tunix/rl/algo_core.py",
        {
            "algorithm": {
                "name": "grpo",
                "num_epochs": 1,
                "num_minibatches": 1,
                "advantages": "mean_std",
                "std_eps": 1e-6,
                "clip_range_low": 0.2,
                "clip_range_high": 0.2,
                "aggregation": "seq-mean-token-mean",
                "kl_coef": 0.04,
                "kl_estimator": "k1",
                "kl_in": "loss",
                "entropy_coef": 0.0,
                "old_logprobs": "recompute",
            },
            "batch": {"samples_per_prompt": 2},
            "generate": {"max_new_tokens": 64, "temperature": 0.9, "top_k": 0, "top_p": 1.0},
        },
    ),
}

METHODS = {
    "dr-grpo": Preset(
        "Dr. GRPO: neither the deviation nor the length divides",
        "arXiv:2503.20783",
        {
            "algorithm": {
                "name": "grpo",
                "advantages": "mean",
                "aggregation": "seq-mean-token-sum",
                "kl_coef": 0.0,
            }
        },
    ),
    "rloo": Preset(
        "RLOO: the mean of a response's others as baseline, the KL in the score",
        "arXiv:2402.14740; kl_coef of TRL 1.9",
        {
            "algorithm": {
                "name": "grpo",
                "advantages": "leave_one_out",
                "aggregation": "seq-mean-token-sum",
                "kl_in": "score",
                "kl_estimator": "k1",
                "kl_coef": 0.05,
            }
        },
    ),
    "reinforce++": Preset(
        "REINFORCE++: no baseline, the KL in the rewards, normalised over the iteration",
        "arXiv:2501.03262; kl_coef of OpenRLHF 0.11",
        {
            "algorithm": {
                "name": "grpo",
                "advantages": "none",
                "kl_in": "rewards",
                "kl_estimator": "k1",
                "kl_coef": 0.01,
                "whiten_advantages": "biased",
                "aggregation": "token-mean",
            }
        },
    ),
    "reinforce++-baseline": Preset(
        "REINFORCE++ with the mean of the group as baseline, the KL in the loss",
        "arXiv:2501.03262; kl_coef of OpenRLHF 0.11",
        {
            "algorithm": {
                "name": "grpo",
                "advantages": "mean",
                "kl_in": "loss",
                "kl_estimator": "k2",
                "kl_coef": 0.01,
                "whiten_advantages": "biased",
                "aggregation": "token-mean",
            }
        },
    ),
    "dapo": Preset(
        "DAPO: a higher clip above, the mean over tokens, groups that tell nothing replaced",
        "arXiv:2503.14476; at most 10 rollouts as in verl's recipe",
        {
            "algorithm": {
                "name": "grpo",
                "advantages": "mean_std",
                "clip_range_low": 0.2,
                "clip_range_high": 0.28,
                "aggregation": "token-mean",
                "kl_coef": 0.0,
            },
            "batch": {"samples_per_prompt": 16, "max_rollouts": 10},
        },
    ),
    "cispo": Preset(
        "CISPO: the log-likelihood weighted by the clipped ratio, without a lower bound",
        "arXiv:2506.13585; the upper bound of 5 of arXiv:2510.13786",
        {
            "algorithm": {
                "name": "grpo",
                "objective": "cispo",
                "clip_range_low": 1.0,
                "clip_range_high": 4.0,
                "aggregation": "token-mean",
                "kl_coef": 0.0,
            }
        },
    ),
    "gspo": Preset(
        "GSPO: the ratio of whole responses, a narrow clip",
        "arXiv:2507.18071",
        {
            "algorithm": {
                "name": "grpo",
                "ratio": "sequence",
                "clip_range_low": 3e-4,
                "clip_range_high": 4e-4,
                "aggregation": "seq-mean-token-mean",
                "kl_coef": 0.0,
            }
        },
    ),
    "vapo": Preset(
        "VAPO: PPO with two lambdas, one by length, good responses made likelier, and values that learn first",
        "arXiv:2504.05118",
        {
            "algorithm": {
                "name": "ppo",
                "num_epochs": 1,
                "clip_range": 0.2,
                "clip_range_high": 0.28,
                "gamma": 1.0,
                "gae_lambda_value": 1.0,
                "gae_length_alpha": 0.05,
                "positive_coef": 0.1,
                "kl_coef": 0.0,
            },
            "optimizer": {"policy": {"learning_rate": 1e-6, "delay": 50}, "default": {"learning_rate": 2e-6}},
        },
    ),
}

PRESETS = PEERS | METHODS


def with_preset(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``tree`` (what YAML and command line say) over the values of the preset that it names; ``tree`` where none.

    ``source`` starts the lines of errors. Raises ConfigError for a name that there is not, and where ``tree`` has
    another algorithm than the preset."""
    name = tree.get("preset")
    if name is None:
        return dict(tree)
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{source}: preset: {show(name)}: unknown preset; {nearest(name, [*PRESETS])}")
    preset, section = PRESETS[name], tree.get("algorithm")
    given = section.get("name", preset.algorithm) if isinstance(section, dict) else preset.algorithm
    if given != preset.algorithm:
        wrong = f"preset {name} is of {preset.algorithm}"
        raise ConfigError(f"{source}: algorithm.name: {show(given)}: {wrong}; expected that, or no preset")
    return over(preset.tree, tree)


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section; a section of ``above`` that says nothing (null) hides none."""
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        if isinstance(under, Mapping) and (isinstance(value, Mapping) or value is None):
            merged[key] = over(under, value or {})
        else:
            merged[key] = value
    return merged
