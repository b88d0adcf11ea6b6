"""Every metric that a run can write: its name, its unit, what it means. One table; a new metric is one more row.

A name with <...> stands for several: a role, a kind of data. Metrics of an evaluation have the prefix eval/.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


class MetricName(NamedTuple):
    """One row of the table."""

    name: str
    unit: str  # "-": none
    meaning: str


METRICS = [
    MetricName(*(cell.strip() for cell in row.split("|")))
    for row in """
    loss/policy | nats | loss of the policy: sft, distill a token's, dpo a pair's; ppo, grpo (clipped), kto have no unit
    loss/value | - | loss of the value model, half the squared error of a token's value
    loss/reward | nats | loss of the reward model, a pair
    loss/cost_value | - | loss of the critic of the cost, as that of the value model (ppo_lagrangian)
    loss/cost | nats | loss of the cost model, a label: safe or not (cm)
    loss/cost_pairs | nats | loss of the cost model, a pair (cm)
    loss/q | - | loss of the Q head: squared error of a token's action value, plus the CQL term (fqi, mc_returns)
    loss/q1 | - | the same of the first Q head (ilql)
    loss/q2 | - | the same of the second Q head (ilql)
    loss/kl | nats | KL term of the loss (grpo), before kl_coef
    loss/nll | nats | -log p of a token of the chosen sides (orpo)
    loss/odds_ratio | nats | odds-ratio term of a pair (orpo), before odds_coef
    loss/positive | nats | -log p of a token of the responses whose score is above 0 (ppo), before positive_coef
    <role>/grad_norm | - | norm of the role's gradient before clipping
    <role>/learning_rate | - | mean learning rate of the updates; 0 while the role is delayed, and where no row counts
    policy/entropy | nats | entropy of the policy, a response token
    policy/clip_fraction | share | response tokens (or responses) whose ratio was clipped
    policy/ratio | - | probability of a response token now over that when it was sampled
    policy/kl_old | nats | KL from the policy that sampled, a response token
    policy/sampler_ratio | - | probability by the trainer over that by the sampler, before the cap: sampler_ratio
    policy/sampler_ratio_capped | share | response tokens whose ratio is above sampler_ratio_cap
    policy/sampler_ratio_dropped | share | response tokens left out by sampler_ratio_above: drop
    <role>/load_balance | - | load-balance loss of the role's routers, before its weight; experts_per_token: all even
    <role>/router_z | - | squared logsumexp of their logits
    <role>/expert_load_max | - | tokens of the busiest expert of a layer, as a multiple of the mean
    <role>/expert_load_entropy | nats | entropy of the experts' shares of a layer's tokens
    <role>/routing_replaced | share | choices of experts that were kept from sampling and that the router would change
    <role>/quantization_error | share | RMS error of the quantised weights of its base over their RMS; at step 0
    <role>/quantization_mismatch | nats | absolute difference of a token's log-probs by them and as they were; at step 0
    <role>/spikes | share | updates of the role that were left out by spike_sigmas
    update/not_finite | share | updates that were left out: a loss, gradient or new parameter was NaN or infinite
    policy/updates_skipped | share | updates that were skipped because of stop_kl
    score/mean | score | score of a response, by the reward model or the reward functions
    score/std | score | standard deviation of the scores
    score/kept | score | score of the responses that are learned from (raft)
    score/disagreement | score | standard deviation between the scores of an ensemble's members, a response
    score/length_correlation | - | correlation of score and length of the responses (evaluation)
    score/unscorable | responses | left out, as the reward functions gave them no score (None or NaN)
    score/unscorable/<grader> | responses | to which this one of rewards.functions gave no score
    score/<grader> | score | score of a response by this one of rewards.functions, or member of an ensemble
    reward/mean | score | sum of a response's rewards: its score less the KL penalty (ppo)
    reward/accuracy | share | pairs whose chosen side has the higher score; a tie is half
    reward/accuracy/<member> | share | the same by this member of an ensemble
    reward/disagreement | score | deviation between an ensemble's members of the difference of the sides, a pair
    reward/margin | score | score of the chosen side less that of the rejected one
    reward/confidence | share | probability of the preference that the model predicts; calibrated: as the accuracy
    reward/brier | - | squared error of the predicted probability
    reward/ties | share | comparisons that are ties (rm_ties)
    reward/tie_difference | score | absolute difference of the sides of a tie
    reward/rating | score | rating of a response, or of a marked step (rm_ratings)
    reward/score | score | what the reward model gives it
    reward/error | score | absolute difference of the two
    reward/chosen | score | score of the chosen sides
    reward/rejected | score | score of the rejected sides
    cost/mean | cost | cost of a response, by the cost model or the reward function called cost
    cost/std | cost | standard deviation of the costs
    cost/violations | share | unsafe responses: their cost is above 0
    cost/multiplier | - | score lost for each unit of cost, in this iteration (ppo_lagrangian)
    cost/accuracy | share | labels that the sign of the cost is right about (cm)
    cost/pair_accuracy | share | pairs whose chosen side has the lower cost; a tie is half (cm)
    cost/safe | cost | cost of responses that are labelled safe (cm)
    cost/unsafe | cost | cost of those that are labelled unsafe (cm)
    cost_value/mean | cost | cost to come at a response token, by its critic (ppo_lagrangian)
    cost_value/explained_variance | share | variance of the cost to come that its critic explains
    cost_value/clip_fraction | share | response tokens whose cost value was clipped
    implicit_reward/chosen | - | of chosen sides: beta log(p / reference) (dpo), beta log p a token (simpo), log odds
    implicit_reward/rejected | - | the same of the rejected sides
    implicit_reward/margin | - | difference of the two
    implicit_reward/accuracy | share | pairs (dpo) or responses (kto) on the right side of each other, of kl/baseline
    implicit_reward/desirable | - | beta (log p - log reference) of the good responses (kto)
    implicit_reward/undesirable | - | the same of the bad ones
    logprobs/desirable | nats | log-probability of a good response
    logprobs/undesirable | nats | log-probability of a bad response
    kl/baseline | nats | KL from the reference that rewards are compared with, of mismatched responses (kto)
    logprobs/chosen | nats | log-probability of a chosen response
    logprobs/rejected | nats | log-probability of a rejected response
    kl/reference | nats | KL from the reference, a response (its sampled tokens)
    kl/sampler_mismatch | nats | absolute difference of a token's log-probs by the trainer and by the sampler
    kl/coef | - | weight of the KL penalty in this iteration (ppo)
    kl/teacher | nats | KL from the teacher, a response (its sampled tokens; distill)
    teacher/divergence | nats | divergence of policy and teacher, a response token (distill, distill_data)
    teacher/divergence_data | nats | the same of demonstrations beside sampled responses (on_policy_share)
    teacher/entropy | nats | entropy of the teacher, a response token
    teacher/top_k_mass | probability | that the teacher gives to the top_k tokens that are compared
    value/mean | score | value of a response token
    value/above_q | share | response tokens whose value is above the highest action value (ilql)
    q/chosen | score | action value of a response token (ilql: the lower of two)
    q/largest | score | highest action value at a response token (ilql: the lower of two)
    return/mean | score | return of a trajectory, or of an episode by its environment; not discounted
    value/explained_variance | share | variance of the returns that the values explain
    value/clip_fraction | share | response tokens whose value was clipped
    group/zero_variance | share | prompts whose responses all have the same score (grpo)
    rollout/staleness | iterations | of updates since the responses were sampled (rewards.sample_ahead)
    rollout/count | rollouts | of the iteration (batch.max_rollouts)
    rollout/equal_groups | prompts | dropped, as all responses earned the same
    rollout/surplus_groups | prompts | dropped, as enough other groups differ
    rollout/missing_groups | prompts | that the iteration learns from fewer than prompts_per_step
    rollout/score_mean | score | score of all responses sampled; score/mean is of those that are learned from
    response/length_mean | tokens | length of a response
    response/ended | share | responses that ended by themselves
    response/tokens | tokens | of all responses of the iteration
    response/count | responses | of the iteration
    turns/mean | responses | of a conversation with an environment of text
    turns/cut | share | conversations that a limit ended: of turns, of tokens
    turns/observation_tokens | tokens | of what the environment wrote into a conversation
    turns/changed_tokens | tokens | of a turn that a later one had otherwise: 0, as no turn is tokenised again
    environment/<name> | - | what the environment's own method metrics gives by this name
    judge/mean | probability | of a positive text, by the outside judge
    judge/std | probability | standard deviation of the judge's answers
    gold/mean | score | score by the second reward, which training never reads (eval.gold, models.gold)
    gold/std | score | standard deviation of it
    win_rate/gold | share | prompts whose response has a higher score by it than the reference's
    win_rate/reward | share | prompts whose response has a higher score than the reference's; a tie is half
    win_rate/judge | share | the same by the outside judge
    data/epoch | epochs | passes over the data: of prompts on policy, of pairs or demonstrations offline
    data/<kind>_dropped | rows | of the source, left out because they are too long
    data/<kind>_uncuttable | rows | of the source, left out because their response, or their system turn, does not fit
    data/<kind>_truncated | rows | of the source, cut to the limit
    data/<kind>_empty | rows | of the source, left out because no token of them is learned from
    data/<kind>_identical | rows | pairs left out because their sides are equal
    data/<kind>_skipped | rows | of the source, left out because they can't be used
    data/<kind>_outranked | rows | trajectories left out because data.keep_top keeps those with higher returns
    time/iteration | s | of the iteration
    time/rewards | s | of it, in reward functions
    time/rewards/<grader> | s | of it, in this one of rewards.functions; several can run at the same time
    time/environment | s | of it, in an environment
    time/evaluation | s | of the evaluation
    memory/host_peak | GiB | most memory that the first process has held so far
    memory/device_peak | GiB | most memory that one of its devices has held so far, where the device keeps account
    throughput/response_tokens_per_second | tokens/s | response tokens over the time of the iteration
    """.strip().splitlines()
]
HELD_OUT = "eval/"  # prefix of what an evaluation measures


def find_metric(name: str) -> MetricName | None:
    """The row of the metric ``name``, as a run writes it; None where the table has none."""
    name = name.removeprefix(HELD_OUT)
    return next((row for row in METRICS if matches(row.name, name)), None)


def matches(pattern: str, name: str) -> bool:
    """Whether ``name`` is ``pattern``, in which <...> stands for letters, digits and underscores."""
    parts = re.split("<.*?>", pattern)
    return re.fullmatch(r"\w+".join(map(re.escape, parts)), name) is not None


def metric_table(rows: Sequence[MetricName] = tuple(METRICS)) -> str:
    """The table in markdown."""
    cells = [f"| `{row.name}` | {row.unit} | {row.meaning} |" for row in rows]
    intro = (
        "**metrics.jsonl**: one row an iteration with `step`, `time` (Unix seconds) and these metrics, of the rows of "
    )
    intro += "the iteration; with the prefix `eval/` of held-out rows."
    return "\n".join([intro, "", "| metric | unit | |", "|---|---|---|", *cells, ""])
