"""The Python files that diffusers runs to load a published folder: classes of the package, and what they need of it."""

import ast
import importlib.machinery
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import stand_in

PACKAGE = "vc_vae_diffusers"
# Where to begin: with what folders name.
ROOTS = ("publishing.auto", "autoencoder.autoencoder_kl_vcvae", "generation.pipeline_latte")
# Publishing itself takes the package.
LEFT_OUT = (f"{PACKAGE}.publishing.hub",)
# What the carried modules import besides Python's own library.
NEEDS = ("torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "psutil")

_CARRIES = f"""If the package {PACKAGE} is installed, it is used. Otherwise the modules below stand in for it: those of
version {{version}} that loading and inference take, under its licence, Apache-2.0. They need
{", ".join(NEEDS)}. Every line of theirs is behind a |."""


def remote_code(names: Sequence[str], carry: bool = True) -> str:
    """A file with which diffusers finds classes of this package by `names`.

    Args:
        names: what is to be found.
        carry: put the modules into it that they take, so that the package need not be installed.
    """
    about = _CARRIES.format(version=_version()) if carry else f"It needs the package {PACKAGE}."
    parts = [f'"""Lets diffusers load this folder with trust_remote_code=True.\n\n{about}\n"""\n']
    if carry:
        code = _source(stand_in.__name__)
        parts.append(code[code.index("import importlib.abc") :])  # without its docstring, which is of this package
        sources = {name: _source(name) for name in sorted(carried_modules())}
        parts.append(f'\n\nstand_in("{PACKAGE}", __file__, {{')
        parts += [f"    \"{name}\": r'''\n{_barred(name, source)}'''," for name, source in sources.items()]
        parts.append("})")
    else:
        parts.append("import importlib")
    # No import statement: diffusers would tell the reader to install what stands in one.
    parts += [f'{name} = importlib.import_module("{PACKAGE}").{name}' for name in names]
    quoted = ", ".join(f'"{name}"' for name in names)
    return "\n".join(parts) + f"\n\n__all__ = [{quoted}]\n"


def carried_modules() -> set[str]:
    """The modules of the package that the classes take, by name."""
    found: set[str] = set()
    waiting = [PACKAGE, *(f"{PACKAGE}.{root}" for root in ROOTS)]
    while waiting:
        name = waiting.pop()
        if name not in found and name not in LEFT_OUT:
            found.add(name)
            waiting += {name.rsplit(".", 1)[0], *_imported(name)}
    return found


def _imported(name: str) -> Iterator[str]:
    """The modules of the package that one imports, anywhere in it; of the package's own, which imports lazily, none."""
    home = name if _is_package(name) else name.rsplit(".", 1)[0]
    for node in ast.walk(ast.parse(_source(name))):
        if name == PACKAGE or not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), home)
        yield base
        if _is_package(base):
            inside = (f"{base}.{alias.name}" for alias in node.names)
            yield from (module for module in inside if importlib.util.find_spec(module) is not None)


def _spec(name: str) -> importlib.machinery.ModuleSpec:
    spec = importlib.util.find_spec(name)
    assert spec is not None, name  # modules of this package
    return spec


def _is_package(name: str) -> bool:
    return _spec(name).submodule_search_locations is not None


def _source(name: str) -> str:
    return Path(str(_spec(name).origin)).read_text(encoding="utf-8")


def _barred(name: str, source: str) -> str:
    """Raises ValueError for a source that would end the string it stands in."""
    if "'''" in source:
        raise ValueError(f"{name} contains three single quotes, which published code cannot carry: use double ones")
    return "".join(f"|{line}" for line in source.splitlines(keepends=True))


def _version() -> str:
    return importlib.import_module(PACKAGE).__version__
