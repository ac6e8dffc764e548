"""What synthetic text says: words, names, amounts, dates and whole text lines, from a seed.

Everything is ASCII. Words are put together from syllables or taken from a short list of words that
stand on receipts and invoices; no name is that of a real company or person on purpose.
"""

import random
import string
from collections.abc import Callable

PRINTABLE = string.ascii_letters + string.digits + string.punctuation
# Characters that reach cap height. A tight crop without any of them has no recoverable scale: `o`
# and `O`, `-` and `_` look alike, and such a label would be noise to learn from.
TALL = string.ascii_uppercase + string.digits + "bdfhklt"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _words(
    """
    total subtotal cash change tax invoice receipt date time cashier table order item price amount
    quantity discount rounding balance due paid card credit debit visa master number no ref member
    points thank you please come again goods sold are not returnable exchange within days with
    original bill service charge inclusive exclusive gst vat rate net gross sales counter terminal
    shop store market street road avenue park north south east west city centre floor unit level
    phone fax mail web open daily from to bread milk coffee tea rice sugar salt water juice apple
    banana orange chicken beef fish egg noodle soup cake pie cheese butter oil pepper onion garlic
    tomato potato lemon paper pen pencil book tape glue box bag bottle pack set large small medium
    red blue green black white steel wood glass plastic battery cable lamp bulb filter brush soap
    towel tissue cup plate knife fork spoon account customer address delivery payment method bank
    transfer signature approved code qty desc each per piece kg pcs ltd inc co sdn bhd
    """
)
ITEM_HEADS = _words(
    """
    Bread Milk Coffee Tea Rice Sugar Water Juice Apple Banana Orange Chicken Beef Fish Noodle Soup
    Cake Pie Cheese Butter Pepper Onion Tomato Potato Lemon Paper Pencil Notebook Tape Glue Battery
    Cable Lamp Bulb Filter Brush Soap Towel Cup Plate Knife Bolt Screw Hinge Valve Pump Hose Quartz
    """
)
ITEM_TAILS = _words(
    """
    large small medium 500g 1kg 2L 330ml x6 A4 XL blue red black white extra fresh organic sliced
    frozen 12pcs roll pack box jumbo mini 60W USB-C 5mm M8 10% off (new) #2 zero light
    """
)
COMPANY_TAILS = ("Ltd", "Inc.", "& Co.", "Trading", "Market", "Supplies", "Stores", "Foods", "GmbH")
STREETS = ("Street", "Road", "Avenue", "Lane", "Square", "Park", "Quay", "Hill")
CURRENCIES = ("", "", "", "$", "RM ", "EUR ", "USD ")

