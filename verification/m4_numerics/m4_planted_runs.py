"""Mistakes in the batch, its updates and the course of a run, to plant into the real trainer."""

import dataclasses

import torch
from m4_planting import plants, replace

from rlhf_core import policy, ppo, rollout, scoring, updates
from rlhf_core.losses import loss_count

PLANTED, plant = plants()


@plant
def mask_without_the_end_of_sequence_token(monkeypatch):
    def make(right):
        def wrong(*args, eos_id, **kwargs):
            drawn = right(*args, eos_id=eos_id, **kwargs)
            mask_BT = drawn.response_mask_BT & (
                (drawn.response_ids_BT != eos_id) | (drawn.response_mask_BT.sum(1) == 1)[:, None]
            )
            return dataclasses.replace(drawn, response_mask_BT=mask_BT)

        return wrong

    replace(monkeypatch, "sample", make)


@plant
def padding_read_as_prompt(monkeypatch):
    def make(right):
        def wrong(prompts, pad_id):
            ids, mask = right(prompts, pad_id)
            return ids, torch.ones_like(mask)

        return wrong

    replace(monkeypatch, "left_pad", make, rollout)


@plant
def positions_that_count_the_padding(monkeypatch):
    """The first column is position 0, whether it is padding or not."""

    def count_columns(attention_mask_BL):
        return torch.arange(attention_mask_BL.shape[1]).expand_as(attention_mask_BL)

    def make(right):
        def wrong(*args):
            with monkeypatch.context() as patch:
                patch.setattr(policy, "position_ids", count_columns)
                return right(*args)

        return wrong

    replace(monkeypatch, "evaluate_rows", make, updates, scoring)


@plant
def gradient_not_zeroed(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self, set_to_none=True: None)


@plant
def gradient_clipped_tensor_by_tensor(monkeypatch):
    def make(right):
        def wrong(grads, norm, max_norm):
            for grad in grads:
                right([grad], updates.total_norm([grad]), max_norm)

        return wrong

    replace(monkeypatch, "clip_gradients", make)


@plant
def gradient_not_clipped(monkeypatch):
    replace(monkeypatch, "clip_gradients", lambda right: lambda grads, norm, max_norm: None)


@plant
def each_micro_batch_divides_by_its_own_tokens(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config, *rest):
            parts = [right(state, rollout, scores, targets, [rows], config, *rest) for rows in minibatch]
            tokens = sum(part.tokens for part in parts)
            sums = torch.stack([part.sums for part in parts]).sum(0)
            return updates.MinibatchSums(sums, torch.stack([part.deviation for part in parts]).max(), tokens, tokens)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def loss_divided_by_the_number_of_micro_batches_too(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, found, minibatch, *rest):
            sums = right(state, rollout, scores, found, minibatch, *rest)
            for parameter in state.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= len(minibatch)
            return sums

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def a_minibatch_divides_by_the_tokens_of_the_batch(monkeypatch):
    def make(right):
        def wrong(state, rollout, *rest):
            monkeypatch.setattr(updates, "loss_count", lambda mask, mean, longest: int(rollout.response_mask_BT.sum()))
            return right(state, rollout, *rest)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def a_minibatch_divides_by_the_mean_of_the_minibatches(monkeypatch):
    """Every token of the batch weighs the same, and a minibatch of short responses counts for less."""

    def make(right):
        def wrong(state, rollout, scores, found, minibatch, config, *rest):
            share = config.ppo.minibatch_size / config.ppo.batch_size
            tokens = float(rollout.response_mask_BT.sum()) * share

            def count(mask, mean, longest):
                return tokens if mean == "token" else loss_count(mask, mean, longest)

            monkeypatch.setattr(updates, "loss_count", count)
            return right(state, rollout, scores, found, minibatch, config, *rest)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def dropout_on(monkeypatch):
    def make(right):
        def wrong(state, *args):
            state.model.train()
            return right(state, *args)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def reference_in_training_mode(monkeypatch):
    def make(right):
        def wrong(model, reference, *rest):
            reference.train()
            return right(model, reference, *rest)

        return wrong

    replace(monkeypatch, "score_rollout", make)


@plant
def old_logprobs_taken_anew_in_each_epoch(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, targets, minibatch, config, *rest):
            fresh = ppo.score_rollout(
                state.model, state.reference, rollout, [minibatch], config.sampling.temperature, config.dtype
            )
            scores = dataclasses.replace(scores, logprobs_BT=fresh.logprobs_BT)
            return right(state, rollout, scores, targets, minibatch, config, *rest)

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def a_row_twice_and_another_not_at_all(monkeypatch):
    def make(right):
        return lambda *args, **kwargs: [
            [torch.where(rows == 0, 1, rows) for rows in minibatch] for minibatch in right(*args, **kwargs)
        ]

    replace(monkeypatch, "plan_epoch", make)


@plant
def reference_follows_the_policy(monkeypatch):
    def make(right):
        def wrong(state, *args):
            result = right(state, *args)
            state.reference.lm.load_state_dict(state.model.lm.state_dict())
            return result

        return wrong

    replace(monkeypatch, "update", make)


@plant
def schedule_off_by_one(monkeypatch):
    replace(monkeypatch, "learning_rate", lambda right: lambda config, step: right(config, step + 1))


@plant
def kl_controller_inverted(monkeypatch):
    def make(right):
        return lambda coef, kl, *, target, **kwargs: right(coef, target, target=kl, **kwargs)

    replace(monkeypatch, "adapt_kl_coef", make)


@plant
def kl_controller_by_the_sign_alone(monkeypatch):
    """A fifth up or down, however near the target is."""

    def make(right):
        def wrong(coef, kl, *, target, **kwargs):
            return right(coef, 2.0 * target if kl > target else 0.0, target=target, **kwargs)

        return wrong

    replace(monkeypatch, "adapt_kl_coef", make)


@plant
def kl_coefficient_adapted_but_never_used(monkeypatch):
    first = {}

    def make(right):
        def wrong(state, rollout, reward, config, *rest, **kwargs):
            first["kl_coef"] = config.ppo.kl_coef
            return right(state, rollout, reward, config, *rest, **kwargs)

        return wrong

    replace(monkeypatch, "learn", make)
    replace(
        monkeypatch,
        "token_rewards",
        lambda right: lambda *args, kl_coef, **kwargs: right(*args, kl_coef=kl_coef and first["kl_coef"], **kwargs),
    )
