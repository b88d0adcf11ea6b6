"""Answers of mathematical problems: where they are in responses and records, what is equal, and what a policy may write
without harm."""

import os
import threading

import pytest

from jaxrlhf.rewards import math_worker
from jaxrlhf.rewards.functions import resolve
from jaxrlhf.rewards.math_answer import lenient, strict

GSM8K = {"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = 72 clips.\n#### 72"}


@pytest.mark.parametrize(
    "response, marked, mentioned",
    [
        ("48 + 24 = 72\n#### 72", 1, 1),
        ("#### 72.0", 1, 1),
        ("so \\boxed{72}", 1, 1),
        ("\\boxed{\\$72}.", 1, 1),
        ("#### 71 no, #### 72", 1, 1),
        ("#### $72", 1, 1),
        ("the answer is 72.", 0, 1),
        ("72 clips, sold in 2 months", 0, 0),
        ("#### 7,2", 0, 0),
        ("#### 72 clips in 2 months", 1, 1),
        ("#### -72", 0, 0),
        ("#### 720", 0, 0),
        ("####", 0, 0),
        ("", 0, 0),
        ("none", 0, 0),
    ],
)
def test_responses(response, marked, mentioned):
    assert strict([response], [GSM8K]) == [marked]
    assert lenient([response], [GSM8K]) == [mentioned]


@pytest.mark.parametrize(
    "answer, response",
    [("1,234", "#### 1234"), (1234, "#### 1,234"), ("-0.5", "#### -.5"), ("x\n#### 10,000", "#### 10000")],
)
def test_numbers_are_compared_and_not_their_spelling(answer, response):
    assert strict([response], [{"answer": answer}]) == lenient([response], [{"answer": answer}]) == [1.0]


def test_each_response_has_its_own_record():
    records = [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}]
    assert lenient(["1", "1", "3"], records) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError):
        lenient(["1"], records)


# ---- what is equal --------------------------------------------------------------------------------------------------

EQUAL = [  # the record's answer, a response
    (r"\frac{\sqrt{3}}{2}", r"so \boxed{\frac{\sqrt{3}}{2}}."),
    ("72", r"\boxed{72\text{ clips}}"),
    ("0.75", "#### 3/4"),
    ("3/4", r"\boxed{\frac34}"),
    ("1200", "#### 1 200"),
    ("1200", r"\boxed{1\,200}"),
    ("1200", r"\boxed{1{,}200}"),
    ("1,234", "#### 1234"),
    ("-72", "#### \u221272"),
    ("-72", "\\boxed{\u221272}"),
    ("72", "#### \uff17\uff12"),
    ("12%", r"\boxed{12\%}"),
    ("12", "#### 12 percent"),
    ("0.12", "#### 12%"),
    ("5", r"\boxed{\$5.00}"),
    ("5", "#### \u20ac5"),
    ("5", "#### 5 dollars"),
    ("$5", r"\boxed{5}"),
    ("1000000", "#### 1 million"),
    ("2.5", "#### 2 1/2"),
    ("5/2", r"\boxed{2\frac{1}{2}}"),
    ("-2.5", r"\boxed{-2\frac12}"),
    ("2.5", "#### 2\u00bd"),
    ("[1,2)", r"\boxed{\left[1, 2\right)}"),
    (r"(-\infty,3]", "\\boxed{(-\u221e, 3]}"),
    (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
    ("1, 2", r"\boxed{2} and \boxed{1}"),
    ("2", r"first \boxed{1}. Then again: \boxed{2}"),
    ("72", r"\boxed{\boxed{72}}"),
    ("72", r"$\boxed{72}$"),
    ("72", r"\boxed 72"),
    ("72", r"\boxed{72}. I hope that question 3 helps"),
    ("72", "#### 72\nI hope this helps with question 3"),
    ("72", "#### 72. I hope this helps"),
    ("72", "#### **72**."),
    ("5", r"\boxed{x = 5}"),
    ("x=5", r"\boxed{5}"),
    ("7", "#### 3 + 4 = 7"),
    ("5", r"\boxed{5.}"),
    ("1500", "#### 1.5e3"),
    (r"5 \times 10^3", r"\boxed{5000}"),
    ("90", "#### 90\u00b0"),
    (r"2\sqrt{2}", "#### 2\u221a2"),
    ("(x+1)^2", r"\boxed{x^2 + 2x + 1}"),
    ("1/3", r"\boxed{0.333333}"),
    ("B", r"\boxed{\text{(B)}}"),
    ("Monday", r"\boxed{\text{monday}}"),
    ("She has 72 clips left", "#### 72"),
    (r"Thus it is $\boxed{\frac{1}{2}}$.", r"\boxed{0.5}"),
    (["3/4", "0.8"], "#### 0.8"),
    ("72", r"\boxed{72}. Write it in \boxed{}."),
    ("72", r"\boxed{\text{72 clips}}"),
    ("June 20", r"\boxed{\text{june 20}}"),
    (0.1, "#### 1/10"),
]
DIFFERENT = [
    ("[1,2)", r"\boxed{(1, 2)}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("2", r"\boxed{1} or \boxed{2}"),
    ("1", r"first \boxed{1}. Then again: \boxed{2}"),
    ("x=5", r"\boxed{y=5}"),
    ("9", r"\boxed{9\pi}"),
    ("9", r"\boxed{9x}"),
    ("9", r"\boxed{9^2}"),
    ("9", r"\boxed{9!}"),
    ("9", r"\boxed{9, 10}"),
    ("9", "#### 9 or 10"),
    ("3", r"\boxed{3/4}"),
    ("1/3", r"\boxed{0.33}"),
    ("5", r"\boxed{-5}"),
    ("B", r"\boxed{C}"),
    ("was", r"\boxed{saw}"),
    ("72", r"\boxed{}"),
    ("June 20", r"\boxed{\text{May 20}}"),
    ("72", r"\boxed{7"),
]


def test_what_is_equal():
    """In one call, as a batch is."""
    rows = [(*pair, 1.0) for pair in EQUAL] + [(*pair, 0.0) for pair in DIFFERENT]
    records, responses = [{"answer": answer} for answer, *_ in rows], [response for _, response, _ in rows]
    for function in (strict, lenient):
        wrong = [row for row, found in zip(rows, function(responses, records)) if found != row[2]]
        assert wrong == []


@pytest.mark.parametrize(
    ("answer", "response", "found"),
    [
        ("3/4", r"it is $\frac{3}{4}$.", 1),
        ("x+1", "so the answer is $1+x$", 1),
        ("-3/4", r"The answer is -\frac{3}{4}.", 1),
        ("2.5", "so 2\u00bd cups", 1),
        ("0.12", "so 12 % of them", 1),
        ("5", "the cost is $6 and $5", 1),
        ("B", "It is not A. The answer is (B).", 1),
        ("Monday", "So she comes on\nMonday.", 1),
        ("72", r"\boxed{71}, and not 72", 0),
        ("Monday", "It is Monday or Tuesday.", 0),
    ],
)
def test_lenient_reads_a_response_without_a_mark(answer, response, found):
    assert lenient([response], [{"answer": answer}]) == [found]
    assert strict([response], [{"answer": answer}]) == [0]


def test_what_strict_takes_lenient_takes():
    responses = [response for _, response in EQUAL]
    marked = strict(responses, [{"answer": answer} for answer, _ in EQUAL])
    assert marked == lenient(responses, [{"answer": answer} for answer, _ in EQUAL])


# ---- what a policy may write ----------------------------------------------------------------------------------------


def test_a_comparison_without_end_is_ended(monkeypatch):
    """SymPy would write this number down; the answers after it are compared by another worker. Off the main thread."""
    monkeypatch.setattr(math_worker, "WORKERS", [])
    responses = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{10}{2}}"]
    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.append(strict(responses, [{"answer": "5"}] * 2)))
    thread.start()
    thread.join(math_worker.WALL_SECONDS)
    assert found == [[0, 1]]
    math_worker.stop_workers()


