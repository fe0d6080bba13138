"""Training a sentiment classifier, which serves as reward model and, on other data, as evaluator."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf_core.batches import batches, right_pad
from rlhf_core.config import ClassifierConfig
from rlhf_core.reward import Classifier
from rlhf_core.sft import Report, train_supervised


def train_classifier(
    lm: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    labels: Sequence[bool],
    config: ClassifierConfig,
    *,
    pad_id: int,
    seed: int,
    purpose: str,
    report: Report,
) -> Classifier:
    """Train a classifier whose trunk starts as a copy of a language model's.

    Args:
        lm: the language model; it stays as it is.
        sequences: token ids.
        labels: True for positive.
        config: steps, batch size and rate.
        pad_id: what fills short rows.
        seed: decides, with ``purpose``, the order of the data.
        purpose: ``"reward"`` or ``"evaluator"``.
        report: hears of each step's loss.
    """
    classifier = Classifier(lm)
    device = next(lm.parameters()).device
    classifier.to(device)
    targets = torch.tensor(labels, dtype=torch.float32)

    def loss_of_rows(rows: list[int]) -> torch.Tensor:
        ids_BL, mask_BL = (x.to(device) for x in right_pad([sequences[row] for row in rows], pad_id))
        return torch.nn.functional.binary_cross_entropy_with_logits(
            classifier(ids_BL, mask_BL), targets[rows].to(device)
        )

    order = batches([len(sequence) for sequence in sequences], config.batch_size, seed, purpose)
    train_supervised(
        classifier, loss_of_rows, order, steps=config.steps, learning_rate=config.learning_rate, report=report
    )
    return classifier.requires_grad_(False)


@torch.no_grad()
def accuracy(
    classifier: Classifier, sequences: Sequence[Sequence[int]], labels: Sequence[bool], *, pad_id: int
) -> float:
    """Return the share of sequences whose logit has the sign of their label."""
    right = 0
    device = next(classifier.parameters()).device
    for start in range(0, len(sequences), 64):
        ids, mask = right_pad(sequences[start : start + 64], pad_id)
        logits = classifier(ids.to(device), mask.to(device))
        right += int(((logits > 0).cpu() == torch.tensor(labels[start : start + 64])).sum())
    return right / len(sequences)
