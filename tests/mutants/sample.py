"""A sample of small faults, put into the code one at a time: which ones does no test notice?

    python -m tests.mutants.sample record [tests ...]   which test runs which line, and how long it takes
    python -m tests.mutants.sample run --count 500      try mutants; those tried before are not tried again
    python -m tests.mutants.sample report               the share caught, and each survivor

mutmut and cosmic-ray start Python for each mutant or rewrite each function, which takes minutes with torch and
Transformers to import, and breaks classes that are read by name. Here one process imports them once; each mutant is
a line of a copy of the project and a fork of that process, which runs the tests that reach the line, fastest first.
"""

import argparse
import ast
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
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent.parent
STATE = PROJECT / "runs" / "mutants"  # ignored by git, kept by `make clean`
SAMPLED = (
    "card", "checkpoint", "classification", "data/augment", "data/cache", "data/check", "data/choice", "data/images",
    "data/loader", "data/local", "data/pixels", "data/schema", "data/sources", "data/splits", "data/store",
    "data/tables", "evaluation", "faults", "files", "history", "learner", "metrics", "optim", "positions",
    "prediction", "preparation", "probing", "randomness", "runs", "trainer", "trial", "tuning",
)  # fmt: skip
TESTS_S = 90.0  # of recorded time, for one mutant
SLOWER = 8.0  # so many times its recorded time a test may take, on a busy machine
HEAVY = ("torch", "transformers", "datasets", "evaluate", "accelerate", "sklearn.metrics", "pytest", "scipy.stats",
         "matplotlib.figure", "hypothesis", "transformers.models.vit.modeling_vit")  # fmt: skip

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

    @property
    def key(self) -> str:
        return "|".join((self.file, self.operator, self.context, str(self.start), self.now))


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file; words that are only read by people are left alone."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    content = source.encode()

    def mutant(node: Any, operator: str, now: str) -> Mutant:
        """An expression is replaced where it stands: `now` is in parentheses where that matters."""
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        was, context = content[start:end].decode(), lines[node.lineno - 1].decode().strip()
        return Mutant(file, operator, node.lineno, node.end_lineno, start, end, was, now, context)

    def visit(node: ast.AST, said: bool) -> Iterator[Mutant]:
        match node:
            case ast.Expr(value=ast.Constant()) | ast.JoinedStr():
                return
            case ast.FunctionDef():
                for part in (*node.args.defaults, *node.args.kw_defaults, *node.body):
                    if part is not None:
                        yield from visit(part, said)
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
    for test in tests or [str(file.relative_to(PROJECT)) for file in sorted((PROJECT / "tests").glob("test_*.py"))]:
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
        shutil.copytree(
            PROJECT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "*_cache", "__pycache__")
        )
        os.chdir(copy)
        sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", str(PROJECT)))]
        os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        for name in HEAVY:
            __import__(name)
        for mutant in sample(copy, count, seed, only):
            if mutant.key in tried:
                continue
            lines = range(mutant.line, mutant.end_line + 1)
            tests = {test for line in lines for test in by_line[mutant.file, line]}
            chosen, total = list[str](), 0.0
            for test in sorted(tests, key=seconds.__getitem__):
                total += seconds[test]
                if chosen and total > TESTS_S:
                    break
                chosen.append(test)
            began = time.monotonic()
            verdict = _try(copy, mutant, chosen, 60 + SLOWER * min(total, TESTS_S)) if chosen else "not reached"
            took_s = round(time.monotonic() - began, 1)
            line = mutant._asdict() | {"key": mutant.key, "verdict": verdict, "tests": len(chosen), "of": len(tests)}
            with (STATE / "results.jsonl").open("a") as file:
                file.write(json.dumps(line | {"s": took_s}) + "\n")
            print(f"{described(line)} ({len(chosen)} of {len(tests)} tests, {took_s} s)", flush=True)
    return 0


def sample(project: Path, count: int, seed: int, only: list[str]) -> list[Mutant]:
    """The same mutants for the same code: an equal share of each file's, drawn file by file."""
    every = {name: list(mutants_of(f"vitft/{name}.py", (project / f"vitft/{name}.py").read_text())) for name in SAMPLED
             if (project / f"vitft/{name}.py").exists()}  # fmt: skip
    share = count / sum(map(len, every.values()))
    chosen = []
    for name, found in every.items():
        drawn = random.Random(f"{seed} {name}").sample(found, round(share * len(found)))
        chosen += drawn if not only or name in only else []
    return chosen


def _try(copy: Path, mutant: Mutant, tests: list[str], limit_s: float) -> str:
    file = copy / mutant.file
    content = file.read_bytes()
    file.write_bytes(content[: mutant.start] + mutant.now.encode() + content[mutant.end :])
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(nothing, handle)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", *tests])))
    end = time.monotonic() + limit_s
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < end:
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started, too
    file.write_bytes(content)
    if not ended:
        os.waitpid(child, 0)
        return "caught late"
    return "SURVIVED" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else "caught"


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
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.sample", description=__doc__.splitlines()[0])
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
