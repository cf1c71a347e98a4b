"""What mkdocs does with links that lead out of docs/: they name files of the repository, which the site does not hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links to files outside docs/ by the files' names; of one that is not there the link check will speak."""
    here = (ROOT / "docs" / page.file.src_uri).parent

    def plain(match: re.Match[str]) -> str:
        text, target, _anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (here / target).resolve()
        if path.is_relative_to(ROOT / "docs") or not path.exists():
            return match[0]
        name = path.relative_to(ROOT)
        return f"{text} (`{name}`)" if text.strip("`") != str(name) else f"`{name}`"

    return _LINK.sub(plain, markdown)
