"""What a correct PPO trainer does, as a list of named properties, each of which a mistake can break on its own.

A property puts a question to a trainer (:class:`~rlhf_core.testing.case.Case`) whose answer is known in closed form, or
from the loops of :mod:`rlhf_core.testing.oracle`, and looks at one side of the answer only: at which prefixes moved, at
the direction, or at the length of the change. So the names of the broken properties say what is wrong; they stand in
order, what others rest on first, so the first that is broken is the likeliest cause::

    from rlhf_core.testing.properties import broken

    def test_my_trainer():
        assert broken(my_trainer) == {}  # name of the property -> what was found

Tolerance: 1e-9, of float64 arithmetic of values around 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.testing.case import Case, Outcome, Trainer, random_case
from rlhf_core.testing.oracle import oracle_trainer
from rlhf_core.testing.readings import (
    FULL,
    SCORES,
    TOLERANCE,
    WORLD,
    close,
    flat,
    follows_directions,
    full_case,
    parallel,
    policy_change,
    read_advantages,
    read_flat,
    rows,
    short_case,
    value_change,
    without_kl,
    without_values,
)
from rlhf_core.testing.world import World, gradient, objective, sequence_logprobs

Check = Callable[[Trainer], None]


@dataclass(frozen=True)
class Property:
    """A named claim about a trainer."""

    name: str
    claim: str
    check: Check
    """Raises AssertionError, with what was found, when the claim does not hold."""


PROPERTIES: dict[str, Property] = {}


def broken(trainer: Trainer) -> dict[str, str]:
    """Return the properties that a trainer breaks: name to what was found, in the order of :data:`PROPERTIES`.

    What a trainer refuses with NotImplementedError is left out.

    Raises:
        ValueError: the trainer refuses everything, so that nothing was asked.
    """
    found, asked = {}, len(PROPERTIES)
    for item in PROPERTIES.values():
        try:
            item.check(trainer)
        except NotImplementedError:
            asked -= 1
        except Exception as error:  # a trainer that fails in any way breaks the property
            found[item.name] = f"{type(error).__name__}: {error}"
    if asked == 0:
        raise ValueError("the trainer raises NotImplementedError for every property: nothing was asked")
    return found


def _property(check: Check) -> Check:
    name, claim = check.__name__, (check.__doc__ or "").strip()
    PROPERTIES[name] = Property(name, claim, check)
    return check


# -- which token, which prefix -----------------------------------------------------------------------------------------


@_property
def labels_are_shifted_by_one(trainer: Trainer) -> None:
    """The logits before a token are what its loss moves."""
    case = without_values(full_case())
    change_SV = policy_change(case, trainer)
    moved = set(change_SV.abs().sum(dim=1).gt(TOLERANCE).nonzero()[:, 0].tolist())
    visited = {state for row in rows(case) for state in case.states(row)}
    assert moved, "nothing moved"
    assert moved <= visited, f"prefixes {sorted(moved - visited)} moved, at which no token of a response was drawn"
    follows_directions(case, change_SV)


@_property
def temperature(trainer: Trainer) -> None:
    """The policy that is trained is the one at the sampling temperature."""
    case = without_values(full_case()).change(temperature=0.5)
    follows_directions(case, policy_change(case, trainer))


@_property
def advantages_are_constants(trainer: Trainer) -> None:
    """Advantages are constants of the loss."""
    # Every advantage is 0, and only a gradient of the KL penalty inside it could move anything.
    case = without_kl(without_values(full_case(kl_coef=1.0))).change(scores=(0.0, 0.0, 0.0))
    close(policy_change(case, trainer), torch.zeros_like(case.policy_SV))


@_property
def reward_raises(trainer: Trainer) -> None:
    """What is rewarded becomes likelier."""
    case = without_values(full_case()).change(scores=(1.0, 2.0, 3.0))
    total = sum(flat(read_advantages(case, policy_change(case, trainer))))
    assert total > TOLERANCE, f"positive scores moved the drawn tokens by {total:.3g}"


@_property
def left_padding(trainer: Trainer) -> None:
    """Left padding changes nothing."""
    padded = random_case(WORLD, (0, 1), FULL[:2], SCORES[:2])
    alone = random_case(WORLD, (0,), FULL[:1], SCORES[:1])
    states = alone.states(0)
    for change in (policy_change, value_change):
        parallel(change(padded, trainer)[states], change(alone, trainer)[states])


@_property
def eos_is_trained(trainer: Trainer) -> None:
    """The end-of-sequence token is trained like any other."""
    case = short_case(gamma=0.0, lam=0.0).change(scores=(0.0, 0.0, 0.0, 0.0))  # every advantage is −V, and not 0
    sizes = read_advantages(case, policy_change(case, trainer))
    for row in (0, 2, 3):
        assert abs(sizes[row][-1]) > TOLERANCE, f"row {row} ended, and its end-of-sequence token moved nothing"


@_property
def score_on_last_token(trainer: Trainer) -> None:
    """The score lands on the last response token."""
    case = without_values(short_case(gamma=0.0, lam=0.0))
    for row, sizes in enumerate(read_advantages(case, policy_change(case, trainer))):
        where = [t for t, size in enumerate(sizes) if abs(size) > TOLERANCE]
        last = len(sizes) - 1
        assert where == [last], f"row {row}: the score reached tokens {where}, and its last response token is {last}"


@_property
def own_score(trainer: Trainer) -> None:
    """Each row is moved by its own score."""
    case = without_values(full_case())
    sizes = [row[-1] for row in read_advantages(case, policy_change(case, trainer))]
    parallel(sizes, list(SCORES[:3]))


@_property
def reaches_back(trainer: Trainer) -> None:
    """Undiscounted, the score reaches every earlier token of its row whole."""
    case = without_values(full_case())
    for row, sizes in enumerate(read_advantages(case, policy_change(case, trainer))):
        assert abs(sizes[-1]) > TOLERANCE, f"row {row}: its score moved nothing"
        shares = [size / sizes[-1] for size in sizes]
        assert max(abs(share - 1.0) for share in shares) <= TOLERANCE, f"row {row}: its tokens got {shares} of it"


@_property
def nothing_behind_the_end(trainer: Trainer) -> None:
    """No prefix behind the end moves."""
    case = short_case(kl_coef=0.5, lam=0.5)
    visited = {state for row in rows(case) for state in case.states(row)}
    behind = [state for state in range(len(case.policy_SV)) if state not in visited]
    close(policy_change(case, trainer)[behind], torch.zeros(len(behind), case.world.vocabulary))


@_property
def no_value_behind_the_end(trainer: Trainer) -> None:
    """No value behind the end is trained."""
    case = short_case(lam=0.5)
    visited = {state for row in rows(case) for state in case.states(row)}
    behind = [state for state in range(len(case.values_S)) if state not in visited]
    close(value_change(case, trainer)[behind], torch.zeros(len(behind)))


# -- the ratio ---------------------------------------------------------------------------------------------------------


@_property
def first_ratio(trainer: Trainer) -> None:
    """The first ratio is 1 at any temperature."""
    for warmth in (0.5, 2.0):
        # So wide a range that no ratio is cut: the change is in proportion to the ratio.
        case = without_values(full_case(clip_range=0.999)).change(temperature=warmth, scores=(1.0, 1.0, 1.0))
        sizes = read_flat(case, trainer)
        parallel(sizes, [1.0] * len(sizes))


# -- the mean, the batch and its parts ---------------------------------------------------------------------------------


@_property
def equal_weights(trainer: Trainer) -> None:
    """Every response token weighs the same."""
    case = without_values(short_case())
    firsts = [row[0] for row in read_advantages(case, policy_change(case, trainer))]
    parallel(firsts, list(SCORES))


@_property
def policy_mean(trainer: Trainer) -> None:
    """The policy loss is the mean over response tokens."""
    case = without_values(short_case())
    close(policy_change(case, trainer).norm(), policy_change(case, oracle_trainer).norm())


@_property
def micro_batches(trainer: Trainer) -> None:
    """Micro-batches add up to their minibatch."""
    for micro_batch_size in (1, 2):
        case = short_case(kl_coef=0.5, lam=0.5)
        split = case.change(settings={"micro_batch_size": micro_batch_size})
        a, b = trainer(case), trainer(split)
        close(a.policy_SV, b.policy_SV)
        close(a.values_S, b.values_S)


@_property
def zeroed(trainer: Trainer) -> None:
    """The gradient of a minibatch starts at zero."""
    case = without_kl(full_case(minibatch_size=1))
    close(policy_change(case, trainer).norm(), policy_change(case, oracle_trainer).norm())


@_property
def clipped_norm(trainer: Trainer) -> None:
    """The gradient is clipped once, by its norm over all parameters."""
    free = short_case(micro_batch_size=1)
    clipped = free.change(settings={"max_grad_norm": 0.125})
    changes = []
    for case in (free, clipped):
        outcome = trainer(case)
        changes.append(torch.cat([(outcome.policy_SV - case.policy_SV).flatten(), outcome.values_S - case.values_S]))
    parallel(changes[1], changes[0])
    # torch's clip_grad_norm_ divides by the norm plus 1e-6.
    if not abs(float(changes[1].norm()) - 0.125) <= 1e-5 * 0.125:
        raise AssertionError(f"a gradient clipped at a norm of 0.125 has one of {float(changes[1].norm()):.9g}")


# -- rewards, advantages, returns --------------------------------------------------------------------------------------


def _kl_case() -> Case:
    return without_values(full_case(gamma=0.0, lam=0.0, kl_coef=0.5)).change(scores=(0.0, 0.0, 0.0))


@_property
def kl_direction(trainer: Trainer) -> None:
    """The KL penalty pulls towards the reference."""
    case = _kl_case()
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def kl_size(trainer: Trainer) -> None:
    """The KL coefficient is applied once."""
    with_kl, score_only = _kl_case(), without_kl(_kl_case()).change(scores=SCORES[:3])
    sizes = [float(policy_change(case, trainer).norm()) for case in (with_kl, score_only)]
    expected = [float(policy_change(case, oracle_trainer).norm()) for case in (with_kl, score_only)]
    close(sizes[0] / sizes[1], expected[0] / expected[1])


@_property
def kl_temperature(trainer: Trainer) -> None:
    """The KL penalty compares the two policies at the sampling temperature."""
    case = _kl_case().change(temperature=0.5)
    parallel(read_flat(case, trainer), read_flat(case, oracle_trainer))


@_property
def missing_eos(trainer: Trainer) -> None:
    """A response that was cut pays the penalty, an ended one does not."""
    case = without_values(random_case(WORLD, (1, 2, 3), ((1, 3, 0), (2, 2, 3), (3, 1, 1)), (1.0, -0.75, 2.5)))
    case = case.change(settings={"missing_eos_penalty": 0.5})
    sizes = [row[-1] for row in read_advantages(case, policy_change(case, trainer))]
    parallel(sizes, [1.0, -1.25, 2.0])


@_property
def gamma_and_lambda(trainer: Trainer) -> None:
    """Γ and λ are in their places."""
    case = full_case(gamma=0.5, lam=0.25)
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def no_bootstrap(trainer: Trainer) -> None:
    """No value is bootstrapped past the end."""
    case = random_case(WORLD, (1, 2, 3), ((1, 0), (2, 2, 3), (0,)), SCORES[:3], lam=0.5)
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def returns(trainer: Trainer) -> None:
    """The return is the advantage plus the value."""
    case = full_case(lam=0.5)
    parallel(value_change(case, trainer), value_change(case, oracle_trainer))


@_property
def value_loss(trainer: Trainer) -> None:
    """The value loss is ½ (V − R)² with R a constant, times its coefficient."""
    case = full_case()
    close(value_change(case, trainer), value_change(case, oracle_trainer))


@_property
def value_mean(trainer: Trainer) -> None:
    """The value loss is the mean over response tokens."""
    case = without_values(short_case())
    visited = [state for row in rows(case) for state in case.states(row)]
    close(value_change(case, trainer)[visited].norm(), value_change(case, oracle_trainer)[visited].norm())


@_property
def values_are_their_own(trainer: Trainer) -> None:
    """The policy's loss does not move the values."""
    close(value_change(full_case(value_coef=0.0), trainer), 0.0)