def test_a_worker_that_dies_is_replaced():
    assert strict([r"\boxed{\sqrt{25}}"], [{"answer": "5"}]) == [1]
    process = math_worker.WORKERS[0].process
    assert process is not None
    os.kill(process.pid, 9)
    process.wait()
    assert strict([r"\boxed{\sqrt{36}}", r"\boxed{\sqrt{49}}"], [{"answer": "6"}, {"answer": "7"}]) == [1, 1]


def test_a_worker_that_can_t_start_is_an_error(monkeypatch):
    """And no wrong answer."""
    monkeypatch.setattr(math_worker, "__name__", "jaxrlhf.rewards.not_there")
    with pytest.raises(RuntimeError, match=r"^math_answer: its worker process did not start: ModuleNotFoundError: .*"):
        math_worker.Worker().compare(("1", "x"))


@pytest.mark.parametrize(
    "response", ["\\boxed{" * 3000, "9" * 50000, " " * 20000, "$" * 5000, "#### 1e999999999", "{" * 9999]
)
def test_long_and_odd_text_takes_no_time(response):
    assert strict([response], [{"answer": "72"}]) == lenient([response], [{"answer": "72"}]) == [0]


# ---- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", [{"question": "?"}, {"answer": None}, {"answer": " "}, {"answer": "####"}, {"answer": []}]
)
def test_a_record_without_an_answer_is_one_line(record):
    with pytest.raises(ValueError, match=r"^math_answer: answer: .*expected a number"):
        strict(["1"], [record])


def test_another_column():
    assert strict([r"\boxed{7}"], [{"solution": r"so \boxed{7}", "answer": "8"}], column="solution") == [1.0]


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(math_worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^math_answer: needs math-verify; pip install 'jaxrlhf\[math\]'$"):
        strict(["1"], [{"answer": "1"}])


def test_a_config_finds_them():
    function = resolve("jaxrlhf.rewards.math_answer:lenient")
    assert function(["it is 72", "it is 7"], [GSM8K, GSM8K]).tolist() == [1.0, 0.0]
