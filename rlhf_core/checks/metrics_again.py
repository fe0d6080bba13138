"""A step's metrics computed again in float64, from its tokens and the weights that drew them.

Independent of the trainer: every sequence goes through transformers' models by itself and without padding, log-probs
come from ``log_softmax``, advantages and AdamW are plain loops. What it shares is the configuration, and the order in
which the minibatches take the sequences. (Llama's norms compute in float32 inside, whatever the model's type.)

Shape suffixes: T response positions of one sequence, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core import checkpoint, run_folder
from rlhf_core.checks import targets_again as again
from rlhf_core.checks.metrics_check import MetricsWrong
from rlhf_core.config import TrainConfig
from rlhf_core.config_files import read_config_file
from rlhf_core.data import reviews
from rlhf_core.rollout_file import read_rollout, rollout_path
from rlhf_core.seeding import permutation

TOLERANCE = 1e-5
"""Of float32 training, absolute and relative; what a rollout and its weights determine."""
BFLOAT16_TOLERANCE = 0.05
"""The same of training under bfloat16, whose products keep eight bits."""
REPLAY_TOLERANCE = 1e-4
"""Relative, of what the updates make: the rounding of one optimizer step goes into the next."""
REPLAYED = ("policy_loss", "value_loss", "approx_kl", "clip_frac", "grad_norm", "grad_norm_max")


@dataclass
class Row:
    """One sequence of the rollout."""

    ids: Tensor
    """Prompt and response, without padding."""
    length: int
    """Response tokens."""
    sampler_logprobs_T: Tensor
    reward: float
    ended: bool
    logprobs_T: Tensor
    entropies_T: Tensor
    ref_logprobs_T: Tensor
    values_T: Tensor | None = None
    advantages_T: Tensor | None = None
    returns_T: Tensor | None = None


class Weights:
    """A checkpoint's policy and value model, and the reference, in float64 on the CPU."""

    def __init__(self, run: Path, step: int, config: TrainConfig) -> None:
        self.folder = checkpoint.step_folder(run / "checkpoints", step)
        checkpoint.check_folder(self.folder)
        checkpoint.check_folder(run / "models" / "base")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "policy")
        self.policy = _model(self.folder / "policy")
        self.reference = _model(run / "models" / "base").requires_grad_(False)
        self.kl_coef: float = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))["kl_coef"]
        self.temperature = config.sampling.temperature
        self.trunk: Any = None
        self.head: Tensor | None = None
        self.bias: Tensor | None = None
        if config.value_model is not None:
            tensors = {name: tensor.double() for name, tensor in load_file(self.folder / "value.safetensors").items()}
            self.head = tensors["value_head.weight"].requires_grad_(True)
            self.bias = tensors["value_head.bias"].requires_grad_(True)
            if config.value_model == "separate":
                # Its token embeddings are the base model's and stay so; what else it is made of is in the checkpoint.
                self.trunk = _model(run / "models" / "base").base_model
                self.trunk.get_input_embeddings().requires_grad_(False)
                own = {name.removeprefix("value_trunk."): t for name, t in tensors.items() if "value_trunk." in name}
                trained = {name for name, parameter in self.trunk.named_parameters() if parameter.requires_grad}
                if not trained <= own.keys():
                    raise ValueError(f"{self.folder}: value.safetensors lacks {min(trained - own.keys())}")
                self.trunk.load_state_dict(own, strict=False)

    def parameters(self) -> dict[str, Tensor]:
        """Return what is trained, by the names of the checkpoint's optimizer."""
        named = {f"lm.{name}": tensor for name, tensor in self.policy.named_parameters()}
        if self.trunk is not None:
            named |= {f"value_trunk.{name}": tensor for name, tensor in self.trunk.named_parameters()}
        if self.head is not None and self.bias is not None:
            named |= {"value_head.weight": self.head, "value_head.bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def distribution(self, model: Any, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return [T, V] log-probs of the response positions, and [T, D] the policy's last hidden states there."""
        output = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        at = slice(len(ids) - length - 1, len(ids) - 1)
        return (output.logits[0, at] / self.temperature).log_softmax(-1), output.hidden_states[-1][0, at]

    def values(self, ids: Tensor, length: int, hidden_TD: Tensor) -> Tensor | None:
        """Return [T] the values, or None without a value model."""
        if self.head is None or self.bias is None:
            return None
        if self.trunk is not None:
            hidden_TD = self.trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            hidden_TD = hidden_TD[len(ids) - length - 1 : len(ids) - 1]
        return hidden_TD @ self.head[0] + self.bias


def _model(folder: Path) -> Any:
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", use_safetensors=True
    )
    return model.eval()


