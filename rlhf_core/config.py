"""The configuration of a training run: frozen dataclasses, from which the command line is derived.

What decides the numbers of a run stands here and nothing else: the run's name and folder do not, so two runs of one
configuration under two names have the same ``config.json`` and the same logs.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Literal

import tyro

from rlhf_core.algorithms import ALGORITHMS, Advantage, Algorithm, AlgorithmName, KLEstimator, KLPlace, LossMean
from rlhf_core.config_checks import (
    WholeConfig,
    require,
    require_at_most,
    require_divides,
    require_field,
    require_finite,
    require_not_negative,
    require_positive,
)
from rlhf_core.numerics import Numerics

LONGEST_WAIT_S = 1e9
"""Thirty years; the system's timers take little more."""
MOST_THREADS = 1024
LARGEST_BATCH = 2**20
"""Completions of a step, and of a prompt: each is held in memory with its tokens."""


def default_seed() -> int:
    """Return ``SEED`` from the environment, or 0.

    Raises:
        ValueError: ``SEED`` is not a whole number.
    """
    text = os.environ.get("SEED", "0")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"SEED in the environment is {text!r}; give a whole number, as in SEED=7") from None


@dataclass(frozen=True)
class ModelConfig:
    """Which language model is trained."""

    path: str | None = None
    """A causal language model to start from: a hub name or a folder. None builds one from the fields below."""
    architecture: Literal["llama", "gpt2"] = "llama"
    """Shape of a model that is built: Llama (RMS norm, rotary positions, gated MLP) or GPT-2."""
    layers: int = 3
    """Transformer blocks."""
    hidden_size: int = 96
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads; they divide hidden_size."""
    context: int = 64
    """Longest sequence, prompt and response together, in tokens."""
    vocabulary: int = 2048
    """Size of the byte-pair vocabulary trained on --data; the embedded task has its own words."""
    value: Literal["shared", "separate"] = "separate"
    """Value model, where there is one: a head on the policy's trunk, or a network that starts from the same weights."""
    attention: Literal["eager", "sdpa"] = "eager"
    """Attention code of transformers; eager is the one whose bits are the same on every processor."""

    def __post_init__(self) -> None:
        require_positive(self, "layers", "hidden_size", "heads", "context", "vocabulary")
        require(
            self.hidden_size % (2 * self.heads) == 0,
            f"model.hidden_size {self.hidden_size} does not divide into {self.heads} heads of an even width; "
            f"take a multiple of {2 * self.heads}",
        )


@dataclass(frozen=True)
class PretrainConfig:
    """Supervised language modelling before PPO; skipped for a model that was loaded, unless steps are asked for."""

    steps: int | None = None
    """Optimizer steps. None takes the task's own number, and 0 for a model that was loaded."""
    batch_size: int = 32
    """Sentences a step."""
    learning_rate: float = 3e-3
    """Peak of AdamW's rate: linear warm-up over a twentieth of the steps, then linearly down to a tenth."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_field(self, "steps", lambda steps: steps is None or steps >= 0, "be 0 or more")
        require_positive(self, "batch_size", "learning_rate")


@dataclass(frozen=True)
class ClassifierConfig:
    """The reward model and the evaluator trained on labelled sentences (only with --data)."""

    steps: int = 300
    """Optimizer steps of each."""
    batch_size: int = 32
    """Sentences a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate, with the schedule of pre-training."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(self, "steps", "batch_size", "learning_rate")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn."""

    max_new_tokens: int = 20
    """Longest response in tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """The policy is softmax(logits / temperature), in the sampler and in the loss alike."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that holds this probability; 1 draws from all."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(self, "max_new_tokens", "temperature")
        require_field(self, "top_k", lambda value: value >= 0, "be 0 (off) or more")
        require_field(self, "top_p", lambda value: 0 < value <= 1, "lie in (0, 1]")


