"""The metrics that answer each of a reader's questions, in the order in which they are shown. Imports no torch.

A metric stands under the question of the rules that speak of it. The report and the dashboard show the same list, and
of it what a run has logged; the dashboard shows the first few until all are asked for.
"""

from rlhf_core.alerting.rules import CLOSE, EXACT, FAST, LEARNING, STABLE

METRICS_OF: dict[str, tuple[str, ...]] = {
    LEARNING: (
        "loss", "token_accuracy", "accuracy", "gap_mean", "reward_margin", "reward_mean", "reward_var",
        "explained_variance", "response_length_mean", "eos_rate", "score_mean", "adv_var", "value_mean", "return_mean",
        "reward_length_corr", "reward_zero_std_frac",
    ),
    STABLE: (
        "entropy", "grad_norm", "clip_frac", "approx_kl", "policy_loss", "value_loss", "grad_norm_max", "lr",
        "value_gradient_share",
    ),
    CLOSE: ("reward_chosen", "reward_rejected", "logprob_chosen", "logprob_rejected", "kl", "kl_coef", "kl_k3"),
    FAST: ("tokens_per_second", "step_time_s", "peak_mem_bytes", "units", "completions", "response_tokens"),
    EXACT: (
        "ratio_max_dev_first", "rollout_logprob_diff_max", "first_gradient_error", "target_error",
        "rollout_logprob_diff_p99", "sampling_z", "tokens_after_eos", "kl_target_error",
    ),
}  # fmt: skip
