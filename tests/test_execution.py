"""
Programs in sandboxes: what passes, what does not, and that none of the hostile ones passes, harms, hangs or lasts.
"""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import dapo_trl
import hostile
from dapo_trl.execution import (
    ExecutionNotAllowedError,
    Limits,
    Outcome,
    Program,
    UnitTests,
    allow_execution,
    monitor_server,
)
from dapo_trl.execution.isolation import KINDS, Isolation
from dapo_trl.execution.local import LocalExecutor


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are of Linux")

SYSTEM_PYTHON = "/usr/bin/python3"  # which everybody may read, so that root can run it as nobody
DOUBLE = UnitTests(entry_point="double", test="assert double(2) == 4\nassert double(5) == 10\nassert double(-3) == -6")
# Those that would do harm where nothing but limits protects, and those that such a place cannot stop from being seen.
NEED_A_SANDBOX = (
    "kills its parent",
    "kills a process by number",
    "kills its process group",
    "stops its parent",
    "detaches a daemon",
    "daemons that start each other",
    "writes outside of its folder",
    "deletes files",
    "a symbolic link out of its folder",
    "a changed working directory",
    "reads a file outside of its folder",
    "finds files by searching",
    "reads its parent's environment",
    "an unpickling trick",
    "survives its monitor",
)


def python_for(kind: str) -> str | None:
    return SYSTEM_PYTHON if kind == "process" and os.geteuid() == 0 else None


def make_executor(kind: str, **limits: float) -> LocalExecutor:
    """An executor with this isolation; the test is skipped where it does not work."""
    try:
        return LocalExecutor(True, Limits(**limits), kind, 2, python_for(kind))
    except RuntimeError as error:
        if os.environ.get("CI") and kind == "namespaces" and os.geteuid() == 0:
            raise
        pytest.skip(f"no {kind} here: {error}")


@pytest.fixture(scope="module", params=KINDS)
def executor(request):
    executor = make_executor(request.param, cpu=2, wall=10)
    yield executor
    executor.close()


def verdicts(executor: LocalExecutor, *sources: str, tests: UnitTests = DOUBLE) -> list[str]:
    return [outcome.verdict for outcome in executor.run([Program(source, tests) for source in sources])]


# ---- What passes and what does not ----


def test_functions(executor):
    found = verdicts(executor, hostile.RIGHT, "def double(x):\n    return x + 2", "def triple(x): pass", "def (", "")
    assert found == ["passed", "failed", "failed", "failed", "failed"]


def test_messages_name_the_line_of_the_tests(executor):
    (outcome,) = executor.run([Program("def double(x):\n    return x + 2", DOUBLE)])
    assert outcome.message == "AssertionError:  in the tests' line 2: assert double(5) == 10"
    (outcome,) = executor.run([Program("def double(x):\n    return undefined", DOUBLE)])
    assert outcome.message.startswith("NameError: name 'undefined' is not defined")


def test_scripts(executor):
    tests = UnitTests(inputs=["1 2\n", "3 4\n"], outputs=["3", "7\n"])
    right = "a, b = map(int, input().split())\nif __name__ == '__main__':\n    print(a + b)"
    wrong = "print(3)"
    fails = "print(3)\nraise ValueError('no')"
    exits = "print(sum(map(int, open(0).read().split())))\nimport sys\nsys.exit(0)"
    ends_badly = exits.replace("exit(0)", "exit(3)")
    assert verdicts(executor, right, wrong, fails, exits, ends_badly, tests=tests) == [
        "passed",
        "failed",
        "failed",
        "passed",
        "failed",
    ]
    (outcome,) = executor.run([Program(fails, tests)])
    assert "ValueError: no" in outcome.message


def test_shares_of_tests(executor):
    """By hand: two of three asserts; of a script's three inputs one; after an end, what was not reached fails."""
    tests = UnitTests(
        entry_point="f",
        test="def check(f):\n    assert f(1) == 1\n    assert f(2) == 5\n    assert f(3) == 3",
        check="check",
    )
    script = UnitTests(inputs=["1", "2", "3"], outputs=["1", "x", "y"])
    programs = [
        Program("def f(x): return x", tests),
        Program("print(input())", script),
        Program("import os\ndef f(x): return x if x == 1 else os._exit(0)", tests),
    ]
    shares = [outcome.share for outcome in executor.run(programs, count_tests=True)]
    assert shares == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert [outcome.share for outcome in executor.run(programs)] == [0.0, 0.0, 0.0]


