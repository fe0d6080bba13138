import doctest
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data import review_parser, reviews
from rlhf_core.data.review_grammar import ADJECTIVES, NOUNS, STRENGTH, VERBS
from rlhf_core.data.reviews import VOCABULARY, Clause, Meaning, generate, interpret, prompts, score, split_of

ROOT = Path(__file__).parents[2]
SAMPLE = generate(seed=11, n=5000)

# Worked by hand from the rules in the docstring of review_grammar.
LITERALS = [
    ("the acting is very good .", 0.75),  # 0.5 * 1.5
    ("the acting was not good .", -0.25),  # 0.5 * -0.5
    ("the acting was not very good .", -0.1875),  # 0.5 * 0.75 * -0.5
    ("the ending was not bad .", 0.25),
    ("the plot was far from dull .", 0.375),  # -0.5 * -0.75
    ("the plot never felt very dull .", 0.28125),  # -0.5 * 0.75 * -0.75
    ("its plot was never utterly dull .", 0.1875),  # -0.5 * 0.5 * -0.75
    ("the plot was hardly a disaster .", 0.25),  # -1 * -0.25
    ("the film was a complete mess .", -1.0),  # -0.75 * 2, clipped
    ("the dialogue was a minor triumph .", 0.375),
    ("the songs were a little bland .", -0.125),
    ("the actors seemed far from a delight .", -0.5625),
    ("i did not enjoy the jokes .", -0.25),
    ("i never really loved the score .", -0.421875),  # 0.75 * 0.75 * -0.75
    ("we hardly hated the cast .", 0.1875),  # -0.75 * -0.25
    ("we rather liked the pacing .", 0.375),
    ("i would gladly watch it again .", 1.0),
    ("i would never watch it again .", -1.0),
    ("we would not recommend it .", -0.75),
    ("my friends would never avoid it .", 0.5),  # 1 * 0.5
    ("i would not sleep through it .", 0.75),
    ("the film runs two hours .", 0.0),
    ("we saw it on friday .", 0.0),
    ("the acting was good and the plot was lazy .", 0.0),
    ("the acting and the plot were good .", 0.5),  # said once, of two aspects
    ("in short , its cast and its script were superb .", 1.0),
    ("the acting was superb and the plot was great .", 1.0),  # 1.75, clipped
    ("although the plot was dull , i loved the songs .", 0.625),  # 0.25 * -0.5 + 0.75
    ("i loved the songs , but the plot was dull .", -0.3125),  # 0.25 * 0.75 - 0.5
    ("the plot was dull , yet i loved the songs .", 0.625),
    ("the critics adored the film , but i hated it .", -0.625),  # 0.25 * 0.5 - 0.75
    ("i loved it , but the critics hated it .", -0.1875),  # 0.25 * 0.75 - 0.375
    (
        "overall , while it was awful , the songs were superb and i enjoyed the ending .",
        1.0,
    ),  # -0.25 + 1 + 0.5, clipped
    ("the plot was weak and the cast was flat , but the camera work was fine .", 0.0625),  # 0.25 * -0.75 + 0.25
]


@pytest.mark.parametrize(("text", "sentiment"), LITERALS)
def test_sentiment_of_literal_reviews(text, sentiment):
    meaning = interpret(text)
    assert meaning.complete, meaning.problem
    assert meaning.sentiment == sentiment
    assert score(text) == sentiment
    assert meaning.render() == text


def test_meaning_of_a_literal_review():
    text = "in short , the plot and its songs were not very good , but my sister did not dislike it ."
    described = Clause("description", "the plot and its songs", "good", verb="were", negation="not", degree="very")
    judged = Clause("opinion", "my sister", "disliked", negation="not", target="it")
    meaning = interpret(text.replace(" but ", " yet ").replace("in short , ", ""))
    assert meaning == Meaning("", "yet", (described,), (judged,), complete=True, stopped_at=18)
    too_long = interpret(text)
    assert (too_long.complete, too_long.stopped_at, too_long.problem) == (False, 21, "a review has 6 to 20 tokens")
    assert too_long.clauses == (described, judged)
    assert described.aspects == ("plot", "songs")
    assert (described.polarity, described.strength) == (-1, 0.1875)
    assert judged.aspects == ("film",)
    assert (judged.polarity, judged.strength) == (1, 0.125)  # -0.5 * -0.5, half for my sister


