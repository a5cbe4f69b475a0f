"""
Starts one process in a sandbox, watches over it and ends it, with all that it has started.

The monitor stays outside of the sandbox and never sees what runs in it: the process in the sandbox reads the job. What
came of it is a line of JSON on the descriptor `status`:

- `reason`: `"exit"`, or why it was ended: `"cpu"`, `"wall"`, `"memory"`, `"processes"`, `"disk"`, `"stopped"` by the
  executor; `"setup"` if the sandbox could not be made and nothing ran;
- `code`: exit code, negative for a signal; `message`: what failed of the setup.
"""

import json
import os
import select
import signal
import sys
import time

from . import sandbox


_INTERVAL = 0.05  # seconds between looks at a program that goes on
_FIRST_LOOK = 0.1
_OF_BUBBLEWRAP = 2  # processes of its own
_BY_LIMIT = (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGXCPU, 128 + signal.SIGKILL)  # bubblewrap adds 128
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")


class SetupError(Exception):
    """The sandbox could not be made; nothing ran."""


def main(config, files):
    """
    Run the process of a configuration, and report.

    Args:
        config (`dict`):
            `role`, `isolation` and what it needs, `limits`.
        files (`dict[str, int]`):
            Descriptors: `stdin` with the job, `stdout`, `stderr`; `status` for the report; `stop`, which is closed when
            the program is to end; where there are any, `rpc` and `verdict`.
    """
    sandbox.adopt_orphans()
    deadline = time.monotonic() + config["limits"]["wall"]
    try:
        child = _start(config, files, deadline)
        report = _watch(child, files["stop"], deadline, config)
    except SetupError as error:
        report = {"reason": "setup", "code": 0, "message": str(error)}
    except Exception as error:
        report = {"reason": "setup", "code": 0, "message": f"{type(error).__name__}: {error}"}
    _end_all()
    os.write(files["status"], json.dumps(report).encode())


def _start(config, files, deadline):
    """Start the child, and give its process id once it is shut in."""
    if config["isolation"] == "namespaces":
        sandbox.leave_namespaces()
    ready, armed = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        _become_child(config, files, armed)
    os.close(armed)
    for name in set(files) - {"status", "stop"}:
        os.close(files[name])
    message = _read_all(ready, deadline)
    os.close(ready)
    if message == b"ready":
        return child
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    raise SetupError(message.decode(errors="replace") or f"it ended with code {code} before it was shut in")


def _become_child(config, files, armed):
    """The process in the sandbox: never returns."""
    try:
        os.setsid()
        os.close(files.pop("status"))
        os.close(files.pop("stop"))
        for target, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(files[name], target)
            os.close(files.pop(name))
        files["armed"] = armed
        if config["isolation"] == "bubblewrap":
            for descriptor in files.values():
                os.set_inheritable(descriptor, True)
            os.execv(config["command"][0], [*config["command"], "enter", json.dumps([config, files])])
        enter(config, files)
    except BaseException as error:
        try:
            os.write(armed, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(127)
    os._exit(127)


def enter(config, files):
    """Shut this process in, then run what it is for. Called in a fork, or by `bubblewrap`'s child."""
    if config["role"] == "tester":
        from .tester import run
    else:
        from .program import run
    is_linux = sys.platform == "linux"
    sandbox.die_with_parent()
    sandbox.die_first()
    if config["isolation"] == "namespaces":
        sandbox.make_root(config["shown"], config["limits"]["disk"])
    elif config["isolation"] == "process":
        os.chdir(config["folder"])
    os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
    os.environ.pop("PWD", None)  # of bubblewrap
    if config["is_nobody"]:
        sandbox.become_nobody()  # before there is a limit of processes, which would hold for all of nobody's
        sandbox.die_with_parent()  # the change of user has cleared it
    is_counted_apart = config["isolation"] in ("bubblewrap", "namespaces") or config["is_nobody"]
    sandbox.limit(config["limits"], 0 if is_counted_apart else sandbox.count_tasks())
    if is_linux:
        sandbox.drop_privileges()
        sandbox.forbid_system_calls(is_alone=config["isolation"] in ("bubblewrap", "namespaces"))
    if is_linux and config["role"] == "tester":
        sandbox.hide()
    armed = files.pop("armed")
    os.write(armed, b"ready")
    os.close(armed)
    try:
        run(files)
    except BaseException:
        os._exit(126)
    os._exit(0)


def _read_all(descriptor, deadline):
    data = b""
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, 4096)
        if not part:
            return data
        data += part
    return b"it took too long"


def _watch(child, stop, deadline, config):
    """Wait for the child, and look at what it uses."""
    limits, wait = config["limits"], _FIRST_LOOK
    ended = [os.pidfd_open(child)] if hasattr(os, "pidfd_open") else []
    while True:
        wait = wait if ended else 0.005  # without a descriptor of the child, ask often
        heard, _, _ = select.select([stop, *ended], [], [], min(wait, max(0.0, deadline - time.monotonic())))
        wait = _INTERVAL
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            is_cpu = code in _BY_LIMIT and _cpu_of_children() >= limits["cpu"]
            return {"reason": "cpu" if is_cpu else "exit", "code": code}
        if stop in heard:
            return {"reason": "stopped", "code": 0}
        if time.monotonic() >= deadline:
            return {"reason": "wall", "code": 0}
        started = _started()
        excess = _excess(started, limits, config.get("folder"))
        if excess:
            return {"reason": excess, "code": 0}
        _reap([pid for pid in started if pid != child])


def _cpu_of_children():
    times = os.times()
    return times.children_user + times.children_system


def _excess(started, limits, folder):
    """What all that was started uses too much of together."""
    used = [_usage(pid) for pid in started]
    if len(used) > limits["processes"] + _OF_BUBBLEWRAP:
        return "processes"
    if sum(pages for pages, _ in used) * _PAGE > limits["memory"]:
        return "memory"
    if sum(ticks for _, ticks in used) / _TICK > limits["cpu"]:
        return "cpu"
    return "disk" if folder and _size(folder) > limits["disk"] else None


def _started():
    """All processes that come from this one; none where the system does not say."""
    found, left = [], [os.getpid()]
    while left:
        each = left.pop()
        found.append(each)
        try:
            for task in os.listdir(f"/proc/{each}/task"):
                with open(f"/proc/{each}/task/{task}/children") as file:
                    left += map(int, file.read().split())
        except OSError:
            continue
    return found[1:]


def _usage(pid):
    """Resident pages and processor ticks of a process, with those of its children that have ended."""
    pages = ticks = 0
    try:
        for task in os.listdir(f"/proc/{pid}/task"):  # the first may have ended before the others
            with open(f"/proc/{pid}/task/{task}/stat", "rb") as file:  # its name may be of any bytes
                pages = max(pages, int(file.read().rpartition(b")")[2].split()[21]))
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
    except (OSError, IndexError, ValueError):  # it has ended
        pass
    return pages, ticks


def _size(folder):
    """Bytes of all files; without an end where it cannot be told, as of folders too deep to walk."""
    total = 0
    try:
        for place, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(place, name)).st_blocks * 512
                except FileNotFoundError:
                    pass
    except (OSError, RecursionError):
        return float("inf")
    return total


def _reap(pids):
    """Orphans that have ended."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except OSError:  # a grandchild
            pass


def _end_all():
    """Kill everything that was started, until there is nothing left."""
    while True:
        for pid in _started():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