def metrics_again(run: Path, step: int) -> dict[str, float]:
    """Return the metrics of a step that its rollout and the checkpoint before it determine.

    Raises:
        ValueError: the rollout, the checkpoint or the base model is damaged.
    """
    config = read_config_file(run / run_folder.CONFIG_FILE, TrainConfig())
    weights = Weights(run, step - 1, config)
    rows = read_rows(rollout_path(run, step), weights)
    if config.data is None and not config.reward:
        check_rewards(rows, weights)
    ppo, recipe = config.ppo, config.ppo.recipe
    found = _of_the_rollout(rows, weights, config)
    fill_in_targets(rows, weights.kl_coef, config)
    found |= _of_the_targets(rows)
    if recipe.group_size > 1:
        found["reward_zero_std_frac"] = again.zero_deviation_share(_scores(rows, config), recipe.group_size)
    if config.dtype == "float32":
        found |= replay(rows, weights, config, step)
    found["lr"] = ppo.learning_rate * (1.0 - (step - 1) / ppo.steps if ppo.schedule == "linear" else 1.0)
    return found


@torch.no_grad()
def read_rows(path: Path, weights: Weights) -> list[Row]:
    """Return the rollout's sequences with what the models say of them."""
    tensors = read_rollout(path)
    rows = []
    for index, mask_T in enumerate(tensors["response_mask"]):
        length = int(mask_T.sum())
        ids = tensors["input_ids"][index][tensors["attention_mask"][index].bool()]
        if not 0 < length < len(ids):
            raise ValueError(f"{path}: sequence {index} has {length} response tokens of {len(ids)}")
        drawn_T1 = ids[-length:, None]
        log_pi_TV, hidden_TD = weights.distribution(weights.policy, ids, length)
        log_ref_TV, _ = weights.distribution(weights.reference, ids, length)
        rows.append(
            Row(
                ids=ids,
                length=length,
                sampler_logprobs_T=tensors["sampler_logprobs"][index][mask_T].double(),
                reward=float(tensors["rewards"][index]),
                ended=int(ids[-1]) == weights.tokenizer.eos_token_id,
                logprobs_T=log_pi_TV.gather(1, drawn_T1)[:, 0],
                entropies_T=-(log_pi_TV.exp() * log_pi_TV).sum(1),
                ref_logprobs_T=log_ref_TV.gather(1, drawn_T1)[:, 0],
                values_T=weights.values(ids, length, hidden_TD),
            )
        )
    return rows


def check_rewards(rows: list[Row], weights: Weights) -> None:
    """Score the texts of the embedded task again.

    Raises:
        ValueError: a kept reward is not its text's.
    """
    for index, row in enumerate(rows):
        score = reviews.score(str(weights.tokenizer.decode(row.ids.tolist(), skip_special_tokens=True)))
        if abs(score - row.reward) > 1e-6:
            raise ValueError(f"the rollout's sequence {index} has the reward {row.reward}; its text scores {score}")


def _of_the_rollout(rows: list[Row], weights: Weights, config: TrainConfig) -> dict[str, float]:
    n, tokens = len(rows), sum(row.length for row in rows)
    ratios = [(row.logprobs_T - row.ref_logprobs_T).tolist() for row in rows]
    flat = [x for ratio in ratios for x in ratio]
    kl = math.fsum(flat) / n
    rewards = [row.reward for row in rows]
    mean = math.fsum(rewards) / n
    scores = _scores(rows, config)
    off = sorted(abs(x) for row in rows for x in (row.sampler_logprobs_T - row.logprobs_T).tolist())
    place = 0.99 * (tokens - 1)
    low = off[math.floor(place)]
    surprises = [x for row in rows for x in (-row.logprobs_T - row.entropies_T).tolist()]
    return {
        "kl": kl,
        "kl_k3": math.fsum(math.exp(-x) - 1.0 + x for x in flat) / tokens,
        "kl_target_error": abs(kl - config.ppo.kl_target),
        "kl_coef": weights.kl_coef,
        "entropy": math.fsum(x for row in rows for x in row.entropies_T.tolist()) / tokens,
        "reward_mean": mean,
        "reward_var": math.fsum((reward - mean) ** 2 for reward in rewards) / (n - 1) if n > 1 else 0.0,
        "score_mean": math.fsum(scores) / n,
        "response_length_mean": tokens / n,
        "response_tokens": tokens,
        "eos_rate": sum(row.ended for row in rows) / n,
        "rollout_logprob_diff_max": off[-1],
        "rollout_logprob_diff_p99": low + (off[math.ceil(place)] - low) * (place - math.floor(place)),
        "reward_length_corr": _correlation(rewards, [float(row.length) for row in rows]),
        "sampling_z": math.fsum(surprises) / max(math.sqrt(math.fsum(x * x for x in surprises)), 1e-12),
    }


