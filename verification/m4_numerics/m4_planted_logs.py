"""Mistakes in what is logged, to plant into the real trainer."""

import dataclasses

import numpy as np
import torch
from m4_planting import plants, replace

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
