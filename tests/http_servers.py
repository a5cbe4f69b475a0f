"""
Servers that the tests start: one that can be told how to behave, and `transformers serve` with the tiny student.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import REPOSITORY, make_tokenizer
from dapo_trl.engines import SamplingConfig


SHORT = SamplingConfig(max_new_tokens=12)


@dataclass
class Behaviour:
    """What the server does. Its policy is a hash of prompt and seed, without any seed a die."""

    token_prompts: bool = True
    token_ids: bool = True
    n: bool = True
    seeds: bool = True
    extra_fields: bool = True
    seed_field: bool = True
    hottest: float = 2.0
    constant: str | None = None  # "any": always the same completion; "greedy": always the greedy one
    models: list | None = field(default_factory=lambda: [{"id": "m", "max_model_len": 400}])
    delay: float = 0.0


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait; the others are reset


class FakeServer:
    """An OpenAI-compatible server; `answer` may take over single requests. It strings random words together."""

    def __init__(self, behaviour, port=0, tokenizer=None, words="abcdefg \n"):
        self.behaviour = behaviour
        self.tokenizer = tokenizer or make_tokenizer()
        self.words = words
        self.bodies, self.in_flight, self.most_in_flight, self.drip = [], 0, 0, 0.0
        self.answer = lambda body, number: None
        self.choice = lambda choice: choice
        self.lock = threading.Lock()
        self.http = Listener(("127.0.0.1", port), type("Handler", (Handler,), {"fake": self}))
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def work(self):
        """The requests that were not probes."""
        return [body for body in self.bodies if body["max_tokens"] == SHORT.max_new_tokens]

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def respond(self, body):
        """Status and body of an answer."""
        with self.lock:
            number, _ = len(self.bodies), self.bodies.append(body)
        time.sleep(self.behaviour.delay)
        taken_over = self.answer(body, number)
        if taken_over is not None:
            return taken_over
        known = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n"}
        if not self.behaviour.extra_fields and set(body) - known:
            return 422, {"detail": f"unexpected fields {set(body) - known}"}
        if ("seed" in body and not self.behaviour.seed_field) or body["temperature"] > self.behaviour.hottest:
            return 400, {"error": {"message": "unknown field, or too hot"}}
        if not isinstance(body["prompt"], str) and not self.behaviour.token_prompts:
            return 400, {"error": {"message": "the prompt must be a string"}}
        count = body.get("n", 1) if self.behaviour.n else 1
        choices = [self.choice(self.complete(body, index)) for index in range(count)]
        read = len(self.tokenizer(body["prompt"]).input_ids if isinstance(body["prompt"], str) else body["prompt"])
        return 200, {"choices": choices, "usage": {"prompt_tokens": read}}

    def complete(self, body, index):
        seed = body.get("seed") if self.behaviour.seeds else None
        prompt = body["prompt"] if isinstance(body["prompt"], str) else self.tokenizer.decode(body["prompt"])
        key = (prompt, index, random.random() if seed is None else seed)
        if body["temperature"] == 0 or body.get("top_k") == 1 or self.behaviour.constant == "greedy":
            key = (prompt, "greedy")
        elif self.behaviour.constant:
            key = (prompt, "constant")
        rng = random.Random(repr(key))
        text = "".join(rng.choices(self.words, k=rng.randrange(1, 16)))
        ids = [*self.tokenizer(text).input_ids, self.tokenizer.eos_token_id]
        finish_reason = "stop" if len(ids) <= body["max_tokens"] else "length"
        ids = ids[: body["max_tokens"]]
        choice = {"text": self.tokenizer.decode(ids, skip_special_tokens=True), "finish_reason": finish_reason}
        return choice | ({"token_ids": ids} if self.behaviour.token_ids and body.get("return_token_ids") else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    fake: FakeServer

    def do_GET(self):
        models = self.fake.behaviour.models
        self.send(*((404, {}) if models is None else (200, {"data": models})))

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not content:  # the client is gone
            self.close_connection = True
            return
        body = json.loads(content)
        with self.fake.lock:
            self.fake.in_flight += 1
            self.fake.most_in_flight = max(self.fake.most_in_flight, self.fake.in_flight)
        try:
            status, answer = self.fake.respond(body)
        finally:
            with self.fake.lock:
                self.fake.in_flight -= 1
        self.send(status, answer)

    def send(self, status, answer):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(answer, bytes) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for position in range(len(content) if self.fake.drip else 0):
                self.wfile.write(content[position : position + 1])
                self.wfile.flush()
                time.sleep(self.fake.drip)
            self.wfile.write(b"" if self.fake.drip else content)
            self.wfile.flush()
        except OSError:
            self.close_connection = True

    def log_message(self, *args):
        pass


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Student:
    """`transformers serve` with the tiny student, killed and started again at will."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        (self.folder / "hub").mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self):
        command = "from transformers.cli.transformers import main; main()"
        arguments = ["serve", "examples/student", "--port", str(self.port), "--host", "127.0.0.1", "--device", "cpu"]
        environment = os.environ | {"HF_HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", command, *arguments], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )

    def wait(self):
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text())

    @property
    def num_requests(self):
        """Requests for completions so far, answered or under way, those that probe included."""
        return (self.folder / "log").read_text().count("[Request received]")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
