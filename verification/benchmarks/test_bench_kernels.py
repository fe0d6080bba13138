"""The kernels beside their peers and the limit of the machine, one group for each contest of `rlhf_kernels.contests`.

Run `make bench`, or `pytest verification/benchmarks`. In a table only the ratios inside one group mean something.
"""

from collections.abc import Iterator

import pytest
import torch

from rlhf_kernels import contests

pytest.importorskip("pytest_benchmark")

PAIRS = [(contest, who) for contest, contestants in contests.CONTESTS.items() for who in contestants]

# A third of what an idle machine shows (kernels/README.md), or less: a busy one does not fail.
LEAST = {
    ("with entropy 1024x50257", "torch log_softmax"): 10.0,
    ("with entropy 65536x258", "torch log_softmax"): 4.0,
    ("token_logprobs 1024x50257", "torch cross_entropy"): 3.0,
    ("backward 1024x50257", "torch log_softmax"): 1.3,
    ("gae 512x1024", "python loop in torch"): 15.0,
    ("whiten 512x1024", "torch"): 2.0,
    ("sample 32x50257", "torch softmax, multinomial, log_softmax"): 10.0,
    ("sample 32x50257 top_k=50", "torch softmax, multinomial, log_softmax"): 3.0,
    ("sample 32x50257 top_p=0.9", "torch softmax, multinomial, log_softmax"): 3.0,
    ("linear 2048x384x50257 forward float32", "limit: the bare products"): 0.3,
}


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def prepare(contest, who):
    try:
        return contests.prepare(contest, who)
    except contests.PeerMissingError as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize(("contest", "who"), PAIRS)
def test_contest(benchmark, contest, who):
    benchmark.group, benchmark.name = contest, who
    benchmark.pedantic(prepare(contest, who), rounds=5, warmup_rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize(("contest", "other"), LEAST)
def test_the_lead_has_not_collapsed(contest, other):
    contestants = {who: prepare(contest, who) for who in (contests.OURS, other)}
    best = contests.best_times_s(contestants, rounds=5)
    ratio = best[other] / best[contests.OURS]
    assert ratio > LEAST[contest, other], f"{contest}: ours is only {ratio:.2f} times as fast as {other}"


@pytest.mark.parametrize("contest", ["whiten 512x1024", "sample 32x50257 top_p=0.9"])
def test_contestants_run_and_are_timed(contest):
    best = contests.best_times_s({who: prepare(contest, who) for who in contests.CONTESTS[contest]}, rounds=1)
    assert list(best) == list(contests.CONTESTS[contest])
    assert all(0.0 < seconds < 60.0 for seconds in best.values())


def test_a_missing_peer_says_how_to_get_it():
    with pytest.raises(contests.PeerMissingError, match=r"No module named 'no_such_peer'.*\[peers\]"):
        contests.peer("no_such_peer", "function")
