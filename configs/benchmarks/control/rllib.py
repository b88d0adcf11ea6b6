"""The task of this benchmark by RLlib's PPO, from the true reward: for a comparison side by side.

It needs an environment of its own, beside jaxrlhf's: pip install 'ray[rllib]' torch gymnasium, and this repository on
PYTHONPATH, of which it imports the environment alone.

    PYTHONPATH=. python configs/benchmarks/control/rllib.py --seed 0

One line an iteration: steps of the environment, the mean return of an episode, seconds.
"""

import argparse
import time

import gymnasium
from ray.rllib.algorithms.ppo import PPOConfig  # pyright: ignore[reportMissingImports]
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig  # pyright: ignore[reportMissingImports]
from ray.tune.registry import register_env  # pyright: ignore[reportMissingImports]

from jaxrlhf.rewards import upright

EPISODE, EPISODES, ITERATIONS = 100, 32, 40  # as ppo.yaml: steps, of an iteration, and how many of those
MODEL = DefaultModelConfig(fcnet_hiddens=[64, 64], fcnet_activation="tanh", vf_share_layers=False)


def make(config: dict) -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(upright.make(), EPISODE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    register_env("upright", make)
    rows = EPISODE * EPISODES
    config = (
        PPOConfig()
        .environment("upright")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=EPISODES)
        .rl_module(model_config=MODEL)
        .training(
            lr=2e-3,
            gamma=0.98,
            lambda_=0.95,
            clip_param=0.2,
            vf_clip_param=1e9,
            kl_coeff=0.0,
            use_kl_loss=False,
            entropy_coeff=0.0,
            num_epochs=4,
            minibatch_size=rows // 4,
            train_batch_size_per_learner=rows,
        )
        .debugging(seed=seed)
    )
    algorithm = config.build_algo()
    started = time.perf_counter()
    for number in range(1, ITERATIONS + 1):
        found = algorithm.train()["env_runners"]
        returned, seconds = found["episode_return_mean"], time.perf_counter() - started
        print(f"iteration {number}  steps {number * rows}  return {returned:.1f}  {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
