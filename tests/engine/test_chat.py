"""Conversations as prompts: the form of `ask` without a template, the template with one, stable prefixes."""

import copy

import pytest
from transformers import AutoTokenizer

from opensala.data.prompts import PromptFormat
from opensala.engine import shipped_model
from opensala.engine.chat import Message, encode_chat

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] or "
    "(m.role == 'system' and not loop.first) %}{{ raise_exception('system comes first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
DOCUMENT = "The access code for the north gate is 48213.\n\n" + "Nothing else happened.\n" * 20
QUESTION = "What is the access code for the north gate?"


@pytest.fixture(scope="module")
def plain():
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def chatty(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def talk(*turns):
    return [Message(role, (text,) if isinstance(text, str) else tuple(text)) for role, text in turns]


def text(tokenizer, *turns, **options):
    return tokenizer.decode(encode_chat(tokenizer, talk(*turns), **options).ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "turns",
    [
        [("user", f"{DOCUMENT}\n\n{QUESTION}")],
        [("user", [DOCUMENT, QUESTION])],
        [("system", DOCUMENT), ("user", QUESTION)],
        [("user", f"{DOCUMENT}\n\n{QUESTION}".replace("\n", "\r\n"))],
    ],
)
def test_without_a_template_it_is_what_ask_asks(plain, turns):
    made = encode_chat(plain, talk(*turns))
    assert made.ids == PromptFormat(plain).encode_question(DOCUMENT, QUESTION)[0]
    assert made.stop == ("\nQuestion:",) and made.trims
    assert plain.decode(made.ids[: made.marks[-1]], skip_special_tokens=True).rstrip() == DOCUMENT.rstrip()


def test_without_a_template_turns_stand_where_they_were(plain):
    turns = [("user", "Text one.\n\nWho?"), ("assistant", "Ada"), ("user", "More text.\n\nWhen?")]
    assert text(plain, *turns) == (
        "Text one.\n\nQuestion: Who?\nAnswer: Ada\n\nMore text.\n\nQuestion: When?\nAnswer:"
    )
    assert text(plain, ("user", "Who?")) == "Question: Who?\nAnswer:"
    unasked = [("assistant", "Hello."), ("assistant", "Ask."), ("user", "Who?")]
    assert text(plain, *unasked) == "Hello.\n\nAsk.\n\nQuestion: Who?\nAnswer:"
    begun = [("user", "Who?"), ("assistant", "It is A")]
    assert text(plain, *begun, continue_final=True) == "Question: Who?\nAnswer: It is A"


def test_a_template_is_used(chatty):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"), ("user", ["One", "two"])]
    made = encode_chat(chatty, talk(*turns))
    assert chatty.decode(made.ids) == (
        "[system]Be brief.[end]\n[user]Hi[end]\n[assistant]Yes[end]\n[user]One\ntwo[end]\n[assistant]"
    )
    assert made.stop == () and not made.trims
    heads = [chatty.decode(made.ids[:m]) for m in made.marks]
    assert heads[0].endswith("Yes[end]\n") and heads[-1].endswith("two")
    assert (
        text(chatty, ("user", "Hi"), ("assistant", "Y"), continue_final=True) == "[user]Hi[end]\n[assistant]Y"
    )


@pytest.mark.parametrize("which", ["plain", "chatty"])
@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("x-anthropic-billing-header: cc_version=1; cch=9a;", "x-anthropic-billing-header: cc_version=2;"),
        ("Today's date is 2026-11-26.", "Today's date is 2026-11-27."),
        ("- Current date and time: 2026-11-26 10:00", "- Current date and time: 2026-11-26 10:01"),
        ("Today is Thursday, 26 November 2026", "Today is Friday, 27 November 2026"),
    ],
)
def test_a_billing_or_date_line_does_not_end_the_prefix(which, one, two, request):
    """The prompts of two calls begin alike up to a mark behind the document, which is nearly all of them."""
    tokenizer = request.getfixturevalue(which)
    calls = []
    for line in (one, two):
        system = f"You answer briefly.\n{line}\nThe rules follow.\n{DOCUMENT}"
        calls.append(encode_chat(tokenizer, talk(("system", system), ("user", f"A text.\n\n{QUESTION}"))))
    a, b = calls
    place = a.marks[-1]
    assert a.marks[-1] == b.marks[-1] and a.ids[:place] == b.ids[:place] and place > 0.6 * len(a.ids)
    whole = tokenizer.decode(a.ids)
    assert ("billing" not in whole) and (one in whole or "billing" in one or one.lstrip("- ") in whole)
    assert whole.index("The rules follow.") < whole.index("A text.")
    if "billing" not in one:
        assert whole.index("A text.") < whole.index(one.strip())  # the model still sees it


@pytest.mark.parametrize("which", ["plain", "chatty"])
def test_a_date_line_stands_once_and_late(which, request):
    tokenizer, day = request.getfixturevalue(which), "Today's date is 2026-11-26."
    turns = [("system", f"Be brief.\n{day}"), ("user", "Text one.\n\nWho?"), ("assistant", "Ada")]
    whole = text(tokenizer, *turns, ("user", "Text two.\n\nWhen?"))
    assert whole.count(day) == 1 and whole.index("Text two.") < whole.index(day)


def test_lines_that_only_look_like_dates_stay(plain):
    kept = "Date: 2026-11-26\nThe current debate is 20 years old.\nToday we learn\nDue today: nothing"
    assert text(plain, ("system", kept), ("user", "Who?")).startswith(kept)
    moved = "Today's date is 2026-11-26."
    assert text(plain, ("system", f"{moved}\nB"), ("user", "Who?"), stable=False).startswith(moved)
    assert text(plain, ("user", f"{moved}\nB\n\nWho?")).startswith(moved)  # only of system messages


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "no text of a user"),
        ([("system", "a")], "no text of a user"),
        ([("user", "  ")], "no text of a user"),
        (
            [("boss", "a"), ("user", "b")],
            r"messages\[0\].role must be one of system, user, assistant, tool, got 'boss'",
        ),
        ([("user", "\ud800")], r"messages\[0\] is not valid UTF-8"),
        ([("user", "b"), ("system", "a")], "must end with the user's question"),
    ],
)
def test_conversations_that_cannot_be(plain, turns, says):
    with pytest.raises(ValueError, match=says):
        encode_chat(plain, talk(*turns))


def test_what_a_template_refuses_is_said(chatty):
    with pytest.raises(ValueError, match="do not fit the model's chat template: system comes first"):
        encode_chat(chatty, talk(("user", "a"), ("system", "b"), ("user", "c")))
    with pytest.raises(ValueError, match="only an answer can be continued"):
        encode_chat(chatty, talk(("user", "a")), continue_final=True)