@dataclass(frozen=True)
class PPOConfig:
    """Policy-gradient updates: PPO, and the algorithms that differ from it in advantage and loss."""

    algorithm: AlgorithmName = "ppo"
    """Decides the advantage estimator, and every option below that is None: see rlhf_core/algorithms.py."""
    steps: int = 80
    """Steps: one rollout and its updates each."""
    batch_size: int = 64
    """Completions a step."""
    group_size: int | None = None
    """Completions a prompt; divides batch_size. None: the algorithm's own (1, or 4 or 8 where it compares them)."""
    minibatch_size: int = 16
    """Completions an optimizer step; divides batch_size."""
    micro_batch_size: int = 16
    """Completions a forward pass; divides minibatch_size. Changes memory, not the result."""
    epochs: int = 4
    """Passes over each rollout."""
    learning_rate: float = 3e-4
    """AdamW's rate at the first step."""
    schedule: Literal["linear", "constant"] = "linear"
    """The rate falls linearly to zero over the run, or stays."""
    adam_beta2: float = 0.99
    """AdamW's second decay; the first is 0.9."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients of a longer total norm are scaled down to it."""
    advantage: Advantage | None = None
    """Advantage estimator; gae alone trains a value model. None: the algorithm's own."""
    gamma: float = 1.0
    """Discount of gae and reward-to-go."""
    lam: float = 0.95
    """λ of gae."""
    clip_range: float = 0.2
    """ε of the clipped ratio."""
    value_clip_range: float = 0.2
    """How far a value may move from the rollout's before its loss is clipped."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    loss_mean: LossMean | None = None
    """What a minibatch's loss is a mean of: see losses.loss_count. None: the algorithm's own."""
    whiten_advantages: bool | None = None
    """Advantages of a step are scaled to mean 0 and variance 1 over the mask. None: the algorithm's own."""
    whiten_rewards: bool = False
    """Rewards of a step are scaled to variance 1 over the mask; their mean stays (gae and reward-to-go)."""
    kl_place: KLPlace | None = None
    """Where the KL penalty enters. None: the algorithm's own."""
    kl_estimator: KLEstimator | None = None
    """What estimates a token's KL: in the reward take k1, in the loss k3-weighted or k2. None: the algorithm's own."""
    kl_coef: float = 0.1
    """Weight of the KL penalty (its start, when kl_control is adaptive)."""
    kl_control: Literal["adaptive", "fixed"] = "adaptive"
    """Whether the coefficient follows kl_target."""
    kl_target: float = 4.0
    """KL per sequence, in nats, that the adaptive coefficient steers to."""
    kl_horizon: int = 2000
    """Completions over which the adaptive coefficient reacts."""
    missing_eos_penalty: float = 0.5
    """Taken from the score of a response that did not end within max_new_tokens."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(
            self, "steps", "batch_size", "minibatch_size", "micro_batch_size", "epochs", "learning_rate",
            "adam_eps", "max_grad_norm", "clip_range", "value_clip_range", "kl_target", "kl_horizon",
        )  # fmt: skip
        require_not_negative(self, "weight_decay", "value_coef", "kl_coef", "missing_eos_penalty")
        for name in ("gamma", "lam"):
            require_field(self, name, lambda value: 0 <= value <= 1, "lie in [0, 1]")
        require_field(self, "adam_beta2", lambda value: 0 <= value < 1, "lie in [0, 1)")
        require_divides(self, "minibatch_size", "batch_size")
        require_divides(self, "micro_batch_size", "minibatch_size")
        require_at_most(self, LARGEST_BATCH, "batch_size")
        self._check_recipe()
        require(
            self.kl_control != "adaptive" or self.batch_size < 5 * self.kl_horizon,
            f"ppo.kl_horizon is {self.kl_horizon}: the adaptive KL coefficient could become 0 or less in a step of "
            f"{self.batch_size} completions; take more than a fifth of ppo.batch_size",
        )

    def _check_recipe(self) -> None:
        recipe = self.recipe
        n, whole = recipe.group_size, self.batch_size
        require(n > 0, f"ppo.group_size is {n}; it must be greater than 0")
        require(
            n > 1 or not recipe.compares_groups,
            f"ppo.group_size is {n}; it must be 2 or more, as {recipe.advantage!r} compares a prompt's completions",
        )
        require(whole % n == 0, f"ppo.batch_size {whole} is not divisible by group_size {n}; take a multiple of {n}")
        require(
            not self.whiten_rewards or not recipe.compares_groups,
            f"ppo.whiten_rewards scales rewards of tokens, which advantage {recipe.advantage!r} adds up; leave it out",
        )
        require(
            (recipe.kl_place, recipe.kl_estimator) != ("loss", "k1"),
            "ppo.kl_estimator is k1 and kl_place loss: the gradient of k1 is the score function, whose expectation is "
            "zero, so nothing pulls towards the reference; take k3-weighted or k2, or kl_place reward",
        )
        require(
            (recipe.kl_place, recipe.kl_estimator) != ("reward", "k3-weighted"),
            "ppo.kl_estimator is k3-weighted and kl_place reward: a reward has no importance weight; take k1",
        )

    @property
    def recipe(self) -> Algorithm:
        """The algorithm, with what the options change of it."""
        options = {item.name: getattr(self, item.name) for item in dataclasses.fields(Algorithm)}
        changes = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(ALGORITHMS[self.algorithm], **changes)

    @property
    def prompts_per_step(self) -> int:
        """Prompts a step, each with ``group_size`` completions."""
        return self.batch_size // self.recipe.group_size


@dataclass(frozen=True)
class LogConfig:
    """What a run keeps."""

    save_every: int = 10
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints that stay."""
    samples_per_step: int = 4
    """Rollouts a step that samples.jsonl shows."""
    evaluation_prompts: int = 128
    """Held-out prompts on which the policy is judged before and after; 0 leaves that out."""

    def __post_init__(self) -> None:
        require_positive(self, "save_every", "keep")
        require_not_negative(self, "samples_per_step", "evaluation_prompts")


