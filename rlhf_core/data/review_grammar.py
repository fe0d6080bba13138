"""The grammar of the embedded task: film reviews of one sentence, and what they mean.

One token a word, every review `MIN_TOKENS` to `MAX_TOKENS` long::

    review      = [opening ","] ( statement [ "," ("but" | "yet") statement ]
                                | ("although" | "while") clause "," statement ) "."
    statement   = clause [ "and" clause ]
    clause      = description | opinion | verdict | fact
    description = thing ["and" thing] ( be [negation] | link ["far from"] | "never" link ) predicate
    predicate   = [degree] adjective | "a" [degree] noun
    opinion     = holder ( "hardly" | ["never" | "did not"] [degree] ) verb thing
    verdict     = holder "would" [ "gladly" | "not" | "never" ] ( "watch it again" | "avoid it" | ... )
    fact        = film "runs two hours" | story "begins in paris" | holder "saw it on friday" | ...

Sentiment is a sum over clauses, clipped to [-1, 1]:

- A word has a sign and a base strength of 0.25 to 1. A degree multiplies it ("very" 1.5, "a little" 0.5).
- Negation flips and weakens ("not" -0.5, "hardly" -0.25, "never" and "far from" -0.75), and a degree under it weakens
  further: "not very good" is milder than "not good". A verdict is a choice, not a scale: it flips whole.
- A clause lies in [-1, 1]. Somebody else's opinion or verdict counts half of what "i" and "we" say. What is conceded
  ("although ...", or whatever stands before "but") counts a quarter. A fact counts nothing.

A review uses an evaluative word once, describes an aspect once, and lets a holder judge a thing once. Degrees do not
stack, and of them only boosters stand under a negation. All constants are sums of powers of two, so sentiments are
exact floats, equal on every machine.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

MIN_TOKENS, MAX_TOKENS = 6, 20
CONCEDED_WEIGHT = 0.25
OTHERS_WEIGHT = 0.5

Kind = Literal["description", "opinion", "verdict", "fact"]
Pairs = tuple[tuple[float, tuple[str, ...], tuple[str, ...]], ...]

# Positive and negative words are paired by strength, so a sign drawn by coin balances the task exactly.
ADJECTIVES: Pairs = (
    (1.0, ("superb", "brilliant", "magnificent", "perfect"), ("awful", "terrible", "dreadful", "horrible")),
    (0.75, ("great", "wonderful", "lovely", "gripping"), ("lousy", "tedious", "painful", "clumsy")),
    (0.5, ("good", "clever", "charming", "fresh"), ("bad", "dull", "weak", "lazy")),
    (0.25, ("decent", "pleasant", "fine", "fair"), ("bland", "thin", "uneven", "flat")),
)
NOUNS: Pairs = (
    (1.0, ("masterpiece", "marvel"), ("disaster", "nightmare")),
    (0.75, ("triumph", "delight"), ("mess", "failure")),
    (0.5, ("joy", "treat"), ("bore", "chore")),
)
VERBS: Pairs = (
    (1.0, ("adored",), ("despised",)),
    (0.75, ("loved", "admired"), ("loathed", "hated")),
    (0.5, ("enjoyed", "liked"), ("resented", "disliked")),
)
ACTIONS: Pairs = ((1.0, ("watch it again", "recommend it"), ("sleep through it", "avoid it")),)
BASE_FORMS = {  # after "did not"
    "adored": "adore", "loved": "love", "admired": "admire", "enjoyed": "enjoy", "liked": "like",
    "despised": "despise", "loathed": "loathe", "hated": "hate", "resented": "resent", "disliked": "dislike",
}  # fmt: skip
PAST_FORMS = {base: past for past, base in BASE_FORMS.items()}
STRENGTH = {
    word: signed
    for pairs in (ADJECTIVES, NOUNS, VERBS, ACTIONS)
    for strength, positive, negative in pairs
    for words, signed in ((positive, strength), (negative, -strength))
    for word in words
}

# A degree's factor alone, and under a negation. Diminishers do not stand under a negation.
DEGREES = {
    "very": (1.5, 0.75), "really": (1.5, 0.75), "truly": (1.5, 0.75), "utterly": (2.0, 0.5),
    "real": (1.5, 0.75), "complete": (2.0, 0.5),
    "a little": (0.5, 0.0), "somewhat": (0.5, 0.0), "rather": (0.75, 0.0), "minor": (0.5, 0.0),
}  # fmt: skip
BOOSTERS = {
    "adjective": ("very", "really", "truly", "utterly"),
    "noun": ("real", "complete"),
    "verb": ("really", "truly"),
}
DIMINISHERS = {"adjective": ("a little", "somewhat", "rather"), "noun": ("minor",), "verb": ("somewhat", "rather")}
NEGATIONS = {"not": -0.5, "hardly": -0.25, "never": -0.75, "far from": -0.75}
VERDICTS = {("", ""): 0.75, ("", "gladly"): 1.0, ("not", ""): -0.75, ("never", ""): -1.0}  # (negation, degree)

_ONE = ("acting", "plot", "score", "dialogue", "ending", "camera work", "pacing", "cast", "story", "script", "editing",
        "lighting", "hero", "villain", "director", "humour", "romance")  # fmt: skip
_MANY = ("actors", "jokes", "songs", "costumes", "effects", "scenes")
FILMS = ("it", "the film", "this film", "the movie", "this movie")
STORIES = ("the story", "its story")
THINGS_ONE = tuple(f"{article} {aspect}" for aspect in _ONE for article in ("the", "its"))
THINGS_MANY = tuple(f"{article} {aspect}" for aspect in _MANY for article in ("the", "its"))
THINGS = THINGS_ONE + THINGS_MANY
SELF, OTHERS = ("i", "we"), ("the critics", "the audience", "my friends", "my sister")
BE_ONE, BE_MANY, LINKS = ("was", "is"), ("were", "are"), ("felt", "seemed")
OPENINGS = ("overall", "honestly", "frankly", "in short", "to be honest")
CONCESSIONS, CONTRASTS = ("although", "while"), ("but", "yet")
FILM_FACTS = ("runs two hours", "runs three hours", "opened in spring", "opened in winter")
STORY_FACTS = ("begins in paris", "begins in london", "ends in paris", "ends in london")
HOLDER_FACTS = ("saw it on friday", "saw it on sunday", "watched it at home", "watched it in london")
FACTS = (
    dict.fromkeys(FILMS, FILM_FACTS) | dict.fromkeys(STORIES, STORY_FACTS) | dict.fromkeys(SELF + OTHERS, HOLDER_FACTS)
)


def all_words(pairs: Pairs) -> tuple[str, ...]:
    """Return the words of both signs."""
    return tuple(word for _, positive, negative in pairs for word in positive + negative)


NOUN_WORDS = all_words(NOUNS)

_PHRASES = (
    (".", ",", "and", "a", "would", "did not", *OPENINGS, *CONCESSIONS, *CONTRASTS),
    (*FILMS, *THINGS_ONE, *THINGS_MANY, *SELF, *OTHERS),
    (*BE_ONE, *BE_MANY, *LINKS, *NEGATIONS, *DEGREES, "gladly"),
    (*FILM_FACTS, *STORY_FACTS, *HOLDER_FACTS),
    (*STRENGTH, *PAST_FORMS),
)
VOCABULARY = tuple(dict.fromkeys(token for phrases in _PHRASES for phrase in phrases for token in phrase.split()))
"""Every token of the grammar once, in a fixed order; punctuation first."""


def clip(value: float) -> float:
    """Clip to [-1, 1]."""
    return max(-1.0, min(1.0, value))


@lru_cache(maxsize=4096)  # there are some 2,200 things and pairs of things
def _aspects(things: str) -> tuple[str, ...]:
    if things in SELF or things in OTHERS:
        return ()
    return tuple("film" if thing in FILMS else thing.split(" ", 1)[1] for thing in things.split(" and "))


class Clause(NamedTuple):
    """One thing said, with the words that say it.

    Attributes:
        kind: What sort of clause it is.
        subject: The holder of an opinion or verdict, or the thing or two things described.
        word: The evaluative word; for a verdict the action, for a fact all that follows the subject. Verbs in the past.
        verb: The copula of a description, else empty.
        negation: A key of `NEGATIONS`, or empty.
        degree: A key of `DEGREES`, or "gladly", or empty.
        target: What an opinion is about, else empty.
    """

    kind: Kind
    subject: str
    word: str
    verb: str = ""
    negation: str = ""
    degree: str = ""
    target: str = ""

    @property
    def aspects(self) -> tuple[str, ...]:
        """What the clause is about: "film", or the aspects without their articles; empty for a holder's fact."""
        return ("film",) if self.kind == "verdict" else _aspects(self.target or self.subject)

    @property
    def value(self) -> float:
        """Sentiment of the clause alone, in [-1, 1]."""
        if self.kind == "fact":
            return 0.0
        strength = STRENGTH[self.word]
        if self.kind == "verdict":
            strength *= VERDICTS[self.negation, self.degree]
        else:
            if self.degree:
                strength *= DEGREES[self.degree][bool(self.negation)]
            if self.negation:
                strength *= NEGATIONS[self.negation]
        return clip(strength) * (OTHERS_WEIGHT if self.subject in OTHERS else 1.0)

    @property
    def polarity(self) -> int:
        """The sign of `value`."""
        return (self.value > 0) - (self.value < 0)

    @property
    def strength(self) -> float:
        """The size of `value`."""
        return abs(self.value)

    @property
    def claims(self) -> tuple[tuple[Kind, str, str], ...]:
        """What may be said once in a review: a kind of thing, by a holder if it has one, of an aspect."""
        holder = "" if self.kind == "description" else self.subject
        return tuple([(self.kind, holder, aspect) for aspect in self.aspects])

    def repeats(self, earlier: "Iterable[Clause]") -> bool:
        """Whether the clause repeats the word of an earlier one, or a claim of an earlier one or of its own."""
        claims = self.claims
        return len(set(claims)) < len(claims) or any(
            self.word == clause.word or not set(claims).isdisjoint(clause.claims) for clause in earlier
        )

    def render(self) -> str:
        """The clause as text."""
        words: tuple[str, ...]
        if self.kind == "description":
            never_felt = self.negation == "never" and self.verb in LINKS
            verb = (self.negation, self.verb) if never_felt else (self.verb, self.negation)
            words = (self.subject, *verb, "a" if self.word in NOUN_WORDS else "", self.degree, self.word)
        elif self.kind == "opinion" and self.negation == "not":
            words = (self.subject, "did not", self.degree, BASE_FORMS[self.word], self.target)
        else:
            would = "would" if self.kind == "verdict" else ""
            words = (self.subject, would, self.negation, self.degree, self.word, self.target)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Meaning:
    """What a text says: its clauses, how they are joined, and whether it is a whole review.

    Attributes:
        opening: "overall", "in short", ... or empty.
        link: "although", "while", "but" or "yet" when something is conceded, else empty.
        first: The clauses of the first statement; with a link they are the conceded ones.
        second: The clauses after the comma of a link.
        complete: Whether the text is exactly one review of the grammar.
        stopped_at: The token at which parsing stopped; the number of tokens if complete.
        problem: What was wrong there; empty if complete.
    """

    opening: str = ""
    link: str = ""
    first: tuple[Clause, ...] = ()
    second: tuple[Clause, ...] = ()
    complete: bool = True
    stopped_at: int = 0
    problem: str = ""

    @property
    def clauses(self) -> tuple[Clause, ...]:
        """All clauses in order."""
        return self.first + self.second

    @property
    def sentiment(self) -> float:
        """Sentiment in [-1, 1]: the clipped sum over the clauses read, conceded ones at `CONCEDED_WEIGHT`."""
        first = sum(clause.value for clause in self.first)
        second = sum(clause.value for clause in self.second)
        return clip(first * (CONCEDED_WEIGHT if self.link else 1.0) + second)

    def render(self) -> str:
        """The review as text; for a complete meaning the inverse of `review_parser.interpret`."""
        parts = [f"{self.opening} ,"] if self.opening else []
        first, second = (" and ".join(clause.render() for clause in part) for part in (self.first, self.second))
        if self.link in CONCESSIONS:
            parts += [self.link, first, ",", second]
        elif self.link:
            parts += [first, ",", self.link, second]
        else:
            parts += [first]
        return " ".join([*parts, "."])
