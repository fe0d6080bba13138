"""PPO and its relatives once more, as slow and plain as can be: a loop over rows, a loop over tokens, float64.

It shares no code with the trainer. Minibatches are taken in order; a case with several of them must be one whose result
does not depend on their order.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_core.testing.case import Case, Outcome

RECIPES: dict[str, dict[str, Any]] = {
    name: dict(
        zip(("advantage", "group_size", "whiten_advantages", "loss_mean", "kl_place", "kl_estimator"), row, strict=True)
    )
    for name, row in {
        "ppo": ("gae", 1, True, "token", "reward", "k1"),
        "grpo": ("group-standard-score", 8, False, "sequence", "loss", "k3"),
        "dr-grpo": ("group-mean", 8, False, "constant", "loss", "k3-weighted"),
        "rloo": ("leave-one-out", 4, False, "sum", "reward", "k1"),
        "reinforce++": ("reward-to-go", 1, True, "token", "reward", "k1"),
        "reinforce++-baseline": ("group-mean", 4, True, "token", "loss", "k2"),
    }.items()
}
"""What each paper says: its advantage, group, whitening, mean of the losses, place and estimator of the KL penalty."""

KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda x, _: x,
    "k2": lambda x, _: x * x / 2,
    "k3": lambda x, _: torch.exp(-x) - 1 + x,
    "k3-weighted": lambda x, log_ratio: log_ratio.exp() * (torch.exp(-x) - 1 + x),
}
"""Estimates of KL(π‖π_ref) from x = log π − log π_ref and log π − log π_old of a drawn token."""


UPDATE = ("policy_loss", "value_loss", "approx_kl", "clip_frac")
"""What is logged of the minibatches before their steps: means over tokens; of losses, over what they are means of."""


def oracle_trainer(case: Case) -> Outcome:
    """Take a case's steps."""
    ppo = case.ppo
    policy_SV = case.policy_SV.clone().requires_grad_()
    values_S = case.values_S.clone().requires_grad_()
    kl_coef, metrics = ppo["kl_coef"], {}
    for step in range(1, ppo["steps"] + 1):
        decay = 1.0 - (step - 1) / ppo["steps"] if ppo["schedule"] == "linear" else 1.0
        batch = _Batch(case, policy_SV.detach(), values_S.detach(), kl_coef)
        metrics = batch.metrics()
        norms, figures = [], []
        for _ in range(ppo["epochs"]):
            for start in range(0, ppo["batch_size"], ppo["minibatch_size"]):
                rows = range(start, start + ppo["minibatch_size"])
                policy_loss, value_loss = batch.losses(policy_SV, values_S, rows)
                loss = policy_loss + ppo["value_coef"] * value_loss
                grads = torch.autograd.grad(loss, [policy_SV, values_S])
                norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
                scale = min(1.0, ppo["max_grad_norm"] / norm) if norm else 1.0
                norms.append(norm)
                of_losses = (float(policy_loss.detach()), float(value_loss.detach()))
                figures.append((batch.weights(rows), (*of_losses, *batch.moved(policy_SV, rows))))
                with torch.no_grad():
                    for parameter, grad in zip((policy_SV, values_S), grads, strict=True):
                        parameter -= ppo["learning_rate"] * decay * scale * grad
        metrics["grad_norm"], metrics["grad_norm_max"] = sum(norms) / len(norms), max(norms)
        for at, name in enumerate(UPDATE):
            parts = [(weights[at], means[at]) for weights, means in figures]
            metrics[name] = sum(weight * mean for weight, mean in parts) / sum(weight for weight, _ in parts)
        if ppo["kl_control"] == "adaptive":
            error = max(-0.2, min(0.2, metrics["kl"] / ppo["kl_target"] - 1.0))
            kl_coef *= 1.0 + error * ppo["batch_size"] / ppo["kl_horizon"]
    return Outcome(policy_SV.detach(), values_S.detach(), case.reference_SV.clone(), kl_coef, metrics)


