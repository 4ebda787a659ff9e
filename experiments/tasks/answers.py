"""The final answer of a worked solution, and whether two answers are the same number or expression.

Parsing and equality are Math-Verify's (Hugging Face); what is added is which part of a text it reads.
"""

from __future__ import annotations

import re

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

# the last of these marks begins the answer; without one the last number or expression of the text is it
_MARKS = re.compile(r"(?:the (?:final )?answer is\s*:?|####)", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{2,}")


def final_answer(text: str) -> str:
    r"""What a solution states as its answer: the last \boxed{..}, else what follows the last mark, else the end."""
    boxed = text.rfind("\\boxed{")
    if boxed >= 0:
        return _balanced(text, boxed + len("\\boxed"))
    marks = list(_MARKS.finditer(text))
    tail = text[marks[-1].end() :] if marks else text.strip().rsplit("\n", 1)[-1]
    return tail.strip().split("\n", 1)[0].strip()


def _balanced(text: str, start: int) -> str:
    """The inside of the braces that open at `start`; to the end of the text where they never close."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1 : i]
    return text[start + 1 :]


def same_answer(given: str, wanted: str) -> bool:
    """Whether an answer equals the reference as mathematics: 1,000 = 1000.0, 1/2 = \\frac{1}{2} = 0.5."""
    return bool(verify(_parsed(wanted), _parsed(given)))


def _parsed(answer: str) -> list:
    plain = answer.strip().rstrip(".").strip("$ ")
    # Math-Verify reads formulas between dollars only, and there the words of a unit would be factors
    is_prose = "\\" not in plain and _WORD.search(plain)
    return parse(plain if is_prose else f"${plain}$", [LatexExtractionConfig(), ExprExtractionConfig()])
