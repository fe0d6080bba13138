"""Which tokens move, how far each, and over what the losses are a mean.

Properties of a trainer, in the order of :mod:`rlhf_core.testing.properties`; the docstring of each is its claim.
"""

import torch

from rlhf_core.testing.case import Trainer, random_case
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
    rounding,
    rows,
    short_case,
    value_change,
    without_kl,
    without_values,
)


def labels_are_shifted_by_one(trainer: Trainer) -> None:
    """The logits before a token are what its loss moves."""
    case = without_values(full_case())
    change_SV = policy_change(case, trainer)
    sizes_S = change_SV.abs().amax(dim=1)
    moved = set(sizes_S.gt(TOLERANCE).nonzero()[:, 0].tolist())
    visited = {state for row in rows(case) for state in case.states(row)}
    assert moved, "nothing moved"
    stray = sorted(moved - visited, key=lambda state: -sizes_S[state])
    assert not stray, (
        f"{len(stray)} prefixes moved at which no token of a response was drawn, {stray[0]} the most, by "
        f"{sizes_S[stray[0]]:.3g}{rounding(float(sizes_S[stray[0]]))}"
    )
    follows_directions(case, change_SV)


def temperature(trainer: Trainer) -> None:
    """The policy that is trained is the one at the sampling temperature."""
    case = without_values(full_case()).change(temperature=0.5)
    follows_directions(case, policy_change(case, trainer))


def advantages_are_constants(trainer: Trainer) -> None:
    """Advantages are constants of the loss."""
    # Every advantage is 0, and only a gradient of the KL penalty inside it could move anything.
    case = without_kl(without_values(full_case(kl_coef=1.0))).change(scores=(0.0, 0.0, 0.0))
    close(policy_change(case, trainer), torch.zeros_like(case.policy_SV))


def reward_raises(trainer: Trainer) -> None:
    """What is rewarded becomes likelier."""
    case = without_values(full_case()).change(scores=(1.0, 2.0, 3.0))
    total = sum(flat(read_advantages(case, policy_change(case, trainer))))
    assert total > TOLERANCE, f"positive scores moved the drawn tokens by {total:.3g}"


def left_padding(trainer: Trainer) -> None:
    """Left padding changes nothing."""
    padded = random_case(WORLD, (0, 1), FULL[:2], SCORES[:2])
    alone = random_case(WORLD, (0,), FULL[:1], SCORES[:1])
    states = alone.states(0)
    for change in (policy_change, value_change):
        parallel(change(padded, trainer)[states], change(alone, trainer)[states])


def eos_is_trained(trainer: Trainer) -> None:
    """The end-of-sequence token is trained like any other."""
    case = short_case(gamma=0.0, lam=0.0).change(scores=(0.0, 0.0, 0.0, 0.0))  # every advantage is −V, and not 0
    sizes = read_advantages(case, policy_change(case, trainer))
    for row in (0, 2, 3):
        assert abs(sizes[row][-1]) > TOLERANCE, f"row {row} ended, and its end-of-sequence token moved nothing"


def score_on_last_token(trainer: Trainer) -> None:
    """The score lands on the last response token."""
    case = without_values(short_case(gamma=0.0, lam=0.0))
    for row, sizes in enumerate(read_advantages(case, policy_change(case, trainer))):
        where = [t for t, size in enumerate(sizes) if abs(size) > TOLERANCE]
        last = len(sizes) - 1
        earlier = max(map(abs, sizes[:-1]), default=0.0)
        assert where == [last], (
            f"row {row}: the score reached tokens {where}, and its last response token is {last}; the others moved by "
            f"up to {earlier:.3g}{rounding(earlier)}"
        )


def own_score(trainer: Trainer) -> None:
    """Each row is moved by its own score."""
    case = without_values(full_case())
    sizes = [row[-1] for row in read_advantages(case, policy_change(case, trainer))]
    parallel(sizes, list(SCORES[:3]))