class _Batch:
    """What is computed once from a rollout: log-probs, rewards, advantages and returns, a list of tokens a row."""

    def __init__(self, case: Case, policy_SV: Tensor, values_S: Tensor, kl_coef: float) -> None:
        self.case, self.kl_coef, ppo = case, kl_coef, case.ppo
        self.recipe = RECIPES[ppo["algorithm"]] | {
            name: ppo[name] for name in RECIPES["ppo"] if ppo.get(name) is not None
        }
        rows = range(len(case.prompts))
        self.states = [case.states(row) for row in rows]
        self.logp = [[float(x) for x in self._logprobs(policy_SV, row)] for row in rows]
        self.ref_logp = [[float(x) for x in self._logprobs(case.reference_SV, row)] for row in rows]
        self.values = [[float(values_S[state]) for state in self.states[row]] for row in rows]
        self.entropies = [[_entropy(policy_SV[state] / case.temperature) for state in self.states[row]] for row in rows]
        self.rewards = [self._rewards(row) for row in rows]
        if ppo["whiten_rewards"]:
            self.rewards = _whiten(self.rewards, shift_mean=False)
        self.raw = self._advantages()
        self.returns = [[a + v for a, v in zip(self.raw[row], self.values[row], strict=True)] for row in rows]
        self.advantages = _whiten(self.raw, shift_mean=True) if self.recipe["whiten_advantages"] else self.raw

    def _logprobs(self, table_SV: Tensor, row: int) -> list[Tensor]:
        tokens = self.case.responses[row]
        logits = [table_SV[state] / self.case.temperature for state in self.states[row]]
        return [x[token] - torch.logsumexp(x, dim=0) for x, token in zip(logits, tokens, strict=True)]

    def _rewards(self, row: int) -> list[float]:
        beta = self.kl_coef if self.recipe["kl_place"] == "reward" else 0.0
        estimate = KL[self.recipe["kl_estimator"]]
        log_ratios = [
            torch.tensor(p - q, dtype=torch.float64) for p, q in zip(self.logp[row], self.ref_logp[row], strict=True)
        ]
        rewards = [-beta * float(estimate(x, torch.zeros_like(x))) for x in log_ratios]
        ended = self.case.world.ended(self.case.responses[row])
        rewards[-1] += self.case.scores[row] - (0.0 if ended else self.case.ppo["missing_eos_penalty"])
        return rewards

    def _advantages(self) -> list[list[float]]:
        ppo, k = self.case.ppo, self.recipe["group_size"]
        if self.recipe["advantage"] == "gae":
            pairs = zip(self.rewards, self.values, strict=True)
            return [_gae(rewards, values, ppo["gamma"], ppo["lam"]) for rewards, values in pairs]
        if self.recipe["advantage"] == "reward-to-go":
            return [_gae(rewards, [0.0] * len(rewards), ppo["gamma"], 1.0) for rewards in self.rewards]
        returns, advantages = [math.fsum(rewards) for rewards in self.rewards], []
        for row, value in enumerate(returns):
            group = returns[row - row % k : row - row % k + k]
            others = group[: row % k] + group[row % k + 1 :]
            baseline = statistics.fmean(others if self.recipe["advantage"] == "leave-one-out" else group)
            scale = statistics.stdev(group) + 1e-6 if self.recipe["advantage"] == "group-standard-score" else 1.0
            advantages.append([(value - baseline) / scale] * len(self.rewards[row]))
        return advantages

    def losses(self, policy_SV: Tensor, values_S: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Return policy loss, with the KL penalty where it is part of it, and value loss of a minibatch."""
        ppo, policy_rows, value_rows = self.case.ppo, [], []
        for row in rows:
            policy_losses, value_losses = [], []
            for t, logp in enumerate(self._logprobs(policy_SV, row)):
                ratio, advantage = (logp - self.logp[row][t]).exp(), self.advantages[row][t]
                low, high = 1.0 - ppo["clip_range"], 1.0 + ppo["clip_range"]
                penalty = torch.zeros_like(logp)
                if self.recipe["kl_place"] == "loss":
                    penalty = KL[self.recipe["kl_estimator"]](logp - self.ref_logp[row][t], logp - self.logp[row][t])
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
                policy_losses.append(self.kl_coef * penalty - surrogate)
                value, old, target = values_S[self.states[row][t]], self.values[row][t], self.returns[row][t]
                near = old + (value - old).clamp(-ppo["value_clip_range"], ppo["value_clip_range"])
                value_losses.append(0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2))
            policy_rows.append(torch.stack(policy_losses))
            value_rows.append(torch.stack(value_losses))
        value_loss = self._mean(value_rows) if self.recipe["advantage"] == "gae" else 0.0 * values_S.sum()
        return self._mean(policy_rows), value_loss

    def weights(self, rows: range) -> tuple[int, int, int, int]:
        """Return what each mean of :data:`UPDATE` of a minibatch counts for: its tokens or its sequences."""
        tokens = sum(len(self.states[row]) for row in rows)
        count = tokens if self.recipe["loss_mean"] == "token" else len(rows)
        return count, count, tokens, tokens

    def moved(self, policy_SV: Tensor, rows: range) -> tuple[float, float]:
        """Return the mean of ρ − 1 − log ρ over tokens, and the share of tokens whose ρ left its range."""
        ratios = [
            math.exp(float(new) - old)
            for row in rows
            for new, old in zip(self._logprobs(policy_SV.detach(), row), self.logp[row], strict=True)
        ]
        k3 = math.fsum(ratio - 1.0 - math.log(ratio) for ratio in ratios) / len(ratios)
        return k3, sum(abs(ratio - 1.0) > self.case.ppo["clip_range"] for ratio in ratios) / len(ratios)

    def _mean(self, rows: list[Tensor]) -> Tensor:
        match self.recipe["loss_mean"]:
            case "token":
                return torch.cat(rows).mean()
            case "sequence":
                return torch.stack([row.mean() for row in rows]).mean()
            case "sum":
                return torch.stack([row.sum() for row in rows]).mean()
            case _:
                return torch.cat(rows).sum() / (len(rows) * self.case.world.length)

    def metrics(self) -> dict[str, float]:
        """Return what a log should say of this rollout."""
        log_ratios = [
            [p - q for p, q in zip(*pair, strict=True)] for pair in zip(self.logp, self.ref_logp, strict=True)
        ]
        scores, n = self.case.scores, len(self.case.scores)
        mean, spread = sum(scores) / n, _variance(self.returns)
        return {
            "kl": sum(map(sum, log_ratios)) / n,
            "kl_k3": _mean([[math.exp(-x) - 1.0 + x for x in row] for row in log_ratios]),
            "kl_coef": self.kl_coef,
            "entropy": _mean(self.entropies),
            "reward_mean": mean,
            "reward_var": sum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else 0.0,
            "adv_var": _variance(self.raw),
            "value_mean": _mean(self.values),
            "return_mean": _mean(self.returns),
            "explained_variance": 1.0 - _variance(self.raw) / spread if spread else 0.0,
            "response_length_mean": sum(map(len, self.states)) / n,
            "eos_rate": sum(self.case.world.ended(response) for response in self.case.responses) / n,
        }


def _gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Return A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t, with no value after the last token."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def _flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


def _mean(rows: list[list[float]]) -> float:
    return math.fsum(_flat(rows)) / len(_flat(rows))


def _variance(rows: list[list[float]]) -> float:
    mean = _mean(rows)
    return math.fsum((x - mean) ** 2 for x in _flat(rows)) / len(_flat(rows))


def _whiten(rows: list[list[float]], *, shift_mean: bool) -> list[list[float]]:
    mean, deviation = _mean(rows), math.sqrt(_variance(rows) + 1e-8)
    return [[(x - mean) / deviation + (0.0 if shift_mean else mean) for x in row] for row in rows]


def _entropy(logits_V: Tensor) -> float:
    p = torch.softmax(logits_V, dim=0).tolist()
    return -math.fsum(x * math.log(x) for x in p)