def test_a_statement_is_one_test(executor):
    """However often it runs: results of any length do not raise the share, nor do calls of what the tests pass on."""
    test = "for x in f(1):\n    assert x > 0\nassert f(2) == 0\nassert f(3) == 0"
    tests = UnitTests(entry_point="f", test=test)
    (outcome,) = executor.run([Program("def f(x): return [1] * 10000", tests)], count_tests=True)
    assert outcome.share == pytest.approx(1 / 3)
    (outcome,) = executor.run([Program("def f(x): return [1, -1, 1]", tests)], count_tests=True)
    assert outcome.share == 0.0


def test_tests_do_not_end_early(executor):
    """`StopIteration` of the program ends no loop of the tests."""
    tests = UnitTests(entry_point="f", test="assert all(a == b for a, b in zip(map(f, [1, 2]), [1, 2]))")
    program = "def f(x):\n    if x == 2: raise StopIteration\n    return x"
    assert verdicts(executor, program, "def f(x): return x", tests=tests) == ["failed", "passed"]


def test_programs_do_not_count_for_each_other(executor):
    """Threads of one program leave those of another as many as it may have."""
    busy = "from threading import Thread\nfrom time import sleep\n"
    busy += "for _ in range(12): Thread(target=sleep, args=(1,), daemon=True).start()\nsleep(1)\n" + hostile.RIGHT
    assert verdicts(executor, *[busy] * 4) == ["passed"] * 4


def test_a_script_that_cannot_be_given_its_input(executor):
    """More than a file may hold: it did not run, and did not pass."""
    small = make_executor(executor.isolation, file_size=1000)
    tests = UnitTests(inputs=["x" * 10_000], outputs=[""])
    assert verdicts(small, "raise SystemExit(3)", "pass", tests=tests) == ["failed", "failed"]
    small.close()


def test_a_server_ends_although_a_fork_lives(executor):
    assert verdicts(executor, hostile.RIGHT) == ["passed"]
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    start = time.monotonic()
    executor.close()
    assert time.monotonic() - start < 5
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_server_that_cannot_start(executor, monkeypatch):
    """No process can be made: programs are not judged; when there are some again, they are."""
    executor.close()
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: (_ for _ in ()).throw(OSError(11, "no more processes")))
    for _ in range(2):
        (outcome,) = executor.run([Program(hostile.RIGHT, DOUBLE)])
        assert outcome.verdict == "setup" and "no more processes" in outcome.message
    monkeypatch.undo()
    assert verdicts(executor, hostile.RIGHT) == ["passed"]


def test_values_cross_as_they_are(executor):
    """Plain data of every kind arrives equal and of the same type; subclasses as what they are made of."""
    values = (
        "[None, True, False, 0, -1, 10**30, -(2**70), 1.5, -0.0, float('inf')]",
        "['é\\ud800\\n', b'x\\x00', bytearray(b'y')]",
        "{1: 'a', (2, 3): [4], None: {5, 6}, frozenset({7}): (8,)}",
        "(1 + 2j, range(3, 9, 2), __import__('collections').deque([1, [2]]))",
        "[__import__('decimal').Decimal('1.10'), __import__('fractions').Fraction(1, 3)]",
        "[__import__('datetime').datetime(2026, 1, 2, 3), __import__('datetime').timedelta(days=1)]",
        "__import__('datetime').date(2026, 1, 2)",
    )
    test = "\n".join(f"assert same(echo(v := {value}), v), {value!r}" for value in values)
    helper = "def same(a, b): return type(a) is type(b) and repr(a) == repr(b)\n"
    helper += (
        "assert same(echo(float('nan')), float('nan'))\nassert echo(make(3)) == {'a': 3} and make(3) == {'a': 3}\n"
    )
    program = "from collections import Counter\ndef echo(x): return x\ndef make(n): return Counter('a' * n)"
    (outcome,) = executor.run([Program(program, UnitTests(entry_point="echo", test=helper + test))])
    assert outcome == Outcome("passed", "", 1.0)


