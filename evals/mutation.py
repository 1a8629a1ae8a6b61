"""Mutation check of the acceptance core: every line is broken in every way below, one at a time,
and the tests must notice. A survivor needs a written reason.

    python -m specdec.evals.mutation reference --out evals/results/mutation.json

Runs in a checkout: pytest collects the module's tests once, and each mutant runs them in a forked
process until the first failure. Reasons are kept in the result file, by mutant; a run with a
survivor that has none exits 1. Verdicts are kept beside the result file until the run ends: one
that was interrupted goes on where it stopped, if neither the module nor the tests changed.
"""

import ast
import copy
import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from tqdm import tqdm


@dataclass(frozen=True)
class Target:
    module: str
    tests: str  # file below tests/
    select: Callable[[str], bool]  # by test name: a few seconds of tests, which see every line
    prepare: Callable[[ModuleType], None]  # makes the tests of a module shorter


def _of_reference(test: str) -> bool:
    if test.startswith("test_text_follows"):
        few = any(cell in test for cell in ("chain 3, iid", "chain 3, mixed", "[2,1], "))
        return few and "merged" not in test
    if test.startswith("test_gumbel_text"):
        return "[iid-" in test
    slow = ("planted", "looks_wrong", "another_key", "production_keys", "drawn_and_checked",
            "chain_with_shared", "chain 4")  # fmt: skip
    return not any(part in test for part in slow)


def _of_batched(test: str) -> bool:
    return "planted" not in test and not ("emits" in test and "float32" in test)


def _few_cases(tests: ModuleType) -> None:
    """50 random trees per group of drafts, not thousands."""
    vars(tests)["LARGE_BATCHES"] = 2
    for name, (*group, _) in tests.GROUPS.items():
        tests.GROUPS[name] = (*group, 50)


TARGETS = {
    **{name: Target(name, "test_acceptance.py", _of_reference, lambda _: None)
       for name in ("reference", "checks", "node")},
    **{name: Target(name, "test_batched.py", _of_batched, _few_cases)
       for name in ("batched", "trees", "kseq", "draw", "laws", "layout")},
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    line: int
    name: str  # what was done to which source, unique in the module
    place: int  # of the node in ast.walk
    number: int  # of its replacements


# Mutations: each yields replacements of one node.


def _compare(node: ast.Compare) -> Iterator[ast.AST]:
    swaps: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
        ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
        ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
        ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
    }  # fmt: skip
    for i, op in enumerate(node.ops):
        for other in swaps[type(op)]:
            ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
            yield ast.Compare(node.left, ops, node.comparators)


def _binary(node: ast.BinOp) -> Iterator[ast.AST]:
    swaps: dict[type[ast.operator], type[ast.operator]] = {
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
        ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
        ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    }  # fmt: skip
    if type(node.op) in swaps:
        yield ast.BinOp(node.left, swaps[type(node.op)](), node.right)
    yield node.left
    yield node.right


def _constant(node: ast.Constant) -> Iterator[ast.AST]:
    purposes = {"accept": "bonus", "residual": "bonus", "bonus": "residual"}
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        if node.value:
            yield ast.Constant(0)
    elif node.value in purposes:
        yield ast.Constant(purposes[node.value])


def _call(node: ast.Call) -> Iterator[ast.AST]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    swaps = {"min": "max", "max": "min", "clamp_min": "clamp_max", "clamp_max": "clamp_min"}
    if name in swaps:
        func: ast.expr = ast.Name(swaps[name], ast.Load())
        if isinstance(node.func, ast.Attribute):
            func = ast.Attribute(node.func.value, swaps[name], ast.Load())
        yield ast.Call(func, node.args, node.keywords)
    yield from node.args  # `p` for `_residual(p, q)`, both arms of `_or`, sums for their terms
    if isinstance(node.func, ast.Attribute) and not node.func.attr.startswith("append"):
        yield node.func.value  # a tensor without the operation


def _branch(node: ast.If | ast.IfExp | ast.While) -> Iterator[ast.AST]:
    for value in (True, False):
        if isinstance(node, ast.While) and value:
            continue
        changed = copy.copy(node)
        changed.test = ast.Constant(value)
        yield changed