# -- whitening ---------------------------------------------------------------------------------------------------------


def _whitened(trainer: Trainer) -> Tensor:
    case = without_values(full_case(whiten_advantages=True, gamma=0.5, lam=0.5, kl_coef=0.5))
    sizes = read_flat(case, trainer)
    return torch.tensor(sizes, dtype=torch.float64) * len(sizes)


@_property
def whitened_mean(trainer: Trainer) -> None:
    """Whitened advantages have mean 0."""
    whitened = _whitened(trainer)
    close(whitened.mean() / whitened.std(), 0.0)


@_property
def whitened_variance(trainer: Trainer) -> None:
    """Whitened advantages have population variance 1."""
    found = float(_whitened(trainer).var(correction=0))
    assert abs(found - 1.0) < 1e-6, f"the variance is {found:.9g}"  # 1e-8 is added to it before the root is taken


@_property
def whitening_mask(trainer: Trainer) -> None:
    """Whitening reads response tokens only."""
    case = without_values(short_case(whiten_advantages=True, gamma=0.5, lam=0.5, kl_coef=0.5))
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def whitening_batch(trainer: Trainer) -> None:
    """Whitening reads the whole batch, and no minibatch or row alone."""
    case = without_values(full_case(whiten_advantages=True, gamma=0.5, lam=0.5, kl_coef=0.5, minibatch_size=1))
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def whitened_rewards(trainer: Trainer) -> None:
    """Whitened rewards keep their mean."""
    case = without_values(full_case(whiten_rewards=True, kl_coef=0.5))
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