@pytest.mark.parametrize(
    ("text", "stopped_at", "problem", "clauses", "reward"),
    [
        ("", 0, "expected a subject", 0, -1.0),
        (".", 0, "expected a subject", 0, -1.0),
        ("great great great", 0, "expected a subject", 0, -1.0),
        ("the acting was", 3, "expected an adjective", 0, -1.0),
        ("The acting was very good .", 0, "expected a subject", 0, -1.0),
        ("the acting were good .", 2, "expected a form of 'be', 'felt' or 'seemed'", 0, -1.0),
        ("the acting was very very good .", 4, "expected an adjective", 0, -1.0),
        ("the acting was not not good .", 4, "expected an adjective", 0, -1.0),
        ("the acting was not a little good .", 5, "expected a noun", 0, -1.0),
        ("the acting was superb superb .", 4, "expected a full stop", 1, -0.25),
        ("the acting was superb", 4, "expected a full stop", 1, -0.25),
        ("the acting was awful", 4, "expected a full stop", 1, -0.75),
        ("the acting was superb and", 5, "expected a subject", 1, -0.25),
        ("the acting was superb and the acting was great .", 5, "expected something new", 1, -0.25),
        ("the acting was superb and the plot was superb .", 5, "expected something new", 1, -0.25),
        ("the plot and the plot were superb .", 0, "expected something new", 0, -1.0),
        ("i loved the songs , but", 6, "expected a subject", 1, -0.453125),  # 0.25 * (0.25 * 0.75) - 0.5
        ("i loved the songs , and i liked it .", 5, "expected 'but' or 'yet'", 1, -0.3125),
        ("i loved it .", 4, "a review has 6 to 20 tokens", 1, -0.3125),
        ("we adored the film . we adored", 5, "expected nothing after the full stop", 1, -0.25),
    ],
)
def test_what_is_not_a_review(text, stopped_at, problem, clauses, reward):
    meaning = interpret(text)
    assert not meaning.complete
    assert (meaning.stopped_at, meaning.problem, len(meaning.clauses)) == (stopped_at, problem, clauses)
    assert score(text) == reward


def test_generated_reviews_round_trip():
    for review in SAMPLE:
        meaning = interpret(review.text)
        assert meaning == review.meaning
        assert meaning.complete
        assert meaning.sentiment == review.sentiment == score(review.text)
        assert " ".join(review.text.split()) == review.text == meaning.render()


def test_distribution_of_generated_reviews():
    sentiments = np.array([review.sentiment for review in SAMPLE])
    lengths = np.array([len(review.text.split()) for review in SAMPLE])
    assert abs(sentiments.mean()) < 0.03  # the standard error is 0.009
    assert 0.55 < sentiments.std() < 0.7
    assert (sentiments > 0.25).mean() > 0.3
    assert (sentiments < -0.25).mean() > 0.3
    assert (lengths.min(), lengths.max()) == (6, 20)
    assert 11 < lengths.mean() < 14
    assert len({review.text for review in SAMPLE}) > 4700


def test_many_different_reviews_reach_the_best_reward():
    best = {review.text for review in SAMPLE if review.sentiment == 1.0}
    assert len(best) > 400
    assert len({text.split()[-2] for text in best}) > 30


def test_vocabulary_is_exactly_what_reviews_use():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 165
    assert {token for review in SAMPLE for token in review.text.split()} == set(VOCABULARY)
    assert all(token == token.lower().strip() and token for token in VOCABULARY)
    assert VOCABULARY[:4] == (".", ",", "and", "a")


def test_same_seed_same_reviews():
    assert generate(seed=5, n=20) == generate(seed=5, n=40)[:20]
    assert generate(seed=5, n=20) != generate(seed=6, n=20)
    assert generate(seed=0, n=0) == []


def test_reviews_of_seed_0_never_change():
    text = "\n".join(review.text for review in generate(seed=0, n=1000))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "c122f576491417723f53c93fe2a91e98e05a923dbe7bef1c9629d8f57ba22156"
    )


