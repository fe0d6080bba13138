"""The embedded task: film reviews drawn from a grammar, and a reward that reads what a text means.

`generate` draws a `Meaning` and renders it; `score` parses any text with `interpret` and pays its sentiment. Both use
`review_grammar`, so the reward is exact: the same adjective pays in "the plot was never dull" and costs in "the plot
was dull", and no count of words predicts it. Signs are drawn by coin over words paired by strength, so the expected
sentiment is zero and a policy that imitates the reviews has all its reward still to gain.

Only `random.Random(seed).random()` is drawn from, whose stream Python guarantees, so a seed gives the same reviews on
every version of Python and every machine.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rlhf_core.data import review_grammar as grammar
from rlhf_core.data.review_grammar import VOCABULARY, Clause, Meaning, Pairs
from rlhf_core.data.review_parser import interpret

__all__ = [
    "VOCABULARY",
    "Clause",
    "Meaning",
    "Review",
    "Split",
    "generate",
    "interpret",
    "prompts",
    "score",
    "split_of",
]

Split = Literal["train", "held_out"]
T = TypeVar("T")

# What a text that is not one whole review is paid: PARTIAL_WEIGHT * sentiment so far - PARTIAL_PENALTY, or NOTHING.
PARTIAL_WEIGHT, PARTIAL_PENALTY, NOTHING = 0.25, 0.5, -1.0

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 2, 5
_EVALUATIVE = frozenset(phrase.split()[0] for phrase in (*grammar.STRENGTH, *grammar.PAST_FORMS))


@dataclass(frozen=True)
class Review:
    """A generated review.

    Attributes:
        text: The review, words and punctuation separated by single spaces.
        meaning: The meaning it was rendered from; `interpret(text)` gives it back.
    """

    text: str
    meaning: Meaning

    @property
    def sentiment(self) -> float:
        """The sentiment of the meaning, in [-1, 1]."""
        return self.meaning.sentiment


def generate(seed: int, n: int, split: Split | None = None) -> list[Review]:
    """Draw reviews, independent and with replacement.

    Args:
        seed: Not negative. The same seed gives the same reviews, and a longer list begins with the shorter one.
        n: How many reviews.
        split: Keep only the reviews of this split, see `split_of`; None keeps all.

    Returns:
        `n` reviews.

    Example:
        >>> generate(seed=0, n=1)[0].text
        'we never disliked its camera work , but my friends would never avoid it .'
        >>> generate(seed=0, n=1)[0].sentiment
        0.59375
    """
    rng = _rng(seed, n)
    return _take(n, lambda: _draw_review(rng), lambda review: split is None or split_of(review.text) == split)


def prompts(seed: int, n: int, split: Split) -> list[str]:
    """Draw beginnings of reviews, 2 to 5 tokens long, that leave the sentiment open.

    A prompt ends before the first evaluative word of a review; a review beginning "i loved" gives none. The
    splits share no prompt: a prompt belongs to the split that `split_of` gives the prompt itself.

    Args:
        seed: Not negative. The same seed gives the same prompts.
        n: How many prompts; they repeat as often as reviews begin alike.
        split: Whose prompts.

    Returns:
        `n` prompts, without a space at the end.

    Example:
        >>> prompts(seed=0, n=3, split="train")
        ['we never', 'its camera work was a', 'the jokes felt']
    """
    rng = _rng(seed, n)
    return _take(
        n, lambda: _cut_prompt(rng, _draw_review(rng).text), lambda prompt: prompt != "" and split_of(prompt) == split
    )


def split_of(text: str) -> Split:
    """Say which split a review or a prompt belongs to, by the SHA-256 of its text: one in eight is held out.

    Example:
        >>> split_of("the plot was never dull .")
        'train'
    """
    return "held_out" if hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] < 32 else "train"


def score(text: str) -> float:
    """Reward a text, prompt and completion together, in [-1, 1]. Total: every string has a score.

    A whole review is paid its sentiment. Any other text, be it cut short, run on, repetitive or no review at all, is
    paid ``0.25 * sentiment of the clauses read - 0.5``, at most -0.25, or -1 where no clause could be read. So a text
    that is not a review always earns less than a neutral one, and nothing earns more than many ordinary reviews do.

    Example:
        >>> score("the plot was not very good , but i loved the songs .")
        0.703125
        >>> score("i loved the songs")
        -0.3125
        >>> score("great great great")
        -1.0
    """
    meaning = interpret(text)
    if meaning.complete:
        return meaning.sentiment
    return PARTIAL_WEIGHT * meaning.sentiment - PARTIAL_PENALTY if meaning.clauses else NOTHING


def _rng(seed: int, n: int) -> random.Random:
    if seed < 0 or n < 0:
        raise ValueError(f"seed and n must not be negative, got seed={seed}, n={n}")
    return random.Random(int(seed))


def _take(n: int, draw: Callable[[], T], keep: Callable[[T], bool]) -> list[T]:
    kept: list[T] = []
    while len(kept) < n:
        drawn = draw()
        if keep(drawn):
            kept.append(drawn)
    return kept


def _cut_prompt(rng: random.Random, text: str) -> str:
    tokens = text.split()
    open_until = next((at for at, token in enumerate(tokens) if token in _EVALUATIVE), MAX_PROMPT_TOKENS)
    if open_until < MIN_PROMPT_TOKENS:
        return ""
    length = MIN_PROMPT_TOKENS + int(rng.random() * (MAX_PROMPT_TOKENS - MIN_PROMPT_TOKENS + 1))
    return " ".join(tokens[: min(length, open_until)])


def _draw_review(rng: random.Random) -> Review:
    while True:
        stance = _coin(rng)
        opening = _pick(rng, grammar.OPENINGS) if rng.random() < 0.25 else ""
        kind = rng.random()
        link = _pick(rng, grammar.CONCESSIONS) if kind < 0.2 else _pick(rng, grammar.CONTRASTS) if kind < 0.45 else ""
        first = _draw_statement(rng, -stance if link else stance, 1 if link in grammar.CONCESSIONS else 2, ())
        second = _draw_statement(rng, stance, 2, first) if link else ()
        tokens = Meaning(opening, link, first, second).render().split()
        if grammar.MIN_TOKENS <= len(tokens) <= grammar.MAX_TOKENS:
            return Review(" ".join(tokens), Meaning(opening, link, first, second, stopped_at=len(tokens)))


def _draw_statement(rng: random.Random, stance: int, most: int, earlier: tuple[Clause, ...]) -> tuple[Clause, ...]:
    clauses: tuple[Clause, ...] = ()
    wanted = most if rng.random() < 0.4 else 1
    while len(clauses) < wanted:
        clause = _draw_clause(rng, stance if rng.random() < 0.8 else -stance)
        if not clause.repeats((*earlier, *clauses)):
            clauses += (clause,)
    return clauses


def _draw_clause(rng: random.Random, sign: int) -> Clause:
    kind = rng.random()
    if kind < 0.55:
        return _draw_description(rng, sign)
    if kind < 0.8:
        return _draw_opinion(rng, sign)
    return _draw_verdict(rng, sign) if kind < 0.93 else _draw_fact(rng)


def _draw_description(rng: random.Random, sign: int) -> Clause:
    subject = _draw_thing(rng)
    plural = subject in grammar.THINGS_MANY
    if subject not in grammar.FILMS and rng.random() < 0.2:
        subject += " and " + _pick(rng, grammar.THINGS)
        plural = True
    verb = _pick(rng, grammar.LINKS if rng.random() < 0.3 else grammar.BE_MANY if plural else grammar.BE_ONE)
    negation = ""
    if rng.random() < 0.4:
        negation = _pick(rng, ("never", "far from") if verb in grammar.LINKS else tuple(grammar.NEGATIONS))
    part, words = ("noun", grammar.NOUNS) if rng.random() < 0.15 else ("adjective", grammar.ADJECTIVES)
    degree = "" if negation == "far from" and part == "adjective" else _draw_degree(rng, part, bool(negation))
    return Clause("description", subject, _draw_word(rng, words, -sign if negation else sign), verb, negation, degree)


def _draw_opinion(rng: random.Random, sign: int) -> Clause:
    negation = _pick(rng, ("not", "never", "hardly")) if rng.random() < 0.4 else ""
    degree = "" if negation == "hardly" else _draw_degree(rng, "verb", bool(negation))
    word = _draw_word(rng, grammar.VERBS, -sign if negation else sign)
    return Clause("opinion", _draw_holder(rng), word, negation=negation, degree=degree, target=_draw_thing(rng))


def _draw_verdict(rng: random.Random, sign: int) -> Clause:
    negation, degree = _pick(rng, tuple(grammar.VERDICTS))
    word = _draw_word(rng, grammar.ACTIONS, -sign if negation else sign)
    return Clause("verdict", _draw_holder(rng), word, negation=negation, degree=degree)


def _draw_fact(rng: random.Random) -> Clause:
    subject = _draw_holder(rng) if _coin(rng) > 0 else _pick(rng, grammar.FILMS + grammar.STORIES)
    return Clause("fact", subject, _pick(rng, grammar.FACTS[subject]))


def _draw_degree(rng: random.Random, part: str, negated: bool) -> str:
    if rng.random() < 0.6:
        return ""
    return _pick(rng, grammar.BOOSTERS[part] + (() if negated else grammar.DIMINISHERS[part]))


def _draw_word(rng: random.Random, words: Pairs, sign: int) -> str:
    _, positive, negative = _pick(rng, words)
    return _pick(rng, positive if sign > 0 else negative)


def _draw_thing(rng: random.Random) -> str:
    return _pick(rng, grammar.FILMS if rng.random() < 0.15 else grammar.THINGS)


def _draw_holder(rng: random.Random) -> str:
    return _pick(rng, grammar.SELF if rng.random() < 0.6 else grammar.OTHERS)


def _coin(rng: random.Random) -> int:
    return 1 if rng.random() < 0.5 else -1


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]
