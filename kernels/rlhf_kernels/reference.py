"""The meaning of each kernel in obvious torch code. Accepts float64; differentiable by torch's own autograd.

Shapes: B sequences, T tokens, N rows, V vocabulary. Arguments are checked in `api.py`, not here.
"""

import math

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    bootstrap_B: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the tokens of the mask; γ and λ are numbers or [B, T].

    δ_t = r_t + γ_t V_{t+1} − V_t and A_t = δ_t + γ_t λ_t A_{t+1} (Schulman et al. 2016, arXiv 1506.02438, eq. 12, 16),
    where t+1 is the next token *inside the mask*; after the last one the value is `bootstrap_B` or 0.
    """
    rewards, values = rewards_BT.double(), values_BT.double()
    next_value = torch.zeros_like(rewards[:, 0]) if bootstrap_B is None else bootstrap_B.double()
    next_advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        inside = mask_BT[:, t]
        gamma_t, lam_t = (x[:, t].double() if isinstance(x, Tensor) else x for x in (gamma, lam))
        delta = rewards[:, t] + gamma_t * next_value - values[:, t]
        advantage = delta + gamma_t * lam_t * next_advantage
        columns.append(torch.where(inside, advantage, 0.0))
        next_value = torch.where(inside, values[:, t], next_value)
        next_advantage = torch.where(inside, advantage, next_advantage)
    advantages_BT = torch.stack(columns[::-1], dim=1).to(rewards_BT.dtype)
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits [..., V] over the temperature, up to a constant a row, so that the largest never overflows.

    Where others do, the softmax is the limit of low temperatures: those with the largest logit share the probability.
    """
    if temperature < 1.0 and logits.shape[-1] > 0:
        logits = logits - logits.detach().amax(-1, keepdim=True)
    largest = torch.finfo(logits.dtype).max
    quotient = logits / min(temperature, largest)
    return quotient if temperature <= largest else quotient / min(temperature / largest, largest)


def token_logprobs(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Read log softmax(logits / temperature) at each label, and on request the entropy −Σ p log p in nats.

    Shapes: logits [..., V], labels [...]; both results have the shape of labels. Half-precision logits are widened to
    float32 first. Rows whose label is `ignore_index` give 0 and carry no gradient.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if ignore_index is not None:
        ignored = labels == ignore_index
        labels = labels.masked_fill(ignored, 0)
        wide = wide.masked_fill(ignored.unsqueeze(-1), 0.0)
    logp = torch.log_softmax(tempered(wide, temperature), dim=-1)
    # torch adds up a long row of float32 differently by processor: what its probabilities lack to 1 is taken off again.
    logp = logp - logp.exp().sum(-1, keepdim=True, dtype=torch.float64).log().to(logp.dtype)
    picked = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # A token masked with −inf has p log p → 0; the product of 0 and −inf would be NaN, in the gradient too.
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1) if with_entropy else None
    if ignore_index is not None:
        picked = picked.masked_fill(ignored, 0.0)
        entropy = None if entropy is None else entropy.masked_fill(ignored, 0.0)
    return picked, entropy


def linear_token_logprobs(
    hidden: Tensor,
    weight_VH: Tensor,
    labels: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    with_entropy: bool,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` of the logits hidden @ weight.T + bias, which are held whole. Shapes: hidden [..., H]."""
    if ignore_index is not None:  # NaN times a gradient of 0 would reach the weight's gradient
        hidden = hidden.masked_fill((labels == ignore_index).unsqueeze(-1), 0.0)
    logits = torch.nn.functional.linear(hidden, weight_VH, bias_V)
    return token_logprobs(logits, labels, temperature, with_entropy, ignore_index)


def top_k_top_p_mask(logits_NV: Tensor, logp_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """True for the tokens that top-k, then top-p of what top-k left, keep (Holtzman et al. 2020, arXiv 1904.09751).

    Tokens are ranked by logit, equal ones by id, lower first. Top-p keeps a token when the mass ranked before
    it is less than `top_p` of the mass that top-k kept, so at least one token always stays.
    """
    order = torch.sort(logits_NV, dim=-1, descending=True, stable=True).indices
    ranked_p = logp_NV.gather(-1, order).exp()
    keep = torch.ones_like(ranked_p, dtype=torch.bool)
    if top_k > 0:
        keep[:, top_k:] = False
        ranked_p = torch.where(keep, ranked_p, 0.0)
    if top_p < 1.0:
        before = ranked_p.cumsum(-1) - ranked_p
        keep &= before < top_p * ranked_p.sum(-1, keepdim=True)
        keep[:, 0] = True
    return torch.zeros_like(keep).scatter(-1, order, keep)


def sample_tokens(
    logits_NV: Tensor, uniforms_N: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The first id whose cumulative probability, in order of ids over the kept tokens, exceeds the uniform.

    Returns ids [N], their log-probability under softmax(logits / temperature), and the same after top-k and top-p.
    """
    logp_NV = torch.log_softmax(tempered(logits_NV.double(), temperature), dim=-1)
    keep_NV = top_k_top_p_mask(logits_NV, logp_NV, top_k, top_p)
    kept_p_NV = torch.where(keep_NV, logp_NV.exp(), 0.0)
    cumulative_NV = kept_p_NV.cumsum(-1)
    target_N1 = uniforms_N.double().unsqueeze(-1) * cumulative_NV[:, -1:]
    # Rounding may leave the target at the total: the last token with any mass is the answer then.
    last_possible_N = (kept_p_NV > 0).int().cumsum(-1).argmax(-1)
    ids_N = torch.minimum((cumulative_NV <= target_N1).sum(-1), last_possible_N)
    logprobs_N, _ = token_logprobs(logits_NV, ids_N, temperature, False, None)
    if top_k == 0 and top_p == 1.0:
        return ids_N, logprobs_N, logprobs_N.clone()
    filtered_N = logp_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1) - kept_p_NV.sum(-1).log()
    return ids_N, logprobs_N, filtered_N.to(logprobs_N.dtype)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """(x − mean) / √(variance + 1e-8) with the mean and population variance of the masked elements; 0 outside the mask.

    With `shift_mean=False` the mean is added back. The square root is IEEE's: torch.sqrt differs between processors.
    """
    inside = torch.where(mask, x.double(), 0.0)
    count = max(int(mask.sum()), 1)
    mean = float(inside.sum()) / count
    deviation = torch.where(mask, inside - mean, 0.0)
    scale = 1.0 / math.sqrt(float(deviation.square().sum()) / count + WHITEN_EPSILON)
    whitened = deviation * scale + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened, 0.0).to(x.dtype)
