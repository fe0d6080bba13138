"""Direct preference optimisation: a policy from preference pairs, without a reward model and without sampling.

Rafailov et al., "Direct Preference Optimization" (2023): the policy that maximises reward less β KL has the reward
β log π/π_ref, up to a term of the prompt; so the Bradley–Terry likelihood of the pairs can be maximised by the policy
itself. Shape suffixes: B pairs, N rows, L positions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from rlhf_core.data.batches import right_pad
from rlhf_core.metrics import DPO_METRICS, rounded
from rlhf_core.policy import ForwardArguments, autocast, response_logits
from rlhf_core.scoring import response_scores
from rlhf_core.stage_config import DPOLossConfig


def dpo_loss(
    log_ratio_B: torch.Tensor, tie_B: torch.Tensor, *, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return −Σ (1 − ε) log σ(β h) + ε log σ(−β h): Rafailov et al. (2023), eq. 7, for ε = 0.

    ε > 0 is the conservative variant of Mitchell, "A note on DPO with noisy preferences" (2023): the label is wrong
    with probability ε, and the optimum lies at σ(β h) = 1 − ε and not at infinity. A tie is a label that is right half
    of the time: ε = ½.

    Args:
        log_ratio_B: [B] h = log π(y_c)/π_ref(y_c) − log π(y_r)/π_ref(y_r), of the chosen and the rejected completion.
        tie_B: [B] 1 where neither is better, else 0.
        beta: β.
        label_smoothing: ε.
    """
    wrong_B = label_smoothing + (0.5 - label_smoothing) * tie_B
    h_B = beta * log_ratio_B
    return -((1 - wrong_B) * logsigmoid(h_B) + wrong_B * logsigmoid(-h_B)).sum()