def test_objects_of_the_program(executor):
    """As in MBPP's problems about trees: tests make objects of a class, set attributes, and pass them back."""
    program = """
class Node:
    def __init__(self, value):
        self.value, self.left, self.right = value, None, None
def height(node):
    return 0 if node is None else 1 + max(height(node.left), height(node.right))
def numbers(n):
    yield from range(n)
def same(node):
    return node
"""
    test = """
root = Node(1)
root.left = Node(2)
root.left.right = Node(3)
assert height(root) == 3
assert root.left.right.value == 3
assert list(numbers(3)) == [0, 1, 2]
assert same(root) == root and same(root) != root.left
"""
    (outcome,) = executor.run([Program(program, UnitTests(entry_point="height", test=test))])
    assert outcome.verdict == "passed", outcome.message


def test_functions_and_exceptions_cross(executor):
    program = """
class Mine(KeyError): pass
def apply(f, values): return [f(each) for each in values]
def fail(x): raise Mine("no")
def fill(values, found): values.append(4); found["x"] = 5
def pass_on(f): return f("text")
"""
    test = """
assert apply(lambda x: x + 1, [1, 2]) == [2, 3]
try:
    fail(1)
    assert False
except LookupError as error:
    assert type(error).__name__ == "Mine" and "no" in str(error)
values, found = [1], {}
fill(values, found)
assert values == [1, 4] and found == {"x": 5}
assert apply(fill_nothing := (lambda x: None), [1]) == [None]
try:
    pass_on(lambda x: 1 / 0)
    assert False
except RuntimeError as error:
    assert "division by zero" in str(error)
"""
    (outcome,) = executor.run([Program(program, UnitTests(entry_point="apply", test=test))])
    assert outcome.verdict == "passed", outcome.message


def test_cases_of_a_function_or_a_method(executor):
    tests = UnitTests(entry_point="pair", cases=[[[1, 2], [1, 2]], [[3, 4], [[3, 4]]]])
    function = "def pair(a, b): return (a, b)"
    method = "class Solution:\n    def pair(self, a, b):\n        return [a, b]"
    assert verdicts(executor, function, method, "def pair(a, b): return a", tests=tests) == [
        "passed",
        "passed",
        "failed",
    ]
    (outcome,) = executor.run([Program("def pair(a, b): return [1, 2]", tests)], count_tests=True)
    assert outcome.share == 0.5


def test_tests_that_do_not_work_are_not_judged(executor):
    """Whatever the program does: none of these is its fault, and none can be brought about by it."""
    bad = {
        "no Python": "assert double(",
        "an error before the program is called": "1 / 0\nassert double(2) == 4",
        "nothing is called": "assert True",
        "they end by themselves": "import sys\nassert double(2) == 4\nsys.exit(0)",
    }
    for name, test in bad.items():
        tests = UnitTests(entry_point="double", test=test)
        assert verdicts(executor, hostile.RIGHT, tests=tests) == ["bad_tests"], name
    names_what_nobody_has = UnitTests(entry_point="double", test="assert double(2) == undefined(2)")
    assert verdicts(executor, hostile.RIGHT, tests=names_what_nobody_has) == ["failed"]  # the program may have it
    no_check = UnitTests(entry_point="double", test="def checks(f): pass", check="check")
    assert verdicts(executor, hostile.RIGHT, tests=no_check) == ["bad_tests"]


def test_programs_see_no_trace_of_others(executor):
    """An empty folder, a clean environment, the same seed of hashes; nothing of the program before."""
    leaves = "open('left', 'w').write('x')\ndef double(x): return 2 * x"
    looks = "import os\ndef double(x): return 2 * x if os.listdir('.') == [] else 0"
    assert verdicts(executor, leaves, looks, leaves, looks) == ["passed"] * 4
    names = UnitTests(
        inputs=[""], outputs=["['HOME', 'LANG', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH', 'TMPDIR']"]
    )
    program = "import os\nprint(sorted(name for name in os.environ if not name.startswith(('PYTHON', 'LC_'))))"
    assert verdicts(executor, program, tests=names) == ["passed"]
    hashes = [executor.run([Program("print(hash('x'))", UnitTests(inputs=[""], outputs=["?"]))]) for _ in range(2)]
    assert hashes[0] == hashes[1]


