"""
What a program is shut in with: bubblewrap, Linux namespaces without it, or limits alone.
"""

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from dapo_trl.execution import Limits
from dapo_trl.execution.inside.sandbox import DEVICES, FORBIDDEN, WORK


KINDS = ("bubblewrap", "namespaces", "process")  # the most trusted first
BARE = "bare"  # limits and a filter only: for a process in which nothing but our own code runs
_INSIDE = Path(__file__).parent / "inside"
# Our code in a Python of its own, which finds the folder `inside` and nothing else of this package.
_BOOTSTRAP = f"import sys; sys.path.insert(0, {str(_INSIDE.parent)!r}); from inside.server import start; start()"
# What an interpreter is made of, in its own words.
_ASK = """
import json, os, sys
packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
folders = [sys.prefix, sys.base_prefix, sys.base_exec_prefix, *packages]
print(json.dumps([sys.version_info[:2], folders, os.__file__]))
"""
_OLDEST = (3, 11)
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")


class Isolation:
    """
    One kind of sandbox, on this machine.

    Args:
        kind (`str`):
            One of `KINDS`.
        python (`str`, *optional*):
            Interpreter of the programs, with the packages that it has. `None` takes this one, without packages.
    """

    def __init__(self, kind: str, python: str | None = None) -> None:
        self.kind = kind
        self._executable = python or os.path.realpath(sys.executable)
        self._has_packages = python is not None

    @property
    def command(self) -> list[str]:
        """Our code in the interpreter."""
        return self._words(_BOOTSTRAP)

    def _words(self, code: str) -> list[str]:
        """Code in the interpreter: nothing from the environment, and without packages if there shall be none."""
        return [self._executable, "-s", "-P", *([] if self._has_packages else ["-S"]), "-c", code]

    @cached_property
    def _made_of(self) -> tuple[tuple[int, int], list[str], str]:
        """Version of the interpreter, its folders, and a file of its standard library."""
        done = subprocess.run(self._words(_ASK), check=True, capture_output=True, env={})
        version, folders, file = json.loads(done.stdout)
        return (version[0], version[1]), folders, file

    def missing(self) -> str | None:
        """What this machine lacks for it, as far as can be seen without trying."""
        if os.name != "posix":
            return "this system has neither limits nor sandboxes"
        if self.kind != "process" and sys.platform != "linux":
            return "it is of Linux"
        if self.kind == "bubblewrap" and shutil.which("bwrap") is None:
            return "`bwrap` is not installed"
        try:
            version, _, file = self._made_of
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            return f"{self._executable} is no Python that works ({error})"
        if version < _OLDEST:
            return f"{self._executable} is older than Python {'.'.join(map(str, _OLDEST))}"
        home = os.path.expanduser("~")
        for path in self.shown if self.kind != "process" else ():
            if os.path.isabs(home) and home != "/" and os.path.commonpath([path, home]) == path:
                return f"programs would see {path}, which is part of {self._executable}, and the home folder in it"
        if self.kind == "process" and os.geteuid() == 0 and not all(map(_is_open, (self._executable, file))):
            return f"programs would run as root, because nobody else may read {self._executable}"
        return None

    @cached_property
    def shown(self) -> list[str]:
        """Files and folders that a program may read."""
        folders = [*self._made_of[1], os.path.dirname(self._executable)]
        paths = [*_SYSTEM, *(os.path.abspath(each) for each in folders if each)]
        return [
            path for path in dict.fromkeys(paths) if os.path.lexists(path) and path not in ("/", str(_INSIDE.parent))
        ]

    @property
    def is_nobody(self) -> bool:
        """Whether who starts it is root, who becomes nobody in it."""
        return os.geteuid() == 0

    def config(self, limits: Limits, stack: ExitStack) -> dict[str, Any]:
        """What the monitor has to know of it."""
        config: dict[str, Any] = {"isolation": self.kind, "is_nobody": self.is_nobody}
        if self.kind == BARE:
            return config
        if self.kind == "namespaces":
            return config | {"shown": self.shown}
        if self.kind == "bubblewrap":
            return config | {"command": self._bubblewrap(limits)}
        return config | {"folder": stack.enter_context(_work_folder(self.is_nobody))}

    def _bubblewrap(self, limits: Limits) -> list[str]:
        """The command that runs our code in a sandbox."""
        bwrap = shutil.which("bwrap") or "bwrap"
        words = [bwrap, "--die-with-parent", "--new-session", "--as-pid-1"]
        if self.is_nobody:
            words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
            words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            words += ["--unshare-all"]
        paths = [*self.shown, str(_INSIDE)]
        parents = {str(parent): None for path in paths for parent in list(Path(path).parents)[-2::-1]}
        for parent in [each for each in parents if each not in paths]:
            words += ["--perms", "0755", "--dir", parent]
        for path in paths:
            words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
        for name in DEVICES:
            words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        words += ["--perms", "1777", "--size", str(limits.disk), "--tmpfs", WORK, "--remount-ro", "/", "--chdir", WORK]
        return [*words, "--", *self.command]

    def protections(self) -> dict[str, bool]:
        """What is protected from a program, and what not."""
        has_root = self.kind != "process"
        has_filter = sys.platform == "linux" and platform.machine() in FORBIDDEN
        return {
            "reading files": has_root,
            "writing files": has_root,
            "other processes": has_root,
            "the network": has_root or has_filter,
            "root's rights": True,
            "rare system calls": has_filter,
            "time, memory, processes and output": True,
        }

    def in_words(self) -> str:
        """The same as a sentence."""
        found = self.protections()
        has, lacks = ([name for name, holds in found.items() if holds is wanted] for wanted in (True, False))
        return f"protected are {', '.join(has)}" + (f"; NOT protected are {', '.join(lacks)}" if lacks else "")


def _is_open(path: str) -> bool:
    """Whether everybody may go to a file and read it."""
    file = Path(os.path.realpath(path))
    return all(place.stat().st_mode & (0o001 if place.is_dir() else 0o004) for place in (file, *file.parents))


@contextmanager
def _work_folder(is_nobody: bool) -> Iterator[str]:
    """An empty folder that is gone afterwards, whatever a program made of it."""
    folder = tempfile.mkdtemp(prefix="dapo-trl-")
    try:
        if is_nobody:
            os.chown(folder, 65534, 65534)
        yield folder
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder, also one whose folders are closed or deep; what cannot be removed stays."""
    try:
        os.chmod(folder, 0o700)
        for _, names, _, here in os.fwalk(folder):
            for name in names:
                if stat.S_ISDIR(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode):
                    os.chmod(name, 0o700, dir_fd=here)
    except (OSError, RecursionError):
        pass
    subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)
