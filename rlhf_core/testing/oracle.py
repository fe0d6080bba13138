"""PPO once more, written as slowly and plainly as can be: a loop over rows, a loop over tokens, float64.

It shares no code with the trainer. Minibatches are taken in order; a case with several of them must be one whose result
does not depend on their order.
"""

import math

import torch
from torch import Tensor

from rlhf_core.testing.case import Case, Outcome


def oracle_trainer(case: Case) -> Outcome:
    """Take a case's steps."""
    ppo = case.ppo
    policy_SV = case.policy_SV.clone().requires_grad_()
    values_S = case.values_S.clone().requires_grad_()
    kl_coef, metrics = ppo["kl_coef"], {}
    for step in range(1, ppo["steps"] + 1):
        decay = 1.0 - (step - 1) / ppo["steps"] if ppo["schedule"] == "linear" else 1.0
        batch = _Batch(case, policy_SV.detach(), values_S.detach(), kl_coef)
        metrics = batch.metrics(kl_coef)
        norms, losses = [], []
        for _ in range(ppo["epochs"]):
            for start in range(0, ppo["batch_size"], ppo["minibatch_size"]):
                rows = range(start, start + ppo["minibatch_size"])
                policy_loss, value_loss = batch.losses(policy_SV, values_S, rows)
                loss = policy_loss + ppo["value_coef"] * value_loss
                grads = torch.autograd.grad(loss, [policy_SV, values_S])
                norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
                scale = min(1.0, ppo["max_grad_norm"] / norm) if norm else 1.0
                norms.append(norm)
                losses.append((float(policy_loss.detach()), float(value_loss.detach())))
                with torch.no_grad():
                    for parameter, grad in zip((policy_SV, values_S), grads, strict=True):
                        parameter -= ppo["learning_rate"] * decay * scale * grad
        metrics["grad_norm"] = sum(norms) / len(norms)
        metrics["policy_loss"], metrics["value_loss"] = (sum(column) / len(losses) for column in zip(*losses))
        if ppo["kl_control"] == "adaptive":
            error = max(-0.2, min(0.2, metrics["kl"] / ppo["kl_target"] - 1.0))
            kl_coef *= 1.0 + error * ppo["batch_size"] / ppo["kl_horizon"]
    return Outcome(policy_SV.detach(), values_S.detach(), case.reference_SV.clone(), kl_coef, metrics)


class _Batch:
    """What is computed once from a rollout: log-probs, rewards, advantages and returns, a list of tokens a row."""

    def __init__(self, case: Case, policy_SV: Tensor, values_S: Tensor, kl_coef: float) -> None:
        self.case, ppo = case, case.ppo
        rows = range(len(case.prompts))
        self.states = [case.states(row) for row in rows]
        self.logp = [[float(x) for x in self._logprobs(policy_SV, row)] for row in rows]
        self.ref_logp = [[float(x) for x in self._logprobs(case.reference_SV, row)] for row in rows]
        self.values = [[float(values_S[state]) for state in self.states[row]] for row in rows]
        self.entropies = [[_entropy(policy_SV[state] / case.temperature) for state in self.states[row]] for row in rows]
        self.rewards = [self._rewards(row, kl_coef) for row in rows]
        if ppo["whiten_rewards"]:
            self.rewards = _whiten(self.rewards, shift_mean=False)
        self.raw = [_gae(self.rewards[row], self.values[row], ppo["gamma"], ppo["lam"]) for row in rows]
        self.returns = [[a + v for a, v in zip(self.raw[row], self.values[row], strict=True)] for row in rows]
        self.advantages = _whiten(self.raw, shift_mean=True) if ppo["whiten_advantages"] else self.raw

    def _logprobs(self, table_SV: Tensor, row: int) -> list[Tensor]:
        tokens = self.case.responses[row]
        logits = [table_SV[state] / self.case.temperature for state in self.states[row]]
        return [x[token] - torch.logsumexp(x, dim=0) for x, token in zip(logits, tokens, strict=True)]

    def _rewards(self, row: int, kl_coef: float) -> list[float]:
        rewards = [-kl_coef * (p - q) for p, q in zip(self.logp[row], self.ref_logp[row], strict=True)]
        ended = self.case.world.ended(self.case.responses[row])
        rewards[-1] += self.case.scores[row] - (0.0 if ended else self.case.ppo["missing_eos_penalty"])
        return rewards

    def losses(self, policy_SV: Tensor, values_S: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Return policy and value loss of a minibatch: means over its tokens."""
        ppo = self.case.ppo
        policy_losses, value_losses = [], []
        for row in rows:
            for t, logp in enumerate(self._logprobs(policy_SV, row)):
                ratio, advantage = (logp - self.logp[row][t]).exp(), self.advantages[row][t]
                low, high = 1.0 - ppo["clip_range"], 1.0 + ppo["clip_range"]
                policy_losses.append(-torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage))
                value, old, target = values_S[self.states[row][t]], self.values[row][t], self.returns[row][t]
                near = old + (value - old).clamp(-ppo["value_clip_range"], ppo["value_clip_range"])
                value_losses.append(0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2))
        return torch.stack(policy_losses).mean(), torch.stack(value_losses).mean()

    def metrics(self, kl_coef: float) -> dict[str, float]:
        """Return what a log should say of this rollout."""
        log_ratios = [
            [p - q for p, q in zip(*pair, strict=True)] for pair in zip(self.logp, self.ref_logp, strict=True)
        ]
        scores, n = self.case.scores, len(self.case.scores)
        mean = sum(scores) / n
        return {
            "kl": sum(map(sum, log_ratios)) / n,
            "kl_k3": _mean([[math.exp(-x) - 1.0 + x for x in row] for row in log_ratios]),
            "kl_coef": kl_coef,
            "entropy": _mean(self.entropies),
            "reward_mean": mean,
            "reward_var": sum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else 0.0,
            "adv_var": _variance(self.raw),
            "value_mean": _mean(self.values),
            "return_mean": _mean(self.returns),
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
