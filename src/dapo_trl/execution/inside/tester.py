"""
The process of the tests: it runs them against the functions of a program that lives in another process, and writes the
verdict to a descriptor that only it has.
"""

import ast
import builtins
import json

from .wire import Connection, WireError, decode, encode


def run(files):
    """
    Read the tests from standard input, run them, write the verdict.

    Args:
        files (`dict[str, int]`):
            `rpc` is the socket to the program; `verdict` is for the verdict, as JSON: `verdict` is `"passed"`,
            `"failed"` or `"bad_tests"`; `passed` and `total` count tests, if they were to be counted; `message` says
            what failed first.
    """
    with open(0, encoding="utf-8", errors="surrogatepass") as file:
        job = json.load(file)
    found = judge(job, Connection(files["rpc"]))
    with open(files["verdict"], "w") as file:
        json.dump(found, file)


class ProgramError(Exception):
    """What the program raised; also an instance of the built-in exception of that name."""


class BadTests(Exception):
    """The tests do not work, whatever the program does."""


def judge(job, connection):
    """
    Run tests.

    Args:
        job (`dict`):
            `setup` and `test` are code, run one after the other; `check` names the function that is then called with
            the one of the program that `entry_point` names; or `cases` has pairs of arguments and result. `count` says
            whether every `assert` and case counts by itself.
        connection ([`Connection`]):
            To the program.

    Returns:
        `dict`: see [`run`].
    """
    program = Remote(connection)
    counter = Counter(job["count"])
    found = {"verdict": "failed", "message": ""}
    try:
        _wait_until_loaded(program)
        if job.get("cases") is not None:
            _run_cases(job, program, counter)
        else:
            _run_code(job, program, counter)
        if program.num_requests == 0:
            raise BadTests("the tests never call the program")
        counter.raise_first()
        found["verdict"] = "passed"
    except BadTests as error:
        found = {"verdict": "bad_tests", "message": str(error)}
    except WireError as error:
        found["message"] = f"the program ended: {error}"
    except SystemExit:
        found = {"verdict": "bad_tests", "message": "the tests end by themselves, with `exit`"}
    except BaseException as error:
        if program.num_requests == 0 and not isinstance(error, ProgramError):
            found["verdict"] = "bad_tests"
        found["message"] = f"{type(error).__name__}: {error}{_line_of(error, job)}"[:500]
    if program.is_broken and found["verdict"] == "passed":
        found = {"verdict": "failed", "message": "the program ended, or sent what is no value"}
    return found | counter.counts()


def _line_of(error, job):
    """The line of the tests that an error went through."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" in the tests' line {line}: {job['test'].splitlines()[line - 1].strip()}"


def _wait_until_loaded(program):
    """Nothing that goes wrong here is the tests' fault."""
    try:
        program.wait_until_loaded()
    except (WireError, ProgramError):
        raise
    except Exception as error:
        raise ProgramError(f"{type(error).__name__}: {error}") from error


def _run_code(job, program, counter):
    setup, test = job["setup"], job["test"]
    try:
        trees = [ast.parse(setup, "setup"), counter.rewrite(ast.parse(test, "tests"))]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BadTests(f"{type(error).__name__}: {error}") from error
    names = {name: program.function(name) for name in _unknown_names(trees)}
    names |= {"__name__": "tests", counter.name: counter}
    exec(compile(trees[0], "setup", "exec"), names)
    if job["entry_point"]:  # the setup may hold a stub of it
        names[job["entry_point"]] = program.function(job["entry_point"])
    exec(compile(trees[1], "tests", "exec"), names)
    if job["check"]:
        if not callable(names.get(job["check"])):
            raise BadTests(f"the tests define no function {job['check']!r}")
        names[job["check"]](names[job["entry_point"]])


def _run_cases(job, program, counter):
    function = program.function(job["entry_point"])
    counter.num_written = len(job["cases"])
    for number, (arguments, expected) in enumerate(job["cases"]):
        if not counter.test(number, lambda given=arguments, wanted=expected: _is_expected(function(*given), wanted)):
            return


def _is_expected(value, expected):
    """Whether a result is the one of a JSON file, which has no tuples, and sometimes a list around a single result."""
    value = _as_json(value)
    expected = _as_json(expected)
    return value == expected or (isinstance(expected, list) and len(expected) == 1 and value == expected[0])


def _as_json(value):
    if isinstance(value, Handle):
        value = list(value)
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _as_json(each) for key, each in value.items()}
    return value


