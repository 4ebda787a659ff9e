"""Which modules the patterns of a configuration match: as in PEFT, and in bounded time.

PEFT matches by `re`, which a short pattern such as `(([a-z]+)+)+!` keeps busy for longer than anyone waits. Here a
pattern means the same, and is matched by `regex`, which stops when it is told to.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from re import _parser  # type: ignore[attr-defined]  # Python's own tree of a pattern
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import regex

from uniproj.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftConfig

T = TypeVar("T")

# limits for all patterns of one field together: CPU seconds, and letters, each counted as often as it must repeat,
# since `regex` expands repetitions before its timeout applies. An honest match takes microseconds
SECONDS, SECONDS_PER_MODULE, LETTERS = 1.0, 1e-4, 2**16

# what PEFT puts before and after a pattern
_SIZE = r"(.*\.)?(", r")$"
_HEAD = r"(^|.*\.)", r"($|\..*)"
_LAYER = r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

# a name, as re.escape writes it
_LITERAL = re.compile(r"(?:\w|-|\\[^\w\s])+", re.ASCII)
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT)
# a plain brace to `re`, but a count of errors in fuzzy matching to `regex`
_BRACE = re.compile(r"(\\.)|\{(?!\d+\}|\d*,\d*\})", re.DOTALL)


def of_modules(field: str, patterns: Mapping[str, T] | None, modules: Iterable[str], default: T) -> dict[str, T]:
    """{module: the value of the first pattern that matches its name}; `default` where none does.

    field: rank_pattern or alpha_pattern. Raises AdapterError for an invalid pattern, and for one that takes too long.
    """
    values = list((patterns or {}).values())
    found = _matching(field, patterns or {}, modules)
    # PEFT too takes a key that equals the name, even if as a pattern it does not match itself
    return {m: values[min(indices)] if indices else (patterns or {}).get(m, default) for m, indices in found.items()}


def of_sites(field: str, patterns: Mapping[str, T] | None, sites: Iterable[str], default: T) -> dict[str, T]:
    """`of_modules` for sites of a layout: the output projection of an attention has what the attention has."""
    sites = set(sites)
    targets = {site: parent if (parent := site.removesuffix(".out_proj")) in sites else site for site in sites}
    values = of_modules(field, patterns, set(targets.values()), default)
    return {site: values[target] for site, target in targets.items()}


def idle(field: str, patterns: Mapping[str, Any] | None, modules: Iterable[str]) -> list[str]:
    """The patterns that match none of the modules. Raises AdapterError as `of_modules` does."""
    used = {index for indices in _matching(field, patterns or {}, modules).values() for index in indices}
    return [pattern for index, pattern in enumerate(patterns or {}) if index not in used]


def targets(config: PeftConfig, names: Iterable[str]) -> tuple[list[str], set[str]]:
    """The modules that PEFT adapts for a configuration, and those that the configuration excludes.

    Raises AdapterError as `of_modules` does.
    """
    names, wanted = list(names), config.target_modules
    excluded = _named("exclude_modules", getattr(config, "exclude_modules", None), names)
    matcher = _Matcher("modules_to_save", len(names))
    for head in getattr(config, "modules_to_save", None) or ():
        excluded |= set(filter(matcher.by(head, *_HEAD), names))
    found = _named("target_modules", wanted, names) - excluded
    if not isinstance(wanted, str):
        found = _in_layers(config, found, set(wanted or ()))
    return [name for name in names if name in found], excluded


def matches(field: str, pattern: str, name: str) -> bool:
    """Whether a pattern matches a whole name. Raises AdapterError as `of_modules` does."""
    return bool(_named(field, pattern, [name]))


def _matching(field: str, patterns: Iterable[str], modules: Iterable[str]) -> dict[str, list[int]]:
    """{module: the indices of all patterns that match its name}."""
    modules = list(modules)
    matcher, ends = _Matcher(field, len(modules)), _Ends()
    others: list[tuple[int, _Match]] = []
    for index, text in enumerate(patterns):
        if _LITERAL.fullmatch(text):
            ends.add(re.sub(r"\\(.)", r"\1", text), index)
        else:
            others.append((index, matcher.by(text, *_SIZE)))
    return {m: [*ends.of(m), *(index for index, match in others if match(m))] for m in modules}


def _named(field: str, wanted: str | Iterable[str] | None, names: list[str]) -> set[str]:
    """The names that a pattern matches as a whole, or that end in one of several names."""
    if isinstance(wanted, str):
        return set(filter(_Matcher(field, len(names)).by(wanted), names))
    ends = _Ends()
    for index, end in enumerate(wanted or ()):
        ends.add(end, index)
    return {name for name in names if ends.of(name)}


def _in_layers(config: Any, found: set[str], in_full: set[str]) -> set[str]:
    """Those of layers_to_transform, and those that target_modules names in full, to which it does not apply."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return found
    wanted, around = {layers} if isinstance(layers, int) else set(layers), getattr(config, "layers_pattern", None) or ()
    matcher = _Matcher("layers_pattern", len(found))
    matchers = [matcher.by(text, *_LAYER) for text in ([around] if isinstance(around, str) else around)]

    def layer(name: str) -> int | None:
        match = next(filter(None, (match(name) for match in matchers or [_ANY_LAYER.match])), None)
        return None if match is None or match["idx"] is None else int(match["idx"])

    return {name for name in found if name in in_full or layer(name) in wanted}


