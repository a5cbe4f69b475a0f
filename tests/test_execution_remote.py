"""
Programs at a service: a server that really runs what it is sent, and may be told to misbehave.
"""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import hostile
from dapo_trl.execution import Limits, Program, UnitTests
from dapo_trl.execution import remote as module
from dapo_trl.execution.remote import RemoteExecutor


DOUBLE = UnitTests(entry_point="double", test="assert double(2) == 4\nassert double(5) == 10")
CHEATS = (
    "an object that equals everything",
    "an object, not a number, that equals everything",
    "patched builtins",
    "replaced unittest",
    "forged success output",
    "a forged verdict on every descriptor",
    "forged replies",
    "sys.exit",
    "os._exit when called",
    "segmentation fault",
    "looks for the tests in its memory",
)


class Service:
    """Runs scripts as SandboxFusion does; `answers` are given in place of the next results."""

    def __init__(self, folder):
        self.answers, self.requests, self.folder = [], [], folder
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append((self.path, request))
                status, answer = service.answers.pop(0) if service.answers else (200, service.result(request))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def result(self, request):
        script = self.folder / f"script-{len(self.requests)}.py"
        script.write_text(request["code"])
        try:
            done = subprocess.run(
                [sys.executable, str(script)],
                input=request["stdin"],
                capture_output=True,
                text=True,
                timeout=request["run_timeout"],
            )
        except subprocess.TimeoutExpired:
            return {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""}}
        names = {"stdout": done.stdout, "stderr": done.stderr, "return_code": done.returncode}
        status = "Success" if done.returncode == 0 else "Failed"
        return {"status": status, "message": "", "run_result": {"status": "Finished", "execution_time": 0.1} | names}


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    service = Service(tmp_path)
    yield service
    service.http.shutdown()
    service.http.server_close()


def verdicts(service, *sources, tests=DOUBLE, count_tests=False, **limits):
    executor = RemoteExecutor(service.url + "/", Limits(**limits), max_retries=2)
    return executor.run([Program(source, tests) for source in sources], count_tests)


def test_functions(service):
    found = verdicts(service, hostile.RIGHT, "def double(x): return 4", "def (")
    assert [outcome.verdict for outcome in found] == ["passed", "failed", "failed"]
    assert found[1].message == "AssertionError:  in the tests' line 2: assert double(5) == 10"
    assert {path for path, _ in service.requests} == {"/run_code"}
    (outcome,) = verdicts(service, "def double(x): return 4", count_tests=True)
    assert outcome.share == 0.5


def test_scripts(service):
    tests = UnitTests(inputs=["2", "5"], outputs=["4", "10\n"])
    found = verdicts(service, "print(2 * int(input()))", "print(4)", "raise ValueError", tests=tests, count_tests=True)
    assert [(outcome.verdict, outcome.share) for outcome in found] == [
        ("passed", 1.0),
        ("failed", 0.5),
        ("failed", 0.0),
    ]
    assert "ValueError" in found[2].message


def test_limits(service):
    (outcome,) = verdicts(service, "while True: pass", wall=1)
    assert outcome.verdict == "wall" and outcome.is_judged
    time.sleep(0.2)
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "from inside import program" not in commands  # it ends with the script that the service has killed
    request = service.requests[0][1]
    assert (request["run_timeout"], request["memory_limit_MB"], request["language"]) == (1, 512, "python")


@pytest.mark.parametrize("name", CHEATS)
def test_cheats(service, name):
    (outcome,) = verdicts(service, hostile.PROGRAMS[name], wall=10)
    assert outcome.verdict == "failed"


def test_the_tests_are_gone_from_disk(service):
    """The script deletes itself before the program starts."""
    (outcome,) = verdicts(service, hostile.RIGHT)
    assert outcome.verdict == "passed" and not list(service.folder.glob("script-*.py"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, b"out of memory"), "OSError: status 500, out of memory"),
        ((200, b"<html>welcome</html>"), "JSONDecodeError"),
        (
            (200, {"status": "SandboxError", "message": "no", "run_result": None}),
            "not a result of a run, but .*SandboxError",
        ),
        ((200, ["no"]), "not a result of a run"),
    ],
)
def test_a_service_that_fails(service, answer, message):
    """Once is tried again; again and again is an error, and no verdict."""
    service.answers = [answer]
    assert verdicts(service, hostile.RIGHT)[0].verdict == "passed"
    service.answers = [answer] * 3
    with pytest.raises(RuntimeError, match=rf"Gave up on {service.url}/run_code after 3 attempts: {message}"):
        verdicts(service, hostile.RIGHT)


def test_a_service_that_is_not_there(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    with pytest.raises(RuntimeError, match=r"Gave up on http://127.0.0.1:9/run_code after 1 attempts: URLError"):
        RemoteExecutor("http://127.0.0.1:9", max_retries=0).run([Program("", DOUBLE)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8080"}, "`url` must begin with http://"),
        ({"url": "http://x", "max_concurrency": 0}, "`max_concurrency` must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RemoteExecutor(**arguments)
    assert RemoteExecutor("http://x").run([]) == []
