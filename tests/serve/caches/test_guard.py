"""Questions that look alike and ask for something else; and the same question in other words."""

from __future__ import annotations

import pytest

from snello.serve.caches.guard import Guard, of_the_moment, words_of

STRICT, LAX = Guard(), Guard(max_edits=1)

TURNED = [  # polarity
    ("Is it safe to take ibuprofen with alcohol?", "Is it not safe to take ibuprofen with alcohol?"),
    ("Is it safe to take ibuprofen with alcohol?", "Is it unsafe to take ibuprofen with alcohol?"),
    ("How do I enable dark mode?", "How do I disable dark mode?"),
    ("Can I cancel my subscription?", "Can't I cancel my subscription?"),
    ("Should I buy a house?", "Should I sell a house?"),
    ("How do you stop a nosebleed?", "How do you start a nosebleed?"),
    ("Does coffee increase blood pressure?", "Does coffee decrease blood pressure?"),
    ("Why is smoking legal?", "Why is smoking illegal?"),
    ("What are the advantages of nuclear power?", "What are the disadvantages of nuclear power?"),
    ("Can I eat before surgery?", "Can I eat after surgery?"),
    ("How do I log in without a password?", "How do I log in with a password?"),
    ("Which foods are good for the liver?", "Which foods are bad for the liver?"),
    ("Is Pluto a planet?", "Is Pluto no planet?"),
    ("Will it work?", "Won\u2019t it work?"),
    ("Why do people always lie?", "Why do people never lie?"),
    ("Was he guilty?", "Was she guilty?"),
]
COUNTED = [
    ("What is 15% of 80?", "What is 15% of 90?"),
    ("How do I lose 5 kg in 2 weeks?", "How do I lose 2 kg in 5 weeks?"),
    ("What happened in 1914?", "What happened in 1941?"),
    ("Convert 3.5 miles to kilometres", "Convert 35 miles to kilometres"),
    ("Who was the first president?", "Who was the second president?"),
    ("List five reasons to learn Go", "List six reasons to learn Go"),
    ("Is x < 5?", "Is x > 5?"),
    ("How do I use Python 2?", "How do I use Python 3?"),
    ("What costs $10?", "What costs \u20ac10?"),
    ("What is half of it?", "What is it?"),
]
WHOLE = [  # small words that turn a question round
    ("Can I hit you?", "Can you hit me?"),
    ("Can I drink this?", "Should I drink this?"),
    ("Who is the king of Spain?", "Who was the king of Spain?"),
    ("Are toys made for children?", "Are toys made by children?"),
    ("Do cats and dogs bite?", "Do cats or dogs bite?"),
    ("Will he win?", "Did he win?"),
    ("What is in the box?", "What is on the box?"),
    ("What\u2019ll happen?", "What happened?"),
    ("Is it just a dream?", "Is it a dream?"),
]
NAMED = [
    ("Who is the president of France?", "Who is the president of Germany?"),
    ("How far is Paris from London?", "How far is Paris from Madrid?"),
    ("How do I install NumPy?", "How do I install SciPy?"),
    ("Is C faster than Go?", "Is C++ faster than Go?"),
    ("What is GPT4?", "What is GPT5?"),
    ("Convert USD to EUR", "Convert EUR to USD"),
    ("Is Rust better than Go?", "Is Go better than Rust?"),
    ("What is the capital of australia?", "What is the capital of austria?"),
    ("Can the dog bite the man?", "Can the man bite the dog?"),
    ("When did Rome fall?", "Where did Rome fall?"),
]


@pytest.mark.parametrize(("one", "other"), [*TURNED, *COUNTED, *WHOLE, *NAMED])
def test_another_question_is_refused_in_both_directions(one: str, other: str) -> None:
    assert STRICT.refuses(one, other) and STRICT.refuses(other, one)
    assert STRICT.refuses(one, one) is None and LAX.refuses(other, other) is None


@pytest.mark.parametrize(("one", "other"), [*TURNED, *COUNTED])
def test_polarity_and_numbers_are_refused_whatever_the_edits(one: str, other: str) -> None:
    assert Guard(max_edits=9).refuses(one, other) in ("negation", "numbers", "opposites", "names", "content")
    assert Guard(max_edits=9).refuses(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I learn Python?", "how can i learn python"),
        ("What is the capital of France?", "What's the capital of France?"),
        ("Please explain how to bake bread.", "How to bake bread"),
        ("What are good tips for exams?", "What is a good tip for an exam?"),
        ("How do you learn to swim?", "How does one learn to swim?"),
        ("Why can't birds talk?", "Why cannot birds talk?"),
        ("Give me 3 tips", "give me three tips"),
        ("  What   is love ?", "What is love"),
    ],
)
def test_the_same_question_in_other_dress_passes(one: str, other: str) -> None:
    assert STRICT.refuses(one, other) is None and STRICT.refuses(other, one) is None


def test_an_edit_is_allowed_where_it_was_asked_for() -> None:
    one, other = "How do I quickly learn python?", "How do I learn python?"
    assert STRICT.refuses(one, other) == "content" and LAX.refuses(one, other) is None
    assert LAX.refuses(one, "How do I cook rice?") == "content"
    assert STRICT.digest != LAX.digest


@pytest.mark.parametrize(
    "text", ["", "?!", "\ud800", "日本の首都はどこですか", "a" * 5000, "don't " * 500, "\u0000", "é" * 9]
)
def test_any_text_has_words(text: str) -> None:
    assert STRICT.refuses(text, text) is None and words_of(text).negations in (0, 500)


def test_questions_of_the_moment() -> None:
    assert of_the_moment("What is the weather?") and of_the_moment("Who won today?")
    assert not of_the_moment("What is the capital of France?")