def _boolean(node: ast.BoolOp) -> Iterator[ast.AST]:
    yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    yield from node.values


def _unary(node: ast.UnaryOp) -> Iterator[ast.AST]:
    yield node.operand


def _statement(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        yield ast.Pass()


MUTATIONS: dict[type[ast.AST], Callable[[Any], Iterator[ast.AST]]] = {
    ast.Compare: _compare,
    ast.BinOp: _binary,
    ast.Constant: _constant,
    ast.Call: _call,
    ast.If: _branch,
    ast.IfExp: _branch,
    ast.While: _branch,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.Assign: _statement,
    ast.AugAssign: _statement,
    ast.Expr: _statement,
    ast.Return: _statement,
    ast.Break: _statement,
}


class _Replace(ast.NodeTransformer):
    def __init__(self, place: ast.AST, new: ast.AST) -> None:
        self._place, self._new = place, new

    def visit(self, node: ast.AST) -> Any:
        return self._new if node is self._place else self.generic_visit(node)


def mutants(source: str) -> list[Mutant]:
    """Every mutant of the functions' bodies and defaults, in the order of the source."""
    tree = ast.parse(source)
    places = {id(node): place for place, node in enumerate(ast.walk(tree))}
    found, names = list[Mutant](), Counter[str]()
    for function in tree.body:
        if not isinstance(function, (ast.FunctionDef, ast.ClassDef)):
            continue
        for node in _code_of(function):
            for number, new in enumerate(_replacements(node)):
                before, after = ast.unparse(node).split("\n")[0], ast.unparse(new).split("\n")[0]
                if before == after or isinstance(new, (ast.GeneratorExp, ast.Starred)):
                    continue
                name = f"{function.name}: {before} -> {after}"
                names[name] += 1
                if names[name] > 1:
                    name += f" (number {names[name]})"
                found.append(Mutant(getattr(node, "lineno", 0), name, places[id(node)], number))
    return sorted(found, key=lambda mutant: mutant.line)


def mutated(source: str, mutant: Mutant) -> ast.Module:
    tree = ast.parse(source)
    node = next(n for place, n in enumerate(ast.walk(tree)) if place == mutant.place)
    new = list(_replacements(node))[mutant.number]
    changed: ast.Module = _Replace(node, new).visit(tree)
    return ast.fix_missing_locations(changed)


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    return MUTATIONS.get(type(node), _nothing)(node)


def _code_of(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, without annotations and what only errors say."""
    for name, value in ast.iter_fields(function):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.Assert)):
                yield child
                yield from _code_of(child)


def _nothing(node: ast.AST) -> Iterator[ast.AST]:
    del node
    yield from ()


class Runner:
    """A pytest plugin: instead of running the collected tests once, runs them per mutant."""

    def __init__(
        self, target: Target, module: ModuleType, only: Collection[str] | None, notes: "Notes"
    ) -> None:
        """only: names of mutants; None runs all."""
        self._target, self._module, self._notes = target, module, notes
        self._source = Path(str(module.__file__)).read_text(encoding="utf-8")
        self.mutants = mutants(self._source)
        self._chosen = [m for m in self.mutants if only is None or m.name in only]
        self.survivors = list[Mutant]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self._target.select(item.name)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for tests in {item.module for item in session.items if isinstance(item, pytest.Function)}:
            self._target.prepare(tests)
        seconds, items = self._until_failure(session, None, 600), session.items
        if len(seconds) < len(items):
            raise click.ClickException("the tests fail without a mutation")
        # the quick ones first, and before them what killed the mutants before
        items[:] = [items[i] for i in sorted(range(len(items)), key=lambda i: seconds[i])]
        limit = 2 * sum(seconds) + 5  # of processor time: a mutant that never ends is killed too
        gc.collect()
        gc.freeze()  # or every child copies the pages that a collection marks
        for mutant in tqdm(self._chosen, mininterval=2, file=sys.__stderr__):
            if mutant.name not in self._notes.verdicts:
                passed = len(self._until_failure(session, mutant, limit))
                items[:] = [*items[passed : passed + 1], *items[:passed], *items[passed + 1 :]]
                self._notes.add(mutant.name, survives=passed == len(items))
            if self._notes.verdicts[mutant.name]:
                self.survivors.append(mutant)
        return True

    def _until_failure(
        self, session: pytest.Session, mutant: Mutant | None, limit: float
    ) -> list[float]:
        """Seconds of each test that passed, in order, until one failed."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            self._run(session, mutant, limit, writing)
        os.close(writing)
        with os.fdopen(reading) as report:
            seconds = [float(line) for line in report]
        os.waitpid(child, 0)
        return seconds

    def _run(
        self, session: pytest.Session, mutant: Mutant | None, limit: float, report: int
    ) -> None:
        """In the child; never returns."""
        signal.setitimer(signal.ITIMER_PROF, limit)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            if mutant is not None:
                _install(mutated(self._source, mutant), self._module)
            for item, following in zip_longest(session.items, session.items[1:]):
                before = time.process_time()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    break
                os.write(report, f"{time.process_time() - before}\n".encode())
        finally:
            os._exit(0)


class Notes:
    """Verdicts of a run that has not ended, one per line below what they are about."""

    def __init__(self, path: Path, about: str) -> None:
        self._path = path
        self.verdicts = dict[str, bool]()  # by mutant, whether it survives
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines[:1] == [about]:
            self.verdicts = dict(json.loads(line) for line in lines[1:])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(about + "\n", encoding="utf-8")

    def add(self, name: str, *, survives: bool) -> None:
        self.verdicts[name] = survives
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, survives]) + "\n")

    def remove(self) -> None:
        self._path.unlink()