def _scores(rows: list[Row], config: TrainConfig) -> list[float]:
    return [row.reward - (0.0 if row.ended else config.ppo.missing_eos_penalty) for row in rows]


def fill_in_targets(rows: list[Row], kl_coef: float, config: TrainConfig) -> None:
    """Give each sequence its advantages before whitening, and with a value model its returns."""
    scores = _scores(rows, config)
    log_ratios = [(row.logprobs_T - row.ref_logprobs_T).tolist() for row in rows]
    values = [row.values_T.tolist() for row in rows if row.values_T is not None] or None
    rewards = again.token_rewards(scores, log_ratios, kl_coef, config.ppo)
    for row, advantages in zip(rows, again.advantages(rewards, values, config.ppo), strict=True):
        row.advantages_T = torch.tensor(advantages, dtype=torch.float64)
        row.returns_T = None if row.values_T is None else row.advantages_T + row.values_T


def _correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    norm = math.sqrt(again.moments(x)[1] * again.moments(y)[1]) * len(x)
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / norm if norm > 1e-12 else 0.0


def _flat(tensors: list[Tensor | None]) -> list[float]:
    return [x for tensor in tensors if tensor is not None for x in tensor.tolist()]


def _of_the_targets(rows: list[Row]) -> dict[str, float]:
    found = {"adv_var": again.moments(_flat([row.advantages_T for row in rows]))[1]}
    values = _flat([row.values_T for row in rows])
    if not values:
        return found
    returns = _flat([row.returns_T for row in rows])
    spread = again.moments(returns)[1]
    left = again.moments([a - b for a, b in zip(returns, values, strict=True)])[1]
    return found | {
        "explained_variance": 1.0 - left / spread if spread > 0 else 0.0,
        "value_mean": math.fsum(values) / len(values),
        "return_mean": math.fsum(returns) / len(returns),
    }


def replay(rows: list[Row], weights: Weights, config: TrainConfig, step: int) -> dict[str, float]:
    """Do the step's updates in float64, and return the metrics that they make."""
    ppo = config.ppo
    advantages = [row.advantages_T.tolist() for row in rows if row.advantages_T is not None]
    if ppo.recipe.whiten_advantages:
        advantages = again.whitened(advantages)
    adam = Adam(weights, config, step)
    sums, norms, tokens, counted = [0.0] * 4, [], 0, 0
    for epoch in range(ppo.epochs):
        order = permutation(config.seed, "minibatches", ppo.batch_size, step, epoch).tolist()
        for start in range(0, ppo.batch_size, ppo.minibatch_size):
            minibatch = order[start : start + ppo.minibatch_size]
            count = _count([rows[index] for index in minibatch], config)
            for index in minibatch:
                figures = _loss(rows[index], torch.tensor(advantages[index], dtype=torch.float64), weights, config)
                ((figures[0] + ppo.value_coef * figures[1]) / count).backward()
                sums = [total + float(figure.detach()) for total, figure in zip(sums, figures, strict=True)]
            tokens += sum(rows[index].length for index in minibatch)
            counted += count
            norms.append(adam.step())
    of_the_rows = {"policy_loss": sums[0] / counted, "approx_kl": sums[2] / tokens, "clip_frac": sums[3] / tokens}
    value = {"value_loss": sums[1] / counted} if ppo.recipe.has_value_model else {}
    return of_the_rows | value | {"grad_norm": math.fsum(norms) / len(norms), "grad_norm_max": max(norms)}


def _count(minibatch: list[Row], config: TrainConfig) -> int:
    """Return what the losses of a minibatch are divided by."""
    match config.ppo.recipe.loss_mean:
        case "token":
            return sum(row.length for row in minibatch)
        case "constant":
            return len(minibatch) * config.sampling.max_new_tokens
        case _:
            return len(minibatch)


