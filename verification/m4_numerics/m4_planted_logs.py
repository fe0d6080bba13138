"""Mistakes in what is logged, to plant into the real trainer."""

import dataclasses

import numpy as np
import torch
from m4_planting import plants, replace

from rlhf_core import updates

PLANTED, plant = plants()


@plant
def logged_kl_by_token(monkeypatch):
    def make(right):
        def wrong(**arrays):
            metrics = right(**arrays)
            return metrics | {"kl": metrics["kl"] / metrics["response_length_mean"]}

        return wrong

    replace(monkeypatch, "rollout_metrics", make)


@plant
def logged_entropy_over_the_padding(monkeypatch):
    def change(right):
        def wrong(**arrays):
            everywhere = arrays | {"mask": np.ones_like(arrays["mask"])}
            return right(**arrays) | {"entropy": right(**everywhere)["entropy"]}

        return wrong

    replace(monkeypatch, "rollout_metrics", change)


@plant
def entropy_logged_without_the_temperature(monkeypatch):
    def make(right):
        def wrong(model, reference, rollout, plan, temperature, dtype):
            scores, cold = (right(model, reference, rollout, plan, tau, dtype) for tau in (temperature, 1.0))
            return dataclasses.replace(scores, entropies_BT=cold.entropies_BT)

        return wrong

    replace(monkeypatch, "score_rollout", make)


@plant
def approximate_kl_the_other_way_round(monkeypatch):
    replace(monkeypatch, "kl_k3", lambda right: lambda log_ratio_BT: right(-log_ratio_BT))


@plant
def clip_fraction_over_the_padding(monkeypatch):
    def make(right):
        def wrong(state, rollout, scores, found, minibatch, *rest):
            sums = right(state, rollout, scores, found, minibatch, *rest)
            return dataclasses.replace(sums, tokens=rollout.response_mask_BT[torch.cat(minibatch)].numel())

        return wrong

    replace(monkeypatch, "accumulate_gradients", make)


@plant
def explained_variance_against_the_values(monkeypatch):
    def make(right):
        def wrong(**arrays):
            metrics, mask = right(**arrays), arrays["mask"]
            if arrays["values"] is not None and (spread := arrays["values"][mask].var()) > 0:
                error = (arrays["returns"] - arrays["values"])[mask].var()
                metrics |= {"explained_variance": 1.0 - float(error / spread)}
            return metrics

        return wrong

    replace(monkeypatch, "rollout_metrics", make)


@plant
def gradient_norm_logged_after_clipping(monkeypatch):
    def make(right):
        return lambda state, sums, parameters, max_norm, step: min(
            right(state, sums, parameters, max_norm, step), max_norm
        )

    replace(monkeypatch, "optimizer_step", make)


@plant
def logged_minibatches_weigh_the_same(monkeypatch):
    """A mean over minibatches, and not over their tokens."""

    def make(right):
        def wrong(self, minibatch, norm):
            mean = updates.MinibatchSums(minibatch.sums.clone(), minibatch.deviation, 1, 1)
            mean.sums[:2] /= minibatch.count
            mean.sums[2:] /= minibatch.tokens
            return right(self, mean, norm)

        return wrong

    replace(monkeypatch, "add", make, updates.UpdateStatistics)


@plant
def metrics_of_the_first_step_for_ever(monkeypatch):
    first = {}

    def make(right):
        def wrong(state, *args, **kwargs):
            result = right(state, *args, **kwargs)
            if state.step == 1:
                first.update(result.metrics)
            return dataclasses.replace(result, metrics=dict(first))

        return wrong

    replace(monkeypatch, "learn", make)
