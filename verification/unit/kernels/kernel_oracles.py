"""What the kernels must compute, in plain numpy and Python float64, written without looking at them."""

import math

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits: −0 differs from 0, and a NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


def gae_by_definition(rewards, values, mask, gamma, lam, bootstrap=None):
    """A_t = Σ_l (Π_{i<l} γ_{t+i} λ_{t+i}) δ_{t+l} over the compacted response tokens, summed term by term."""
    advantages = np.zeros(rewards.shape)
    gammas, lams = (torch.as_tensor(x, dtype=torch.float64).expand(rewards.shape).numpy() for x in (gamma, lam))
    for b in range(rewards.shape[0]):
        inside = np.flatnonzero(mask[b].numpy())
        r = rewards[b].double().numpy()[inside]
        v = np.append(values[b].double().numpy()[inside], 0.0 if bootstrap is None else float(bootstrap[b]))
        g, decay = gammas[b, inside], gammas[b, inside] * lams[b, inside]
        delta = [r[t] + g[t] * v[t + 1] - v[t] for t in range(len(inside))]
        for t, position in enumerate(inside):
            factors = np.concatenate([[1.0], np.cumprod(decay[t:-1])])
            advantages[b, position] = math.fsum(factors * delta[t:])
    returns = np.where(mask.numpy(), advantages + np.where(mask.numpy(), values.double().numpy(), 0.0), 0.0)
    return torch.from_numpy(advantages), torch.from_numpy(returns)


def logp_and_entropy(logits, labels, temperature=1.0):
    """Per row, in float64; p log p is 0 where p is."""
    z = logits.double().numpy().reshape(-1, logits.shape[-1]) / temperature
    logp = z - logsumexp(z, axis=-1, keepdims=True)
    p = np.exp(logp)
    entropy = -np.where(p > 0, p * np.where(p > 0, logp, 0.0), 0.0).sum(-1)
    picked = logp[np.arange(len(logp)), labels.numpy().reshape(-1)]
    return torch.from_numpy(picked).reshape(labels.shape), torch.from_numpy(entropy).reshape(labels.shape)


def kept_tokens(logits_row, temperature, top_k, top_p):
    """The ids that top-k and then top-p keep, and their probabilities renormalised, as a dictionary."""
    z = logits_row.double().numpy() / temperature
    ranked = sorted(range(len(z)), key=lambda i: (-z[i], i))
    ranked = ranked[: top_k or None]
    weight = {i: math.exp(z[i] - z.max()) for i in ranked}
    total, before, kept = math.fsum(weight.values()), 0.0, []
    for i in ranked:
        if kept and before >= top_p * total:
            break
        kept.append(i)
        before += weight[i]
    mass = math.fsum(weight[i] for i in kept)
    return {i: weight[i] / mass for i in sorted(kept)}


def whitened(x, mask, shift_mean=True):
    inside = x.double().numpy()[mask.numpy()]
    out = np.zeros(tuple(x.shape))
    if inside.size:
        mean = inside.mean()
        out[mask.numpy()] = (inside - mean) / np.sqrt(inside.var() + 1e-8) + (0.0 if shift_mean else mean)
    return torch.from_numpy(out)
