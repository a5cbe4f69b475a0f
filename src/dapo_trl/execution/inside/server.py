"""
Makes a monitor for each program: a process that has everything loaded and forks when it is asked to.

It knows nothing of programs and tests, so that no program finds anything in the memory that it begins with. It ends
when the executor does.
"""

import importlib
import json
import os
import signal
import sys

from . import monitor


# What programs and tests import most: a fork has it at once.
_LOADED = (
    "ast bisect collections contextlib copy dataclasses datetime decimal enum fractions functools heapq inspect "
    "itertools math numbers operator random re statistics string traceback typing unittest"
).split()
FILES = ("stdin", "stdout", "stderr", "status", "stop", "rpc", "verdict")  # in the order in which they come
_MOST_BYTES = 2**16  # of a configuration


def start():
    """What the command line says: `serve DESCRIPTOR` from the executor, `enter CONFIG` from bubblewrap."""
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        monitor.enter(*json.loads(sys.argv[2]))


def serve(requests):
    """
    Fork a monitor for each request: a configuration with the names of the descriptors that come with it.

    Args:
        requests (`int`):
            Descriptor of a socket of packets.
    """
    import socket

    from . import program, tester  # noqa: F401 (for the forks)

    for name in _LOADED:
        importlib.import_module(name)
    requests = socket.socket(fileno=requests)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the executor, which closes what we wait for
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # monitors report by themselves; the system buries them
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, _MOST_BYTES, len(FILES))
        if not data:
            return
        config = json.loads(data)
        if os.fork() == 0:
            try:
                requests.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                monitor.main(config, dict(zip(config.pop("files"), descriptors, strict=True)))
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
