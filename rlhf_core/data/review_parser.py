"""The parser of the embedded task's reviews. It reads any text: what is no review means what could be read of it.

Recursive descent without backtracking, after the rules in the docstring of `review_grammar`.
"""

from collections.abc import Iterable

from rlhf_core.data import review_grammar as grammar
from rlhf_core.data.review_grammar import Clause, Meaning

Choices = dict[str, tuple[tuple[str, ...], ...]]
"""Phrases by their first word, the longest first."""


def _choices(*groups: Iterable[str]) -> Choices:
    """Return the phrases of all groups."""
    phrases = sorted((tuple(phrase.split()) for group in groups for phrase in group), key=len, reverse=True)
    return {first: tuple(phrase for phrase in phrases if phrase[0] == first) for first, *_ in phrases}


_SUBJECTS = _choices(grammar.SELF, grammar.OTHERS, grammar.FILMS, grammar.THINGS_ONE, grammar.THINGS_MANY)
_THINGS = _choices(grammar.FILMS, grammar.THINGS_ONE, grammar.THINGS_MANY)
_ASPECTS, _LINK = _choices(grammar.THINGS_ONE, grammar.THINGS_MANY), _choices(grammar.LINKS)
_COPULA = {False: _choices(grammar.BE_ONE, grammar.LINKS), True: _choices(grammar.BE_MANY, grammar.LINKS)}
_NEGATION, _VERB_NEGATION = _choices(grammar.NEGATIONS), _choices(("never", "hardly"))
_BOOSTER = {part: _choices(words) for part, words in grammar.BOOSTERS.items()}
_DEGREE = {part: _choices(words, grammar.DIMINISHERS[part]) for part, words in grammar.BOOSTERS.items()}
_ADJECTIVE, _NOUN = _choices(grammar.all_words(grammar.ADJECTIVES)), _choices(grammar.NOUN_WORDS)
_ACTION = _choices(grammar.all_words(grammar.ACTIONS))
_PAST, _BASE = _choices(grammar.BASE_FORMS), _choices(grammar.PAST_FORMS)
_FACT = {subject: _choices(facts) for subject, facts in grammar.FACTS.items()}
_OPENING, _CONCESSION = _choices(grammar.OPENINGS), _choices(grammar.CONCESSIONS)
_CONTRAST = _choices(grammar.CONTRASTS)
_AND, _A, _COMMA, _STOP, _WOULD, _NOT, _NEVER, _GLADLY, _FAR_FROM, _DID_NOT = (
    _choices((phrase,)) for phrase in ("and", "a", ",", ".", "would", "not", "never", "gladly", "far from", "did not")
)


class _Stopped(Exception):
    """Parsing cannot go on."""


class _Parser:
    """Each rule is a method and never recurses into itself."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.opening = self.link = ""
        self.first: list[Clause] = []
        self.second: list[Clause] = []

    def accept(self, choices: Choices) -> str:
        """Take the longest phrase that comes next, or take nothing and return the empty string."""
        for phrase in choices.get(self.tokens[self.at], ()) if self.at < len(self.tokens) else ():
            if tuple(self.tokens[self.at : self.at + len(phrase)]) == phrase:
                self.at += len(phrase)
                return " ".join(phrase)
        return ""

    def expect(self, choices: Choices, what: str) -> str:
        phrase = self.accept(choices)
        if not phrase:
            raise _Stopped(f"expected {what}")
        return phrase

    def review(self) -> None:
        self.opening = self.accept(_OPENING)
        if self.opening:
            self.expect(_COMMA, "a comma")
        self.link = self.accept(_CONCESSION)
        if self.link:
            self.first.append(self.clause())
            self.expect(_COMMA, "a comma")
            self.statement(self.second)
        else:
            self.statement(self.first)
            if self.accept(_COMMA):
                self.link = self.expect(_CONTRAST, "'but' or 'yet'")
                self.statement(self.second)
        self.expect(_STOP, "a full stop")
        if self.at < len(self.tokens):
            raise _Stopped("expected nothing after the full stop")
        if not grammar.MIN_TOKENS <= self.at <= grammar.MAX_TOKENS:
            raise _Stopped(f"a review has {grammar.MIN_TOKENS} to {grammar.MAX_TOKENS} tokens")

    def statement(self, clauses: list[Clause]) -> None:
        clauses.append(self.clause())
        if self.accept(_AND):
            clauses.append(self.clause())

    def clause(self) -> Clause:
        start = self.at
        subject = self.expect(_SUBJECTS, "a subject")
        holder = subject in grammar.SELF or subject in grammar.OTHERS
        fact = self.accept(_FACT.get(subject, {}))
        if fact:
            clause = Clause("fact", subject, fact)
        elif holder and self.accept(_WOULD):
            clause = self.verdict(subject)
        elif holder:
            clause = self.opinion(subject)
        else:
            clause = self.description(subject)
        if clause.repeats([*self.first, *self.second]):
            self.at = start
            raise _Stopped("expected something new")
        return clause

    def verdict(self, holder: str) -> Clause:
        negation = self.accept(_NOT) or self.accept(_NEVER)
        degree = "" if negation else self.accept(_GLADLY)
        return Clause("verdict", holder, self.expect(_ACTION, "an action"), negation=negation, degree=degree)

    def opinion(self, holder: str) -> Clause:
        did_not = self.accept(_DID_NOT)
        negation = "not" if did_not else self.accept(_VERB_NEGATION)
        degree = "" if negation == "hardly" else self.accept((_BOOSTER if negation else _DEGREE)["verb"])
        verb = self.expect(_BASE if did_not else _PAST, "a verb of liking or disliking")
        word = grammar.PAST_FORMS[verb] if did_not else verb
        return Clause("opinion", holder, word, negation=negation, degree=degree, target=self.expect(_THINGS, "a thing"))

    def description(self, subject: str) -> Clause:
        plural = subject in grammar.THINGS_MANY
        if subject not in grammar.FILMS and self.accept(_AND):
            subject += " and " + self.expect(_ASPECTS, "an aspect")
            plural = True
        negation = self.accept(_NEVER)
        verb = self.expect(_LINK if negation else _COPULA[plural], "a form of 'be', 'felt' or 'seemed'")
        negation = negation or self.accept(_FAR_FROM if verb in grammar.LINKS else _NEGATION)
        degrees = _BOOSTER if negation else _DEGREE
        degree = "" if negation == "far from" else self.accept(degrees["adjective"])
        if not degree and self.accept(_A):
            degree = self.accept(degrees["noun"])
            return Clause("description", subject, self.expect(_NOUN, "a noun"), verb, negation, degree)
        return Clause("description", subject, self.expect(_ADJECTIVE, "an adjective"), verb, negation, degree)


def interpret(text: str) -> Meaning:
    """Read a text as a review. Total: every string has an answer, in time linear in its length.

    Args:
        text: Tokens separated by white space.

    Returns:
        The meaning. If the text is not exactly one review, `complete` is false and the clauses are those read so far.

    Example:
        >>> interpret("although the plot was dull , i loved the songs .").sentiment
        0.625
        >>> interpret("the plot was great great .").problem
        'expected a full stop'
    """
    tokens = text.split(None, grammar.MAX_TOKENS + 1)  # whatever follows is one last piece that no rule accepts
    parser = _Parser(tokens)
    problem = ""
    try:
        parser.review()
    except _Stopped as stopped:
        problem = str(stopped)
    first, second = tuple(parser.first), tuple(parser.second)
    return Meaning(parser.opening, parser.link, first, second, not problem, parser.at, problem)