class _Ends:
    """Whole components in which names may end ("attn.q_proj"), each with the index at which it was given first.

    A look-up in place of a match, as a configuration may name every module in full.
    """

    def __init__(self) -> None:
        self._indices: dict[str, int] = {}
        self._lengths: set[int] = set()

    def add(self, end: str, index: int) -> None:
        self._indices.setdefault(end, index)
        self._lengths.add(len(end))

    def of(self, name: str) -> list[int]:
        """The indices of those in which a name ends."""
        starts = [len(name) - n for n in self._lengths if n <= len(name)]
        starts = [start for start in starts if start == 0 or name[start - 1] == "."]
        return [self._indices[name[start:]] for start in starts if name[start:] in self._indices]


def _unfolded(tree: Any) -> int:
    """About how many parts a pattern has once `x{3,}` is written as `xxxx*`, and `x+` as `xx*`."""
    if not isinstance(tree, _parser.SubPattern | tuple | list):
        return 1
    if len(tree) == 2 and tree[0] in _REPEATS:
        least, _, part = tree[1]
        return (int(least) + 1) * _unfolded(part)
    return sum(map(_unfolded, tree))


_Match = Callable[[str], Any]


class _Matcher:
    """Matches the patterns of one field within one budget of time and letters."""

    def __init__(self, field: str, modules: int):
        self._field, self._letters = field, 0
        self._seconds = SECONDS + SECONDS_PER_MODULE * modules
        self._end = time.thread_time() + self._seconds

    def by(self, text: str, before: str = "", after: str = "") -> _Match:
        """A function that matches a name by this pattern; before and after: what is put around the pattern."""
        self._count(len(text))
        whole = f"{before}{text}{after}"
        try:
            re.compile(whole)  # `regex` accepts more than PEFT's `re`
            self._count(_unfolded(_parser.parse(whole)))
            pattern = regex.compile(_BRACE.sub(lambda m: m[1] or r"\{", whole), regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{self._field}: every pattern must be a regular expression, got {text!r:.80} ({error}). Correct it."
            ) from None
        run = pattern.match if before else pattern.fullmatch

        def match(name: str) -> Any:
            left = self._end - time.thread_time()
            try:
                return run(name, timeout=left) if left > 0 else self._stop(text)
            except (TimeoutError, MemoryError):
                self._stop(text)

        return match

    def _count(self, letters: int) -> None:
        self._letters += letters
        if self._letters > LETTERS:
            raise AdapterError(
                f"{self._field}: all patterns together must have at most {LETTERS} letters, each counted as often as "
                "it must repeat, got more. Name the modules."
            )

    def _stop(self, text: str) -> NoReturn:
        raise AdapterError(
            f"{self._field}: all patterns must be matched within {self._seconds:.1f} s, got {text!r:.80}, which takes "
            "longer. Name the modules in place of it."
        ) from None
