import math

import pytest
import torch
from tiny_models import ARCHITECTURES, EOS, PAD, PROMPTS, draw, same_bits, snapshot, tiny_config, tiny_lm

from rlhf_core.data.batches import right_pad
from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.reward import Classifier, ClassifierReward, TextReward, decode

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
WORDS = ["film", "good", "bad", "very", "not", ".", "the", "plot"]  # ids 3 to 10, after <eos>, <pad> and <unk>


def with_random_head(lm):
    classifier = Classifier(lm)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        classifier.head.weight.normal_()
        classifier.head.bias.fill_(0.3)
    return classifier


@torch.no_grad()
def logit_alone(classifier, ids):
    """The head on the last token's hidden state, from one sequence without padding."""
    hidden = classifier.trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
    return float(hidden @ classifier.head.weight[0] + classifier.head.bias[0])


def test_decoding_leaves_out_special_tokens():
    tokenizer = word_tokenizer(WORDS)
    assert decode(tokenizer, [[9, 10, 0, 1, 1], [], [1, 4]]) == ["the plot", "", "good"]


def test_a_text_reward_scores_prompt_and_completion_without_padding():
    tokenizer, seen = word_tokenizer(WORDS), []
    rollout = draw(tiny_lm("gpt2"), PROMPTS, tiny_config())

    def count_of_good(text):
        seen.append(text)
        return text.split().count("good")  # whole numbers, as a user's function may return

    scores = TextReward(count_of_good, tokenizer)(rollout)
    names = ["<eos>", "<pad>", "<unk>", *WORDS]
    expected = [" ".join(names[token] for token in ids if token > 2) for ids in rollout.token_ids()]
    assert seen == expected
    assert scores.dtype == torch.float32
    assert scores.tolist() == [ids.count(4) for ids in rollout.token_ids()]


@architectures
def test_logits_are_those_of_each_sequence_alone(architecture):
    classifier = with_random_head(tiny_lm(architecture))
    ids, mask = right_pad(PROMPTS, PAD)
    logits = classifier(ids, mask)
    assert logits.dtype == torch.float32
    assert logits.tolist() == pytest.approx([logit_alone(classifier, prompt) for prompt in PROMPTS], abs=1e-5)
    garbage = torch.where(mask == 0, 9, ids)
    assert same_bits(classifier(garbage, mask), logits)


@architectures
def test_a_classifiers_reward_is_that_of_each_unpadded_text_between_minus_one_and_one(architecture):
    classifier = with_random_head(tiny_lm(architecture))
    rollout = draw(tiny_lm(architecture), PROMPTS, tiny_config())
    scores = ClassifierReward(classifier, PAD)(rollout)
    expected = [2 / (1 + math.exp(-logit_alone(classifier, ids))) - 1 for ids in rollout.token_ids()]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert not scores.requires_grad
    assert len({score > 0 for score in scores.tolist()}) == 2


@architectures
def test_a_classifier_starts_from_a_copy_of_the_trunk_that_can_be_trained_and_says_nothing_yet(architecture):
    lm = tiny_lm(architecture, dropout=0.5).requires_grad_(False)  # frozen, as the reference is
    before = snapshot(lm)
    classifier = Classifier(lm)
    ids, mask = right_pad(PROMPTS, EOS)
    assert not classifier(ids, mask).any()
    assert not any(module.training for module in classifier.modules())
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert all(
        same_bits(before[f"{lm.base_model_prefix}.{name}"], p) for name, p in classifier.trunk.state_dict().items()
    )
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1.0)
    assert all(same_bits(before[name], tensor) for name, tensor in lm.state_dict().items())
