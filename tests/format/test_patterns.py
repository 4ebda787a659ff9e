"""Patterns of names: they mean what they mean to PEFT, and none takes longer than it may."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from tests.format.costs import cost
from uniproj import AdapterError
from uniproj.format import patterns

NAMES = [
    "q_proj",
    "lm_head",
    "model.embed_tokens",
    *(f"model.layers.{i}.{m}" for i in (0, 1, 10) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")),
    *(f"model.layers.1.experts.{i}.gate" for i in (0, 1)),
    "transformer.h.0.attn.c_attn",
    "vision.image.1.k_proj",
    "base_q_proj.K_proj",
    "odd.a+b.c{e}d",
]
# what people write (the first is that of Unsloth), and the corners of the language, with blanks between
_WRITTEN = r"""
(?:.*?(?:vision|image).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))
q_proj  q\_proj  layers.1  model\.layers\.1\.self_attn\.q_proj  .*  (?i)Q_PROJ  [qv]_proj
.*\.(q|v)_proj  layers\.\d+\..*  q_proj|v_proj  a|ab|abc  (\w+)\.\1  (?P<name>q)_(?P=name)  c{e}d
a\+b.c\{e\}d  a+b.c{e}d  l{1,2}ayers  h{,2}  h{,}  (?<!base_)q_proj  (?=m).*  (?!m).*  x{
.*+q_proj  (?>.*)q_proj  [^.]+\.[^.]+  \Aq_proj\Z  ^q_proj$  q_proj\b  .*?  (a)?b  (?(1)a|b)
"""
WRITTEN = ["", *_WRITTEN.split()]
BITS = [*".*+?|()[]^$-{", r"\.", r"\d", r"\w", "{1,2}", "{e}", "model", "layers", "q_proj", "_proj", *"qv10", "10"]
PATTERNS = st.sampled_from(WRITTEN) | st.lists(st.sampled_from(BITS), max_size=7).map("".join)
HANGS_RE = r"(([a-z0-9_.]+)+)+!"
HANGS_BOTH = r"(?:(.)(.)(.)|(.)(.)|(.))*[?!]"


def _outcome(function: Any, *args: Any) -> Any:
    """What a function returns, or that it refuses."""
    try:
        return function(*args)
    except (AdapterError, re.error):
        return "refused"


def _by_peft(config: Any) -> list[str]:
    return [name for name in NAMES if check_target_module_exists(config, name)]


def _config(**fields: Any) -> Any:
    """What PEFT reads of a configuration, without its checks."""
    plain = {"target_modules": {"q_proj", "gate", "c_attn"}, "target_parameters": None, "exclude_modules": None}
    return SimpleNamespace(
        **plain | {"layers_to_transform": None, "layers_pattern": None, "modules_to_save": None} | fields
    )


FIELDS = [
    *(lambda p: {"target_modules": p}, lambda p: {"exclude_modules": p}, lambda p: {"modules_to_save": ["lm_head", p]}),
    lambda p: {"layers_to_transform": [1, 10], "layers_pattern": p},
    lambda p: {"layers_to_transform": 1, "layers_pattern": [p, "layers"]},
    lambda p: {
        "target_modules": [p, "v_proj"],
        "exclude_modules": ["0.mlp", "experts.1.gate"],
        "layers_to_transform": [0, 1],
    },
]


@pytest.mark.parametrize("field", FIELDS)
@given(PATTERNS)
def test_a_configuration_adapts_what_it_adapts_in_peft(field: Any, pattern: str) -> None:
    config = _config(**field(pattern))
    assert _outcome(lambda: patterns.targets(config, NAMES)[0]) == _outcome(_by_peft, config)


@given(st.lists(PATTERNS, max_size=4, unique=True))
def test_a_module_has_the_value_that_it_has_in_peft(keys: list[str]) -> None:
    values = {key: place for place, key in enumerate(keys)}
    expected = _outcome(lambda: {name: values.get(get_pattern_key(keys, name), -1) for name in NAMES})
    assert _outcome(patterns.of_modules, "rank_pattern", values, NAMES, -1) == expected or expected == "refused"


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_people_write_means_the_same(pattern: str) -> None:
    for field in FIELDS:
        config = _config(**field(pattern))
        assert _outcome(lambda config=config: patterns.targets(config, NAMES)[0]) == _outcome(_by_peft, config)
    expected = _outcome(lambda: {name: get_pattern_key([pattern], name) == pattern for name in NAMES})
    assert _outcome(patterns.of_modules, "alpha_pattern", {pattern: True}, NAMES, False) == expected


def test_all_patterns_of_a_field_share_their_time_and_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    for many in ([HANGS_BOTH], [f"{HANGS_BOTH}{i}" for i in range(300)]):
        with pytest.raises(AdapterError, match=r"rank_pattern: all patterns must be matched within 0\.1 s, got '\(\?:"):
            patterns.of_modules("rank_pattern", dict.fromkeys(many, 1), NAMES, 0)
    for many in (["." * patterns.LETTERS, "."], ["." * (patterns.LETTERS + 1)]):
        with pytest.raises(AdapterError, match="alpha_pattern: all patterns together must have at most 65536 letters"):
            patterns.of_modules("alpha_pattern", dict.fromkeys(many, 1), NAMES, 0)


def test_names_in_full_cost_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `remap` writes them: 9 million pairs, for which there would be no time."""
    names = [f"model.layers.{i}.q-proj" for i in range(3000)]
    monkeypatch.setattr(patterns, "SECONDS_PER_MODULE", 0.0)
    found = patterns.of_modules("alpha_pattern", {re.escape(name): i for i, name in enumerate(names)}, names, -1)
    assert list(found.values()) == list(range(3000))


@pytest.mark.parametrize(
    "pattern", ["(", "[", "*", "a{2,1}", r"\p{L}", "(?R)", "(?V1)a", "(" * 500 + ")" * 500, "a(?i)b"]
)
def test_what_is_no_pattern_to_peft_is_refused(pattern: str) -> None:
    config = LoraConfig(target_modules=pattern)
    with pytest.raises(AdapterError, match="target_modules: every pattern must be a regular expression, got '"):
        patterns.targets(config, NAMES)
    with pytest.raises(AdapterError, match="alpha_pattern: every pattern must be a regular expression, got '"):
        patterns.of_modules("alpha_pattern", {pattern: 2}, NAMES, 1)


def test_a_pattern_that_fits_nothing_is_named() -> None:
    assert patterns.idle("rank_pattern", {"q_proj": 1, ".*_proj": 2, "k": 3, "[k]": 4}, NAMES) == ["k", "[k]"]


@pytest.mark.parametrize("pattern", ["a{4294967290}", "(?<=a{10000000})x", f"{'(?:' * 20}ab{')+' * 20}"])
def test_a_pattern_that_must_repeat_too_often_is_refused_before_it_is_compiled(pattern: str) -> None:
    """In a process of its own, as nothing stops `regex` while it writes such a pattern out."""
    found = cost(patterns.matches, "field", pattern, "q_proj")
    assert "AdapterError: field: all patterns together must have at most 65536 letters" in found.said, found


@pytest.mark.parametrize("pattern", ["(?:[a-z]{1,100}_){1,100}proj", "(?:(?:[a-z]+_?)+)+", "(?:q_?){1,9}proj"])
def test_a_pattern_that_may_repeat_means_what_it_means_to_re(pattern: str) -> None:
    assert patterns.matches("field", pattern, "q_proj") == bool(re.fullmatch(pattern, "q_proj"))
