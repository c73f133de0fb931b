"""Regular expressions of ignore lists, matched in linear time whatever they are.

Python's `re` takes time exponential in a name's length for some patterns, and a config.json may come from anyone. So
patterns become a nondeterministic automaton (Thompson's construction), which is run on sets of states, and the steps
are remembered: a character costs one look-up once its step is known. What has no such automaton (look-around,
back-references) is refused.
Source: R. Cox, "Regular Expression Matching Can Be Simple And Fast" (2007).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MAX_PATTERN = 512
MAX_STATES = 512
MAX_DEPTH = 20
MAX_REPEAT = 64
MAX_WORK = 2_500_000
"""Steps that asking a list may take in all, a step that was not taken before counted as many: less than a second."""

Chars = Callable[[str], bool]

CLASSES: dict[str, str] = {
    "d": string.digits,
    "w": string.ascii_letters + string.digits + "_",
    "s": string.whitespace,
}


class UnreadableError(ValueError):
    """A pattern that is not understood, or that takes too long."""


@dataclass
class Work:
    """What matching has cost so far; shared by the patterns of a list."""

    done: int = 0

    def add(self, steps: int) -> None:
        self.done += steps
        if self.done > MAX_WORK:
            raise UnreadableError("matching takes too long")


@dataclass
class _Automaton:
    """States with moves on a character, and free moves that may ask for the name's start or end."""

    moves: list[list[tuple[Chars, int]]] = field(default_factory=list)
    free: list[list[tuple[str, int]]] = field(default_factory=list)

    def state(self) -> int:
        if len(self.moves) >= MAX_STATES:
            raise UnreadableError("the pattern is too large")
        self.moves.append([])
        self.free.append([])
        return len(self.moves) - 1

    def join(self, start: int, end: int, condition: str = "") -> None:
        self.free[start].append((condition, end))


def _any(character: str) -> bool:
    return True


def _among(characters: Iterable[str], inverted: bool = False) -> Chars:
    found = frozenset(characters)
    return (lambda c: c not in found) if inverted else (lambda c: c in found)


class _Parser:
    """Recursive descent; each method adds its part to the automaton and returns (first state, last state)."""

    def __init__(self, text: str, automaton: _Automaton) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.automaton = automaton

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        character = self.peek()
        if not character:
            raise UnreadableError("the pattern ends too early")
        self.at += 1
        return character

    def alternatives(self) -> tuple[int, int]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("the pattern is nested too deeply")
        start, end = self.automaton.state(), self.automaton.state()
        while True:
            first, last = self.sequence()
            self.automaton.join(start, first)
            self.automaton.join(last, end)
            if self.peek() != "|":
                break
            self.at += 1
        self.depth -= 1
        return start, end

    def sequence(self) -> tuple[int, int]:
        start = end = self.automaton.state()
        while self.peek() and self.peek() not in "|)":
            first, last = self.repeated()
            self.automaton.join(end, first)
            end = last
        return start, end

    def repeated(self) -> tuple[int, int]:
        began = self.at
        part = self.atom()
        least, most = self.quantifier()
        if (least, most) == (1, 1):
            return part
        ended = self.at
        start = end = self.automaton.state()
        for number in range(most if most is not None else max(1, least)):
            self.at = began  # each repetition has states of its own
            first, last = self.atom()
            self.automaton.join(end, first)
            if number >= least:
                self.automaton.join(end, last)
            if most is None and number == max(1, least) - 1:
                self.automaton.join(last, first)
                after = self.automaton.state()
                self.automaton.join(last, after)
                last = after
                if least == 0:
                    self.automaton.join(end, last)
            end = last
        self.at = ended
        return start, end

    def quantifier(self) -> tuple[int, int | None]:
        character = self.peek()
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(character)
        if bounds is not None:
            self.at += 1
        elif character == "{":
            bounds = self.counted()
        else:
            return 1, 1
        if self.peek() == "?":  # lazy: the same names match
            self.at += 1
        if self.peek() and self.peek() in "*+?{":
            raise UnreadableError("a repetition is repeated")
        return bounds

    def counted(self) -> tuple[int, int | None]:
        inside, closed, _ = self.text[self.at + 1 :].partition("}")
        low, comma, high = inside.partition(",")
        numbers = [part for part in (low, high) if part]
        if not closed or not numbers or not all(p.isascii() and p.isdigit() and len(p) < 4 for p in numbers):
            raise UnreadableError("a number of repetitions is not understood")
        self.at += len(inside) + 2
        least = int(low or 0)
        most = least if not comma else int(high) if high else None
        if least > MAX_REPEAT or (most is not None and not least <= most <= MAX_REPEAT):
            raise UnreadableError("a number of repetitions is too large")
        return least, most

    def atom(self) -> tuple[int, int]:
        character = self.take()
        if character == "(":
            return self.group()
        if character in "^$":
            start, end = self.automaton.state(), self.automaton.state()
            self.automaton.join(start, end, character)
            return start, end
        if character in "*+?{":
            raise UnreadableError("a repetition of nothing")
        if character == ".":
            return self.moving(_any)
        if character == "[":
            return self.moving(self.bracket())
        if character == "\\":
            return self.moving(self.escaped())
        return self.moving(_among(character))

    def moving(self, chars: Chars) -> tuple[int, int]:
        start, end = self.automaton.state(), self.automaton.state()
        self.automaton.moves[start].append((chars, end))
        return start, end

    def group(self) -> tuple[int, int]:
        if self.peek() == "?":
            if self.text[self.at : self.at + 2] != "?:":
                raise UnreadableError("look-around and named groups are not understood")
            self.at += 2
        part = self.alternatives()
        if self.take() != ")":
            raise UnreadableError("a group is not closed")
        return part

    def escaped(self) -> Chars:
        character = self.take()
        if character.lower() in CLASSES:
            return _among(CLASSES[character.lower()], character.isupper())
        if character.isalnum():
            raise UnreadableError(f"\\{character} is not understood")
        return _among(character)

    def bracket(self) -> Chars:
        inverted = self.peek() == "^"
        self.at += inverted
        found: set[str] = set()
        first = True
        while first or self.peek() != "]":
            first = False
            character = self.take()
            if character == "\\":
                character = self.take()
                if character in CLASSES:
                    found.update(CLASSES[character])
                    continue
                if character.isalnum():
                    raise UnreadableError(f"\\{character} is not understood in brackets")
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", "\\", ""):
                last = self.text[self.at + 1]
                self.at += 2
                if not character.isascii() or not last.isascii() or last < character:
                    raise UnreadableError("a range of characters is not understood")
                found.update(map(chr, range(ord(character), ord(last) + 1)))
            else:
                found.add(character)
        self.at += 1
        return _among(found, inverted)