_SYLLABLES = _words(
    """
    ba be bo bra cal cen chi cor da del do dra el en fa fen fi for ga gel gra ha hel ho in jo ka kel
    ki kwa la len li lo ma mel mi mon na nel no or pa per pi qua ra ren ri ro sa sel shi so ta ten
    ti tor u va vel vi wa wen wi xa yo za zen
    """
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_SHORT_LINE_SHARE = 0.35
_SHORT_LINE_CHARS = 8


def name(rng: random.Random) -> str:
    """Return a capitalised invented name of two to four syllables."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def company(rng: random.Random) -> str:
    """Return an invented company name of at most 26 characters."""
    middle = f" {name(rng)}" if rng.random() < 0.3 else ""
    return f"{name(rng)}{middle} {rng.choice(COMPANY_TAILS)}"[:26].strip()


def digits(rng: random.Random, count: int) -> str:
    """Return a string of `count` decimal digits."""
    return "".join(rng.choice(string.digits) for _ in range(count))


def code(rng: random.Random) -> str:
    """Return a document or article number such as `INV-20417`, `A7/0093` or `9556939040116`."""
    prefix = rng.choice(("INV", "R", "NO", "CB", "SO", "TD", "A", "K", "Z"))
    return rng.choice(
        (
            f"{prefix}-{digits(rng, 5)}",
            f"{prefix}{digits(rng, 6)}",
            f"{prefix}{digits(rng, 1)}/{digits(rng, 4)}",
            digits(rng, rng.randint(6, 13)),
            f"#{digits(rng, 4)}-{rng.choice(string.ascii_uppercase)}",
        )
    )


def format_amount(cents: int, currency: str = "", thousands: bool = True) -> str:
    """Return an amount with two decimals: 123456 -> `1,234.56`, with the currency before it."""
    whole = f"{cents // 100:,}" if thousands else str(cents // 100)
    return f"{currency}{whole}.{cents % 100:02d}"


def amount(rng: random.Random) -> str:
    """Return an amount as receipts print it: `3.50`, `RM 12.00`, `-0.02`, `1,204.00`, `6%`."""
    cents = int(10 ** rng.uniform(0.5, 6.2))
    plain = format_amount(cents, rng.choice(CURRENCIES), thousands=rng.random() < 0.7)
    return rng.choice((plain, plain, plain, plain, f"-{plain}", f"{cents % 100}%", f"({plain})"))


def date(rng: random.Random) -> str:
    """Return a date in one of the forms in which it is printed."""
    year, month, day = rng.randint(1998, 2029), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice(
        (
            f"{day:02d}/{month:02d}/{year}",
            f"{day:02d}-{month:02d}-{year % 100:02d}",
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}.{month:02d}.{year}",
            f"{day} {_MONTHS[month - 1]} {year}",
            f"{_MONTHS[month - 1].upper()} {day}, {year}",
        )
    )


def clock(rng: random.Random) -> str:
    """Return a time of day, with or without seconds, 24 or 12 hours."""
    hour, minute, second = rng.randint(0, 23), rng.randint(0, 59), rng.randint(0, 59)
    return rng.choice(
        (
            f"{hour:02d}:{minute:02d}",
            f"{hour:02d}:{minute:02d}:{second:02d}",
            f"{hour % 12 or 12}:{minute:02d} {'PM' if hour >= 12 else 'AM'}",
        )
    )


def phone(rng: random.Random) -> str:
    """Return a telephone number."""
    return rng.choice(
        (
            f"+{digits(rng, 2)} {digits(rng, 3)} {digits(rng, 4)}",
            f"{digits(rng, 3)}-{digits(rng, 7)}",
            f"({digits(rng, 2)}) {digits(rng, 4)} {digits(rng, 4)}",
        )
    )


def item(rng: random.Random) -> str:
    """Return the name of an article of at most 20 characters."""
    text = f"{rng.choice(ITEM_HEADS)} {rng.choice(ITEM_TAILS)}"
    if rng.random() < 0.25:
        text += f" {digits(rng, 2)}"
    return _cased(rng, text)[:20].strip()


def line_text(rng: random.Random, max_chars: int) -> str:
    """Return one text line of at most `max_chars` characters.

    Lengths are uniform in 1..max_chars, but for 35 % of the lines uniform in 1..8, so that short
    and long ones are both plentiful. Content: 30 % random printable characters, 20 % amounts, 10 %
    dates, times and numbers, 40 % words as on receipts. At least one character is a tall one.
    """
    longest = max_chars
    if rng.random() < _SHORT_LINE_SHARE:
        longest = min(max_chars, _SHORT_LINE_CHARS)
    length = rng.randint(1, longest)
    draw = rng.random()
    if draw < 0.3:
        text = _random_characters(rng, length)
    elif draw < 0.5:
        text = _fill(rng, length, amount)
    elif draw < 0.6:
        text = _fill(rng, length, _number)
    else:
        text = _fill(rng, length, _word_group)
    if not any(character in TALL for character in text):
        position = rng.randrange(len(text))
        text = text[:position] + rng.choice(TALL) + text[position + 1 :]
    return text


def _random_characters(rng: random.Random, length: int) -> str:
    characters = [rng.choice(PRINTABLE) for _ in range(length)]
    if rng.random() < 0.5:  # half of them in groups, as codes are; a blank never at an end
        for position in range(1, length - 1):
            if rng.random() < 0.15 and characters[position - 1] != " ":
                characters[position] = " "
    return "".join(characters)


def _fill(rng: random.Random, length: int, draw_piece: Callable[[random.Random], str]) -> str:
    text = draw_piece(rng)
    while len(text) < length:
        text += " " + draw_piece(rng)
    start = rng.randint(0, len(text) - length)
    while text[start] == " ":
        start += 1
    return text[start : start + length].strip()


def _number(rng: random.Random) -> str:
    return rng.choice((date, clock, code, phone))(rng)


def _word_group(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.15:
        return _cased(rng, name(rng))
    if draw < 0.25:
        return rng.choice((amount, code, date, phone))(rng)
    word = _cased(rng, rng.choice(WORDS))
    if draw < 0.35:
        return f"{word}{rng.choice((':', '.', ',', ' :', ' -', '/', '!', '?', ';', '*', ')'))}"
    if draw < 0.4:
        return f"{digits(rng, 1)} X {word}"
    return word


def _cased(rng: random.Random, text: str) -> str:
    draw = rng.random()
    if draw < 0.4:
        return text.upper()
    return text.capitalize() if draw < 0.75 else text.lower()
