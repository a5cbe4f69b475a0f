"""
`files.py`: what a run leaves is there completely or not at all, and what is damaged is named with its cure.
"""

import json

from dapo_trl.files import write_atomically


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    write_atomically(path, json.dumps({"new": 1}))
    assert json.loads(path.read_text()) == {"new": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["file.json"]