def _install(tree: ast.Module, module: ModuleType) -> None:
    """Runs the mutated source in the module, and hands its new functions to who imported them."""
    before = dict(vars(module))
    exec(compile(tree, str(module.__file__), "exec"), vars(module))
    renewed = {id(old): vars(module)[name] for name, old in before.items()
               if callable(old) and getattr(old, "__module__", "") == module.__name__}  # fmt: skip
    for user, content in list(sys.modules.items()):
        if "specdec" in user or "test_" in user:
            for name, value in list(vars(content).items()):
                if id(value) in renewed:
                    setattr(content, name, renewed[id(value)])


def load_reasons(out: Path, target: str) -> dict[str, str]:
    if not out.exists():
        return {}
    written = json.loads(out.read_text(encoding="utf-8")).get(target, {})
    return {entry["mutant"]: entry["reason"] for entry in written.get("survivors", ())}


def save(out: Path, target: str, total: int, survivors: list[Mutant]) -> list[str]:
    """Writes the result; the names of survivors without a reason."""
    content = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    reasons = load_reasons(out, target)
    content[target] = {
        "mutants": total,
        "killed": total - len(survivors),
        "survivors": [
            {"line": m.line, "mutant": m.name, "reason": reasons.get(m.name, "")} for m in survivors
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [m.name for m in survivors if not reasons.get(m.name)]


@click.command()
@click.argument("target", type=click.Choice(list(TARGETS)))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--tests", type=click.Path(path_type=Path, exists=True), default=Path("tests"))
@click.option("--survivors", is_flag=True, help="Run only the mutants that --out lists, again.")
def main(target: str, out: Path, tests: Path, *, survivors: bool) -> None:
    """Mutate TARGET and list what its tests do not notice."""
    chosen = TARGETS[target]
    only = load_reasons(out, target).keys() if survivors else None
    module = importlib.import_module(f"specdec.acceptance.{chosen.module}")
    files = [Path(str(module.__file__)), tests / chosen.tests]
    about = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    notes = Notes(out.with_name(f"{out.stem}.{target}.part"), about)
    runner = Runner(chosen, module, only, notes)
    options = ["-q", "--no-header", "--tb=no", "--no-summary", "-s", "-p", "no:cacheprovider",
               "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip
    status = pytest.main([*options, str(tests / chosen.tests)], plugins=[runner])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise click.ClickException(f"pytest ended with {status}")
    unexplained = save(out, target, len(runner.mutants), runner.survivors)
    notes.remove()
    click.echo(f"{len(runner.mutants)} mutants, {len(runner.survivors)} survive")
    if unexplained:
        raise click.ClickException("no reason for: " + "; ".join(unexplained))


if __name__ == "__main__":
    main()