def test_which_limit_it_was(executor):
    tests = UnitTests(entry_point="double", test="assert double(2) == 4")
    fast = make_executor(executor.isolation, cpu=0.4, wall=2, memory=200 * 2**20, output=1000)
    programs = {
        "cpu": "while True: pass",
        "wall": "import time\ntime.sleep(100)",
        "output": "print('x' * 2000, flush=True)\ndef double(x): return 4",
    }
    assert verdicts(fast, *programs.values(), tests=tests) == list(programs)
    if executor.isolation != "process":  # there all processes of the user count, and it has none
        memory = "import os, time\n"
        memory += "for _ in range(3):\n    if os.fork() == 0:\n        x = bytearray(10**8)\n        time.sleep(9)\n"
        assert verdicts(fast, memory + "time.sleep(9)", tests=tests) == ["memory"]
    fast.close()


# ---- HumanEval ----


@pytest.mark.parametrize("num_workers", [1, 4])
def test_humaneval(data_dir, num_workers):
    """164 of 164 canonical solutions, and none of 164 whose body is `pass`, whatever the number of workers."""
    with gzip.open(data_dir / "HumanEval.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    executor = LocalExecutor(True, num_workers=num_workers)
    tests = [UnitTests.from_row(row) for row in rows]
    bodies = {"passed": [row["canonical_solution"] for row in rows], "failed": ["    pass\n"] * len(rows)}
    for verdict, given in bodies.items():
        programs = [Program(t.prompt + body, t) for t, body in zip(tests, given, strict=True)]
        assert Counter(outcome.verdict for outcome in executor.run(programs)) == {verdict: 164}
    executor.close()


# ---- Hostile programs ----


class Surroundings:
    """What hostile programs are not to touch."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.canary = folder / "canary"
        self.canary.write_text("4")
        self.port = socket.create_server(("127.0.0.1", 0))
        self.port.settimeout(0)
        self.victim = subprocess.Popen(["sleep", "1000"], env={"SECRET": "4"})

    def source(self, name: str) -> str:
        text = hostile.PROGRAMS[name].replace("{canary!r}", repr(str(self.canary)))
        return text.replace("{port}", str(self.port.getsockname()[1])).replace("{victim}", str(self.victim.pid))

    def check(self) -> None:
        assert self.canary.read_text() == "4" and sorted(self.canary.parent.iterdir()) == [self.canary]
        with pytest.raises(BlockingIOError):
            self.port.accept()
        assert self.victim.poll() is None
        status = Path(f"/proc/{self.victim.pid}/status").read_text()
        assert "T (stopped)" not in status

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        self.port.close()


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    os.environ["SECRET"] = "4"
    surroundings = Surroundings(tmp_path_factory.mktemp("outside") / "canary")
    yield surroundings
    surroundings.close()
    del os.environ["SECRET"]


def processes(mark: str) -> set[str]:
    """Processes whose environment has this mark, which those of an executor inherit; other tests have some, too."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}\0".encode() in (place / "environ").read_bytes():
                found.add(place.name)
        except OSError:  # it has ended
            pass
    return found


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(kind, marks=[] if kind == "namespaces" else pytest.mark.slow) for kind in KINDS)],
)
def strict_executor(request, tmp_path_factory):
    """One with tight limits; after all its programs nothing may be left of them."""
    mark, folder = f"strict-{os.getpid()}", tmp_path_factory.mktemp("temporary")
    folder.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(monitor_server.ENVIRONMENT, "MARK", mark)
        patch.setattr(tempfile, "tempdir", str(folder))
        before = open_descriptors()
        executor = make_executor(request.param, cpu=1, wall=3)
        yield executor
        executor.close()
    deadline = time.monotonic() + 5
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(mark) == set()
    assert open_descriptors() == before
    assert list(folder.iterdir()) == []


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_hostile_programs(strict_executor, surroundings, name):
    if strict_executor.isolation == "process" and name in NEED_A_SANDBOX:
        pytest.skip("it is not protected from in a process without a sandbox, as `protections` says")
    start = time.monotonic()
    (outcome,) = strict_executor.run([Program(surroundings.source(name), DOUBLE)])
    assert outcome.verdict not in ("passed", "bad_tests", "setup"), outcome
    assert time.monotonic() - start < 20
    surroundings.check()
    assert verdicts(strict_executor, hostile.RIGHT) == ["passed"]  # and the next one is as well off as before


