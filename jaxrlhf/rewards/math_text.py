r"""Where the answer is in a text (the last \boxed{} or #### of a solution), and what it says, however it is spelled.

Text in, an Answer out; nothing is compared here."""

import re
import unicodedata
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

LONGEST = 500  # characters of an answer; what is longer is none

# ---- one spelling ---------------------------------------------------------------------------------------------------

SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2013\u2014\ufe63\uff0d", "-"),  # minus signs, dashes
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u00f7": r"\div ",
    "\u00b1": r"\pm ",
    "\u221e": r"\infty ",
    "\u03c0": r"\pi ",
    "\u2044": "/",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u00b0": r"^\circ ",
    "\u221a": r"\sqrt ",
    "\u2019": "'",
}
SPELLING = str.maketrans(SIGNS)
HIGH = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d]|,\d)")
PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"), ("`", "`"))
BEFORE = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is|=|:)*\s*:?|\\(?:displaystyle|approx|boldsymbol)\b|=", re.I)


def plain(text: str) -> str:
    """``text`` in one spelling: ASCII signs and digits, TeX's spaces as blanks."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: f"^{{{found[0].translate(HIGH)}}}", text)
    text = re.sub("√ *\\(([^()]*)\\)", r"\\sqrt{\1}", text).translate(SPELLING)
    text = "".join(spelled(letter) for letter in text)
    text = re.sub(r"(?<!\\)\\!|\{([,.])\}", r"\1", text)
    return re.sub(r"(?<!\\)\\[,;: ]|(?<!\\)~|\\q?quad\b", " ", text)


def spelled(letter: str) -> str:
    """Full-width forms and fractions of one character as several ASCII ones."""
    if letter.isascii():
        return letter
    if unicodedata.decomposition(letter).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", letter).replace("\u2044", "/")
    if unicodedata.decimal(letter, None) is not None or "\uff01" <= letter <= "\uff5e":
        return unicodedata.normalize("NFKC", letter)
    return letter


def bare(text: str) -> str:
    """``text`` without what stands around an answer: math delimiters, emphasis, "the answer is", a full stop."""
    before = None
    while text != before:
        before, text = text, text.strip().rstrip(".,;:\\").strip()
        for left, right in PAIRS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right) and left not in inner:
                text = inner
        found = BEFORE.match(text)
        text = text[found.end() :] if found and found[0] else text
        spans = boxes(text)
        text = text[spans[-1][1] : spans[-1][2]] if spans and spans[-1][0] == 0 and spans[-1][3] == len(text) else text
        group = re.fullmatch(r"\{([^{}]*)\}", text) or TEXT.fullmatch(text)
        text = group[1] if group else text
    return text


# ---- where it is ----------------------------------------------------------------------------------------------------

Span = tuple[int, int, int, int]  # begin, begin of the inside, its end, end
BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|(?P<short>\\(?:boxed|fbox)(?:\s+(?=[^\s{])|(?=\d)))|\\.|\{|\}", re.S
)
MARK = re.compile(r"####\s{0,9}([^\n#]*)")
JOINED = re.compile(r"[\s$,;]{0,9}(?:\\text\s?\{\s{0,3})?(?:and|or|,|;)?(?:\s{0,3}\})?[\s$,;]{0,9}")


def boxes(text: str) -> list[Span]:
    r"""The outermost \boxed{} and \fbox{} that are closed, in order, with whatever braces inside; \boxed 5 too."""
    found: list[Span] = []
    opened: list[tuple[int, int] | None] = []  # of each open brace: begin and inside of a box
    for token in BRACES.finditer(text):
        if token["box"]:
            opened.append(token.span())
        elif token["short"]:
            end = token.end() + len(re.split(r"[\s$]", text[token.end() : token.end() + LONGEST], maxsplit=1)[0])
            found.append((token.start(), token.end(), end, end))
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened and (box := opened.pop()):
            while found and found[-1][0] > box[0]:
                found.pop()
            found.append((*box, token.start(), token.end()))
    return found


def marked(text: str) -> str | None:
    r"""What the last mark of a solution says, \boxed{} or ####; None where there is no mark. An empty box is none.
    Boxes with nothing but a comma, "and" or "or" between them are one answer with several parts."""
    mark = next(reversed([*MARK.finditer(text)]), None)
    found = [span for span in boxes(text) if text[span[1] : span[2]].strip()]
    if mark and (not found or mark.start() > found[-1][0]):
        return mark[1]
    if not found:
        return None
    parts = [found[-1]]
    for span in reversed(found[:-1]):
        if not JOINED.fullmatch(text[span[3] : parts[0][0]]) or span[3] == parts[0][0]:
            break
        parts.insert(0, span)
    return ", ".join(text[begin:end] for _, begin, end, _ in parts)


# ---- numbers --------------------------------------------------------------------------------------------------------

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+"
CURRENCY = r"\\?[$€£¥₹]"
QUANTITY = re.compile(
    rf"(?:(?P<sign>[-+])\s{{0,3}})?(?:{CURRENCY}\s{{0,3}})?(?P<inner>-)?(?P<number>{NUMBER})"
    r"(?:\s{1,3}(?P<top>\d+)\s?/\s?(?P<bottom>\d+)|\s?/\s?(?P<divisor>\d+))?(?![\d/]|\.\d)"
)
LOOSE = re.compile(rf"(?<![\w.\\]){QUANTITY.pattern}")  # in running text
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
UNIT = re.compile(
    r"\\(?:text|textrm|mathrm|mbox|textbf)\s*\{[^{}]*\}|\^\s*\{?\s*\\circ\s*\}?|[A-Za-z]{2,}|[€£¥₹]"
    r"|(?:m|g|J|N|L)/(?:s|h|m|L|g|min|kg)\b"
)
REMARK = re.compile(
    r"[\s.;:)\]]*$|\.\s+[A-Za-z]|\([A-Za-z]{3,}[^()]*\)[\s.]*$"
)  # the next sentence, a word in brackets
FORMULA_SIGN = re.compile(r"\\(?!text|math|mbox|circ)|=")
NO_UNIT = re.compile(r"(?:and|or|to|plus|minus|times|mod|pi|sqrt|frac|sin|cos|tan|log|ln|exp|inf)\b", re.I)
TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox|textbf)\s*\{([^{}]*)\}")


class Answer(NamedTuple):
    """What an answer says."""

    text: str  # LaTeX
    values: frozenset[Fraction] = frozenset()  # of a number: itself, and of 50% also 1/2; empty for anything else
    decimal: bool = False  # the number is written without a fraction or percent: others are compared exactly
    words: str | None = None  # where it is text


def read(text: str) -> Answer | None:
    """The answer that ``text`` is, as it stands in a box or behind a mark; None where it is none."""
    text = bare(plain(text)) if len(text) <= LONGEST else ""
    if not text:
        return None
    found = QUANTITY.match(text)
    if found and (rest := ending(text[found.end() :])) is not None:
        return number(found, *rest)
    words = " ".join(TEXT.sub(r"\1", text).split()).strip("() .")
    if re.fullmatch(r"[A-Z]|[A-Za-z][A-Za-z' -]+", words) and not NO_UNIT.match(words):
        return Answer(text, words=words.casefold())
    if re.match(r"[A-Za-z]{2,}[\s:,]", text) and not re.search(r"[\\^=]", text) and (last := last_number(text)):
        return last._replace(words=text.casefold() if len(text.split()) <= 3 else None)  # a name, a date; a sentence
    text = THOUSANDS.sub(lambda found: re.sub("[ ,]", "", found[0]), text) if not re.search(r"[\[({]", text) else text
    return Answer(re.sub(CURRENCY, "", text))


def ending(rest: str) -> tuple[bool, int] | None:
    """(percent, power of ten) of what stands behind a number, where it is that, a unit or a remark; None where the
    number is part of something else."""
    percent = re.match(r"\s*(?:\\?%|percent\b|per cent\b)", rest)
    rest, power = (rest[percent.end() :] if percent else rest).lstrip(), 0
    while (scale := re.match(r"([A-Za-z]+)\b\s*", rest)) and scale[1].lower() in SCALES:
        power, rest = power + SCALES[scale[1].lower()], rest[scale.end() :]
    if not REMARK.match(rest):
        unit = UNIT.match(rest)
        if not unit or NO_UNIT.match(TEXT.sub(r"\1", unit[0]).strip()) or FORMULA_SIGN.search(rest):
            return None
    return bool(percent), power


def number(found: re.Match, percent: bool = False, power: int = 0) -> Answer | None:
    """The number that QUANTITY found; None for one of more digits than anybody means."""
    if len(found[0]) > 100 or not (bottom := int(found["bottom"] or found["divisor"] or 1)):
        return None
    value = Fraction(re.sub("[ ,]", "", found["number"]))
    value = value + Fraction(int(found["top"]), bottom) if found["top"] else value / bottom
    value *= (-1) ** ((found["sign"] == "-") + (found["inner"] == "-")) * 10**power
    decimal = bottom == 1 and not percent
    if value.denominator == 1:
        shown = str(value.numerator)
    elif bottom == 1:
        with localcontext(prec=1200):
            shown = f"{Decimal(value.numerator) / Decimal(value.denominator):f}"
    else:
        shown = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return Answer(shown + r"\%" * percent, frozenset({value, value / 100} if percent else {value}), decimal)


def last_number(text: str) -> Answer | None:
    """The last number in running text, with the percent sign or unit behind it; None where there is none."""
    text = plain(text)
    found = [*LOOSE.finditer(text)]
    if not found:
        return None
    behind = ending(text[found[-1].end() :][:LONGEST])
    return number(found[-1], *behind) if behind else number(found[-1])


# ---- in running text ------------------------------------------------------------------------------------------------

FORMULA = re.compile(
    r"\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$(?!\d)"
    r"|((?<!\d)-?\d{0,9}\\(?:[dt]?frac\s?\{[^{}]*\}\s?\{[^{}]*\}|sqrt\s?\{[^{}]*\}))",
    re.S,
)
SAID = re.compile(r"answer\s*(?:is|:)\s*:?\s*([^\n]+)", re.I)


def mentioned(text: str) -> list[Answer]:
    """What a text without a mark may mean by its answer: its last number or formula, and in words what it says behind
    "answer is" or in its last line."""
    formulas = [
        found
        for found in FORMULA.finditer(text)
        if not re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", TEXT.sub("", found[0]))
    ]
    numbers = [*LOOSE.finditer(plain(text))]
    inside = formulas and not [*LOOSE.finditer(plain(text[formulas[-1].end() :]))]
    found = [read(next(filter(None, formulas[-1].groups())))] if inside else [last_number(text) if numbers else None]
    lines = [line for line in text.splitlines() if line.strip()]
    said = SAID.findall(text)
    words = [read(part) for part in (said[-1].split(". ")[0] if said else "", lines[-1] if lines else "")]
    return [answer for answer in found if answer] + [answer for answer in words if answer and answer.words]


def final_answer(text: str) -> str | None:
    r"""The answer of a response, equal for equal numbers: its last \boxed{} or ####, else its last number."""
    mark = marked(text)
    answer = last_number(text) if mark is None else read(mark)
    if answer is None:
        return None
    return answer.words or (str(min(answer.values)) if answer.values else answer.text)