def _unknown_names(trees):
    """Names that code reads but nobody defines: they are the program's."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    made |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return sorted(name for name in read - made if not hasattr(builtins, name))


class Counter:
    """
    Counts tests: each `assert` statement and each case, if every one is to count, else only whether all went through.
    A statement that runs several times is one test, which passes if it always does.

    Args:
        is_counting (`bool`):
            Whether tests go on after one that fails.
    """

    name = "__count__"

    def __init__(self, is_counting):
        self._is_counting = is_counting
        self._passed = {}
        self.num_written = 0
        self._first = None

    def rewrite(self, tree):
        """Code in which each `assert` is a call of `test`."""
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        self.num_written = len(found)
        return ast.fix_missing_locations(_Asserts(self.name).visit(tree)) if self._is_counting else tree

    def test(self, which, condition):
        """Count a condition, a function; give whether to go on."""
        is_right = False
        try:
            if not condition():
                raise AssertionError("wrong result")
            is_right = True
        except WireError:
            raise
        except Exception as error:
            if self._first is None:
                self._first = error
        self._passed[which] = is_right and self._passed.get(which, True)
        return self._is_counting or self._first is None

    def raise_first(self):
        """Raise what failed first, if anything did."""
        if self._first is not None:
            raise self._first

    def counts(self):
        """Tests that passed, and all; those that were not reached count too."""
        return {"passed": sum(self._passed.values()), "total": self.num_written} if self._is_counting else {}


class _Asserts(ast.NodeTransformer):
    """`assert condition` as `NAME.test(number, lambda: condition)`."""

    def __init__(self, name):
        self._name = name
        self._number = 0

    def visit_Assert(self, node):
        self._number += 1
        arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        function = ast.Attribute(ast.Name(self._name, ast.Load()), "test", ast.Load())
        call = ast.Call(function, [ast.Constant(self._number), ast.Lambda(arguments, node.test)], [])
        return ast.copy_location(ast.Expr(call), node)


class Remote:
    """
    The program, as the tests see it.

    Args:
        connection ([`Connection`]):
            To its process.
    """

    def __init__(self, connection):
        self._connection = connection
        self._functions = []  # of the tests, that the program may call
        self.num_requests = 0
        self.is_broken = False

    def wait_until_loaded(self):
        """Wait until the program's code has run."""
        self._reply()

    def function(self, name):
        """What the program calls so."""
        return Handle(self, {"name": name}, name)

    def call(self, target, given, named):
        """Call a function of the program; lists and dictionaries that it changes are changed here too."""
        arguments = [encode(each, self._refer) for each in given]
        request = {"do": "call", "args": arguments, "kwargs": {k: encode(v, self._refer) for k, v in named.items()}}
        return self._ask(request | target, given)

    def get(self, target, attribute):
        """An attribute of an object of the program."""
        return self._ask({"do": "get", "attribute": attribute} | target)

    def set(self, target, attribute, value):
        """Set an attribute of an object of the program."""
        return self._ask({"do": "set", "attribute": attribute, "value": encode(value, self._refer)} | target)

    def items(self, target):
        """What an object of the program iterates over."""
        return self._ask({"do": "list"} | target)

    def _ask(self, request, given=()):
        self.num_requests += 1
        self._connection.send(request)
        return self._reply(given)

    def _reply(self, given=()):
        try:
            reply = self._connection.receive()
            while "callback" in reply:
                self._call_back(reply)
                reply = self._connection.receive()
            if "error" not in reply:
                for place, after in reply.get("changed", ()):
                    _become(given[place], decode(after, self._resolve))
                return decode(reply["value"], self._resolve)
            kinds, text = [str(kind) for kind in reply["error"]], str(reply["text"])
        except WireError:
            self.is_broken = True
            raise
        except Exception as error:  # of another shape than a reply
            self.is_broken = True
            raise WireError(f"no reply: {error!r:.200}") from error
        raise _exception(kinds, text)

    def _call_back(self, message):
        try:
            function = self._functions[message["callback"]]
            value = function(*[decode(each, self._resolve) for each in message["args"]])
            reply = {"value": encode(value, self._refer)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        self._connection.send(reply)

    def _refer(self, value):
        if isinstance(value, Handle):
            return {"handle": -1} | object.__getattribute__(value, "_inner")[1]
        if not callable(value):
            raise TypeError(f"the tests pass a {type(value).__name__}, which cannot be sent to the program")
        self._functions.append(value)
        return {"callback": len(self._functions) - 1}

    def _resolve(self, message):
        return Handle(self, {"handle": int(message["handle"])}, str(message["type"]))


class Handle:
    """
    An object of the program that is no plain data: it can be called, iterated over, and has attributes. It is equal to
    nothing but itself, and neither true nor false.
    """

    def __init__(self, remote, target, name):
        object.__setattr__(self, "_inner", (remote, target))
        object.__setattr__(self, "__name__", name)

    def __call__(self, *given, **named):
        remote, target = object.__getattribute__(self, "_inner")
        return remote.call(target, given, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        remote, target = object.__getattribute__(self, "_inner")
        return remote.get(target, name)

    def __setattr__(self, name, value):
        remote, target = object.__getattribute__(self, "_inner")
        remote.set(target, name, value)

    def __iter__(self):
        remote, target = object.__getattribute__(self, "_inner")
        return iter(remote.items(target))

    def _refuse(self, *_):
        name = object.__getattribute__(self, "__name__")
        raise TypeError(f"the program's {name!r} is an object, not a number, text or collection that could be compared")

    def __eq__(self, other):
        if isinstance(other, Handle):
            return object.__getattribute__(self, "_inner") == object.__getattribute__(other, "_inner")
        return self._refuse()

    def __ne__(self, other):
        return not self == other

    __hash__ = object.__hash__
    __bool__ = __len__ = __contains__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def _become(value, after):
    """Make a list, dictionary or set what the program has made of it."""
    if isinstance(value, (list, bytearray)):
        value[:] = after
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(after)


def _exception(kinds, text):
    """What the program raised: of the first of its classes that is built in, but for those that end loops."""
    known = [getattr(builtins, kind, None) for kind in kinds if not kind.startswith("Stop")]
    base = next((kind for kind in known if isinstance(kind, type) and issubclass(kind, Exception)), Exception)
    try:
        return type(kinds[0][:80] if kinds else "Exception", (ProgramError, base), {})(text)
    except Exception:  # a name that cannot be one; a class with a constructor of its own, as UnicodeDecodeError has
        return ProgramError(text)
