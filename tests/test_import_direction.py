"""One direction of imports, room by room: operators <- the autoencoder <- what is around it <- the command line.

Rooms are the folders of the package. A new room, or a module beside them, must be put into `ROOMS`.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "vc_vae_diffusers"

# Single modules that know none of the others; every room but the operators may use them.
SHARED = {"files", "extras", "processes", "hardware", "frame_size", "names"}

# What each room may import besides them and itself. Single modules named here are rooms of their own.
ROOMS = {
    **dict.fromkeys(sorted(SHARED), frozenset()),
    "operators": set(),
    "video": set(),
    "metrics": set(),
    "publishing": {"video", "metrics"},
    "autoencoder": {"operators", "publishing"},
    "video_processor": {"video"},
    "generation": {"publishing", "autoencoder", "video_processor"},
    "publishing.auto": {"autoencoder", "generation"},  # looks for the class that a folder names
    "training.losses": {"metrics"},  # serves any video VAE, as do the others of this kind
    "training.discriminator": set(),
    "training.clip_plan": set(),
    "training.data": {"video", "training.clip_plan"},
    "training.shards": {"video", "training.clip_plan", "training.data"},
    "training": {
        *("video", "metrics", "autoencoder", "training.losses", "training.discriminator", "training.data"),
        *("training.clip_plan", "training.shards"),
    },
    "training.latte": {
        "video",
        "autoencoder",
        "generation",
        "training",
        "training.clip_plan",
        "training.data",
        "training.shards",
    },
    "evaluation": {"video", "metrics", "autoencoder", ""},
    "report": {"video", "operators", "autoencoder", "evaluation"},
    "": {
        "operators",
        "autoencoder",
        "generation",
        "publishing.auto",
        "video_processor",
    },  # the package's __init__: what users import
    "exporting": {"", "operators"},
    "coding": {"", "video", "metrics", "autoencoder"},
    "app": {"", "video", "autoencoder", "report", "coding"},
    "cli": {
        *(
            "",
            "video",
            "metrics",
            "autoencoder",
            "publishing",
            "training",
            "training.data",
            "evaluation",
            "report",
            "coding",
            "exporting",
        ),
        "app",
    },
    "__main__": {"cli"},
    # Names that folders written by version 0.1 contain.
    "auto": {"autoencoder", "generation", "publishing.auto"},
    "latte_transformer": {"generation"},
    "pipeline_latte": {"generation"},
}

# Import names of what only an extra installs: to be imported in the function that needs it.
OPTIONAL = {
    *(
        "lpips",
        "torchvision",
        "pillow_heif",
        "yaml",
        "tensorboard",
        "webdataset",
        "scipy",
        "rapidfuzz",
        "matplotlib",
        "onnxruntime",
        "onnx",
        "onnxscript",
    ),
    *("gradio", "pandas", "playwright"),
    *("cv2", "skvideo", "rapidocr", "dlib", "skimage", "torchmetrics", "pytorch_msssim"),
}

# Modules that only one command imports, in its function, and that are nothing without an extra.
OF_AN_EXTRA = {"app.interface"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "models" not in path.parts}


def absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """The full dotted name that `from … import` starts at."""
    if node.level == 0:
        return node.module or ""
    here = ["vc_vae_diffusers", *(name.split(".") if name else [])]
    base = here[: len(here) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports_of_ours(name: str, source: str, is_package: bool, modules: set[str]) -> set[str]:
    """The modules of the package that a module imports, functions included; not what only type checkers import."""
    targets = set()
    tree = ast.parse(source)
    for_types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    never_run = {inner for node in for_types for statement in node.body for inner in ast.walk(statement)}
    for node in set(ast.walk(tree)) - never_run:
        if isinstance(node, ast.Import):
            targets |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            targets |= {(absolute(node, name, is_package), alias.name) for alias in node.names}
    found = set()
    for module, attribute in targets:
        if module != "vc_vae_diffusers" and not module.startswith("vc_vae_diffusers."):
            continue
        inner = module.removeprefix("vc_vae_diffusers").removeprefix(".")
        submodule = f"{inner}.{attribute}".removeprefix(".")
        found.add(submodule if submodule in modules else inner)
    return found - {name}


IMPORTS = {
    name: imports_of_ours(name, path.read_text(), path.name == "__init__.py", set(FILES)) for name, path in FILES.items()
}


def room_of(module: str) -> str:
    """The room of a module: its longest prefix that `ROOMS` names."""
    if not module:
        return ""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in ROOMS:
            return prefix
    raise AssertionError(f"{module} is in no room: add its folder to ROOMS in tests/test_import_direction.py")


def test_the_parser_sees_every_form_of_import():
    modules = {"", "a", "a.b", "c"}
    source = """
import vc_vae_diffusers.c
from . import b
from .. import c
from ..c import thing
def later():
    from vc_vae_diffusers import exported
if TYPE_CHECKING:
    from .. import never_run
"""
    assert imports_of_ours("a", source, True, modules) == {"c", "a.b", ""}
    assert imports_of_ours("c", "from .a import x\nfrom .a.b import y\nimport torch", False, modules) == {"a", "a.b"}
    assert "operators.tdc" in IMPORTS["autoencoder.blocks"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_rooms_import_one_way(name):
    room = room_of(name)
    others = {room_of(module) for module in IMPORTS[name]} - {room}
    allowed = ROOMS[room] | (SHARED if room not in SHARED | {"operators"} else set())
    too_much = others - allowed
    assert not too_much, f"{name or '__init__'} imports {sorted(too_much)}; its room may import {sorted(allowed)}"


def test_rooms_have_no_cycles_and_none_is_left_over():
    done: set[str] = set()

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"cycle of rooms: {' -> '.join((*path, room))}"
        for other in sorted(ROOMS[room] - done):
            visit(other, (*path, room))
        done.add(room)

    for room in ROOMS:
        visit(room, ())
    unused = set(ROOMS) - {room_of(name) for name in FILES}
    assert not unused, f"{sorted(unused)} no longer exist: remove them from ROOMS"


def test_no_cycles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name in done:
            return
        for other in sorted(IMPORTS.get(name, set())):
            visit(other, (*path, name))
        done.add(name)

    for name in IMPORTS:
        visit(name, ())
    assert done >= set(IMPORTS)


def test_optional_dependencies_are_not_needed_to_import():
    required = set()
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            required |= {(name, n) for n in names if n.split(".")[0] in OPTIONAL and name not in OF_AN_EXTRA}
    assert not required, f"import these in the function that needs them: {sorted(required)}"


def test_only_pytorch_is_needed_for_the_operators():
    """The operators can be copied or used on their own (SPEC section 1)."""
    for name in FILES:
        if room_of(name) != "operators":
            continue
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {node.module.split(".")[0]}
            else:
                continue
            # Triton comes with PyTorch where it is used.
            assert roots <= {"torch", "triton"} | set(sys.stdlib_module_names), f"{name} imports {roots}"


def test_importing_the_operators_loads_no_diffusers():
    code = "import sys, vc_vae_diffusers.operators; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"diffusers", "transformers", "accelerate", "av", "PIL"} & set(loaded)


def test_only_the_command_line_knows_typer_and_rich():
    for name, path in FILES.items():
        if room_of(name) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {n.split(".")[0] for n in names} & {"typer", "rich"}, name