@dataclass(eq=False)
class _Node:
    """A set of the automaton's states: the steps that are known, whether it accepts, also where the name ends."""

    states: frozenset[int]
    accepts: bool
    accepts_end: bool
    steps: dict[str, _Node] = field(default_factory=dict)


class Pattern:
    """A regular expression that `re.match` would understand in the same way, as far as it is read.

    Raises:
        UnreadableError: it is too large or has something that is not understood.
    """

    def __init__(self, text: str, work: Work | None = None) -> None:
        if len(text) > MAX_PATTERN:
            raise UnreadableError("the pattern is too long")
        self.automaton = _Automaton()
        self.work = work or Work()
        self.nodes: dict[frozenset[int], _Node] = {}
        parser = _Parser(text, self.automaton)
        first, self.last = parser.alternatives()
        if parser.at != len(text):
            raise UnreadableError("a group is closed that was not opened")
        self.start = self._node(self._closure({first}, "^"), "^$")

    def matches(self, name: str, *, whole_parts: bool = False) -> bool:
        """Whether a beginning of the name matches; whole_parts: one that ends where a part between dots does.

        Raises:
            UnreadableError: the patterns of the list have taken too long.
        """
        matched, steps = self._walk(name, whole_parts)
        self.work.add(steps)
        return matched

    def _walk(self, name: str, whole_parts: bool) -> tuple[bool, int]:
        """Whether it matches, and after how many steps that was known."""
        node, before = self.start, ""
        for position, character in enumerate(name):
            if node.accepts and (not whole_parts or character == "." or before == "."):
                return True, position
            following = node.steps.get(character)
            if following is None:
                following = self._step(node, character)
            if not following.states:
                return False, position
            node, before = following, character
        return node.accepts or node.accepts_end, len(name)

    def _step(self, node: _Node, character: str) -> _Node:
        self.work.add(20 * len(node.states))
        moves = self.automaton.moves
        states = self._closure({end for state in node.states for chars, end in moves[state] if chars(character)})
        following = self.nodes.get(states)
        if following is None:
            following = self.nodes[states] = self._node(states, "$")
        node.steps[character] = following
        return following

    def _node(self, states: frozenset[int], conditions: str) -> _Node:
        return _Node(states, self.last in states, self.last in self._closure(states, conditions))

    def _closure(self, states: Iterable[int], conditions: str = "") -> frozenset[int]:
        found, todo = set(states), list(states)
        while todo:
            for condition, end in self.automaton.free[todo.pop()]:
                if end not in found and (not condition or condition in conditions):
                    found.add(end)
                    todo.append(end)
        self.work.add(20 * len(found))
        return frozenset(found)


def glob(text: str) -> str:
    """The regular expression of a shell-style pattern: ``*``, ``?``, ``[ab]`` and ``[!ab]``."""
    special = {"*": ".*", "?": ".", "[": "[", "]": "]", "-": "-"}
    made = "".join(special.get(c) or (c if c.isalnum() or c in "_!" else f"\\{c}") for c in text)
    return made.replace("[!", "[^").replace("!", "\\!")
