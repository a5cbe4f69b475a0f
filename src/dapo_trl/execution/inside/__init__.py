"""
What runs in the processes of a program: standard library only, nothing of `dapo_trl`, so that they start at once and
need no other files.

`server.py` waits for work; `monitor.py` starts and ends one program and stays outside of its sandbox; `sandbox.py`
shuts a process in; `program.py` runs the code that is judged, `tester.py` the tests that judge it, in a sandbox of
their own; the two speak over `wire.py`.
"""