def _loss(row: Row, advantages_T: Tensor, weights: Weights, config: TrainConfig) -> tuple[Tensor, ...]:
    """Return a sequence's policy loss, value loss, k3 of new against old, and number of clipped tokens.

    The losses are summed as their mean wants it.
    """
    ppo, recipe = config.ppo, config.ppo.recipe
    log_pi_TV, hidden_TD = weights.distribution(weights.policy, row.ids, row.length)
    logprobs_T = log_pi_TV.gather(1, row.ids[-row.length :, None])[:, 0]
    x_T = logprobs_T - row.logprobs_T.detach()
    ratio_T = x_T.exp()
    cut_T = ratio_T.clamp(1.0 - ppo.clip_range, 1.0 + ppo.clip_range)
    policy_T = -torch.minimum(ratio_T * advantages_T, cut_T * advantages_T)
    if recipe.kl_place == "loss":
        policy_T = policy_T + weights.kl_coef * _kl_loss(logprobs_T - row.ref_logprobs_T, ratio_T, config)
    value_T = torch.zeros_like(policy_T)
    if row.values_T is not None and row.returns_T is not None:
        values_T = weights.values(row.ids, row.length, hidden_TD)
        assert values_T is not None
        near_T = row.values_T + (values_T - row.values_T).clamp(-ppo.value_clip_range, ppo.value_clip_range)
        value_T = torch.maximum((values_T - row.returns_T) ** 2, (near_T - row.returns_T) ** 2) / 2
    share = 1.0 / row.length if recipe.loss_mean == "sequence" else 1.0
    k3 = (ratio_T - 1.0 - x_T).sum().detach()
    clipped = ((ratio_T - 1.0).abs() > ppo.clip_range).sum().detach()
    return share * policy_T.sum(), share * value_T.sum(), k3, clipped


def _kl_loss(to_ref_T: Tensor, ratio_T: Tensor, config: TrainConfig) -> Tensor:
    """Return x²/2, e^−x − 1 + x, or that times ρ, of x = log π − log π_ref."""
    estimator = config.ppo.recipe.kl_estimator
    if estimator == "k2":
        return to_ref_T**2 / 2
    k3_T = (-to_ref_T).exp() - 1.0 + to_ref_T
    return ratio_T * k3_T if estimator == "k3-weighted" else k3_T


class Adam:
    """AdamW from a checkpoint's state: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019)."""

    def __init__(self, weights: Weights, config: TrainConfig, step: int) -> None:
        ppo = config.ppo
        self._ppo = ppo
        self._rate = ppo.learning_rate * (1.0 - (step - 1) / ppo.steps if ppo.schedule == "linear" else 1.0)
        self._parameters = weights.parameters()
        kept = load_file(weights.folder / "optimizer.safetensors")
        self._state = {
            name: [kept.get(f"{key}/{name}", torch.zeros_like(tensor)).double() for key in ("exp_avg", "exp_avg_sq")]
            for name, tensor in self._parameters.items()
        }
        counts = {float(value) for key, value in kept.items() if key.startswith("step/")}
        self._count = max(counts, default=0.0)

    @torch.no_grad()
    def step(self) -> float:
        """Update the parameters, clear their gradients, and return the norm before clipping."""
        ppo = self._ppo
        self._count += 1
        grads = {name: tensor.grad for name, tensor in self._parameters.items() if tensor.grad is not None}
        norm = math.sqrt(math.fsum(float((grad * grad).sum()) for grad in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1.0, ppo.max_grad_norm / norm) if norm > 0 else grad
            parameter, (first, second) = self._parameters[name], self._state[name]
            parameter.mul_(1.0 - self._rate * ppo.weight_decay)
            first.mul_(0.9).add_(grad, alpha=0.1)
            second.mul_(ppo.adam_beta2).add_(grad * grad, alpha=1.0 - ppo.adam_beta2)
            size = (second / (1.0 - ppo.adam_beta2**self._count)).sqrt() + ppo.adam_eps
            parameter.sub_(self._rate * (first / (1.0 - 0.9**self._count)) / size)
            self._parameters[name].grad = None
        return norm


def check_again(run: Path, step: int, row: dict[str, Any]) -> str:
    """Compare a step's logged metrics with those computed again; return the figures in a line.

    Raises:
        MetricsWrong: they differ by more than rounding.
        ValueError: what they are computed from is damaged.
    """
    config = read_config_file(run / run_folder.CONFIG_FILE, TrainConfig())
    largest: dict[str, float] = {}
    found = metrics_again(run, step)
    for name, value in sorted(found.items()):
        kind = "updates" if name in REPLAYED else "rollout"
        tolerance = TOLERANCE if config.dtype == "float32" else BFLOAT16_TOLERANCE
        tolerance = REPLAY_TOLERANCE if kind == "updates" else tolerance
        off = abs(row[name] - value) / max(1.0, abs(value))
        if off > tolerance:
            raise MetricsWrong(
                f"step {step}: {name} is {row[name]}; from the tokens it comes to {value:.8f}, off by {off:.1e}"
            )
        largest[kind] = max(largest.get(kind, 0.0), off)
    figures = ", ".join(f"{kind} within {off:.1e}" for kind, off in sorted(largest.items()))
    return f"again: step {step}: {len(found)} metrics from the tokens in float64, {figures}"