def test_hostile_scripts(strict_executor, surroundings):
    """A script can print what it wants; it neither sees what it should print nor gets out."""
    tests = UnitTests(inputs=["2"], outputs=["4"])
    names = [name for name in hostile.PROGRAMS if strict_executor.isolation != "process" or name not in NEED_A_SANDBOX]
    sources = [surroundings.source(name) + "\nprint(double(2))" for name in names]
    found = dict(zip(names, verdicts(strict_executor, *sources, tests=tests), strict=True))
    passed = {name for name, verdict in found.items() if verdict == "passed"}
    assert passed <= {"an unpickling trick", "os._exit after an answer", "an object that equals everything"}
    assert "setup" not in found.values()
    surroundings.check()


# ---- The executor itself ----


def test_nothing_runs_unless_it_is_allowed(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ExecutionNotAllowedError, match=r"pass `allow_execution=True` or set HF_ALLOW_CODE_EVAL=1"):
        LocalExecutor()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(ExecutionNotAllowedError):
        allow_execution()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    allow_execution()
    with pytest.raises(ExecutionNotAllowedError):
        LocalExecutor(allow_execution=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 0}, "`num_workers` must be at least 1"),
        (
            {"isolation": "docker"},
            "`isolation` must be 'auto' or one of 'bubblewrap', 'namespaces', 'process', got 'docker'",
        ),
        ({"python": "/nowhere/python"}, "/nowhere/python is no Python that works"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        LocalExecutor(allow_execution=True, **arguments)


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="`memory` of the limits must be above 0, got 0"):
        Limits(memory=0)


def test_root_runs_nothing_as_root(monkeypatch):
    """Without a sandbox it becomes nobody; where nobody can read Python, it refuses."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    monkeypatch.setattr("dapo_trl.execution.isolation._is_open", lambda path: False)
    with pytest.raises(RuntimeError, match="programs would run as root, because nobody else may read"):
        LocalExecutor(True, isolation="process")


AS_A_USER = """
import os
from dapo_trl.execution import *
from dapo_trl.execution.local import LocalExecutor
tests = UnitTests(entry_point="double", test="assert double(2) == 4")
threads = "import threading\\nfor _ in range(4): threading.Thread(target=print).start()\\ndef double(x): return 4"
bomb = "import os\\nfor _ in range(100): os.fork()\\ndef double(x): return 4"
writes = "open('x', 'w').close()\\ndef double(x): return 4"
gains = "import ctypes\\ndef double(x): return 4 if ctypes.CDLL(None).unshare(0x10000000) == 0 else 5"
root = "import os\\ndef double(x): return 4 if os.getuid() == 0 else 5"
for isolation in KINDS:
    try:
        executor = LocalExecutor(True, isolation=isolation)
    except RuntimeError as error:
        print(isolation, error)
        continue
    print(isolation, [outcome.verdict for outcome in executor.run([Program(s, tests) for s in SOURCES])])
