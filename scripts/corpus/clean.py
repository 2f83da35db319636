"""What counts as English running text, and how documents are cut."""

import re
from collections.abc import Iterator


def words(text: str) -> set[str]:
    """The words of a text: lists that are read at a glance."""
    return set(text.split())


FUNCTION_WORDS = words(
    "the of and to a in is that for it as be on with by are this or not from an you can at if which "
    "have was has will but his he all they their we when there one no so more would what may any your "
    "my who him she her than then them these were been do does must should only into such other its "
    "also"
)


def prose(paragraph: str, strict: bool = True) -> bool:
    """Whether a paragraph is running text: letters, and in longer ones a fifth of function words."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    found = re.findall(r"[A-Za-z']+", paragraph.lower())
    if letters < (0.82 if strict else 0.75) * len(paragraph) or len(found) < 4:
        return False
    return len(paragraph) < 120 or sum(word in FUNCTION_WORDS for word in found) > 0.22 * len(found)


def clean(text: str, strict: bool = True) -> str:
    """The running text of a text in paragraphs, with up to two headings that stand before each piece."""
    kept: list[str] = []
    headings: list[str] = []
    for part in (p.strip() for p in text.split("\n\n")):
        foreign = sum(ord(c) > 0x24F and not 0x2010 <= ord(c) <= 0x2122 for c in part)
        if not part or foreign > 0.03 * len(part):
            continue
        if len(part) >= 60 and prose(part, strict):
            kept += [*headings[-2:], part]
            headings = []
        elif len(part) < 90 and sum(c.isalpha() or c == " " for c in part) > 0.7 * len(part):
            headings.append(part)
    return "\n\n".join(kept)


def split(title: str, text: str, limit: int = 400_000) -> Iterator[tuple[str, str]]:
    """Documents of at most about `limit` characters, cut between paragraphs."""
    parts: list[str] = []
    size, number = 0, 1
    for part in text.split("\n\n"):
        if parts and size + len(part) > limit:
            yield f"{title} part {number}", "\n\n".join(parts)
            parts, size, number = [], 0, number + 1
        parts.append(part)
        size += len(part) + 2
    if parts:
        yield (f"{title} part {number}" if number > 1 else title), "\n\n".join(parts)