def ipo_loss(log_ratio_B: torch.Tensor, tie_B: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return Σ (h − 1/(2β))²: Azar et al., "A General Theoretical Paradigm" (2024), eq. 17; a tie aims at h = 0.

    Unlike DPO's it has a finite optimum when the preferences are certain.

    Args:
        log_ratio_B: [B] h, as for :func:`dpo_loss`.
        tie_B: [B] 1 where neither is better, else 0.
        beta: β (their τ).
    """
    return (log_ratio_B - (1 - tie_B) / (2 * beta)).square().sum()


class DPOObjective:
    """The loss of preference pairs for a policy, mean over pairs; the reference is the policy as it is given.

    The reference's log-probs are computed once, at the making, in the order of the rows: they are constants of the
    training, and no second model stays in memory.
    """

    metrics = DPO_METRICS

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        chosen: Sequence[Sequence[int]],
        rejected: Sequence[Sequence[int]],
        config: DPOLossConfig,
        *,
        pad_id: int,
        dtype: str = "float32",
        ties: Sequence[float] | None = None,
        reference: PreTrainedModel | None = None,
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Measure the pairs under the reference.

        Args:
            model: the policy; trained in place.
            prompts: [N] token ids.
            chosen: [N] token ids of the better completions, end-of-sequence token included.
            rejected: [N] of the worse ones.
            config: the loss.
            pad_id: what fills short rows.
            dtype: ``bfloat16`` runs the models under autocast.
            ties: [N] 1 where neither is better; None has no ties.
            reference: what the policy is kept near to; None takes the policy as it is now.
            batch_size: pairs a forward pass of the reference.
            advance: hears of pairs measured.

        Raises:
            ValueError: there is no pair, the columns differ in length, or a pair has nothing to compare.
        """
        if not len(prompts) or not len(prompts) == len(chosen) == len(rejected):
            raise ValueError(
                f"{len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected completions; "
                "give one of each a pair, and at least one pair"
            )
        self.model = model.requires_grad_(True)
        self._prompts, self._sides = prompts, (chosen, rejected)
        self._config, self._pad_id, self._dtype = config, pad_id, dtype
        self._arguments = ForwardArguments(model)
        self._ties_N = torch.zeros(len(prompts)) if ties is None else torch.tensor(ties, dtype=torch.float32)
        self._reference_N2 = self._measured(reference or model, batch_size, advance)

    def __len__(self) -> int:
        return len(self._prompts)

    def lengths(self) -> Sequence[int]:
        """Return the tokens of each pair, its prompt counted twice."""
        both = zip(self._prompts, *self._sides, strict=True)
        return [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in both]

    def units(self, rows: Sequence[int]) -> int:
        """Return the number of pairs."""
        return len(rows)

    def losses(self, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the summed loss, and sums of the figures of :data:`~rlhf_core.metrics.DPO_METRICS`."""
        logprobs_B2 = self._logprobs(self.model, rows)
        x_B2 = logprobs_B2 - self._reference_N2[list(rows)].to(logprobs_B2)
        log_ratio_B = x_B2[:, 0] - x_B2[:, 1]
        tie_B = self._ties_N[list(rows)].to(logprobs_B2)
        beta = self._config.beta
        if self._config.loss == "ipo":
            loss = ipo_loss(log_ratio_B, tie_B, beta=beta)
        else:
            loss = dpo_loss(log_ratio_B, tie_B, beta=beta, label_smoothing=self._config.label_smoothing)
        with torch.no_grad():
            figures = {
                "accuracy": (torch.sign(log_ratio_B) + 1) / 2,
                "reward_chosen": beta * x_B2[:, 0],
                "reward_rejected": beta * x_B2[:, 1],
                "reward_margin": beta * log_ratio_B,
                "logprob_chosen": logprobs_B2[:, 0],
                "logprob_rejected": logprobs_B2[:, 1],
            }
        return loss, {name: value_B.double().sum().item() for name, value_B in figures.items()}

    @torch.no_grad()
    def evaluate(self, batch_size: int, advance: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Return the mean loss and the means of the figures over all pairs."""
        n, sums = len(self), dict[str, float]()
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            loss, figures = self.losses(rows)
            for name, value in (figures | {"loss": loss.item()}).items():
                sums[name] = sums.get(name, 0.0) + value
            advance(len(rows))
        return {"pairs": n} | {name: rounded(value / n) for name, value in sums.items()}

    @torch.no_grad()
    def _measured(self, model: PreTrainedModel, batch_size: int, advance: Callable[[int], None]) -> torch.Tensor:
        """Return [N, 2] log-probs of the chosen and rejected completions."""
        parts = []
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            parts.append(self._logprobs(model, rows).cpu())
            advance(len(rows))
        found_N2 = torch.cat(parts)
        if not found_N2.isfinite().all():
            row = int((~found_N2.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"the reference gives pair {row} a log-prob that is not finite; look at its weights")
        return found_N2

    def _logprobs(self, model: PreTrainedModel, rows: Sequence[int]) -> torch.Tensor:
        """Return [B, 2] log π(completion | prompt), the sum over the completion's tokens: one batch of 2 B rows."""
        device = next(model.parameters()).device
        prompts = [list(self._prompts[row]) for row in rows]
        whole = [prompt + list(side[row]) for side in self._sides for row, prompt in zip(rows, prompts, strict=True)]
        ids_NL, mask_NL = (x.to(device) for x in right_pad(whole, self._pad_id))
        length = ids_NL.shape[1] - 1
        logits_of = partial(response_logits, model, self._arguments)
        with autocast(device, self._dtype):
            logprobs_NT, _ = response_scores(model, logits_of, ids_NL, mask_NL, length, temperature=1.0)
        starts_N1 = torch.tensor([[len(prompt)] for prompt in prompts * 2], device=device)
        counted_NT = mask_NL[:, 1:].bool() & (torch.arange(1, ids_NL.shape[1], device=device) >= starts_N1)
        return torch.where(counted_NT, logprobs_NT, 0.0).sum(dim=1).reshape(2, -1).T