"""


def test_an_ordinary_user():
    """The sandboxes of somebody who is not root, and has no rights to make any but by user namespaces."""
    if os.geteuid() != 0 or not os.access(SYSTEM_PYTHON, os.X_OK):
        pytest.skip("it takes root to become somebody else, and a Python that everybody may run")
    script = AS_A_USER.replace("KINDS", repr(KINDS)).replace("SOURCES", "(threads, writes, bomb, gains, root)")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # whose parents everybody may pass
        os.chmod(folder, 0o755)
        shutil.copytree(Path(dapo_trl.__file__).parent, Path(folder) / "dapo_trl")
        environment = {"PYTHONPATH": folder, "PATH": os.environ["PATH"]}
        somebody = {"user": 1234, "group": 1234, "extra_groups": []}
        words = [SYSTEM_PYTHON, "-c", script]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, **somebody)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "does not work here" not in line]
    assert lines
    for line in lines:
        assert line.endswith("['passed', 'passed', 'failed', 'failed', 'failed']"), line


def test_what_is_protected_is_said(executor, caplog):
    protections = executor.protections
    assert protections["time, memory, processes and output"] and protections["root's rights"]
    has_sandbox = executor.isolation != "process"
    assert {protections[name] for name in ("reading files", "writing files", "other processes")} == {has_sandbox}
    words = Isolation(executor.isolation).in_words()
    assert ("NOT protected are reading files" in words) is not has_sandbox


def test_the_best_that_works_is_taken(monkeypatch, caplog):
    """Where a sandbox does not work, the next one is, and the log says what is missing; who names one gets no other."""
    missing = Isolation.missing
    for lacking in (("bubblewrap",), ("bubblewrap", "namespaces")):
        monkeypatch.setattr(
            Isolation, "missing", lambda self, kinds=lacking: "gone" if self.kind in kinds else missing(self)
        )
        caplog.clear()
        try:
            executor = LocalExecutor(True, python=python_for("process"))
        except RuntimeError as error:
            pytest.skip(str(error))
        assert executor.isolation == KINDS[len(lacking)]
        assert "bubblewrap: gone." in caplog.text and executor._isolation.in_words() in caplog.text
        executor.close()
        with pytest.raises(RuntimeError, match="`isolation` 'bubblewrap' does not work here: bubblewrap: gone"):
            LocalExecutor(True, isolation="bubblewrap")


def test_another_interpreter_with_its_packages(executor):
    if executor.isolation == "process":
        pytest.skip("root may not run it there")
    other = LocalExecutor(True, isolation=executor.isolation, python=sys.executable)
    program = "import numpy\ndef double(x): return numpy.int64(2) * x"
    assert verdicts(other, program) == ["passed"] and verdicts(executor, program) == ["failed"]
    other.close()


def test_a_server_that_is_gone_starts_again(executor):
    assert verdicts(executor, hostile.RIGHT) == ["passed"]
    executor._server._process.kill()
    executor._server._process.wait()
    assert verdicts(executor, hostile.RIGHT) == ["passed"]
    executor.close()
    assert verdicts(executor, hostile.RIGHT) == ["passed"]


def test_a_fork_has_a_server_of_its_own(executor):
    assert verdicts(executor, hostile.RIGHT) == ["passed"]
    pid = os.fork()
    if pid == 0:
        os._exit(verdicts(executor, hostile.RIGHT) != ["passed"])
    assert os.waitpid(pid, 0)[1] == 0
    assert verdicts(executor, hostile.RIGHT) == ["passed"]


def test_an_interrupt_ends_what_runs(executor):
    """Ctrl-C in the middle of a hundred programs that sleep: over at once, nothing left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            executor.run([Program("import time\ntime.sleep(100)", DOUBLE)] * 100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 8
    assert verdicts(executor, hostile.RIGHT) == ["passed"]


def test_programs_end_with_the_process_that_runs_them(executor, tmp_path):
    """Killed with SIGKILL while programs run, it leaves none of them."""
    mark = f"killed-{os.getpid()}"
    code = (
        "from dapo_trl.execution import *; from dapo_trl.execution.local import LocalExecutor\n"
        "from dapo_trl.execution.monitor_server import ENVIRONMENT\n"
        f"ENVIRONMENT['MARK'] = {mark!r}\n"
        f"executor = LocalExecutor(True, isolation={executor.isolation!r}, python={python_for(executor.isolation)!r})\n"
        "print('ready', flush=True)\n"
        "tests = UnitTests(entry_point='double', test='assert double(2) == 4')\n"
        "executor.run([Program('import time\\ntime.sleep(100)', tests)] * 4)"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert runner.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    assert len(processes(mark)) > 2
    runner.kill()
    runner.wait()
    runner.stdout.close()
    deadline = time.monotonic() + 10
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(mark) == set()


def test_no_processes_left_is_no_verdict(executor, monkeypatch):
    """Where nothing can be started, nothing is judged."""
    monkeypatch.setattr(
        "dapo_trl.execution.sandboxed_process.os.pipe",
        lambda: (_ for _ in ()).throw(OSError(24, "Too many open files")),
    )
    (outcome,) = executor.run([Program(hostile.RIGHT, DOUBLE)])
    assert outcome.verdict == "setup" and "Too many open files" in outcome.message and not outcome.is_judged


@pytest.mark.skipif(shutil.which("bwrap") is None and os.environ.get("CI") is None, reason="no bubblewrap")
def test_bubblewrap_is_there_in_ci():
    if os.environ.get("CI") and os.geteuid() == 0:
        assert shutil.which("bwrap"), "install bubblewrap in .ci/run"
