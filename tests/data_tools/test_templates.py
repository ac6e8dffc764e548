"""Templates: the shipped files, answers and their way back, messages for wrong files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import ConfigError
from data_tools.templates import Template, load_template, template_names

FIELD_VALUES = st.one_of(st.none(), st.text(max_size=12), st.lists(st.text(max_size=5), max_size=3))
GUIDE_PROMPT = (
    "请从图片中提取以下字段：\n1. 发票号码:<text>\n2. 开票日期:<date>\n3. 金额合计:<currency>"
)


def test_every_shipped_template_loads_under_its_own_name() -> None:
    assert template_names() == [
        "invoice-fields-zh",
        "lines-en",
        "lines-zh",
        "receipt-fields-en",
        "text-en",
        "text-plain",
        "text-zh",
    ]
    for name in template_names():
        template = load_template(name)
        assert template.name == name
        assert bool(template.prompt) == (name != "text-plain")


def test_invoice_template_has_the_prompt_of_the_guide() -> None:
    template = load_template("invoice-fields-zh")
    assert template.prompt == GUIDE_PROMPT
    fields = {"invoice_number": "No.8", "date": "2024-01-02", "total": None, "other": "x"}
    answer = template.answer(fields)
    assert answer == "1. 发票号码:No.8\n2. 开票日期:2024-01-02\n3. 金额合计:"
    assert template.parse(answer) == {"invoice_number": "No.8", "date": "2024-01-02", "total": None}


@given(st.fixed_dictionaries({name: FIELD_VALUES for name in ("company", "date", "total")}))
def test_json_answer_comes_back(fields: dict) -> None:
    template = load_template("receipt-fields-en")
    expected = {"company": None, "date": None, "address": None, "total": None} | fields
    assert template.parse(template.answer(fields)) == expected
    assert template.parse(f"```json\n{template.answer(fields)}\n```") == expected


@given(st.text(max_size=20), st.text(max_size=20))
def test_numbered_answer_comes_back_up_to_white_space(number: str, total: str) -> None:
    template = load_template("invoice-fields-zh")
    found = template.parse(template.answer({"invoice_number": number, "total": total}))
    assert found["invoice_number"] == (" ".join(number.split()) or None)
    assert found["total"] == (" ".join(total.split()) or None)


@pytest.mark.parametrize(
    "text",
    [
        '{"total": "9.99"}',
        '```json\n{"total": "9.99", "colour": "red"}\n```',
        'Here it is:\n```\n{"total": "9.99"}',
        'The {fields} are {"total": "9.99"}. Anything {else}?',
    ],
)
def test_json_is_found_among_fences_and_words(text: str) -> None:
    assert load_template("receipt-fields-en").parse(text) == {"total": "9.99"}


@pytest.mark.parametrize("text", ["", "no", "{", "}{", '{"total": ', "[1, 2]", "{" * 5000 + "}"])
def test_unreadable_answer_gives_no_fields(text: str) -> None:
    assert load_template("receipt-fields-en").parse(text) == {}
    assert load_template("invoice-fields-zh").parse(text) == {}


def test_numbered_answer_tolerates_wide_punctuation() -> None:
    found = load_template("invoice-fields-zh").parse(
        "```\n1、发票号码：A 1\n3．金额合计: 5:00\n```"
    )
    assert found == {"invoice_number": "A 1", "total": "5:00"}


def test_fence_inside_a_value_is_kept() -> None:
    template = load_template("receipt-fields-en")
    assert (
        template.parse(template.answer({"company": "a ```b``` {c}"}))["company"] == "a ```b``` {c}"
    )


def test_numbers_in_json_become_text() -> None:
    found = load_template("receipt-fields-en").parse('{"total": 9.5, "date": [1, "x"]}')
    assert found == {"total": "9.5", "date": ["1", "x"]}


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match='no template "text-eng"; did you mean "text-en"?'):
        load_template("text-eng")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\ntask: text\nlanguage: en\npromt: x", "promt: unknown key, did you mean prompt"),
        ("name: a\ntask: read\nlanguage: en", "task: .*'text', 'lines' or 'fields'"),
        ("name: a\ntask: fields\nlanguage: en", "must be listed for the task fields"),
        ("name: a\ntask: text\nlanguage: en\nfields: [{name: x, key: x}]", "and only for it"),
        (
            "name: a\ntask: fields\nlanguage: en\nfields: [{name: x, key: x}, {name: y, key: x}]",
            "two fields have the same key x",
        ),
        ("name: [", "not YAML"),
        ("- 1", "the template: "),
    ],
)
def test_wrong_file_is_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_template(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template(str(tmp_path / "absent.yaml"))


def test_names_in_a_json_answer_may_differ_from_keys() -> None:
    fields = [{"name": "发票号码", "key": "invoice_number"}]
    template = Template.model_validate(
        {"name": "own", "task": "fields", "language": "zh", "fields": fields}
    )
    assert template.answer({"invoice_number": "A1"}) == '{"发票号码": "A1"}'
    assert template.parse('{"发票号码": "A1", "invoice_number": "B2"}') == {"invoice_number": "A1"}


def test_own_template_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("name: own\ntask: text\nlanguage: fr\nprompt: Lis le texte.\n")
    template = load_template(str(path))
    assert template == Template(name="own", task="text", language="fr", prompt="Lis le texte.")
