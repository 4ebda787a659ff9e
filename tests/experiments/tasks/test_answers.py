"""Final answers of worked solutions, judged against cases solved by hand."""

import pytest

from experiments.tasks.answers import final_answer, same_answer

RIGHT = [
    ("5 + 5 = 10.\nThe answer is 10.", "10"),
    ("The answer is 1,000", "1000"),
    ("#### -7", "-7"),
    ("The answer is \u22124", "-4"),
    (r"so we get \boxed{\frac{1}{2}}.", "0.5"),
    (r"\boxed{\dfrac{3}{4}}", r"\frac34"),
    (r"first \boxed{3}, then \boxed{\sqrt{\frac{1}{4}}}", r"\frac{1}{2}"),
    ("The answer is $5.00.", "5"),
    ("The answer is 18 apples.", "18"),
    (r"The answer is \$1,250.50", "1250.5"),
    ("The answer is: -3/4", "-0.75"),
    ("The answer is 25%", "25"),
    ("The answer is 12 - 4", "8"),
    ("The answer is 7. No: the answer is 8", "8"),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{p-q}", "p - q"),
    ("The answer is 60 km/h.", "60"),
    ("The answer is x=5", "5"),
    ("so he has 5 left", "5"),
    ("The answer is $20 per hour", "20"),
    ("The final answer is: 1.000", "1"),
]
WRONG = [
    ("The answer is 10", "11"),
    ("The answer is 7", "-7"),
    (r"The answer is $\frac{1}{3}$.", "0.5"),
    ("The answer is", "3"),
    ("", "3"),
    ("The answer is 3 hours and 20", "320"),
    (r"\boxed{", "3"),
    ("The answer is 8.\nThe answer is 9.", "8"),
]


@pytest.mark.parametrize(("text", "wanted"), RIGHT)
def test_right_answers(text: str, wanted: str) -> None:
    assert same_answer(final_answer(text), wanted)


@pytest.mark.parametrize(("text", "wanted"), WRONG)
def test_wrong_answers(text: str, wanted: str) -> None:
    assert not same_answer(final_answer(text), wanted)
