"""The tree in CONTRIBUTING.md is the tree that is there, and docs/architecture.md speaks of names that exist.

`python tests/test_architecture.py` writes the tree anew, from the first sentence of every module.
"""

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vc_vae_diffusers"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- tree: begin (python tests/test_architecture.py) -->\n", "<!-- tree: end -->"
# In the order in which they may import each other, as `ROOMS` of test_import_direction.py has it.
ROOMS = (
    *("operators", "operators/evaluation", "autoencoder", "video", "training", "generation", "publishing", "metrics"),
    *("evaluation", "report", "exporting", "coding", "app", "cli"),
)


def first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    return re.split(r"(?<!Sec)(?<!Eq)(?<!al)\.(?:\s|$)", text, maxsplit=1)[0]


def tree() -> str:
    """Rooms and their modules, a line each."""
    lines = []

    def module(path: Path, depth: int) -> None:
        head = f"{'  ' * depth}{path.name:<{30 - 2 * depth}}"
        lines.extend(textwrap.wrap(first_sentence(path), 121, initial_indent=head, subsequent_indent=" " * 30))

    for room in ROOMS:
        depth = room.count("/") + 1
        about = first_sentence(PACKAGE / room / "__init__.py")
        head = f"{'  ' * (depth - 1)}{room.split('/')[-1] + '/':<{32 - 2 * depth}}"
        lines.extend(textwrap.wrap(about, 121, initial_indent=head, subsequent_indent=" " * 30))
        for path in sorted((PACKAGE / room).glob("*.py")):
            if path.name != "__init__.py":
                module(path, depth)
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name != "__init__.py":
            module(path, 0)
    return "```\n" + "\n".join(lines) + "\n```\n"


def test_every_module_says_what_it_is():
    silent = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if not first_sentence(path)]
    assert not silent


def test_the_tree_is_the_one_that_is_there():
    text = PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == tree(), "run: python tests/test_architecture.py"
    rooms = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("__init__.py")} - {"."}
    assert rooms == set(ROOMS)


def names_of(page: Path) -> list[str]:
    """What stands in backticks and looks like a name of a room's module: `operators.tdc.GroupCausalTDC`."""
    heads = "|".join(room for room in ROOMS if "/" not in room)
    return sorted(set(re.findall(rf"`((?:{heads})(?:\.\w+)+)", page.read_text())))


@pytest.mark.parametrize("name", names_of(ROOT / "docs" / "architecture.md"))
def test_the_page_speaks_of_names_that_exist(name):
    parts = ["vc_vae_diffusers", *name.split(".")]
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return
    raise AssertionError(f"docs/architecture.md names {name}, which is nowhere")


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + tree() + END + rest.split(END, 1)[1])
