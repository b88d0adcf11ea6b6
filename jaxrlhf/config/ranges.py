"""The range in which each number of a config lies."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxrlhf.errors import ConfigError, dotted, show

# Interval -> the fields that lie in it, wherever they stand (Class.field where a name means two things). A record may
# instead write Annotated[float, Gt(0)] beside its field.
RANGES = {
    "[0, inf)": """learning_rate warmup_steps weight_decay delay min_new_tokens halvings temperature top_k size
        samples kl_coef entropy_coef missing_eos_penalty centering reward_centering trunk_gradient normalize_samples
        router_aux_loss_coef router_z_loss_coef
        desirable_weight undesirable_weight cql_coef variance_coef multiplier multiplier_learning_rate
        EvalConfig.every BarConfig.step GenerateConfig.beta process_id
        vocab_size observation_size num_kv_heads head_dim mlp_size sliding_window query_pre_attn_scalar
        num_experts experts_per_token expert_size shared_expert_size query_beta global_head_dim global_kv_heads
        shared_kv_layers per_layer_size linear_key_heads linear_value_heads linear_key_dim linear_value_dim
        convolution_size
        positive_coef target_margin divergence_coef reward_coef
        AlarmsConfig.judge AlarmsConfig.gold AlarmsConfig.kl AlarmsConfig.mismatch
        retries poll wait longest_wait stockouts restarts failures run_as_user""",
    "(0, inf)": """timeout max_run_duration epochs clip_norm spike_sigmas eps clip_range clip_range_low clip_range_high
        value_clip_range kl_target stop_kl multiplier_max beta tie_threshold sampler_ratio_cap sampler_ratio_floor
        std_eps odds_coef gae_length_alpha score_clip norm_eps rope_theta deadline
        low_freq_factor high_freq_factor local_rope_theta attention_softcap logit_softcap beta_fast beta_slow
        DistillConfig.temperature DistillDataConfig.temperature attention_factor short_factor long_factor alpha""",
    "[0, 0]": "dropout",
    "(1, inf)": "dual_clip AlarmsConfig.length",
    "[1, inf)": """iterations max_nonfinite every samples_every keep prompts_per_step samples_per_prompt max_rollouts
        sequences_per_step preferences_per_step unpaired_per_step trajectories_per_step micro_batch_size
        patience pack_widths max_new_tokens prompt_buckets num_epochs num_minibatches kl_horizon target_period
        rank hidden_size num_layers num_heads max_positions original_max_positions factor num_processes
        init_timeout slices starts newton_schulz_steps max_turns turn_tokens context_widths""",
    "[2, inf)": "max_length",
    "[5, inf)": "heartbeat_timeout",
    "[120, inf)": "grace_seconds",
    "[259, 1048576]": "train_vocab_size",
    "[0, 1]": "final_fraction gamma gae_lambda gae_lambda_value AlarmsConfig.entropy AlarmsConfig.zero_variance",
    "(0, 1]": "top_p rotary_fraction keep_top polyak on_policy_share",
    "(0, 1)": "expectile DistillConfig.beta DistillDataConfig.beta",
    "[0, 1)": "b1 b2 momentum",
    "[0, 0.5)": "label_smoothing reward_label_smoothing",
    "(-inf, inf)": "weight cost_limit at_least at_most AlarmsConfig.explained_variance",
    "[0, 2147483647]": "seed",
}
LARGEST = 2**31 - 1  # devices count in 32 bits
RANGE_OF = {name: interval for interval, names in RANGES.items() for name in names.split()}


def interval_of(cls: type, name: str) -> str | None:
    """The interval in which the field lies; None where any number will do."""
    return RANGE_OF.get(f"{cls.__name__}.{name}") or RANGE_OF.get(name)


def outside(value: float, interval: str) -> str | None:
    """What to say of a number that isn't in ``interval`` ("[0, 1)"); None of one that is."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    below = value < low or (value == low and interval[0] == "(")
    above = value > high or (value == high and interval[-1] == ")")
    if not below and not above:
        return None
    bound, closed = (low, interval[0] == "[") if below else (high, interval[-1] == "]")
    nearest = f"; nearest: {int(bound) if bound.is_integer() else bound}" if closed else ""
    return f"{show(value)}: expected a number in {interval}{nearest}"


def check_ranges(record: Any, source: str) -> None:
    """Raises ConfigError for the numbers in ``record`` that are outside their range; ``source`` starts the lines."""
    if problems := [*range_problems(record)]:
        raise ConfigError("\n".join(f"{source}: {dotted(keys)}: {text}" for keys, text in problems))


def range_problems(record: Any, keys: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """(keys, text) of every number in ``record``, and in the records below it, that is outside its range."""
    for field in dataclasses.fields(record):
        value, here = getattr(record, field.name), (*keys, field.name)
        inside = dict(enumerate(value)) if isinstance(value, tuple) else value
        items = [((*here, key), item) for key, item in inside.items()] if isinstance(inside, dict) else [(here, value)]
        for place, item in items:
            if dataclasses.is_dataclass(item):
                yield from range_problems(item, place)
            elif isinstance(item, (int, float)) and not isinstance(item, bool):
                interval = interval_of(type(record), field.name)
                if isinstance(item, int) and abs(item) > LARGEST and interval != f"[0, {LARGEST}]":
                    yield place, f"{show(item)}: expected at most {LARGEST}, which 32 bits hold"
                    continue
                if interval and (text := outside(item, interval)):
                    yield place, text
