"""A sample of small faults, put into the code one at a time: which ones does no test notice?

    python tests/mutants/sample.py record [tests ...]   which test runs which line, and how long it takes
    python tests/mutants/sample.py run --count 500      try mutants; those tried before are not tried again
    python tests/mutants/sample.py report               the share caught, and each survivor

cosmic-ray starts Python anew for each mutant, which with torch and Transformers takes ten seconds, and mutmut renames
functions, which breaks what looks them up. Here one process imports all of it, the tests too; a mutant is a fork of
that process in which one function has other code, and runs the tests that reach the line, fastest first.
"""

import argparse
import ast
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
STATE = PROJECT / "runs" / "mutants"  # ignored by git, kept by `make clean`
ROOMS = ("checkpoints", "data", "evaluation", "io", "models", "training")
SAMPLED = (
    "randomness",
    *(str(file.relative_to(PROJECT / "vitft").with_suffix("")) for room in ROOMS
      for file in sorted((PROJECT / "vitft" / room).rglob("[!_]*.py"))),
)  # fmt: skip
# For lines that no test reaches in its own process:
IN_PROCESSES = ("tests/training/test_processes.py", "tests/training/test_survival.py")
TESTS_S = 60.0  # of recorded time, for one mutant
SLOWER = 4.0  # so many times its recorded time a test may take, on a busy machine
_QUIET = ("-p", "no:randomly", "-p", "no:cacheprovider")

# -- mutants ----------------------------------------------------------------------------------------

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitXor: ast.BitOr,
}  # fmt: skip
_OTHER_NAME = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "argmax": "argmin",
               "mean": "sum", "sorted": "list", "floor": "ceil", "ceil": "floor"}  # fmt: skip


class Mutant(NamedTuple):
    """A piece of a file, by line and columns in UTF-8, and what stands in its place."""

    file: str
    operator: str
    line: int
    end_line: int
    start: int
    end: int
    was: str
    now: str
    context: str  # the whole line: a mutant is known again when lines above it have moved
    function: str  # the outermost function whose body it is in, by qualified name; "" where it is in none

    @property
    def key(self) -> str:
        return "|".join((self.file, self.operator, self.context, str(self.start), self.now))


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file; words that are only read by people are left alone."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    content, function = source.encode(), ""

    def mutant(node: Any, operator: str, now: str) -> Mutant:
        """An expression is replaced where it stands: `now` is in parentheses where that matters."""
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        was, context = content[start:end].decode(), lines[node.lineno - 1].decode().strip()
        return Mutant(file, operator, node.lineno, node.end_lineno, start, end, was, now, context, function)

    def visit(node: ast.AST, said: bool, names: tuple[str, ...] = ()) -> Iterator[Mutant]:
        nonlocal function
        match node:
            case ast.Expr(value=ast.Constant()) | ast.JoinedStr():
                return
            case ast.ClassDef():
                for part in node.body:
                    yield from visit(part, said, (*names, node.name))
                return
            case ast.FunctionDef():
                for default in (*node.args.defaults, *node.args.kw_defaults):
                    if default is not None:
                        yield from visit(default, said)
                outer, function = function, function or ".".join((*names, node.name))
                for part in node.body:
                    yield from visit(part, said)
                function = outer
                return
            case ast.AnnAssign():
                if node.value is not None:
                    yield from visit(node.value, said)
                return
            case ast.Raise():
                yield mutant(node, "nothing is raised", "pass")
                return
            case ast.Compare(ops=[op]) if type(op) in _COMPARED:
                other = ast.Compare(node.left, [_COMPARED[type(op)]()], node.comparators)
                yield mutant(node, "comparison", f"({ast.unparse(other)})")
            case ast.BinOp() if type(node.op) in _COMPUTED and not _is_text(node):
                other = ast.BinOp(node.left, _COMPUTED[type(node.op)](), node.right)
                yield mutant(node, "arithmetic", f"({ast.unparse(other)})")
            case ast.AugAssign() if type(node.op) in _COMPUTED:
                yield mutant(
                    node, "arithmetic", ast.unparse(ast.AugAssign(node.target, _COMPUTED[type(node.op)](), node.value))
                )
                yield mutant(node, "statement left out", "pass")
            case ast.BoolOp():
                other = ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
                yield mutant(node, "and for or", f"({ast.unparse(other)})")
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield mutant(node, "sign left out", f"({ast.unparse(node.operand)})")
            case ast.If() | ast.While() | ast.IfExp():
                yield mutant(node.test, "condition turned", f"(not ({ast.unparse(node.test)}))")
            case ast.Constant(value=bool(value)):
                yield mutant(node, "constant", str(not value))
            case ast.Constant(value=int(value)):
                yield mutant(node, "constant", str(value + 1))
            case ast.Constant(value=float(value)):
                yield mutant(node, "constant", repr(2 * value or 1.0))
            case ast.Constant(value=str(value)) if not said and value and " " not in value:
                yield mutant(node, "name", repr("X" + value))
            case ast.Return(value=value) if value is not None and not _is(value, None):
                yield mutant(value, "nothing is returned", "None")
            case ast.Break():
                yield mutant(node, "break for continue", "continue")
            case ast.Continue():
                yield mutant(node, "continue for break", "break")
            case ast.Expr(value=ast.Call()):
                yield mutant(node, "statement left out", "pass")
            case ast.Slice(lower=lower, upper=upper):
                for bound in (lower, upper):
                    if bound is not None:
                        yield mutant(bound, "bound left out", "")
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in _OTHER_NAME:
                yield mutant(node.func, "another function", _OTHER_NAME[name])
            case ast.Call(func=ast.Attribute(attr=name)) if name in _OTHER_NAME:
                place = mutant(node.func, "another function", _OTHER_NAME[name])
                yield place._replace(start=place.end - len(name), was=name)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg is not None and len(node.keywords) + len(node.args) > 1 and not said:
                    rest = ast.Call(node.func, node.args, [one for one in node.keywords if one is not keyword])
                    yield mutant(node, f"{keyword.arg} left out", ast.unparse(rest))
            said = said or ast.unparse(node.func).startswith("console.")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, said)

    for node in ast.parse(source).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            yield from visit(node, False)


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(one, ast.JoinedStr) or (isinstance(one, ast.Constant) and isinstance(one.value, str))
               for one in (node.left, node.right))  # fmt: skip


