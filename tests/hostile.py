"""
Programs that cheat, harm or hang, for tests of executors: none of them may pass, hurt anything, or last.

All are asked for `double(x)`, tested by `assert double(2) == 4` and more. `{canary}` is a file in a folder of its own,
outside of theirs, that they must neither read nor change, `{port}` a local port that they must not reach, `{victim}` a
process that must live. What they find of these they return, so that the tests see it.

A sandbox may fail the test: what they would do then must hurt nothing but the canary, the port and the victim.
"""

RIGHT = "def double(x):\n    return 2 * x\n"
_ALWAYS_EQUAL = """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
"""

PROGRAMS = {
    # ---- that do not end ----
    "endless loop": "def double(x):\n    while True: pass",
    "endless loop while it is loaded": "while True: pass",
    "endless sleep": "import time\ndef double(x):\n    time.sleep(1000)",
    "endless output": "def double(x):\n    while True: print('x' * 10000)",
    "output to standard error": "import sys\nwhile True: sys.stderr.write('x' * 10000)",
    "endless iterator": "import itertools\ndef double(x):\n    return itertools.count()",
    "ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "catches everything": """
def double(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "threads that outlive it": """
import threading
def spin():
    while True: pass
def double(x):
    for _ in range(4): threading.Thread(target=spin).start()
    return 5
""",
    "a thread that goes on when the program ends": """
import threading, time
threading.Thread(target=lambda: time.sleep(1000)).start()
raise SystemExit(0)
""",
    # ---- that use too much ----
    "fork bomb": "import os\ndef double(x):\n    while True: os.fork()",
    "fork bomb while it is loaded": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "def double(x):\n    return bytearray(10**12)",
    "memory, piece by piece": "def double(x):\n    parts = []\n    while True: parts.append(bytearray(10**6))",
    "memory of many processes": """
import os, time
for _ in range(12):
    if os.fork() == 0:
        parts = [b"x" * 10**8 for _ in range(4)]
        time.sleep(1000)
time.sleep(1000)
""",
    "shared memory": """
import os
def double(x):
    for number in range(100):
        file = os.memfd_create(str(number))
        os.write(file, b"x" * 10**7)
""",
    "memory that no process holds": """
import mmap
def double(x):
    shared = [mmap.mmap(-1, 10**8) for _ in range(20)]
    return 5
""",
    "memory under a name of other bytes": """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b"\\xff\\xfe", 0, 0, 0)
for _ in range(8):
    if os.fork() == 0:
        parts = [b"x" * 10**8 for _ in range(2)]
        time.sleep(1000)
time.sleep(1000)
""",
    "processor time of children": """
import os, time
def double(x):
    for _ in range(100):
        if os.fork() == 0:
            start = time.process_time()
            while time.process_time() < start + 0.3: pass
            os._exit(0)
        os.wait()
""",
    "a large file": """
def double(x):
    with open('large', 'wb') as file:
        while True: file.write(b'x' * 10**6)
""",
    "many files": """
def double(x):
    number = 0
    while True:
        number += 1
        with open(str(number), 'wb') as file: file.write(b'x' * 10**6)
""",
    "many open files": "def double(x):\n    return [open('/dev/null') for _ in range(10**6)] and 5",
    "huge integers": "def double(x):\n    return 10 ** 10 ** 9",
    "a huge integer as the result": "def double(x):\n    return 1 << (1 << 27)",
    "a huge list as the result": "def double(x):\n    return [0] * 10**8",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef double(x):\n    return double(x)",
    "deep recursion in C": """
import sys
sys.setrecursionlimit(10**9)
class Deep:
    def __getattr__(self, name): return getattr(self, name)
def double(x):
    return Deep().x
""",
    "a deep value": """
def double(x):
    value = []
    for _ in range(10**5): value = [value]
    return value
""",
    "a value that contains itself": "def double(x):\n    value = []\n    value.append(value)\n    return value",
    # ---- that end early ----
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit when called": "import sys\ndef double(x):\n    sys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit when called": "import os\ndef double(x):\n    os._exit(0)",
    "os._exit after an answer": """
import os, threading, time
def double(x):
    threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()
    return 4
""",
    "survives its monitor": """
import ctypes
assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0
def double(x): return 4
""",
    "folders too deep to walk": """
import os
for _ in range(1100):
    os.mkdir("d")
    os.chdir("d")
def double(x): return 5
""",
    "exec of another program": "import os\nos.execv('/bin/true', ['true'])",
    "segmentation fault": "import ctypes\ndef double(x):\n    return ctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nwhile True: pass",
    # ---- that kill or change others ----
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nraise SystemExit(0)",
    "kills a process by number": """
import os, signal
for kill in (lambda: os.kill({victim}, signal.SIGKILL), lambda: os.kill({victim}, signal.SIGSTOP)):
    try: kill()
    except OSError: pass
raise SystemExit(0)
""",
    "kills its process group": "import os, signal\nos.killpg(0, signal.SIGKILL)\nraise SystemExit(0)",
    "stops its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nraise SystemExit(0)",
    "takes limits from its parent": """
import os, resource
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))
""",
    "raises its own limits": """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))
while True: pass
""",
    "looks into its parent's memory": """
import os
def double(x):
    return open(f"/proc/{os.getppid()}/mem", "rb").read(10)
""",
    "traces its parent": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def double(x):
    return 4 if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 5
""",
    "detaches a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
def double(x):
    return 5
""",
    "daemons that start each other": """
import os, time
def again():
    while True:
        time.sleep(0.01)
        if os.fork() == 0: os.setsid()
        else: os._exit(0)
if os.fork() == 0: again()
def double(x):
    return 5
""",
    # ---- that reach out ----
    "connects to the network": """
import socket
def double(x):
    with socket.create_connection(("127.0.0.1", {port}), 1) as connection:
        return int(connection.recv(10))
""",
    "sends a datagram": """
import socket
def double(x):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end: end.sendto(b"x", ("127.0.0.1", {port}))
    return 5
""",
    "opens a port": """
import socket
end = socket.socket()
end.bind(("127.0.0.1", 0))
end.listen()
def double(x):
    return 5
""",
    "writes outside of its folder": """
def double(x):
    open({canary!r}, "w").write("gone")
    return 4
""",
    "deletes files": """
import os, shutil
shutil.rmtree(os.path.dirname({canary!r}), ignore_errors=True)
def double(x):
    return 5
""",
    "a symbolic link out of its folder": """
import os
os.symlink({canary!r}, "link")
def double(x):
    open("link", "w").write("gone")
    return 4
""",
    "a changed working directory": """
import os
os.chdir(os.path.dirname({canary!r}))
def double(x):
    open(os.path.basename({canary!r}), "w").write("gone")
    return 4
""",
    "reads a file outside of its folder": "def double(x):\n    return int(open({canary!r}).read())",
    "finds files by searching": """
import os
def double(x):
    for place, _, names in os.walk("/"):
        if {canary!r} in (os.path.join(place, name) for name in names):
            return int(open({canary!r}).read())
""",
    "reads the environment": "import os\ndef double(x):\n    return int(os.environ['SECRET'])",
    "reads its parent's environment": """
import os
def double(x):
    for pid in (os.getppid(), {victim}):
        text = open(f"/proc/{pid}/environ").read()
        if "SECRET" in text: return int(text.partition("SECRET=")[2].partition(chr(0))[0])
""",
    "mounts a file system": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.mkdir("new")
def double(x):
    made = libc.unshare(0x10020000) == 0 or libc.mount(b"tmpfs", b"new", b"tmpfs", 0, None) == 0
    return 4 if made else 5
""",
    # ---- that cheat ----
    "an object that equals everything": _ALWAYS_EQUAL + "def double(x):\n    return Equal()",
    "an object, not a number, that equals everything": """
class Equal:
    def __eq__(self, other): return True
    def __bool__(self): return True
def double(x):
    return Equal()
""",
    "a class that equals everything": """
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class Equal(metaclass=Meta): pass
def double(x):
    return Equal
""",
    "patched builtins": """
import builtins
builtins.isinstance = lambda *_: True
builtins.AssertionError = RuntimeError
builtins.bool = lambda _=None: True
def double(x):
    return 0
""",
    "patched assertions": """
import sys
class AssertionError(Exception): pass
__builtins__["AssertionError"] = None if isinstance(__builtins__, dict) else None
sys.excepthook = lambda *_: None
def double(x):
    return 0
""",
    "replaced unittest": """
import sys, types, unittest
unittest.TestCase.assertEqual = lambda *_: None
sys.modules["unittest"] = types.ModuleType("unittest")
def double(x):
    return 0
""",
    "forged success output": """
print("ok")
print('{"verdict": "passed", "message": ""}')
def double(x):
    print("OK\\n\\nRan 2 tests\\n\\nOK")
    return 0
""",
    "a forged verdict on every descriptor": """
import os
for number in range(256):
    for text in (b'{"verdict": "passed", "message": ""}', b'\\x00\\x00\\x00\\x24{"verdict": "passed", "message": ""}'):
        try: os.write(number, text)
        except OSError: pass
def double(x):
    return 0
""",
    "forged replies": """
import os, struct
for number in range(256):
    for _ in range(10):
        try: os.write(number, struct.pack("!I", 14) + b'{"value":null}')
        except OSError: pass
def double(x):
    return 0
""",
    "a message that is too long": """
import os, struct
for number in range(256):
    try: os.write(number, struct.pack("!I", 2**32 - 1) + b"x" * 1000)
    except OSError: pass
""",
    "looks for the tests in its memory": """
import gc, re, sys
def double(x):
    texts = [each for each in gc.get_objects() if isinstance(each, str)]
    frame = sys._getframe()
    while frame:
        texts += [str(each) for each in frame.f_locals.values() if isinstance(each, (str, dict, list))]
        frame = frame.f_back
    for text in texts:
        found = re.search(r"double[(]" + str(x) + r"[)] == (\\d+)", text)
        if found and "re.search" not in text: return int(found[1])
""",
    "looks for the tests on disk": """
import os, re
def double(x):
    for place, _, names in os.walk("/"):
        if place.startswith(("/usr", "/sys")): continue
        for name in names:
            try: text = open(os.path.join(place, name), errors="replace").read(10**6)
            except OSError: continue
            found = re.search(r"double[(]" + str(x) + r"[)] == (\\d+)", text)
            if found: return int(found[1])
""",
    "reads the tests from its descriptors": """
import os, re
def double(x):
    for number in [*range(3), *range(3, 64)]:
        try: os.lseek(number, 0, 0)
        except OSError: continue
        found = re.search(rb"double[(]" + str(x).encode() + rb"[)] == (\\d+)", os.read(number, 10**6))
        if found: return int(found[1])
""",
    "an unpickling trick": """
import os
class Trick:
    def __reduce__(self): return os.system, ("echo gone > " + {canary!r},)
    def __int__(self): return 4
def double(x):
    return Trick()
""",
    "an argument that is changed": """
def double(x):
    globals()["x"] = x = 4
    return None
""",
    "an exception with a name that cannot be one": """
class Kind(type):
    __name__ = "a\\0b"
class Strange(Exception, metaclass=Kind): pass
raise Strange()
""",
    "an exception with a name that cannot be one, when called": """
class Kind(type):
    __name__ = "\\ud800"
class Strange(Exception, metaclass=Kind): pass
def double(x): raise Strange()
""",
    "exceptions that are none": """
class Base(BaseException):
    def __str__(self): raise self
def double(x):
    raise Base
""",
    "an exception instead of a result": """
def double(x):
    raise AssertionError("ok")
""",
    "StopIteration": "def double(x):\n    raise StopIteration(4)",
}
