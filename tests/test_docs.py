"""What README, pages and cards say can be typed: commands parse, Python imports, files and names are there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from vc_vae_diffusers.cli.app import app
from vc_vae_diffusers.evaluation.protocols import protocol_names
from vc_vae_diffusers.report.paper import TABLES

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),  # which speaks of what is gone
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("README.md"),
    ]
)
VCVAE = get_command(app)
# What may stand for a value in an example.
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*|….*|N|.*FOLDER.*")
VALUES = {
    ("evaluate", "--protocol"): lambda value: value in protocol_names() or value.endswith(".yaml"),
    ("report", "--paper"): lambda value: value in TABLES,
}
NAMES = {"fetch-weights": {"lpips", "i3d"}}
TRAINING = "".join(path.read_text() for path in sorted((ROOT / "src/vc_vae_diffusers/training").rglob("*.py")))
LAUNCHERS = {"--config_file", "--num_processes", "--mixed_precision", "--cpu", "--multi_gpu", "--num_machines"}


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Snippet]:
    """Fenced blocks of a language; for the shell also those that are indented."""
    text = page.read_text(encoding="utf-8")
    found = [
        Snippet(page, text[: match.start()].count("\n") + 2, match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if match[1] == language
    ]
    if language == "bash":
        fenced = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
        found += [
            Snippet(page, fenced[: match.start()].count("\n") + 1, match[0])
            for match in re.finditer(r"(?<=\n\n)(?: {4}.*\n)+", fenced)
        ]
    return found


def commands(page: Path) -> list[Snippet]:
    """Every line of a shell block, joined where it goes on, and inline code that begins as a command does."""
    found = []
    for block in blocks(page, "bash"):
        number = block.line
        for line in block.text.replace("\\\n", "\0").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                found.append(Snippet(page, number, line.replace("\0", " ").strip()))
            number += 1 + line.count("\0")
    for match in re.finditer(r"`((?:vcvae|make|bash|python|accelerate) [^`]+)`", page.read_text(encoding="utf-8")):
        found.append(Snippet(page, page.read_text(encoding="utf-8")[: match.start()].count("\n") + 1, match[1]))
    return found


def words_of(text: str) -> list[str]:
    """The words of a command without comment, `[optional]` marks and leading variables."""
    text = re.sub(r"\s#.*| {2,}and:.*", "", text)
    words = shlex.split(re.sub(r"(?<=\s)\[|\](?=\s|$)", "", text))
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def check_vcvae(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        assert not words or words[0] in ("--help", "-h", "--version", "--install-completion"), f"no option {words[0]}"
        return
    name, *rest = words
    if name == "train":
        check_training(rest)
        return
    command = VCVAE.commands.get(name)
    assert command is not None, f"no command {name}"
    if hasattr(command, "commands"):
        if not rest:
            return
        assert rest[0] in command.commands, f"{name} knows no {rest[0]}"
        check_options(f"vcvae {name}", rest[1:], TRAINING)
        return
    options = {option: parameter for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help": None}
    while rest:
        word = rest.pop(0)
        if word in ("…", "..."):
            return
        if not re.match(r"--?[a-zA-Z]", word):
            assert name not in NAMES or word in NAMES[name], f"{name} knows no {word}"
            continue
        assert word in options, f"{name} has no option {word}"
        if options[word] is None or getattr(options[word], "is_flag", False):
            continue
        if rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            check = VALUES.get((name, word))
            assert check is None or PLACEHOLDER.fullmatch(value) or check(value), f"{word} knows no {value}"


def check_training(words: list[str]) -> None:
    """The programs read their options themselves."""
    if not words or words[0].startswith("-"):
        assert words in ([], ["--help"])
        return
    assert words[0] in VCVAE.commands["train"].commands, f"train has no {words[0]}"
    options = importlib.import_module(f"vc_vae_diffusers.training.{words[0].replace('-', '_')}_options").Config
    groups = [field.default_factory for field in dataclasses.fields(options)]
    known = {"--help", "--config"} | {f"--{field.name}" for group in groups for field in dataclasses.fields(group)}
    for word in words[1:]:
        assert not word.startswith("--") or word in known, f"train {words[0]} has no option {word}"


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"no file {words[0]}"
    if script.suffix != ".py":
        return
    check_options(words[0], words[1:], TRAINING + "".join(path.read_text() for path in script.parent.glob("*.py")))


def check_options(what: str, words: list[str], source: str) -> None:
    """Options that are fields of a dataclass or arguments of a parser somewhere in the source."""
    for word in words:
        if re.match(r"--[a-zA-Z]", word):
            option = word.split("=")[0].removeprefix("--")
            assert re.search(rf"(\b{option}: |--{option}\b|\"{option}\")", source), f"{what} has no option --{option}"


def check(words: list[str]) -> None:
    """Raises AssertionError for a command that cannot work."""
    match words:
        case ["vcvae", *rest] | ["python", "-m", "vc_vae_diffusers" | "vc_vae_diffusers.cli", *rest]:
            check_vcvae(rest)
        case ["make", *targets]:
            known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {target for target in targets if "=" not in target} <= known, f"the Makefile has only {sorted(known)}"
        case ["bash", script, *_]:
            check_script([script])
        case ["python", "-m", *_] | ["python", "-c", *_]:
            pass
        case ["python", *rest]:
            check_script(rest)
        case ["accelerate", "launch", *rest]:
            while rest and rest[0] in LAUNCHERS:
                rest = rest[2:]
            if rest[:2] == ["-m", "vc_vae_diffusers.cli"]:
                check_vcvae(rest[2:])
            elif rest and "/" in rest[0]:  # else a script of the reader's
                check_script(rest)


def test_the_checks_can_fail():
    for wrong in (
        "vcvae reconstrct a b",
        "vcvae reconstruct a b --fast",
        "vcvae fetch-weights fvd",
        "vcvae evaluate --protocol webwid",
        "vcvae plan --frames 8",
        "make tset",
        "python examples/no_such.py",
        "accelerate launch examples/train_vcvae.py --no_such_option 1",
        "bash examples/no_such.sh",
    ):
        with pytest.raises(AssertionError):
            check(words_of(wrong))
    check(words_of("vcvae plan --height 1 --width 2 [--num-frames 3]  # a comment"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    for snippet in commands(page):
        try:
            check(words_of(snippet.text))
        except (AssertionError, ValueError) as error:
            pytest.fail(f"{snippet}: {snippet.text}: {error}")


def test_some_commands_are_found():
    found = [snippet.text for page in PAGES for snippet in commands(page)]
    for start in (
        "vcvae evaluate",
        "make demo",
        "accelerate launch examples/train_vcvae.py",
        "bash examples/",
        "vcvae stats",
    ):
        assert any(text.startswith(start) for text in found), start


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles_and_its_imports_are_there(page):
    for block in blocks(page, "python"):
        tree = ast.parse(block.text.replace("...)", ")"), filename=str(block))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("vc_vae_diffusers", "diffusers"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{block}: {node.module} has no {', '.join(missing)}"


RUN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    "block",
    [block for page in RUN for block in blocks(page, "python") if not block.text.startswith("# needs")],
    ids=str,
)
def test_python_of_the_pages_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks may write
    torch.manual_seed(0)
    exec(compile(block.text, str(block), "exec"), {})


def test_every_page_is_on_the_site():
    named = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [
        path for path in (ROOT / "docs").rglob("*.md") if path.parent.name not in ("ablations", "report")
    ]  # made by tools
    assert not [path for path in pages if str(path.relative_to(ROOT / "docs")) not in named]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:examples|tests|docs|benchmarks|src|integrations)/[\w./-]+\.\w+)`", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names {missing}"
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#", "mailto"))
    ]
    assert not [link for link in links if not (page.parent / link).exists()]
    for name in re.findall(r"`(vc_vae_diffusers(?:\.\w+)+)`", text):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), f"{page.name} names {name}"


def test_nobody_is_sent_to_an_index_for_this_package():
    for path in [*PAGES, *(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        assert not re.search(r"pip install [\"']?vc_vae_diffusers", path.read_text(encoding="utf-8")), path