# -- which test runs which line ---------------------------------------------------------------------


def record(tests: list[str]) -> int:
    """Run tests under coverage, each in a context of its own; those named replace what was known of them."""
    import coverage
    import pytest

    STATE.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(PROJECT))
    known = read_record()
    for test in tests or [str(file.relative_to(PROJECT)) for file in sorted((PROJECT / "tests").rglob("test_*.py"))]:
        measured = coverage.Coverage(data_file=None, include=[str(PROJECT / "vitft" / "*")], config_file=False)
        watch = _Watch(measured)
        measured.start()
        pytest.main(["-q", "-m", "not slow", "-p", "no:randomly", str(PROJECT / test)], plugins=[watch])
        measured.stop()
        found: dict[str, Any] = {name: {"s": took, "lines": {}} for name, took in watch.took_s.items()}
        data = measured.get_data()
        for file in data.measured_files():
            short = str(Path(file).relative_to(PROJECT))
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    if context in found:
                        found[context]["lines"].setdefault(short, []).append(line)
        known = {name: one for name, one in known.items() if not name.startswith(f"{test}::")} | found
        (STATE / "record.json").write_text(json.dumps(known))
    return 0


class _Watch:
    """A context for each test, and its seconds, fixtures included."""

    def __init__(self, measured: Any) -> None:
        self.measured = measured
        self.took_s: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.measured.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.measured.switch_context("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.took_s[report.nodeid] += report.duration if report.outcome == "passed" else 1e9


def read_record() -> dict[str, Any]:
    file = STATE / "record.json"
    return json.loads(file.read_text()) if file.exists() else {}


# -- trying them ------------------------------------------------------------------------------------


def run(count: int, seed: int, only: list[str]) -> int:
    """Try the sample; a line of results.jsonl for each."""
    by_line, seconds = defaultdict[tuple[str, int], list[str]](list), dict[str, float]()
    for test, one in read_record().items():
        if one["s"] < 1e6:  # it passed
            seconds[test] = one["s"]
            for file, lines in one["lines"].items():
                for line in lines:
                    by_line[file, line].append(test)
    tried = {one["key"] for one in results()}
    with tempfile.TemporaryDirectory(prefix="vitft-mutants-") as folder:
        copy = Path(folder) / "project"
        _copy(copy)
        os.chdir(copy)
        mine = ("", str(PROJECT), str(Path(__file__).parent))
        sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in mine)]
        os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        import pytest

        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            files = sorted({test.split("::")[0] for test in seconds})
            assert pytest.main(["--collect-only", "-q", *_QUIET, *files]) == 0
        for mutant in sample(copy, count, seed, only):
            if mutant.key in tried:
                continue
            lines = range(mutant.line, mutant.end_line + 1)
            # What runs as a file is imported is recorded with the test that happened to be first.
            tests = {test for line in lines for test in by_line[mutant.file, line]} if mutant.function else set[str]()
            # What runs then, or in other processes alone, is no test's own.
            near = tests or {test for (file, _), of_it in by_line.items() if file == mutant.file for test in of_it}
            chosen, total = list[str](), 0.0
            for test in sorted(near, key=seconds.__getitem__):
                total += seconds[test]
                if chosen and total > TESTS_S:
                    break
                chosen.append(test)
            began, verdict = time.monotonic(), "SURVIVED"
            if chosen:
                verdict = _try(copy, mutant, chosen, 60 + SLOWER * total)
            if not tests and mutant.function and verdict == "SURVIVED":
                verdict = _try(copy, mutant, [*IN_PROCESSES, "-m", "not slow"], 1800)
            took_s = round(time.monotonic() - began, 1)
            line = mutant._asdict() | {"key": mutant.key, "verdict": verdict, "tests": len(chosen), "of": len(tests)}
            with (STATE / "results.jsonl").open("a") as file:
                file.write(json.dumps(line | {"s": took_s}) + "\n")
            print(f"{described(line)} ({len(chosen)} of {len(tests)} tests, {took_s} s)", flush=True)
    return 0


