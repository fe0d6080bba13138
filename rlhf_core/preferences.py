"""Losses of a reward model on pairs of completions (pure; sums over pairs, which the caller divides).

r_c and r_r are the rewards of the chosen and the rejected completion, d = r_c − r_r − margin.
"""

import torch
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen_B: torch.Tensor, rejected_B: torch.Tensor, margin_B: torch.Tensor, tie_B: torch.Tensor
) -> torch.Tensor:
    """Return −Σ log σ(d), and −½ (log σ(d) + log σ(−d)) for ties.

    The Bradley–Terry likelihood of "chosen beats rejected" (Christiano et al., 2017, eq. 1), with the margin of
    Touvron et al., "Llama 2" (2023), eq. 2. A tie counts as half a win of each side, Christiano et al.'s label (½, ½):
    it has its optimum at d = 0, and needs no threshold beside the rewards, as Rao and Kupper's model (1967) does.

    Args:
        chosen_B: [B] rewards of the chosen completions.
        rejected_B: [B] rewards of the rejected ones.
        margin_B: [B] by how much the chosen one has to win; 0 asks for nothing more.
        tie_B: [B] 1 where neither is better, else 0.
    """
    d_B = chosen_B - rejected_B - margin_B
    half_B = tie_B / 2
    return -((1 - half_B) * logsigmoid(d_B) + half_B * logsigmoid(-d_B)).sum()


def centering_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
    """Return Σ (r_c + r_r)², which picks the rewards around 0 among those of equal likelihood.

    The likelihood depends on differences alone; Eisenstein et al., "Helping or Herding?" (2023), fix the rest so.
    """
    return (chosen_B + rejected_B).square().sum()
