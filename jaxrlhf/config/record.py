"""One run as one record: the configs of its parts, composed."""

import dataclasses
from typing import Any, Literal

from jaxrlhf.config.members import grader_of, members_in
from jaxrlhf.data.sources import DataConfig, SourceConfig
from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.hosts.processes import DistributedConfig
from jaxrlhf.log.alarms import AlarmsConfig
from jaxrlhf.log.bars import BarConfig
from jaxrlhf.log.metrics import LogConfig
from jaxrlhf.models.attention.kernels import Asked
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.models.quantized import Quantization
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.rewards.environments import EnvironmentConfig
from jaxrlhf.rewards.functions import RewardsConfig
from jaxrlhf.sharding import MeshConfig
from jaxrlhf.types import Role


@dataclasses.dataclass(frozen=True)
class RoleConfig:
    """Where the weights of one role come from: init_from or architecture."""

    init_from: str | None = None  # a Hugging Face folder, gguf:FILE, a hub name, RUN, RUN@best, RUN@STEP, or a role
    architecture: ModelConfig | None = None  # random weights of this shape
    share_trunk: bool = False  # value: no model of its own but a head on the policy, whose pass serves both
    trunk_gradient: float = 0.1  # share_trunk: the policy learns from its loss + this x the value loss (vf_coef)
    adapter: LoraConfig | None = None  # LoRA: the weights are frozen and shared with roles that start from this one
    router_aux_loss_coef: float = 0.0  # of a mixture of experts that learns: weight of the load-balance loss
    router_z_loss_coef: float = 0.0  # of the squared logsumexp of its routers' logits
    replay_routing: bool = False  # policy: updates follow the experts that the sampler chose for each token
    base_quantization: Quantization | None = None  # QLoRA: the frozen weights of layers in 8 bits (int8) or 4 (nf4)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Number formats; that of the optimizer's first moment is optimizer.<role>.dtype."""

    params: Literal["float32", "bfloat16"] = "float32"  # stored weights of roles that do not learn; others: float32
    compute: Literal["float32", "bfloat16"] = "float32"  # activations and matrix products


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from."""

    init_from: str | None = None  # a Hugging Face folder, a hub name or a run; null: that of the policy or reward model
    train_vocab_size: int | None = None  # train a byte-level BPE of this size on the demonstrations instead


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Rows of one iteration, over all devices. algorithm.num_minibatches splits them."""

    prompts_per_step: int = 64  # prompts of an on-policy iteration
    samples_per_prompt: int = 1  # responses to each of them
    max_rollouts: int = 1  # of an iteration: of further prompts, until groups whose scores differ fill it; 1: off
    share_prompts: bool = True  # compute a prompt once for all of them in scoring and training, not only in sampling
    sequences_per_step: int = 64  # rows of demonstrations (sft)
    preferences_per_step: int = 32  # pairs
    unpaired_per_step: int = 32  # responses with a label
    trajectories_per_step: int = 32  # rows of trajectories
    micro_batch_size: int | None = None  # rows whose activations are held at once; null: all, fewer on CPUs
    pack_widths: int = 1  # widths, each compiled, that a micro-batch's responses may be packed into; 1: no packing


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved, and which saves stay."""

    every: int = 50  # iterations; the last one is saved too
    background: bool = True  # write while training goes on, which takes a copy of the state in host memory
    keep: int = 2  # latest checkpoints that stay
    best: str | None = None  # a metric of the evaluation ("eval/score/mean") whose best checkpoint stays too
    mode: Literal["max", "min"] = "max"  # which value of it is best


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out data."""

    every: int = 0  # iterations; 0: only at the end
    size: int = 256  # held-out examples
    samples: int = 8  # responses that go to samples.jsonl
    temperature: float | None = None  # of held-out responses; 0: greedy; null: generate.temperature
    judge: SourceConfig | None = None  # labelled texts to train an outside judge on
    gold: str | None = None  # a second reward, never trained on: as rewards.function; or a reward model: models.gold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    preset: str | None = None  # where the values of keys that are not given come from; jaxrlhf configs lists presets
    run_dir: str  # where everything that the run writes goes; may be gs://
    iterations: int | None = None  # updates of sft, rm and dpo; on policy rounds of sampling and updates; or epochs
    epochs: float | None = None  # in place of iterations: passes over the rows of the training data
    max_run_duration: float | None = None  # seconds from a command's start, before which it saves and exits with 0
    seed: int = 0  # of weights, data order and sampling
    algorithm_name: str  # algorithm.name in YAML: a name of the table, or "package.module:NAME" of an Algorithm
    algorithm: Any  # the config of that algorithm
    models: dict[Role, RoleConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    remat: Literal["none", "full", "dots"] = "none"  # what is recomputed backward: nothing, layers, all but matmuls
    scan_layers: bool | None = None  # one compiled body for all layers; null: unless they are few, on a CPU
    attention: Asked = "auto"  # the kernel: splash on TPUs and cudnn on GPUs where they can compute the model, else xla
    deterministic: bool = False  # GPUs: the same bits in every run, as TPUs and CPUs give anyway; slower
    optimizer: dict[Role, OptimizerConfig] = dataclasses.field(default_factory=dict)  # "default" serves the other roles
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    generate: GenerateConfig = GenerateConfig()
    rewards: RewardsConfig = RewardsConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    bars: dict[str, BarConfig] = dataclasses.field(default_factory=dict)  # published numbers to hold the run against
    on_nonfinite: Literal["stop", "skip"] = "stop"  # after an update left out for a NaN or infinity
    max_nonfinite: int = 3  # skip: iterations with such updates, one after the other, at which the run stops
    profile: str | None = None  # "10:13": steps 10, 11 and 12 are traced into RUN_DIR/profile, for perfetto

    @property
    def length(self) -> int:
        """The iterations of the run, where its epochs have been counted."""
        assert self.iterations is not None, "epochs have not been counted"
        return self.iterations

    @property
    def acts(self) -> bool:
        """Whether the policy acts in an environment, in place of writing."""
        return self.environment.id is not None

    @property
    def converses(self) -> bool:
        """Whether an environment of text answers the policy's responses."""
        return self.environment.function is not None

    @property
    def turn_tokens(self) -> int:
        """Tokens that the sampler may write at once: of a response, or of a turn of it."""
        room = self.generate.max_new_tokens
        return min(self.environment.turn_tokens or room, room) if self.converses else room

    @property
    def environment_scores(self) -> bool:
        """Whether the environment's own rewards count, as no reward model is given."""
        return (self.acts or self.converses) and members_in(self.models, "reward")[0] not in self.models

    def optimizer_of(self, role: Role) -> OptimizerConfig:
        """The role's own row of ``optimizer``, else that of the grader that it is a member of, else the row "default",
        else the defaults."""
        rows = self.optimizer
        return rows.get(role) or rows.get(grader_of(role)) or rows.get("default") or OptimizerConfig()
