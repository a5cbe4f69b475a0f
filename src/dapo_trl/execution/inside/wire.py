"""
Values between two processes that do not trust each other: plain data only, by value, as JSON.

Nothing is ever unpickled or evaluated. What arrives is a number, a text, bytes, a date, or a list, tuple, set or
dictionary of such, of exactly these types, whatever their sender overloaded: objects that equal everything stay where
they are, as handles that equal nothing.
"""

import json
import os
import struct
import sys
from collections import deque


MAX_MESSAGE = 32 * 2**20  # bytes
MAX_DEPTH = 100
_LARGE = 2**62  # integers from here on are sent in base 16, which takes linear time and has no limit of digits


class WireError(Exception):
    """The other side has ended, or what it sends is no message."""


class Connection:
    """
    Messages over a socket.

    Args:
        descriptor (`int`):
            The socket's.
    """

    def __init__(self, descriptor):
        self._descriptor = descriptor

    def send(self, message):
        """Send a message of JSON values."""
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(data) > MAX_MESSAGE:
            raise WireError(f"a message of {len(data)} bytes is too long")
        left = memoryview(struct.pack("!I", len(data)) + data)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            raise WireError(str(error)) from error

    def receive(self):
        """The next message."""
        (length,) = struct.unpack("!I", self._read(4))
        if length > MAX_MESSAGE:
            raise WireError(f"a message of {length} bytes is too long")
        data = self._read(length)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise WireError(f"no message: {error}") from error

    def _read(self, length):
        parts = []
        while length:
            try:
                part = os.read(self._descriptor, min(length, 2**20))
            except OSError as error:
                raise WireError(str(error)) from error
            if not part:
                raise WireError("the other side has ended")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def encode(value, refer, depth=0):
    """
    A value as JSON. What is no plain data is kept by `refer(value)`, which gives `{"handle": number}` or, of a function
    that the other side may call, `{"callback": number}`.

    Subclasses become what they are made of: a `Counter` a dictionary, a named tuple a tuple, a NumPy integer an
    integer.
    """
    if value is None or value is True or value is False:
        return value
    if depth > MAX_DEPTH:
        return refer(value)
    if isinstance(value, int):
        number = int(value)
        return number if -_LARGE < number < _LARGE else {"int": hex(number)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(each, refer, depth + 1) for each in list.__iter__(value)]
    for kind, read in _encoders():
        if isinstance(value, kind):
            return read(value, lambda each: encode(each, refer, depth + 1))
    return refer(value)


def decode(message, resolve, depth=0):
    """
    The value of a message.

    Args:
        message:
            What [`encode`] gave.
        resolve (`Callable[[dict], Any]`):
            What stands for the thing that `refer` kept on the other side.
        depth (`int`, *optional*, defaults to `0`):
            How deep in another value this one is.

    Raises:
        WireError: If it is no such message.
    """
    if message is None or isinstance(message, (bool, int, str, float)):
        return message
    if depth > 2 * MAX_DEPTH:
        raise WireError("a value is too deep")
    if isinstance(message, list):
        return [decode(each, resolve, depth + 1) for each in message]
    try:
        if "handle" in message or "callback" in message:
            return resolve(message)
        ((tag, content),) = message.items()
        return _DECODERS[tag](content, lambda each: decode(each, resolve, depth + 1))
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"no value: {error!r:.200}") from error


def _pairs(value, down):
    return {"dict": [[down(key), down(each)] for key, each in dict.items(value)]}


_BUILT_IN = (
    (tuple, lambda value, down: {"tuple": [down(each) for each in tuple.__iter__(value)]}),
    (dict, _pairs),
    (float, lambda value, down: float(value)),
    (set, lambda value, down: {"set": [down(each) for each in set.__iter__(value)]}),
    (frozenset, lambda value, down: {"frozenset": [down(each) for each in frozenset.__iter__(value)]}),
    (bytes, lambda value, down: {"bytes": bytes(value).hex()}),
    (bytearray, lambda value, down: {"bytearray": bytes(value).hex()}),
    (complex, lambda value, down: {"complex": [complex(value).real, complex(value).imag]}),
    (deque, lambda value, down: {"deque": [down(each) for each in deque.__iter__(value)]}),
    (range, lambda value, down: {"range": [down(value.start), down(value.stop), down(value.step)]}),
)
# Of modules that take time to load. Where nobody has loaded one, there is no value of its classes. In this order: a
# `datetime` is a `date` too, and a `Decimal` may be registered as a number.
_OF_MODULES = (
    ("decimal", "Decimal", lambda value, down: {"decimal": str(value)}),
    ("fractions", "Fraction", lambda value, down: {"fraction": [down(value.numerator), down(value.denominator)]}),
    ("datetime", "datetime", lambda value, down: {"datetime": value.isoformat()}),
    ("datetime", "date", lambda value, down: {"date": value.isoformat()}),
    ("datetime", "time", lambda value, down: {"time": value.isoformat()}),
    ("datetime", "timedelta", lambda value, down: {"timedelta": [value.days, value.seconds, value.microseconds]}),
    ("numbers", "Integral", lambda value, down: down(int(value))),  # NumPy's too
    ("numbers", "Real", lambda value, down: float(value)),
)


def _encoders():
    yield from _BUILT_IN
    for module, name, read in _OF_MODULES:
        if module in sys.modules:
            yield getattr(sys.modules[module], name), read


def _of_module(module, name, make=None):
    """A decoder that loads the module of its class."""

    def read(content, down):
        kind = getattr(__import__(module), name)
        return make(kind, content, down) if make else kind(content)

    return read


def _from_iso(kind, content, down):
    return kind.fromisoformat(content)


_DECODERS = {
    "int": lambda content, down: int(content, 16),
    "tuple": lambda content, down: tuple([down(each) for each in content]),
    "dict": lambda content, down: {down(key): down(each) for key, each in content},
    "set": lambda content, down: {down(each) for each in content},
    "frozenset": lambda content, down: frozenset([down(each) for each in content]),
    "bytes": lambda content, down: bytes.fromhex(content),
    "bytearray": lambda content, down: bytearray.fromhex(content),
    "complex": lambda content, down: complex(*content),
    "deque": lambda content, down: deque([down(each) for each in content]),
    "range": lambda content, down: range(*[down(each) for each in content]),
    "decimal": _of_module("decimal", "Decimal"),
    "fraction": _of_module("fractions", "Fraction", lambda kind, content, down: kind(*map(down, content))),
    "datetime": _of_module("datetime", "datetime", _from_iso),
    "date": _of_module("datetime", "date", _from_iso),
    "time": _of_module("datetime", "time", _from_iso),
    "timedelta": _of_module("datetime", "timedelta", lambda kind, content, down: kind(*content)),
}
