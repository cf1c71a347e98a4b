"""Deliberate faults in operators, losses, training steps, data and metrics, one at a time: do the tests see them?

    python tests/soak/mutants.py --seconds 600 --seed 0
    python tests/soak/mutants.py --only operators/tdc.py

A fault is a comparison, a sign, an operation, a number or a condition turned, or a statement dropped, in a copy of the
package. The tests of that module run on it, in a forked process. Prints the faults that no test saw, and exits with 1 if
these are more than one in twenty.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers  # noqa: F401  imported once, before processes are forked
import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = Path("vc_vae_diffusers")
# The tests of a module, those first that are quick and likely to see.
TARGETS = {
    "operators/tdc.py": ["operators/test_tdc.py", "report/test_visualize.py", "autoencoder/test_streaming.py"],
    "operators/neighbours.py": ["operators/test_tdc.py", "autoencoder/test_streaming.py"],
    "training/losses.py": ["training/test_losses.py", "training/test_objective.py"],
    "training/discriminator.py": ["training/test_discriminator.py", "training/test_objective.py"],
    "training/vcvae.py": ["training/test_objective.py", "training/test_train_vcvae.py"],
    "training/trainer.py": ["training/test_objective.py", "training/test_train_vcvae.py", "training/test_program.py"],
    "training/latte.py": ["training/test_train_latte.py"],
    "training/clip_plan.py": ["training/test_data.py", "training/test_train_vcvae.py"],
    "training/data.py": ["training/test_data.py", "training/test_latent_stats.py", "training/test_train_vcvae.py"],
    "metrics/frame.py": ["metrics/test_metrics_frame.py"],
    "metrics/fvd.py": ["metrics/test_metrics_fvd.py"],
}
SECONDS = 240  # more than the tests of any module take
MOST_UNSEEN = 0.05

_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add},
}


class Mutator(ast.NodeTransformer):
    """Turns what stands at one place; with `at=None` it only counts the places."""

    def __init__(self, at: int | None = None):
        self.at, self.count = at, 0
        self.line, self.before, self.after = 0, "", ""

    def _turn(self, node: ast.AST, turned: ast.AST) -> ast.AST:
        self.count += 1
        if self.count - 1 != self.at:
            return node
        self.line, self.before = node.lineno, ast.unparse(node)
        self.after = ast.unparse(turned)
        return ast.copy_location(turned, node)

    def visit(self, node: ast.AST) -> ast.AST:
        # What is said, declared and annotated is no behaviour that tests should pin down.
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.arg):
            return node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return node
        return super().visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.defaults = [self.visit(value) for value in node.args.defaults]
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        return self._turn(node, ast.Compare(node.left, [_OTHER[type(node.ops[0])](), *node.ops[1:]], node.comparators))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        return self._turn(node, ast.BoolOp(_OTHER[type(node.op)](), node.values))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = _OTHER.get(type(node.op))
        return node if other is None else self._turn(node, ast.BinOp(node.left, other(), node.right))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        other = _OTHER.get(type(node.op))
        return node if other is None else self._turn(node, ast.AugAssign(node.target, other(), node.value))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self._turn(node, node.operand)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return self._turn(node, ast.IfExp(node.test, node.orelse, node.body))

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return self._turn(node, ast.Constant(not node.value))
        if isinstance(node.value, int | float):
            return self._turn(node, ast.Constant(node.value + 1))
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant):  # a docstring
            return node
        self.generic_visit(node)
        return self._turn(node, ast.Pass()) if isinstance(node.value, ast.Call) else node


def places(module: str) -> int:
    """How many faults a module can have."""
    counter = Mutator()
    counter.visit(ast.parse((SOURCE / PACKAGE / module).read_text(encoding="utf-8")))
    return counter.count


@contextlib.contextmanager
def faulty(copy: Path, module: str, at: int | None) -> Iterator[str]:
    """Put a fault into the copy of a module; yields what it is."""
    path, text = copy / PACKAGE / module, (SOURCE / PACKAGE / module).read_text(encoding="utf-8")
    mutator = Mutator(at)
    tree = ast.fix_missing_locations(mutator.visit(ast.parse(text)))
    path.write_text(ast.unparse(tree), encoding="utf-8")
    try:
        yield f"{module}:{mutator.line}: {mutator.before} -> {mutator.after}"
    finally:
        path.write_text(text, encoding="utf-8")


def seen(copy: Path, module: str) -> bool:
    """Whether a test of the module fails on the copy, or takes too long."""
    words = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "--capture=fd", *TARGETS[module]]
    child = os.fork()
    if child == 0:
        os.chdir(ROOT / "tests")
        sys.path.insert(0, str(copy))
        sys.dont_write_bytecode = True
        os.environ["PYTHONPATH"] = str(copy)
        os.setpgrp()
        signal.alarm(SECONDS)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        os._exit(int(pytest.main(words)))
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):  # what its tests started
        os.killpg(child, signal.SIGKILL)
    return status != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="MODULE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faults = [(module, at) for module in options.only for at in range(places(module))]
    random.Random(options.seed).shuffle(faults)
    unseen, tried = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(SOURCE / PACKAGE, copy / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        for module in options.only:
            with faulty(copy, module, None):
                if seen(copy, module):
                    raise SystemExit(f"the tests of {module} fail without a fault: {' '.join(TARGETS[module])}")
        begin = time.monotonic()  # of what is tried: the tests ran without a fault first
        for module, at in faults:
            if time.monotonic() - begin > options.seconds:
                break
            with faulty(copy, module, at) as what:
                if not seen(copy, module):
                    unseen.append(what)
                    print("not seen:", what, flush=True)
            tried += 1
    print(f"{tried} of {len(faults)} faults tried, {len(unseen)} not seen")
    return int(len(unseen) > MOST_UNSEEN * max(1, tried))


if __name__ == "__main__":
    sys.exit(main())
