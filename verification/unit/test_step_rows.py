import math

import pytest
from tiny_models import EOS, PAD, PROMPTS, VOCABULARY, share_of_sevens, tiny_config, tiny_state

from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.ppo import ppo_step
from rlhf_core.step_rows import sample_rows

SPECIALS = 3
TOKENIZER = word_tokenizer([f"word{number}" for number in range(VOCABULARY - SPECIALS)])


@pytest.fixture(scope="module")
def step():
    config = tiny_config(max_new_tokens=8)
    # A reference of another seed, so that log-ratios are not 0; responses of unequal length, so that there is padding.
    state = tiny_state("gpt2", "shared", config, reference_seed=1)
    return ppo_step(state, PROMPTS, share_of_sevens, config, eos_id=EOS, pad_id=PAD)


@pytest.fixture(scope="module")
def rows(step):
    return sample_rows(1, step, TOKENIZER, 8)


def test_the_log_ratios_of_a_sample_add_up_to_its_kl(rows):
    assert len({len(row["token_ids"]) for row in rows}) > 1, "all responses are of one length: padding is not tested"
    for row in rows:
        log_ratios = [p - q for p, q in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
        assert math.fsum(log_ratios) == pytest.approx(row["kl"], abs=1e-5)
        assert any(abs(ratio) > 1e-3 for ratio in log_ratios)


def test_each_token_has_its_text_and_two_log_probs(rows, step):
    for number, row in enumerate(rows):
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["ref_logprobs"]) == len(row["token_ids"])
        sampled = step.rollout.sampler_logprobs_BT[number][step.rollout.response_mask_BT[number]]
        assert row["logprobs"] == pytest.approx(sampled.tolist(), abs=1e-5)
        assert max(row["logprobs"] + row["ref_logprobs"]) <= 0
    texts = {token: text for row in rows for token, text in zip(row["token_ids"], row["tokens"], strict=True)}
    specials = {EOS: "<eos>", PAD: "<pad>", 2: "<unk>"}  # a policy may draw any of them
    assert texts == {token: specials.get(token, f"word{token - SPECIALS}") for token in texts}
    assert EOS in texts
    assert len(texts) > 3


def test_no_more_rows_than_asked_for_or_there_are(step):
    assert [row["sample"] for row in sample_rows(5, step, TOKENIZER, 2)] == [0, 1]
    assert len(sample_rows(5, step, TOKENIZER, 99)) == len(PROMPTS)