def reaches_back(trainer: Trainer) -> None:
    """Undiscounted, the score reaches every earlier token of its row whole."""
    case = without_values(full_case())
    for row, sizes in enumerate(read_advantages(case, policy_change(case, trainer))):
        assert abs(sizes[-1]) > TOLERANCE, f"row {row}: its score moved nothing"
        shares = [size / sizes[-1] for size in sizes]
        worst = max(abs(share - 1.0) for share in shares)
        assert worst <= TOLERANCE, f"row {row}: its tokens got {shares} of it{rounding(worst)}"


def nothing_behind_the_end(trainer: Trainer) -> None:
    """No prefix behind the end moves."""
    case = short_case(kl_coef=0.5, lam=0.5)
    visited = {state for row in rows(case) for state in case.states(row)}
    behind = [state for state in range(len(case.policy_SV)) if state not in visited]
    close(policy_change(case, trainer)[behind], torch.zeros(len(behind), case.world.vocabulary))


def no_value_behind_the_end(trainer: Trainer) -> None:
    """No value behind the end is trained."""
    case = short_case(lam=0.5)
    visited = {state for row in rows(case) for state in case.states(row)}
    behind = [state for state in range(len(case.values_S)) if state not in visited]
    close(value_change(case, trainer)[behind], torch.zeros(len(behind)))


def first_ratio(trainer: Trainer) -> None:
    """The first ratio is 1 at any temperature."""
    for warmth in (0.5, 2.0):
        # So wide a range that no ratio is cut: the change is in proportion to the ratio.
        case = without_values(full_case(clip_range=0.999)).change(temperature=warmth, scores=(1.0, 1.0, 1.0))
        sizes = read_flat(case, trainer)
        parallel(sizes, [1.0] * len(sizes))


def equal_weights(trainer: Trainer) -> None:
    """Every response token weighs the same."""
    case = without_values(short_case())
    firsts = [row[0] for row in read_advantages(case, policy_change(case, trainer))]
    parallel(firsts, list(SCORES))


def policy_mean(trainer: Trainer) -> None:
    """The policy loss is the mean over response tokens."""
    case = without_values(short_case())
    close(policy_change(case, trainer).norm(), policy_change(case, oracle_trainer).norm())


def micro_batches(trainer: Trainer) -> None:
    """Micro-batches add up to their minibatch."""
    for micro_batch_size in (1, 2):
        case = short_case(kl_coef=0.5, lam=0.5)
        split = case.change(settings={"micro_batch_size": micro_batch_size})
        a, b = trainer(case), trainer(split)
        close(a.policy_SV, b.policy_SV)
        close(a.values_S, b.values_S)


def zeroed(trainer: Trainer) -> None:
    """The gradient of a minibatch starts at zero."""
    case = without_kl(full_case(minibatch_size=1))
    parallel(policy_change(case, trainer), policy_change(case, oracle_trainer))


def minibatch_mean(trainer: Trainer) -> None:
    """A minibatch's loss is the mean over its own response tokens."""
    case = without_values(short_case(minibatch_size=1))
    close(policy_change(case, trainer).norm(), policy_change(case, oracle_trainer).norm())


def clipped_norm(trainer: Trainer) -> None:
    """The gradient is clipped once, by its norm over all parameters."""
    free = short_case(micro_batch_size=1)
    clipped = free.change(settings={"max_grad_norm": 0.125})
    changes = []
    for case in (free, clipped):
        outcome = trainer(case)
        changes.append(torch.cat([(outcome.policy_SV - case.policy_SV).flatten(), outcome.values_S - case.values_S]))
    parallel(changes[1], changes[0])
    norm = float(changes[1].norm())
    # torch's clip_grad_norm_ divides by the norm plus 1e-6.
    assert abs(norm - 0.125) <= 1e-5 * 0.125, f"a gradient clipped at a norm of 0.125 has one of {norm:.9g}"
