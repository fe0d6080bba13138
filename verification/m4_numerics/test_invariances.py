import dataclasses

import pytest
import torch
from tiny_models import PROMPTS, draw, tiny_config, tiny_state
from trainer_cases import architectures, everything_of, gradient_of, off_policy_case, padded_more, plan_of, values

SPLITS = [(4, 4), (1,) * 8, (3, 5), (7, 1), (2, 2, 2, 2)]


@architectures
@values
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_the_gradient_of_a_minibatch_does_not_depend_on_its_split(architecture, value, double):
    case = off_policy_case(architecture, value, double)
    whole, added = gradient_of(case, plan_of(8))
    tolerance = 1e-12 if double else 2e-6
    assert 0.0 < added.sums[3] < added.tokens  # some ratios are clipped and some are not
    for split in SPLITS:
        parts, part = gradient_of(case, plan_of(*split))
        for name in whole:
            scale = max(1.0, float(whole[name].abs().max()))
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=tolerance * scale)
        torch.testing.assert_close(part.sums, added.sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.deviation, added.deviation, rtol=1e-5, atol=1e-6)
        assert (part.tokens, part.count) == (added.tokens, added.count)


@architectures
def test_more_padding_changes_metrics_and_weights_by_rounding_only(architecture):
    config = tiny_config(learning_rate=1e-3)
    state = tiny_state(architecture, "separate", config, reference_seed=1)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1e-3)
    rollout = draw(state.model.lm, PROMPTS, config)
    narrow, wide = (everything_of(state, one, config) for one in (rollout, padded_more(rollout, 3, 4)))
    assert wide[0] == pytest.approx(narrow[0], rel=1e-4, abs=1e-5)
    for name in narrow[1]:
        torch.testing.assert_close(wide[1][name], narrow[1][name], rtol=1e-4, atol=1e-5)


@architectures
def test_the_order_of_the_rows_changes_metrics_and_weights_by_rounding_only(architecture):
    config = tiny_config(minibatch_size=8, micro_batch_size=8)
    state = tiny_state(architecture, "shared", config, reference_seed=1)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1e-3)
    rollout = draw(state.model.lm, PROMPTS, config)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    shuffled = type(rollout)(*(getattr(rollout, field.name)[order] for field in dataclasses.fields(rollout)))
    first, second = (everything_of(state, one, config) for one in (rollout, shuffled))
    assert second[0] == pytest.approx(first[0], rel=1e-4, abs=1e-5)
    for name in first[1]:
        torch.testing.assert_close(second[1][name], first[1][name], rtol=1e-4, atol=1e-5)