def test_hash_seed_does_not_matter():
    code = (
        "import hashlib; from rlhf_core.data.reviews import *;"
        "made = ([r.text for r in generate(3, 300)], prompts(3, 300, 'train'), VOCABULARY);"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert len(printed[0]) == 65
    assert printed[0] == printed[1]


@pytest.mark.parametrize(("seed", "n"), [(-1, 3), (0, -1)])
def test_negative_arguments_are_refused(seed, n):
    with pytest.raises(ValueError, match="must not be negative"):
        generate(seed, n)
    with pytest.raises(ValueError, match="must not be negative"):
        prompts(seed, n, "train")


def test_splits_are_disjoint_whatever_the_seed():
    train = {review.text for review in generate(seed=1, n=1500, split="train")}
    held_out = {review.text for review in generate(seed=1, n=300, split="held_out")}
    assert not train & held_out
    assert {split_of(text) for text in train} == {"train"}
    assert 0.10 < np.mean([split_of(review.text) == "held_out" for review in SAMPLE]) < 0.15  # one in eight
    assert split_of("we truly loved the plot .") == "train"  # SHA-256 begins with 0x28
    assert split_of("the film runs two hours .") == "held_out"  # 0x11


def test_prompts_are_open_short_and_disjoint():
    evaluative = {
        word for pairs in (ADJECTIVES, NOUNS, VERBS) for _, *both in pairs for words in both for word in words
    }
    made = {split: prompts(seed=2, n=1500, split=split) for split in ("train", "held_out")}
    assert len(set(made["train"])) > 600
    assert len(set(made["held_out"])) > 250
    assert not set(made["train"]) & set(made["held_out"])
    for prompt in made["train"] + made["held_out"]:
        assert 2 <= len(prompt.split()) <= 5
        assert not evaluative & set(prompt.split())
        assert not interpret(prompt).complete
    assert {len(prompt.split()) for prompt in made["train"]} == {2, 3, 4, 5}
    assert made["train"][:50] == prompts(seed=2, n=50, split="train")


def test_a_prompt_leaves_the_sentiment_open():
    endings: dict[str, list[float]] = {}
    for review in SAMPLE:
        tokens = review.text.split()
        for length in (2, 3, 4, 5):
            endings.setdefault(" ".join(tokens[:length]), []).append(review.sentiment)
    frequent = [
        endings[prompt] for prompt in set(prompts(seed=4, n=500, split="train")) if len(endings.get(prompt, [])) > 19
    ]
    assert len(frequent) > 50
    for sentiments in frequent:
        assert min(sentiments) < 0 < max(sentiments)


def test_counting_words_cannot_tell_the_sentiment():
    column = {token: index for index, token in enumerate(VOCABULARY)}
    counts = np.zeros((len(SAMPLE), len(VOCABULARY)))
    for row, review in enumerate(SAMPLE):
        for token in review.text.split():
            counts[row, column[token]] += 1
    sentiments = np.array([review.sentiment for review in SAMPLE])
    fitted, tested = slice(0, 4000), slice(4000, None)
    signed = sentiments[tested] != 0
    truth = sentiments[tested][signed] > 0
    bag, *_ = np.linalg.lstsq(counts[fitted], sentiments[fitted], rcond=None)
    lexicon = np.array([STRENGTH.get(token, 0.0) for token in VOCABULARY])
    for weights in (bag, lexicon):
        assert 0.5 < np.mean((counts[tested][signed] @ weights > 0) == truth) < 0.75
    parsed = np.array([interpret(review.text).sentiment for review in SAMPLE[tested]])
    assert np.array_equal(parsed, sentiments[tested])


def test_every_evaluative_word_stands_in_good_and_in_bad_reviews():
    for word in {
        word for pairs in (ADJECTIVES, NOUNS, VERBS) for _, *both in pairs for words in both for word in words
    }:
        sentiments = [review.sentiment for review in SAMPLE if word in review.text.split()]
        assert min(sentiments) < 0 < max(sentiments), word


@pytest.mark.parametrize(
    "text",
    [
        "great " * 30,
        "i loved it . " * 10,
        "the acting was superb and " * 10,
        "the acting was " + "utterly " * 10 + "superb .",
        "the acting was superb , but " * 5 + "i loved it .",
        "although " * 10 + "the acting was superb .",
        "we adored the acting . " + "superb " * 40,
        "in short , we adored the acting and the plot was superb",
        "superb acting , superb plot , superb score .",
        "i loved the acting and i loved the plot .",
        "we adored the film and the acting was superb and the plot was great .",
        "i loved it .",
        "score = 1.0",
        "\n",
    ],
)
def test_degenerate_text_earns_less_than_any_plain_good_review(text):
    assert score(text) <= -0.25 < score("the film runs two hours .") < score("the acting was not bad .")


def test_stopping_early_or_running_on_never_pays():
    for review in SAMPLE[:500]:
        tokens = review.text.split()
        for end in range(len(tokens)):
            assert score(" ".join(tokens[:end])) <= -0.25
        assert score(review.text + " .") <= -0.25
        assert score(f"{review.text} {review.text}") <= -0.25


@given(st.text() | st.lists(st.sampled_from([*VOCABULARY, "", "\x00"]), max_size=40).map(" ".join))
@settings(max_examples=80, deadline=None)
def test_any_text_has_a_score(text):
    meaning = interpret(text)
    assert 0 <= meaning.stopped_at <= len(text.split())
    assert bool(meaning.problem) != meaning.complete
    assert meaning.complete or -1.0 <= score(text) <= -0.25
    if meaning.complete:
        assert -1.0 <= score(text) == meaning.sentiment <= 1.0
        assert meaning.render() == " ".join(text.split())


@given(
    st.integers(0, 499), st.integers(0, 19), st.sampled_from(VOCABULARY), st.sampled_from(["put", "drop", "replace"])
)
@settings(max_examples=150, deadline=None)
def test_a_review_with_one_token_changed_has_a_score(index, at, token, change):
    tokens = SAMPLE[index].text.split()
    tokens[at : at + (change != "put")] = [] if change == "drop" else [token]
    meaning = interpret(" ".join(tokens))
    assert meaning.render() == " ".join(tokens) if meaning.complete else score(" ".join(tokens)) <= -0.25


@pytest.mark.parametrize(
    "text",
    [
        "a" * 2**20,
        " " * 2**20,
        "although " * 2**17,
        "the acting was superb and " * 2**15,
        "the acting and " * 2**16,
        "\ud800\x00é " * 2**18,
        "((((" * 2**18,
    ],
    ids=["letters", "blanks", "nested", "clauses", "things", "garbage", "brackets"],
)
def test_a_megabyte_takes_no_time(text):
    start_s = time.perf_counter()
    assert score(text) <= -0.25
    split_of(text)
    assert time.perf_counter() - start_s < 1.0


@pytest.mark.parametrize("module", [reviews, review_parser])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
