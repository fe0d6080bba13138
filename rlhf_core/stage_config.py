"""The configurations of the commands but ``rlhf train``, whose is in ``config``, and which command made a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlhf_core import run_folder, runlog
from rlhf_core.config import LARGEST_BATCH, LogConfig, ModelConfig, PPOConfig, RunConfig, SamplingConfig
from rlhf_core.config_checks import (
    require,
    require_at_most,
    require_field,
    require_finite,
    require_not_negative,
    require_positive,
)


@dataclass(frozen=True)
class TrainingConfig:
    """Supervised training: AdamW, warm-up over a twentieth of the steps, then linearly down to a tenth."""

    epochs: int = 1
    """Passes over the data; what an epoch leaves over after its last whole batch is dropped."""
    steps: int | None = None
    """Optimizer steps. None: as many as the epochs have."""
    batch_size: int = 32
    """Rows an optimizer step."""
    micro_batch_size: int = 8
    """Rows a forward pass. Changes memory, not the result but for rounding."""
    max_length: int = 1024
    """Longest row in tokens, prompt and completion together; never more than the model's context."""
    learning_rate: float | None = None
    """Peak rate. None: 3e-3 for sft, 1e-3 for reward and 3e-4 for dpo at width 96, less for wider models."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients of a longer total norm are scaled down to it."""
    save_every: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that stay."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(
            self, "epochs", "batch_size", "max_length", "micro_batch_size", "max_grad_norm", "save_every", "keep"
        )
        for name in ("steps", "learning_rate"):
            require_field(self, name, lambda value: value is None or value > 0, "be greater than 0")
        require_not_negative(self, "weight_decay")


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss of the reward model."""

    margin_scale: float = 1.0
    """Factor of the rows' margins in the loss; 0 leaves them out."""
    centering: float = 0.01
    """Weight of the mean (chosen + rejected reward)², which keeps rewards around 0; 0 leaves it out."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_not_negative(self, "margin_scale", "centering")


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning: on completions of prompts, on whole texts, or on the chosen ones of preferences."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(layers=4, hidden_size=128, heads=4, context=128))
    """The language model."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The optimizer and its steps."""


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """A reward model trained on preferences, from a language model."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(layers=4, hidden_size=128, heads=4, context=128))
    """The language model that it starts from."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The optimizer and its steps."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss."""


@dataclass(frozen=True)
class DPOLossConfig:
    """The loss of preference pairs."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: Rafailov et al. (2023). ipo: Azar et al. (2024), which does not push certain preferences for ever."""
    beta: float = 0.1
    """How strongly the policy is kept near the reference: the reward is β log π/π_ref."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (sigmoid alone); below 0.5."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.beta > 0, f"dpo.beta is {self.beta}; it must be greater than 0")
        wrong = self.label_smoothing
        require(0 <= wrong < 0.5, f"dpo.label_smoothing is {wrong}; it must lie in [0, 0.5)")
        require(self.loss == "sigmoid" or wrong == 0, "dpo.label_smoothing belongs to the loss sigmoid; leave it out")


@dataclass(frozen=True)
class DPOConfig(RunConfig):
    """A policy trained on preferences alone, from the model that it is kept near to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model that it starts from, and its reference; --model.path names it."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The optimizer and its steps."""
    dpo: DPOLossConfig = field(default_factory=DPOLossConfig)
    """The loss."""


@dataclass(frozen=True)
class JudgingConfig:
    """What a policy is judged on."""

    prompts: int = 128
    """Prompts, the held-out ones first; 0 takes all."""
    best_of: int = 1
    """Completions a prompt; with more than 1, the best of 1, 2, 4 … by the weighted reward are reported."""
    batch_size: int = 64
    """Completions at a time."""

    def __post_init__(self) -> None:
        require_positive(self, "best_of", "batch_size")
        require_at_most(self, LARGEST_BATCH, "best_of")
        require_not_negative(self, "prompts")


@dataclass(frozen=True)
class EvalConfig(RunConfig):
    """Judge a policy on prompts: rewards with intervals, KL to a reference, best-of-n."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy; --model.path names it."""
    reference: str | None = None
    """A policy that the KL is taken against. None leaves the KL out."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn."""
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    """Prompts, and completions of each."""


@dataclass(frozen=True)
class PipelineConfig(RunConfig):
    """Preferences in, a policy out: sft on the chosen ones, a reward model, PPO against it, evaluation."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(layers=4, hidden_size=128, heads=4, context=128))
    """The language model."""
    sft: TrainingConfig = field(default_factory=TrainingConfig)
    """Supervised fine-tuning."""
    reward_model: TrainingConfig = field(default_factory=TrainingConfig)
    """Training of the reward model."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Its loss."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=32))
    """How completions are drawn."""
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(steps=60, learning_rate=1e-4, kl_coef=0.05, kl_target=8.0))
    """The PPO updates."""
    log: LogConfig = field(default_factory=LogConfig)
    """Checkpoints, samples, evaluation."""
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    """The evaluation of the policy before and after PPO."""


def require_training_run(run: Path) -> None:
    """Raise ValueError if another command than ``rlhf train`` made a run.

    A configuration that cannot be read is left to what reads it.
    """
    try:
        config = runlog.parse_json((run / run_folder.CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    kind = run_folder.kind_of(config) if isinstance(config, dict) else "train"
    require(kind == "train", f"{run} is a run of rlhf {kind}; this command is for runs of rlhf train")
