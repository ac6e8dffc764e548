"""What stands on a synthetic receipt or form, row by row, and the fields that it carries.

Amounts add up: the total is the sum of the items plus tax. A label and its value, an item and its
price are cells of their own, so that each becomes a box of its own.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

from data_tools.synth import phrases

MAX_CELL_CHARS = 40


@dataclass(frozen=True)
class Cell:
    """One piece of text.

    Attributes:
        text: what stands there, at most `MAX_CELL_CHARS` characters.
        column: where it is anchored, as a share of the text width of the page.
        align: which end of the text is anchored there.
        category: the field whose value it is, if any.
        divider: in a framed row, where the line before the cell stands, as a share of the width.
    """

    text: str
    column: float = 0.0
    align: Literal["left", "middle", "right"] = "left"
    category: str | None = None
    divider: float = 0.0


@dataclass(frozen=True)
class Row:
    """Cells side by side, from left to right.

    Attributes:
        cells: what stands in the row.
        scale: text size relative to that of the page.
        frame: `rule` draws a line below the row, `box` a frame with dividers between the cells.
        gap: free height above the row, in heights of a row.
    """

    cells: tuple[Cell, ...]
    scale: float = 1.0
    frame: Literal["none", "rule", "box"] = "none"
    gap: float = 0.0


@dataclass(frozen=True)
class Content:
    """A whole document: rows from top to bottom, and its fields by name."""

    rows: tuple[Row, ...]
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Item:
    name: str
    quantity: int
    price_cents: int

    @property
    def amount_cents(self) -> int:
        return self.quantity * self.price_cents


def receipt(rng: random.Random) -> Content:
    """Return the content of a till receipt: shop, number and date, items, total, closing words."""
    shout = rng.random() < 0.5
    company = phrases.company(rng).upper() if shout else phrases.company(rng)
    number, date = phrases.code(rng), phrases.date(rng)
    rows = [Row((_centred(company, "company"),), scale=1.25)]
    rows += [Row((_centred(line),)) for line in _address(rng)]
    rows.append(Row((_centred(f"{rng.choice(('Tel', 'TEL:', 'Ph.'))} {phrases.phone(rng)}"),)))
    number_label = rng.choice(("Invoice No", "INVOICE NO:", "Bill #", "Receipt No.", "Doc No :"))
    rows.append(_pair(number_label, number, "invoice_number", gap=0.5))
    rows.append(_pair(rng.choice(("Date", "DATE:", "Date :", "Issued")), date, "date"))
    rows.append(_pair(rng.choice(("Time", "TIME:", "Till", "Cashier")), _till_value(rng)))
    items = _items(rng, rng.randint(5, 11))
    item_rows, total = _item_rows(rng, items, frame="none")
    rows += item_rows
    rows += _closing(rng)
    fields = {"company": company, "date": date, "total": total, "invoice_number": number}
    return Content(tuple(rows), fields)


def form(rng: random.Random) -> Content:
    """Return the content of an invoice form: a framed block of fields and a framed table."""
    company, customer = phrases.company(rng), f"{phrases.name(rng)} {phrases.name(rng)}"[:24]
    number, date, due_date = phrases.code(rng), phrases.date(rng), phrases.date(rng)
    title = rng.choice(("INVOICE", "Tax Invoice", "Delivery Note", "ORDER FORM", "Statement"))
    rows = [
        Row((Cell(company, category="company"), Cell(title, 1.0, "right")), scale=1.2),
        *(Row((Cell(line),)) for line in _address(rng)),
    ]
    block = [
        (rng.choice(("Invoice No.", "Number", "Document:")), number, "invoice_number"),
        (rng.choice(("Date", "Invoice date", "Issued on")), date, "date"),
        (rng.choice(("Due date", "Payable by", "Due:")), due_date, "due_date"),
        (rng.choice(("Customer", "Bill to", "Sold to:")), customer, "customer"),
        (rng.choice(("Account", "Reference", "Your ref.")), phrases.code(rng), None),
        (rng.choice(("E-mail", "Contact", "Phone")), _contact(rng), None),
    ]
    for position, (label, value, category) in enumerate(block):
        gap = 0.6 if position == 0 else 0.0
        cells = (Cell(label), Cell(value, 0.34, category=category, divider=0.34))
        rows.append(Row(cells, frame="box", gap=gap))
    item_rows, total = _item_rows(rng, _items(rng, rng.randint(4, 9)), frame="box")
    rows += item_rows
    rows.append(_pair(rng.choice(("Signature", "Approved", "Received by")), customer, gap=0.6))
    fields = {
        "company": company,
        "date": date,
        "total": total,
        "invoice_number": number,
        "due_date": due_date,
        "customer": customer,
    }
    return Content(tuple(rows), fields)


def _centred(text: str, category: str | None = None) -> Cell:
    return Cell(text, 0.5, "middle", category)


def _pair(
    label: str, value: str, category: str | None = None, gap: float = 0.0, scale: float = 1.0
) -> Row:
    cells = (Cell(label), Cell(value, 1.0, "right", category))
    return Row(cells, scale=scale, gap=gap)


def _address(rng: random.Random) -> list[str]:
    street = f"{rng.randint(1, 240)} {phrases.name(rng)} {rng.choice(phrases.STREETS)}"
    town = f"{phrases.digits(rng, 5)} {phrases.name(rng)}"
    return [street[:30], town] if rng.random() < 0.8 else [f"{street}, {town}"[:MAX_CELL_CHARS]]


def _till_value(rng: random.Random) -> str:
    return rng.choice((phrases.clock(rng), phrases.name(rng), f"{phrases.digits(rng, 2)}"))


def _contact(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return phrases.phone(rng)
    return f"{phrases.name(rng).lower()}@{phrases.name(rng).lower()}.com"


def _items(rng: random.Random, count: int) -> list[_Item]:
    return [
        _Item(
            phrases.item(rng),
            rng.choice((1, 1, 2, 3, 4, 6, 12, 24)),
            int(10 ** rng.uniform(1.9, 4.4)),
        )
        for _ in range(count)
    ]


def _item_rows(
    rng: random.Random, items: list[_Item], frame: Literal["none", "box"]
) -> tuple[list[Row], str]:
    """Return the table of the items with tax and total below, and the total as printed."""
    has_quantity = rng.random() < 0.5
    head = [Cell(rng.choice(("Item", "DESCRIPTION", "Article", "Goods")))]
    if has_quantity:
        head.append(Cell(rng.choice(("Qty", "QTY", "Pcs")), 0.68, "right", divider=0.56))
    head.append(Cell(rng.choice(("Amount", "PRICE", "EUR", "RM")), 1.0, "right", divider=0.7))
    rows = [Row(tuple(head), frame="box" if frame == "box" else "rule", gap=0.6)]
    for item in items:
        cells = [Cell(item.name)]
        if has_quantity:
            cells.append(Cell(str(item.quantity), 0.68, "right", divider=0.56))
        cells.append(Cell(phrases.format_amount(item.amount_cents), 1.0, "right", divider=0.7))
        rows.append(Row(tuple(cells), frame=frame))
    subtotal = sum(item.amount_cents for item in items)
    percent = rng.choice((0, 6, 7, 10, 19, 20))
    tax = round(subtotal * percent / 100)
    currency = rng.choice(phrases.CURRENCIES)
    rows.append(
        _pair(
            rng.choice(("Subtotal", "Sub Total", "NET")), phrases.format_amount(subtotal), gap=0.4
        )
    )
    rows.append(
        _pair(f"{rng.choice(('VAT', 'GST', 'Tax'))} {percent}%", phrases.format_amount(tax))
    )
    total = phrases.format_amount(subtotal + tax, currency)
    label = rng.choice(("TOTAL", "Total", "Total due", "GRAND TOTAL", "Amount due:"))
    rows.append(_pair(label, total, "total", scale=1.2))
    return rows, total


def _closing(rng: random.Random) -> list[Row]:
    lines = (
        "Thank you!",
        "THANK YOU, COME AGAIN",
        "Goods sold are not returnable",
        "Exchange within 7 days (with receipt)",
        "* Please keep this bill *",
        f"www.{phrases.name(rng).lower()}.com",
        f"Card xx-{phrases.digits(rng, 4)} [OK]",
        f"Points: {rng.randint(1, 999)} + {rng.randint(1, 99)}",
    )
    chosen = rng.sample(lines, 2)
    return [
        Row((_centred(line),), gap=0.5 * (position == 0)) for position, line in enumerate(chosen)
    ]
