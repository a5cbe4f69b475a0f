"""
The process of the program that is judged: it runs the code, and calls its functions for the tests, which it never sees.

Nothing that happens here can be trusted once the program has run: what leaves this process is what its functions
return, as plain data, and what it prints.
"""

import json
import os
import sys
import types

from .wire import Connection, WireError, decode, encode


_MOST_ITEMS = 1_000_000  # of an iterator that the tests ask for
_MUTABLE = (list, dict, set, bytearray)


def run(files):
    """
    Read the job from standard input, and do it.

    Args:
        files (`dict[str, int]`):
            `rpc` is the socket to the tests. Without one the program is a script that reads and prints.
    """
    job = json.loads(_read_job())
    if "rpc" not in files:
        _run_script(job["source"], job["stdin"])
        return
    _set_input("")
    Program(Connection(files["rpc"])).serve(job["source"])


def _read_job():
    parts = []
    while part := os.read(0, 2**20):
        parts.append(part)
    return b"".join(parts).decode("utf-8")


def _set_input(text):
    """Let standard input be this text."""
    name = ".input"
    with open(name, "wb+") as file:
        os.unlink(name)
        file.write(text.encode("utf-8", "surrogatepass"))
        file.seek(0)
        os.dup2(file.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)


def _make_way():
    """Leave nothing of ours where the program would find it in place of its own."""
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.dirname(__file__))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "inside"]:
        del sys.modules[name]
    sys.argv[:] = ["program.py"]


def _new_module(name):
    """An empty module that the program's code makes its own."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def _run_script(source, stdin):
    _set_input(stdin)
    _make_way()
    exit_code = 1
    try:
        exec(compile(source, "program.py", "exec"), _new_module("__main__"))
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # closed by the program, or the reader has had enough
            pass
    os._exit(exit_code & 0xFF)


class Program:
    """
    The program's functions and objects, for the tests on the other side of a connection.

    Args:
        connection ([`Connection`]):
            To the tests.
    """

    def __init__(self, connection):
        self._connection = connection
        self._kept = []  # objects that the tests know by number
        self._numbers = {}
        self._names = {}

    def serve(self, source):
        """Run the code, then do what the tests ask for until they end."""
        _make_way()
        self._names = _new_module("program")
        self._answer(lambda: self._load(source))
        while True:
            try:
                request = self._connection.receive()
            except WireError:
                return
            self._answer(lambda request=request: getattr(self, "_do_" + request["do"])(request))

    def _load(self, source):
        exec(compile(source, "program.py", "exec"), self._names)
        return {"value": None}

    def _answer(self, act):
        try:
            reply = act()
        except WireError:
            raise
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": kinds, "text": _text_of(error)}
        try:
            self._connection.send(reply)
        except RecursionError:
            self._connection.send({"error": ["RecursionError", "Exception"], "text": "the value is too deep"})

    def _do_call(self, request):
        given = [self._in(each) for each in request["args"]]
        named = {name: self._in(each) for name, each in request["kwargs"].items()}
        before = [encode(each, self._refer) if isinstance(each, _MUTABLE) else None for each in given]
        value = self._target(request)(*given, **named)
        changed = []
        for place, each in enumerate(given):
            if isinstance(each, _MUTABLE) and (after := encode(each, self._refer)) != before[place]:
                changed.append([place, after])
        return {"value": encode(value, self._refer), "changed": changed}

    def _do_get(self, request):
        return {"value": encode(getattr(self._target(request), request["attribute"]), self._refer)}

    def _do_set(self, request):
        setattr(self._target(request), request["attribute"], self._in(request["value"]))
        return {"value": None}

    def _do_list(self, request):
        items = []
        for each in self._target(request):
            items.append(each)
            if len(items) > _MOST_ITEMS:
                raise ValueError("the iterator does not end")
        return {"value": encode(items, self._refer)}

    def _has(self, name):
        return name in self._names or hasattr(self._names.get("Solution"), name)

    def _target(self, request):
        """The object that is meant: by number, or by name, as a method of a class `Solution` too."""
        if "name" not in request:
            return self._kept[request["handle"]]
        name = request["name"]
        if name not in self._names and self._has(name):
            return getattr(self._names["Solution"](), name)
        if name not in self._names:
            raise NameError(f"the program has no {name!r}")
        return self._names[name]

    def _refer(self, value):
        """Keep an object, and give its number: the same for the same object."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._kept)
            self._kept.append(value)
        return {"handle": self._numbers[id(value)], "type": type(value).__name__[:80]}

    def _in(self, message):
        return decode(message, self._resolve)

    def _resolve(self, message):
        """A function of the tests, which calls them back; or one of the program's own objects."""
        if "callback" not in message:
            return self._target(message)
        number = message["callback"]

        def call(*given):
            arguments = [encode(each, self._refer) for each in given]
            self._connection.send({"callback": number, "args": arguments})
            reply = self._connection.receive()
            if "error" in reply:
                raise RuntimeError(reply["error"])
            return self._in(reply["value"])

        return call


def _text_of(error):
    try:
        return str(error)[:500]
    except BaseException:
        return ""
