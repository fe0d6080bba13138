import math

import pytest
import torch
from tiny_models import ARCHITECTURES, PAD, PROMPTS, same_bits, snapshot, tiny_lm

from rlhf_core.config import ClassifierConfig
from rlhf_core.data.batches import right_pad
from rlhf_core.reward import Classifier
from rlhf_core.reward_model import accuracy, train_classifier

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def labelled(n, seed=0):
    """Sequences of 2 to 6 tokens whose label is whether a 7 is among them."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for row in range(n):
        length = int(torch.randint(2, 7, (1,), generator=generator))
        ids = [3 + int(x) for x in torch.randint(0, 4, (length,), generator=generator)]
        if row % 2:
            ids[int(torch.randint(0, length, (1,), generator=generator))] = 7
        sequences.append(ids)
    return sequences, [7 in ids for ids in sequences]


def trained(lm, sequences, labels, *, seed=0, purpose="reward", losses=None, **settings):
    config = ClassifierConfig(**({"steps": 60, "batch_size": 16, "learning_rate": 1e-2} | settings))
    report = (lambda loss: None) if losses is None else losses.append
    return train_classifier(lm, sequences, labels, config, pad_id=PAD, seed=seed, purpose=purpose, report=report)


@architectures
def test_a_classifier_learns_what_can_be_told_apart_and_the_language_model_stays(architecture):
    lm, losses = tiny_lm(architecture), []
    before = snapshot(lm)
    classifier = trained(lm, *labelled(256), losses=losses)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)  # a head of zero: p = ½ for every label
    assert len(losses) == 60
    assert accuracy(classifier, *labelled(150, seed=1), pad_id=PAD) > 0.95
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    assert all(same_bits(before[name], tensor) for name, tensor in lm.state_dict().items())


def test_seed_and_purpose_decide_the_training_and_a_frozen_language_model_serves_too():
    data = labelled(64)

    def weights(lm, **settings):
        return snapshot(trained(lm, *data, steps=3, **settings))

    first = weights(tiny_lm("gpt2"))
    again = weights(tiny_lm("gpt2").requires_grad_(False))
    assert all(same_bits(first[name], again[name]) for name in first)
    for other in (weights(tiny_lm("gpt2"), seed=1), weights(tiny_lm("gpt2"), purpose="evaluator")):
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_first_loss_is_the_cross_entropy_of_the_labels_by_hand():
    sequences, labels = [[3, 4], [7, 5, 6], [4, 4, 4, 4]], [False, True, True]
    losses = []
    classifier = trained(tiny_lm("llama"), sequences, labels, losses=losses, steps=2, batch_size=3, learning_rate=1e-3)
    ids, mask = right_pad(sequences, PAD)
    p = classifier(ids, mask).double().sigmoid().tolist()
    following = -(math.log(1 - p[0]) + math.log(p[1]) + math.log(p[2])) / 3
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert following < losses[1] < losses[0]


def test_accuracy_is_the_share_of_logits_with_the_sign_of_their_label():
    classifier = Classifier(tiny_lm("gpt2"))
    sequences = PROMPTS * 20  # more than one batch
    with torch.no_grad():
        classifier.head.weight.normal_(0.0, 0.01, generator=torch.Generator().manual_seed(1))  # logits close to 0
        logits = [float(classifier(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))) for ids in PROMPTS]
    signs = [logit > 0 for logit in logits] * 20
    assert len(set(signs)) == 2
    assert accuracy(classifier, sequences, signs, pad_id=PAD) == 1.0
    assert accuracy(classifier, sequences, [not sign for sign in signs], pad_id=PAD) == 0.0
    assert accuracy(classifier, sequences, [True] * 160, pad_id=PAD) == sum(signs) / 160