# -- epochs ------------------------------------------------------------------------------------------------------------


@_property
def clipping(trainer: Trainer) -> None:
    """A ratio that left its range by its own advantage stops, the others go on."""
    # Two prompts of two responses each that share their first prefix: one is reinforced, which makes the other's ratio
    # fall; the four cases are a positive and a negative advantage whose ratio rose and fell.
    responses = ((1, 3, 2), (2, 2, 3), (1, 3, 2), (2, 2, 3))
    case = random_case(WORLD, (1, 1, 2, 2), responses, (4.0, 0.5, -4.0, -0.5))
    case = without_values(case).change(settings={"epochs": 2, "learning_rate": 12.0})
    close(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def value_clipping(trainer: Trainer) -> None:
    """A value that left its range stops."""
    case = without_values(full_case(epochs=3, learning_rate=2.0, value_clip_range=0.25, clip_range=0.999))
    close(value_change(case, trainer), value_change(case, oracle_trainer))


@_property
def epochs(trainer: Trainer) -> None:
    """Later epochs keep the advantages and the log-probs of the rollout."""
    case = full_case(epochs=3, learning_rate=0.25, clip_range=0.5, lam=0.5, kl_coef=0.5)
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


# -- the run -----------------------------------------------------------------------------------------------------------


@_property
def dropout(trainer: Trainer) -> None:
    """Dropout stays off."""
    case = without_values(full_case(epochs=2))
    close(trainer(case.change(dropout=0.5)).policy_SV, trainer(case).policy_SV)


@_property
def schedule(trainer: Trainer) -> None:
    """The learning rate falls linearly from its full value."""
    case = without_values(full_case(steps=4, schedule="linear", learning_rate=0.5))
    close(policy_change(case, trainer).norm(), policy_change(case, oracle_trainer).norm())


@_property
def reference(trainer: Trainer) -> None:
    """The reference never moves."""
    outcome = trainer(full_case(steps=2, kl_coef=0.5))
    assert torch.equal(outcome.reference_SV, full_case().reference_SV), "the reference's table changed"


@_property
def adaptive_kl(trainer: Trainer) -> None:
    """The KL coefficient follows its target."""
    for target in (0.01, 100.0, 0.5):
        case = full_case(kl_coef=0.5, kl_control="adaptive", kl_target=target, kl_horizon=30, steps=2)
        close(trainer(case).kl_coef, oracle_trainer(case).kl_coef)


# -- everything at once ------------------------------------------------------------------------------------------------


@_property
def expected_gradient(trainer: Trainer) -> None:
    """The expected gradient is the gradient of E[r] − β KL."""
    world = World(vocabulary=3, length=3, prompts=((2,),))
    beta = 0.5
    scores = torch.tensor([((7 * row) % 16) / 8 - 1 for row in range(len(world.responses))], dtype=torch.float64)
    base = random_case(world, (0,), (world.responses[0],), (0.0,), kl_coef=beta)
    policy, reference = base.policy(), base.reference()
    logp_N = sequence_logprobs(world, policy, 0)
    exact = gradient(objective(logp_N, sequence_logprobs(world, reference, 0).detach(), scores, beta=beta), policy)
    expected_SV = torch.zeros_like(base.policy_SV)
    for response, score, logp in zip(world.responses, scores.tolist(), logp_N.tolist(), strict=True):
        case = base.change(responses=(response,), scores=(score,))
        # Of one response alone, the loss divides by its number of tokens, which is as random as the response.
        expected_SV += math.exp(logp) * len(response) * policy_change(case, trainer)
    close(expected_SV, exact["table"])


def _logged(outcome: Outcome, expected: Outcome, names: tuple[str, ...]) -> None:
    for name in names:
        assert name in outcome.metrics, f"{name} is not logged"
        found, wanted = outcome.metrics[name], expected.metrics[name]
        assert abs(found - wanted) <= TOLERANCE * max(1.0, abs(wanted)), f"{name} is {found:.9g}, not {wanted:.9g}"


@_property
def rollout_log(trainer: Trainer) -> None:
    """The log says what was measured on the rollout."""
    case = short_case(kl_coef=0.5, lam=0.5, gamma=0.75).change(temperature=0.75)
    names = (
        *("kl", "kl_k3", "kl_coef", "entropy", "reward_mean", "reward_var"),
        *("adv_var", "value_mean", "return_mean", "explained_variance", "response_length_mean", "eos_rate"),
    )
    _logged(trainer(case), oracle_trainer(case), names)


@_property
def update_log(trainer: Trainer) -> None:
    """The log says what the update did."""
    case = short_case(kl_coef=0.5, lam=0.5, epochs=2, learning_rate=2.0)  # so fast that ratios leave their range
    names = ("policy_loss", "value_loss", "approx_kl", "clip_frac", "grad_norm", "grad_norm_max")
    _logged(trainer(case), oracle_trainer(case), names)


@_property
def whole(trainer: Trainer) -> None:
    """A whole step is the oracle's."""
    case = short_case(
        steps=2, epochs=3, learning_rate=0.25, schedule="linear", gamma=0.75, lam=0.5, kl_coef=0.5,
        whiten_advantages=True, whiten_rewards=True, missing_eos_penalty=0.5, value_clip_range=0.25, max_grad_norm=1.0,
        micro_batch_size=1,
    ).change(temperature=0.75)  # fmt: skip
    found, expected = trainer(case), oracle_trainer(case)
    close(found.policy_SV, expected.policy_SV)
    close(found.values_S, expected.values_S)


# -- the other algorithms ----------------------------------------------------------------------------------------------


def _group_case(group_size: int = 4, **settings: object) -> Case:
    """Two prompts of four responses each, of unequal length."""
    responses = ((1, 0), (2, 2, 3), (0,), (3, 1, 0), (1, 3, 2), (2, 0), (3, 3, 1), (0,))
    scores = (1.0, -0.75, 2.5, 0.5, 0.25, 3.0, -1.0, 0.125)
    return random_case(
        WORLD, (0, 0, 0, 0, 1, 1, 1, 1), responses, scores, group_size=group_size, kl_coef=0.5, **settings
    )


def _follows_the_oracle(trainer: Trainer, algorithm: str, group_size: int = 4) -> None:
    case = _group_case(group_size, algorithm=algorithm, epochs=3, learning_rate=0.25, whiten_advantages=None)
    close(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def group_mean(trainer: Trainer) -> None:
    """The baseline of a response is the mean score of its prompt's responses."""
    case = _group_case(advantage="group-mean").change(settings={"kl_coef": 0.0})
    close(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def leave_one_out(trainer: Trainer) -> None:
    """The baseline of a response is the mean score of its prompt's other responses."""
    case = _group_case(advantage="leave-one-out").change(settings={"kl_coef": 0.0})
    close(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def group_standard_score(trainer: Trainer) -> None:
    """The standard score of a response divides by the sample deviation of its prompt's scores."""
    case = _group_case(advantage="group-standard-score").change(settings={"kl_coef": 0.0})
    close(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def kl_in_the_loss(trainer: Trainer) -> None:
    """A KL penalty in the loss is in no reward, and pulls by the gradient of its estimator."""
    for estimator in ("k2", "k3", "k3-weighted"):
        case = _group_case(kl_place="loss", kl_estimator=estimator, group_size=1)
        case = without_values(case).change(scores=(0.0,) * 8)
        close(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def loss_means(trainer: Trainer) -> None:
    """The loss is a mean over tokens, sequences, sequences of sums or the longest possible, as configured."""
    for loss_mean in ("token", "sequence", "sum", "constant"):
        case = _group_case(loss_mean=loss_mean, group_size=1).change(settings={"kl_coef": 0.0})
        close(policy_change(case, trainer), policy_change(case, oracle_trainer))


@_property
def grpo(trainer: Trainer) -> None:
    """GRPO's whole step is the oracle's."""
    _follows_the_oracle(trainer, "grpo")


@_property
def dr_grpo(trainer: Trainer) -> None:
    """Dr. GRPO's whole step is the oracle's."""
    _follows_the_oracle(trainer, "dr-grpo")


@_property
def rloo(trainer: Trainer) -> None:
    """RLOO's whole step is the oracle's."""
    _follows_the_oracle(trainer, "rloo")


@_property
def reinforce_plus_plus(trainer: Trainer) -> None:
    """REINFORCE++'s whole step, without and with its baseline, is the oracle's."""
    _follows_the_oracle(trainer, "reinforce++", group_size=1)
    _follows_the_oracle(trainer, "reinforce++-baseline")