def _copy(to: Path) -> None:
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "*_cache", "__pycache__")
    shutil.copytree(PROJECT, to, ignore=ignored, dirs_exist_ok=True)


def sample(project: Path, count: int, seed: int, only: list[str]) -> list[Mutant]:
    """The same mutants for the same code: an equal share of each file's, drawn file by file."""
    every = {name: list(mutants_of(f"vitft/{name}.py", (project / f"vitft/{name}.py").read_text())) for name in SAMPLED}
    share = count / sum(map(len, every.values()))
    chosen = []
    for name, found in every.items():
        drawn = random.Random(f"{seed} {name}").sample(found, round(share * len(found)))
        chosen += drawn if not only or name in only else []
    return chosen


def _try(copy: Path, mutant: Mutant, tests: list[str], limit_s: float) -> str:
    file = copy / mutant.file
    content = file.read_bytes()
    mutated = content[: mutant.start] + mutant.now.encode() + content[mutant.end :]
    file.write_bytes(mutated)  # for the processes that tests start
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(nothing, handle)
        _put_in(mutant, compile(mutated, str(file), "exec"))
        import pytest

        os._exit(int(pytest.main(["-x", "-q", *_QUIET, *tests])))
    end = time.monotonic() + limit_s
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < end:
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started, too
    if file.exists():
        file.write_bytes(content)
    else:  # some mutants remove the folder that they are in
        _copy(copy)
        os.chdir(copy)
    if not ended:
        os.waitpid(child, 0)
        return "caught late"
    return "SURVIVED" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else "caught"


def _put_in(mutant: Mutant, module: CodeType) -> None:
    """Give the function its new code, wherever it is already in use; or have everything imported anew."""
    from vitft.hardware.pools import thread_pool

    thread_pool.cache_clear()  # threads do not survive a fork
    codes = [code for code in _functions(module) if code.co_qualname == mutant.function]
    live = [one for one in gc.get_objects() if isinstance(one, FunctionType) and one.__qualname__ == mutant.function
            and one.__code__.co_filename == module.co_filename]  # fmt: skip
    if len(codes) == 1 and len({one.__code__ for one in live}) == 1:
        for one in live:
            one.__code__ = codes[0]
        return
    for name in list(sys.modules):
        if name.split(".")[0] in ("vitft", "tests"):
            del sys.modules[name]


def _functions(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _functions(inner)


def results() -> list[dict[str, Any]]:
    file = STATE / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def described(one: dict[str, Any]) -> str:
    """A line for a person."""
    change = f"{one['was'][:60]!r} -> {one['now'][:70]!r}"
    return f"{one['verdict']:11} {one['file']}:{one['line']} {one['operator']}: {change}"


def report() -> int:
    """The share caught, by file, and the survivors."""
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for one in results():
        by_file[one["file"]][one["verdict"]] += 1
    for file, verdicts in sorted(by_file.items()):
        print(f"{file}: {dict(verdicts)}")
    every = sum(by_file.values(), Counter[str]())
    caught = every["caught"] + every["caught late"]
    print(f"{caught} of {every.total()} caught, {caught / max(1, every.total()):.1%}: {dict(every)}")
    for one in results():
        if not one["verdict"].startswith("caught"):
            print(f"{described(one)}\n    {one['context']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutants/sample.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("tests", nargs="*")
    trying = commands.add_parser("run")
    trying.add_argument("--count", type=int, default=600)
    trying.add_argument("--seed", type=int, default=0)
    trying.add_argument("--only", nargs="*", default=[], help="files of the sample, such as data/store")
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "record":
        return record(given.tests)
    return run(given.count, given.seed, given.only) if given.command == "run" else report()


if __name__ == "__main__":
    sys.exit(main())
