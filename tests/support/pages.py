"""Pages, parsed as strictly as HTML can be."""

import re
from collections.abc import Iterator
from itertools import product
from typing import Any
from xml.etree.ElementTree import Element

import html5lib


def parsed(page: str) -> Element:
    """The tree of a page. Raises html5lib's ParseError at anything that is not valid."""
    parser: Any = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return parser.parse(page)


def text_of(element: Element) -> str:
    """All text in it, with single spaces."""
    return " ".join("".join(element.itertext()).split())


def having(root: Element, name: str) -> Iterator[Element]:
    """The elements of a class."""
    return (element for element in root.iter() if name in element.get("class", "").split())


def names(pattern: str) -> list[str]:
    """What `layers.{0–1,3}.q` stands for."""
    parts = [re.split("[{}]", part)[1:2] or [part] for part in pattern.split(".")]
    return [".".join(chosen) for chosen in product(*(_numbers(*part) for part in parts))]


def _numbers(part: str) -> list[str]:
    if not re.fullmatch(r"[\d–,]+", part):
        return [part]
    ends = [run.split("–") for run in part.split(",")]
    return [str(number) for run in ends for number in range(int(run[0]), int(run[-1]) + 1)]
