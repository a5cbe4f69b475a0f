"""
Which model it is that results were made with: of a local folder its weights, wherever it lies; of a model on the Hub
its name and revision.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj


def identify(model: str, revision: str | None = None) -> dict[str, Any]:
    """
    What tells a model from others, as JSON values.

    Args:
        model (`str`):
            Name on the Hub, or path of a folder.
        revision (`str`, *optional*):
            Branch, tag or commit of a model on the Hub.

    Returns:
        `dict`: `weights` of a folder, whatever it is called; `name` and `revision` of all others.

    Example:

    ```python
    >>> from dapo_trl.model_identity import identify

    >>> identify("examples/student") == identify("examples/../examples/student")
    True
    >>> identify("Qwen/Qwen2.5-Math-7B-Instruct", "main")
    {'name': 'Qwen/Qwen2.5-Math-7B-Instruct', 'revision': 'main'}

    ```
    """
    weights = weights_hash(model)
    return {"name": model, "revision": revision} if weights is None else {"weights": weights}


def weight_files(model: str) -> list[Path]:
    """
    Files with the weights of a model.

    Args:
        model (`str`):
            Path of a folder, or a name on the Hub.

    Returns:
        `list[Path]`: sorted; empty if there is no such folder, or nothing in it.
    """
    folder = Path(model)
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def weights_hash(model: str) -> str | None:
    """
    Short hash of the weights in a folder. Each file is read once in the life of a process.

    Args:
        model (`str`):
            Path of the folder, or a name on the Hub.

    Returns:
        `str` or `None`: 16 hexadecimal digits of a SHA-256; `None` if there are no weights, as of a name on the Hub.
    """
    if not (files := weight_files(model)):
        return None
    hashes = []
    for path in files:
        found = path.stat()
        hashes.append(_sha256(path.resolve(), found.st_size, found.st_mtime_ns))
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> bytes:
    """Of a file as it is now, of which size and time tell."""
    with path.open("rb") as file:
        return sha_fileobj(file)
