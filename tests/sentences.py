"""How long the sentences of the pages are: `python -m tests.sentences`. Tables, code and headings are no sentences."""

from __future__ import annotations

import re
from pathlib import Path

from tests.pages import PAGES, ROOT

LONG = 25  # words
_LEFT_OUT = (
    (r"<!--.*?-->", ""),
    (r"^ *```.*?^ *```", "\n\n"),
    (r"^\s*\|.*$|^#+ .*$", "\n"),
    (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"),
    (r"`[^`]*`", "CODE"),
    (r"https?://\S+", "URL"),
)


def lengths(text: str) -> list[int]:
    """Words of each sentence of a page; an item of a list is at least one."""
    for pattern, by in _LEFT_OUT:
        text = re.sub(
            pattern, by, text, flags=re.DOTALL | re.MULTILINE if "```" in pattern or "<!" in pattern else re.M
        )
    found = []
    for part in re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. )", text):
        for sentence in re.split(r"(?<=[.!?])[*_)\"]*\s+(?=[A-Z(*_\"\d])", " ".join(part.split()).lstrip("-* ")):
            if words := [word for word in sentence.split() if re.search(r"\w", word)]:
                found.append(len(words))
    return found


def mean_and_long(found: list[int]) -> tuple[float, float]:
    """Words of the mean sentence, and the share of those with more than `LONG`."""
    return sum(found) / len(found), sum(count > LONG for count in found) / len(found)


def of_page(page: Path) -> list[int]:
    """`lengths` of a file."""
    return lengths(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in PAGES:
        if found := of_page(page):
            mean, share = mean_and_long(found)
            print(f"{page.relative_to(ROOT)!s:34} {sum(found):5} words, mean {mean:4.1f}, over {LONG}: {share:5.1%}")
    mean, share = mean_and_long([count for page in PAGES for count in of_page(page)])
    print(f"{'all':34} mean {mean:4.1f}, over {LONG}: {share:5.1%}")
