"""What an update steers to, again: rewards of tokens, advantages and returns as plain loops over float64 (pure).

Independent of :mod:`rlhf_core.advantages`, :mod:`rlhf_core.targets` and the kernels; what it shares is the choice of an
algorithm. Every list holds sequences, the completions of a prompt side by side, and each of those its response tokens.
"""

import math
from collections.abc import Sequence

from rlhf_core.algorithms import Algorithm
from rlhf_core.config import PPOConfig

Tokens = list[list[float]]


def token_rewards(scores: Sequence[float], log_ratios: Tokens, kl_coef: float, config: PPOConfig) -> Tokens:
    """Return −β k of each token, where the penalty is part of the reward, and the score on a sequence's last token.

    Args:
        scores: of each sequence.
        log_ratios: x = log π − log π_ref.
        kl_coef: β.
        config: decides k, and whether rewards are scaled to variance 1.
    """
    recipe = config.recipe
    coef = kl_coef if recipe.kl_place == "reward" else 0.0
    rewards = [[-coef * penalty(x, recipe) for x in tokens] for tokens in log_ratios]
    for tokens, score in zip(rewards, scores, strict=True):
        tokens[-1] += score
    if config.whiten_rewards:
        mean, variance = moments(flat(rewards))
        rewards = [[(r - mean) / math.sqrt(variance + 1e-8) + mean for r in tokens] for tokens in rewards]
    return rewards


def penalty(x: float, recipe: Algorithm) -> float:
    """Return the estimate of a token's KL that the reward loses: x, x²/2, or e^−x − 1 + x."""
    match recipe.kl_estimator:
        case "k1":
            return x
        case "k2":
            return x * x / 2.0
        case _:
            return math.exp(-x) - 1.0 + x


def advantages(rewards: Tokens, values: Tokens | None, config: PPOConfig) -> Tokens:
    """Return the advantages before whitening, by the configured estimator."""
    recipe = config.recipe
    if recipe.compares_groups:
        returns = [math.fsum(tokens) for tokens in rewards]
        size = recipe.group_size
        groups = [group_advantages(returns[at : at + size], recipe) for at in range(0, len(returns), size)]
        return [[a] * len(tokens) for a, tokens in zip([a for group in groups for a in group], rewards, strict=True)]
    lam = config.lam if recipe.has_value_model else 1.0
    values = values if values is not None else [[0.0] * len(tokens) for tokens in rewards]
    return [
        generalized_advantages(tokens, of_tokens, config.gamma, lam)
        for tokens, of_tokens in zip(rewards, values, strict=True)
    ]


def generalized_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Return δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}; nothing comes after the last token."""
    found, next_value, next_advantage = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        found[t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = values[t]
    return found


def group_advantages(returns: list[float], recipe: Algorithm) -> list[float]:
    """Return of a prompt's completions R less the mean: of all, of the others, or over the deviation (n − 1)."""
    n, mean = len(returns), math.fsum(returns) / len(returns)
    match recipe.advantage:
        case "leave-one-out":
            return [r - (math.fsum(returns) - r) / (n - 1) for r in returns]
        case "group-standard-score":
            deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in returns) / (n - 1))
            return [(r - mean) / (deviation + 1e-6) for r in returns]
        case _:
            return [r - mean for r in returns]


def whitened(values: Tokens) -> Tokens:
    """Return all tokens' values shifted to mean 0 and scaled to variance 1."""
    mean, variance = moments(flat(values))
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in tokens] for tokens in values]


def zero_deviation_share(rewards: Sequence[float], group_size: int) -> float:
    """Return the share of the prompts whose completions all have the same reward."""
    groups = [rewards[at : at + group_size] for at in range(0, len(rewards), group_size)]
    return sum(max(group) == min(group) for group in groups) / len(groups)


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Return mean, and variance of the population."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((x - mean) ** 2 for x in values) / len(values)


def flat(values: Tokens) -> list[float]:
    """Return the tokens of all sequences, one after the other."""
    return [x for tokens in values for x in tokens]