@dataclass(frozen=True)
class RunConfig(WholeConfig):
    """What every run has."""

    seed: int = field(default_factory=default_seed)
    """Seed of everything; SEED in the environment sets the default."""
    data: str | None = None
    """A data file or a folder of them, or hub:NAME; for train also a folder of *.pos and *.neg. None: embedded task."""
    data_errors: Literal["stop", "skip"] = "stop"
    """A row that cannot be used ends the run with its place, or is left out and counted."""
    held_out: float = 0.1
    """Share of the prompts, by a stable hash of each, whose rows are kept for evaluation."""
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A reward model's folder or module:function, with =WEIGHT behind it or not; several are summed."""
    reward_timeout_s: float = 60.0
    """Seconds that a reward function may take for a batch."""
    numerics: Numerics = "native"
    """portable: the same bits on every x86-64 processor, one thread, slower. native: this processor's fastest."""
    threads: int | None = None
    """Threads of one operation, whatever OMP_NUM_THREADS says. None: 2, and 1 with portable numerics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU when there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: models under autocast, all else float32; slower on processors that have no bfloat16 products."""

    def __post_init__(self) -> None:
        require_field(self, "seed", lambda seed: 0 <= seed < 2**63, "lie in [0, 2**63)")
        require_field(self, "held_out", lambda share: 0 <= share < 1, "lie in [0, 1)")
        require_field(
            self,
            "reward_timeout_s",
            lambda seconds: 0 < seconds <= LONGEST_WAIT_S,
            f"be greater than 0 and at most {LONGEST_WAIT_S:g}",
        )
        require_field(
            self,
            "threads",
            lambda threads: threads is None or 0 < threads <= MOST_THREADS,
            f"be greater than 0 and at most {MOST_THREADS}",
        )
        require_finite(self)  # last, as a field's own limits say more
        if self.numerics == "portable":
            attention = getattr(getattr(self, "model", None), "attention", "eager")
            require(self.threads in (None, 1), f"threads is {self.threads}; numerics 'portable' runs on 1")
            require(self.device != "cuda", "numerics 'portable' runs on the CPU; take --device cpu")
            require(self.dtype == "float32", "numerics 'portable' needs --dtype float32")
            require(attention == "eager", "numerics 'portable' needs --model.attention eager")

    @property
    def resolved_threads(self) -> int:
        """Threads of one operation."""
        return self.threads or (1 if self.numerics == "portable" else 2)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train a language model with PPO: on the embedded film reviews, your own sentences, or prompts and a reward."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Supervised language modelling before PPO."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Reward model and evaluator."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """The updates of the policy."""
    log: LogConfig = field(default_factory=LogConfig)
    """Checkpoints, samples, evaluation."""

    @property
    def value_model(self) -> Literal["shared", "separate"] | None:
        """The value model that is trained, or None where the advantage needs none."""
        return self.model.value if self.ppo.recipe.has_value_model else None


def for_data(data: str) -> TrainConfig:
    """Return the defaults of ``rlhf train --data``: a larger model and vocabulary, a gentler rate."""
    return TrainConfig(
        data=data,
        model=ModelConfig(layers=4, hidden_size=128, heads=4, context=96),
        sampling=SamplingConfig(max_new_tokens=32),
        ppo=PPOConfig(steps=60, learning_rate=1e-4, kl_coef=0.05, kl_target=8.0),
    )
