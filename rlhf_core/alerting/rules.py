"""The rules of the alerts: one table of what each looks for, why it happens and what to do about it."""

from dataclasses import dataclass

from rlhf_core.alerting import judges
from rlhf_core.alerting.judges import Judge, above, below, drop, grown, jump, lost, recent_below
from rlhf_core.alerting.series import NONFINITE, STEP_ADVANCE


@dataclass(frozen=True)
class Rule:
    """One thing that can go wrong."""

    name: str
    question: str
    """The question of a reader that it answers."""
    text: str
    """What it looks for, in a sentence."""
    metrics: tuple[str, ...]
    """What it needs; the first is the metric that it speaks of. A log without one of them is not checked by it."""
    judge: Judge
    cause: str
    remedy: str


LEARNING = "Is it learning?"
STABLE = "Is it stable?"
CLOSE = "Is the policy still close?"
FAST = "Is it fast?"
EXACT = "Does it compute what it should?"
QUESTIONS = (LEARNING, STABLE, CLOSE, FAST, EXACT)

RULES = (
    # -- does it compute what it should? -------------------------------------------------------------------------------
    Rule(
        "nonfinite", EXACT, "A value is NaN or infinite.", (NONFINITE,), above(NONFINITE),
        "An overflow or a division by nothing: too high a learning rate, a reward that is not finite, low precision.",
        "Go back to the checkpoint before it, look at that step's rewards and gradient norms, lower the learning rate.",
    ),
    Rule(
        "steps_out_of_order", EXACT, "A step is logged twice, or steps go backwards.", (STEP_ADVANCE,),
        below(STEP_ADVANCE),
        "Two processes write one log, or a resumed run did not cut its log back to the checkpoint.",
        "Give each run its own folder; cut the log back to the checkpoint's step before resuming.",
    ),
    Rule(
        "ratio_off_one", EXACT, "Before any update the policy's probabilities are not those of the rollout.",
        ("ratio_max_dev_first",), above("ratio_max_dev_first"),
        "Dropout left on, old log-probs from other weights, another temperature, or padding that shifts positions.",
        "Call eval() on the policy; take old log-probs from the weights and the forward pass that updates start from.",
    ),
    Rule(
        "gradient_off_closed_form", EXACT, "The first minibatch's gradient is not the one of the PPO loss.",
        ("first_gradient_error",), above("first_gradient_error"),
        "Padding counted in the loss, attached advantages, a term on a wrong scale or sign, or one too many (entropy).",
        "Compare masks and token counts of both loss terms; detach advantages and returns; check signs and terms.",
    ),
    Rule(
        "targets_off_definition", EXACT, "Advantages or returns are not what rewards, KL penalty and values make them.",
        ("target_error",), above("target_error"),
        "The KL penalty is missing or has a wrong sign, scores reach other rows or tokens, GAE or whitening is wrong.",
        "Check token rewards first (score on the last response token, −β per-token log-ratio), then γ, λ and the mask.",
    ),
    Rule(
        "sampler_trainer_mismatch", EXACT, "Sampler and trainer give the same tokens different log-probs.",
        ("rollout_logprob_diff",), judges.mismatch,
        "Stale weights in the sampler, another temperature or precision, or another tokenisation or position.",
        "Sync weights before each rollout; compare temperature, dtype and position ids of both.",
    ),
    Rule(
        "not_drawn_from_policy", EXACT, "Completions are likelier, or less likely, than draws from the policy can be.",
        ("sampling_z", "entropy"), judges.not_drawn_from_the_policy,
        "The sampler draws at another temperature, with top-k or top-p, or from stale weights.",
        "Sample at the temperature of the loss, without top-k and top-p, from the weights that are trained.",
    ),
    Rule(
        "tokens_after_end", EXACT, "Tokens after a sequence's end count as response.", ("tokens_after_eos",),
        above("tokens_after_eos"),
        "The response mask covers padding, or the sampler does not stop at the end-of-sequence token.",
        "Build the mask from the first end-of-sequence token; check that sampler and trainer have the same id for it.",
    ),
    Rule(
        "kl_controller_off", EXACT, "The KL coefficient moves as no target of the KL can make it.",
        ("kl_target_error", "kl_coef", "kl"), judges.controller,
        "The controller has a wrong sign, steers by another KL than the logged one, or its target moves.",
        "Check that the coefficient grows while kl lies above kl_target, and falls while it lies below.",
    ),
    # -- is the policy still close? ------------------------------------------------------------------------------------
    Rule(
        "kl_blow_up", CLOSE, "The policy is far from its reference, in nats a token.", ("kl_per_token",),
        judges.kl_blow_up,
        "The KL penalty is too weak for the learning rate, the reward is being exploited, or updates diverge.",
        "Raise kl_coef or lower kl_target, lower the learning rate; read the completions.",
    ),
    Rule(
        "kl_jump", CLOSE, "The KL of a sequence is many times that of the steps before.", ("kl",), judges.kl_jump,
        "A divergence, a reward that has been found to be exploitable, or a reference that was changed.",
        "Go back to a checkpoint from before it; lower the learning rate, raise kl_coef; read the completions.",
    ),
    Rule(
        "kl_collapse", CLOSE, "The KL to the reference is gone: the policy is its reference.", ("kl_per_token",),
        judges.kl_collapse,
        "Weights do not change (rate 0, frozen, wrong parameters in the optimizer), or the reference is updated too.",
        "Check that the optimizer holds the policy's parameters, and that the reference is a frozen copy.",
    ),
    Rule(
        "kl_negative", CLOSE, "The mean log-ratio to the reference stays below zero.", ("kl_per_token",),
        below("kl_per_token"),
        "Tokens are not drawn from the policy (temperature, top-p, stale weights), or padding counts.",
        "Compare sampler and trainer log-probs; a KL estimated on draws from the policy cannot stay negative.",
    ),
    Rule(
        "kl_coef_zero", CLOSE, "Nothing holds the policy to its reference: the KL coefficient is 0.", ("kl_coef", "kl"),
        below("kl_coef"),
        "kl_coef is set to 0, or the adaptive controller has driven it there.",
        "Set kl_coef, or drop the reference if that is meant.",
    ),
    # -- is it stable? -------------------------------------------------------------------------------------------------
    Rule(
        "step_too_large", STABLE, "One step moves the policy far from its rollout.", ("approx_kl",), above("approx_kl"),
        "Updates too large for one rollout: learning rate, epochs or minibatches too many.",
        "Lower the learning rate, or do fewer epochs on each rollout.",
    ),
    Rule(
        "clip_frac_high", STABLE, "The ratio leaves the clip range on a large share of tokens.", ("clip_frac",),
        above("clip_frac"),
        "Updates too large for one rollout: learning rate, epochs or minibatches too many.",
        "Lower the learning rate, or do fewer epochs on each rollout.",
    ),
    Rule(
        "clip_frac_zero", STABLE, "No ratio leaves the clip range, step after step.", ("clip_frac",),
        below("clip_frac"),
        "Small steps: a low learning rate or the end of its schedule, or a single update on each rollout.",
        "Nothing, if the reward still rises; else raise the learning rate or the epochs.",
    ),
    Rule(
        "policy_frozen", STABLE, "Updates do not change the policy any more.", ("approx_kl",), judges.policy_frozen,
        "The learning rate is 0, gradients are 0, or the optimizer no longer holds the policy's weights.",
        "Look at lr and grad_norm; check what the optimizer was given.",
    ),
    Rule(
        "lr_zero", STABLE, "The learning rate is 0.", ("lr",), below("lr"),
        "The schedule has ended before the run, or counts other steps than the run does.",
        "Give the schedule the number of optimizer steps that the run does.",
    ),
    Rule(
        "grad_norm_spike", STABLE, "The gradient norm is many times that of the steps before.", ("grad_norm",),
        jump("grad_norm"),
        "A batch unlike the others, a loss term on another scale, or the start of a divergence.",
        "Look at that step's completions and rewards; clip gradients, or lower the learning rate.",
    ),
    Rule(
        "no_gradient", STABLE, "The gradient is 0.", ("grad_norm",), below("grad_norm"),
        "All advantages are 0, the loss is detached from the weights, or they are frozen.",
        "Look at adv_var and reward_var; check requires_grad and what is detached.",
    ),
    Rule(
        "entropy_collapse", STABLE, "The policy has lost most of the entropy that it began with.", ("entropy",),
        lost("entropy"),
        "The reward is won by few completions and the KL penalty does not hold against it, or steps are too large.",
        "Raise kl_coef, lower the learning rate; read the completions, which may all be the same.",
    ),
    Rule(
        "entropy_blow_up", STABLE, "The policy's entropy has risen far above what it began with.", ("entropy",),
        grown("entropy"),
        "The policy is falling apart towards random tokens: too large steps, a wrong sign, a broken loss.",
        "Read the completions; lower the learning rate, go back to a checkpoint from before it rose.",
    ),
    Rule(
        "value_loss_jump", STABLE, "The value loss is many times that of the steps before.", ("value_loss",),
        jump("value_loss"),
        "Rewards on another scale, a value function that diverges, or a loss that is scaled wrongly.",
        "Look at reward_mean and reward_var; scale rewards, lower the learning rate or value_coef.",
    ),
    Rule(
        "value_dominates", STABLE, "Nearly all of the first gradient comes from the value loss.",
        ("value_gradient_share",), above("value_gradient_share"),
        "value_coef is too large, or rewards are large and not scaled.",
        "Lower value_coef, or scale the rewards to a standard deviation near 1.",
    ),
    # -- is it learning? -----------------------------------------------------------------------------------------------
    Rule(
        "reward_variance_gone", LEARNING, "All completions of a step get the same reward.",
        ("reward_var", "reward_mean"), judges.reward_variance_gone,
        "A reward that is constant or cannot tell completions apart, or a policy that writes one thing.",
        "Score a good and a bad completion by hand; check that the reward reads the completion.",
    ),
    Rule(
        "groups_without_signal", LEARNING, "In nearly all groups every completion gets the same reward.",
        ("reward_zero_std_frac",), above("reward_zero_std_frac"),
        "Prompts too easy or too hard, or a reward that is constant.",
        "Choose prompts that some completions solve and some do not; check the reward by hand.",
    ),
    Rule(
        "advantages_gone", LEARNING, "All advantages are equal, so no token is better than another.", ("adv_var",),
        below("adv_var"),
        "Equal rewards, or rewards that reach no token.",
        "Look at reward_var; check where the score lands and that the mask is not empty.",
    ),
    Rule(
        "reward_falling", LEARNING, "The reward is falling.", ("reward_mean",), judges.reward_falling,
        "A wrong sign, a penalty stronger than the reward, or a policy that falls apart.",
        "Compare reward_mean with score_mean and kl·kl_coef; read the completions before and after.",
    ),
    Rule(
        "reward_flat", LEARNING, "The reward has not risen above its noise since the run began.", ("reward_mean",),
        judges.reward_flat,
        "Too few steps yet, a small learning rate, a strong KL penalty, or a reward that the policy cannot move.",
        "Look whether kl and clip_frac move: if not, raise the learning rate; if so, read the completions.",
    ),
    Rule(
        "reward_pays_for_length", LEARNING, "Within a step, the reward goes with the length of the response.",
        ("reward_length_corr", "response_tokens", "response_length_mean"), judges.pays_for_length,
        "The reward counts tokens, or something that grows with them: suspected reward hacking to come.",
        "Normalise the reward by length, or penalise length; score a long and a short bad completion by hand.",
    ),
    Rule(
        "reward_hacking_length", LEARNING, "Reward and length rise together: suspected reward hacking.",
        ("response_length_mean", "reward_mean"), judges.up_with_length,
        "The policy is paid for writing more.",
        "Read long and short completions with their rewards; normalise or penalise length.",
    ),
    Rule(
        "reward_hacking_kl", LEARNING, "The reward rises while the policy runs away: suspected reward hacking.",
        ("kl_per_token", "reward_mean"), judges.up_with_kl,
        "The policy has found what the reward model overrates, far from the text that it was trained on.",
        "Judge completions by eye or by another model; raise kl_coef or lower kl_target; stop earlier.",
    ),
    Rule(
        "value_explains_nothing", LEARNING, "The value function explains returns worse than a constant would.",
        ("explained_variance",), recent_below("explained_variance", 5),
        "The value function lags behind, diverges, or reads other positions than the returns belong to.",
        "Raise value_coef or its learning rate; check that values and tokens are aligned; warm it up first.",
    ),
    Rule(
        "value_biased", LEARNING, "The value function's error is mostly one constant offset.",
        ("value_mean", "return_mean", "adv_var"), judges.value_bias,
        "Something else than the value loss moves it, such as attached advantages; or it learns too slowly.",
        "Detach advantages; raise value_coef or the learning rate of the value function.",
    ),
    Rule(
        "all_truncated", LEARNING, "No response ends: all are cut off at the longest length.", ("eos_rate",),
        below("eos_rate"),
        "max_new_tokens is too short, the end-of-sequence token is wrong or masked, or ending costs reward.",
        "Check the id of the end-of-sequence token in sampler and tokenizer; allow more tokens; penalise missing ends.",
    ),
    Rule(
        "length_collapse", LEARNING, "Responses have become very short.", ("response_length_mean",),
        lost("response_length_mean"),
        "Ending at once is paid better than writing: a KL penalty per token, a length penalty, a reward for nothing.",
        "Read the completions; lower the penalties, or reward what a response should hold.",
    ),
    # -- is it fast? ---------------------------------------------------------------------------------------------------
    Rule(
        "throughput_drop", FAST, "Tokens per second fall far below those of the steps before.", ("tokens_per_second",),
        drop("tokens_per_second"),
        "Another process on the machine, memory that is swapped out, or another length of responses.",
        "Look at the step's stages in timings.jsonl, and at what else runs on the machine.",
    ),
    Rule(
        "memory_growth", FAST, "Peak memory is a multiple of what it was at first.", ("peak_mem_bytes",),
        grown("peak_mem_bytes"),
        "Something keeps tensors from step to step, or responses have become much longer.",
        "Keep numbers instead of tensors (item(), detach()); lower micro_batch_size.",
    ),
)  # fmt: skip

STALLED = Rule(
    "stalled", FAST, "No new step for far longer than a step takes.", ("age_of_last_row_s",),
    above("age_of_last_row_s"),
    "The process has died, waits for something, or the machine sleeps.",
    "Look whether the process lives and what it printed last; continue with --resume.",
)  # fmt: skip
"""The one rule that needs the present time; the caller measures it."""

BY_NAME = {rule.name: rule for rule in (*RULES, STALLED)}
