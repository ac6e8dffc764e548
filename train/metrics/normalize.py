"""Normalisation of texts before comparison: one function, its options recorded in every report.

Always: Unicode NFC, runs of whitespace (no-break and ideographic spaces too) to one space, strip. A
newline between the lines of a page therefore counts as a space. Case, punctuation and width are
kept unless an option says otherwise.
"""

import unicodedata
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

import regex

_WHITESPACE = regex.compile(r"\s+")
_PUNCTUATION = regex.compile(r"\p{P}+")
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]\p{M}*|[^\s\p{Han}\p{Hiragana}\p{Katakana}]+"
)
_GRAPHEME = regex.compile(r"\X")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}

_CURRENCY = r"(?:RM|MYR|USD|EUR|GBP|CNY|RMB|JPY|SGD|HKD|\p{Sc}|元|圆)"
_AMOUNT = regex.compile(
    rf"(?P<minus>-)?\s*{_CURRENCY}?\s*(?P<minus>-)?\s*(?P<digits>\d[\d.,]*)\s*{_CURRENCY}?",
    regex.IGNORECASE,
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"(?P<name>jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?"
_YEAR_FIRST = regex.compile(
    r"(?P<y>\d{4})\s*[-/.年]\s*(?P<a>\d{1,2})\s*[-/.月]\s*(?P<b>\d{1,2})\s*日?"
)
_YEAR_LAST = regex.compile(r"(?P<a>\d{1,2})\s*[-/.]\s*(?P<b>\d{1,2})\s*[-/.]\s*(?P<y>\d{4}|\d{2})")
_DAY_NAME_YEAR = regex.compile(
    rf"(?P<d>\d{{1,2}})[-\s]*{_MONTH}[-,\s]*(?P<y>\d{{4}}|\d{{2}})", regex.IGNORECASE
)
_NAME_DAY_YEAR = regex.compile(rf"{_MONTH}\s*(?P<d>\d{{1,2}}),?\s*(?P<y>\d{{4}})", regex.IGNORECASE)


@dataclass(frozen=True)
class NormalizeOptions:
    """What is ignored when two texts are compared.

    Attributes:
        casefold: upper and lower case are equal.
        no_punct: punctuation (Unicode category P) is dropped.
        fold_width: full-width ASCII and the ideographic space equal their half-width forms.
    """

    casefold: bool = False
    no_punct: bool = False
    fold_width: bool = False


DEFAULT_OPTIONS = NormalizeOptions()


def normalize(text: str, options: NormalizeOptions = DEFAULT_OPTIONS) -> str:
    """Return the text as it is compared (module docstring); applying it twice changes nothing."""
    text = unicodedata.normalize("NFC", text)
    if options.fold_width:
        text = text.translate(_FULL_WIDTH)
    if options.casefold:
        text = text.casefold()
    if options.no_punct:
        text = _PUNCTUATION.sub("", text)
    text = _WHITESPACE.sub(" ", text).strip()
    return unicodedata.normalize("NFC", text)  # folding and dropping can bring marks to a base


def graphemes(text: str) -> list[str]:
    """Return the extended grapheme clusters (the "characters" of every metric) of a text."""
    return _GRAPHEME.findall(text)


def words(text: str) -> list[str]:
    """Return the words: whitespace tokens, and each CJK ideograph or kana by itself."""
    return _WORD.findall(text)


def typed_value(
    text: str, options: NormalizeOptions = DEFAULT_OPTIONS, *, day_first: bool = True
) -> str:
    """Return a value by its meaning: `amount:1234.5`, `date:2019-01-02`, else the normalised text.

    Args:
        text: value of a field as it stands on the document.
        options: normalisation of what is neither an amount nor a date.
        day_first: read 02/01/2019 as the 2nd of January; a first number above 12 is always the day.
    """
    plain = normalize(text, NormalizeOptions(fold_width=True))
    day = _iso_date(plain, day_first)
    if day is not None:
        return f"date:{day}"
    amount = _amount(plain)
    return normalize(text, options) if amount is None else f"amount:{amount}"


def _amount(text: str) -> str | None:
    """Return a plain decimal number without trailing zeros; None if the text is no amount.

    Digits alone that start with 0 are a code ("0012"), not an amount.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    number = _decimal_point(match["digits"].rstrip(".,"))
    if number is None or (number.isdigit() and len(number) > 1 and number[0] == "0"):
        return None
    value = format(Decimal(number).normalize(), "f")
    return value if match["minus"] is None or value == "0" else f"-{value}"


def _decimal_point(digits: str) -> str | None:
    """Drop thousands separators and write the decimal one as a point; None if they make no sense.

    With both separators the last one is decimal. A lone comma before exactly three digits separates
    thousands; a lone point is always decimal; a separator that occurs twice separates thousands.
    """
    last = max(digits.rfind(","), digits.rfind("."))
    if last < 0:
        return digits
    separator, tail = digits[last], digits[last + 1 :]
    other = "." if separator == "," else ","
    thousands = digits.count(separator) > 1 or (
        separator == "," and other not in digits and len(tail) == 3
    )
    whole, fraction = (digits, "") if thousands else (digits[:last], tail)
    groups = regex.split(r"[.,]", whole)
    if len(groups) > 1 and (not 1 <= len(groups[0]) <= 3 or any(len(g) != 3 for g in groups[1:])):
        return None
    return "".join(groups) + (f".{fraction}" if fraction else "")


def _iso_date(text: str, day_first: bool) -> str | None:
    if match := _YEAR_FIRST.fullmatch(text):
        return _date(match["y"], match["a"], match["b"])
    if match := _YEAR_LAST.fullmatch(text):
        first, second = match["a"], match["b"]
        if int(first) > 12 or (day_first and int(second) <= 12):
            first, second = second, first
        return _date(match["y"], first, second)
    match = _DAY_NAME_YEAR.fullmatch(text) or _NAME_DAY_YEAR.fullmatch(text)
    if match is None:
        return None
    return _date(match["y"], str(_MONTHS.index(match["name"][:3].lower()) + 1), match["d"])


def _date(year: str, month: str, day: str) -> str | None:
    number = int(year)
    if len(year) == 2:  # POSIX strptime: 69-99 are the 1900s
        number += 1900 if number >= 69 else 2000
    try:
        return date(number, int(month), int(day)).isoformat()
    except ValueError:
        return None
