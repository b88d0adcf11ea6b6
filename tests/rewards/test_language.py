"""The language of a response: some sentences of each, what says too little, and mistakes."""

import pytest

from jaxrlhf.rewards.language import Language

SENTENCES = {
    "en": "This is a sentence about the weather, which was rather cold this morning.",
    "de": "Das ist ein Satz über das Wetter, das heute Morgen ziemlich kalt war.",
    "es": "Esta es una frase sobre el tiempo, que estaba bastante frío esta mañana.",
    "zh": "这是一个关于今天早上相当寒冷的天气的句子。",
}


@pytest.fixture(scope="module")
def english() -> Language:
    return Language("en")


def test_the_language_of_a_sentence(english):
    found = dict(zip(SENTENCES, english([*SENTENCES.values()], [{}] * 4)))
    assert found.pop("en") > 0.9 and max(found.values()) < 0.1


def test_the_language_of_the_records_among_few():
    grader = Language(column="to", among=["en", "de", "es", "zh"])
    records = [{"to": "de"}, {"to": "es"}, {"to": "en"}, {"to": None}]
    first, second, third, fourth = grader([SENTENCES["de"], SENTENCES["de"], "Short words", SENTENCES["en"]], records)
    assert first > 0.9 and second < 0.1 and third is not None and fourth is None


def test_what_says_too_little_has_no_score(english):
    assert english(["", "1 + 1 = 2", "So it is"], [{}] * 3) == [None, None, None]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "language: expected either language, or column of the records"),
        ({"language": "english"}, 'language: language: "english": unknown; '),
        ({"language": "en", "among": ["en", "xx"]}, 'language: among: "xx": unknown; '),
        ({"language": "fr", "among": ["en", "de"]}, 'language: language: "fr": unknown; choices: en, de'),
    ],
)
def test_mistakes_are_one_line(given, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        Language(**given)


def test_a_record_of_an_unknown_language():
    with pytest.raises(ValueError, match=r'^language: to: "klingon": unknown; '):
        Language(column="to")(["some words of English"], [{"to": "klingon"}])
