"""Sources: what goes in comes out, and each kind of bad line is named by file and line in one
sentence.
"""

import json
import sys

import numpy as np
import pytest

from ip_jax.data import sources

CHAT = [{"role": "user", "content": "Is 4 × 3 = 12?"}, {"role": "assistant", "content": "Yes."}]


def _write(path, *lines):
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
    )
    return path


def test_jsonl_rows_come_back_whole(tmp_path):
    rows = [
        {"id": 7, "messages": CHAT, "mod": None},
        {"messages": [CHAT[0]], "label": "Brasília \u2028 x"},
    ]
    path = _write(
        tmp_path / "chats.jsonl", json.dumps(rows[0]), "", json.dumps(rows[1], ensure_ascii=False)
    )
    first, second = sources.read_jsonl(path)
    assert first == {"id": "7", "messages": CHAT, "mod": None}
    assert second == {"id": "chats:3", "messages": [CHAT[0]], "label": "Brasília \u2028 x"}


@pytest.mark.parametrize(
    "line,problem",
    [
        ('{"messages": [', "is not JSON"),
        (b'{"messages": "\xff"}', "is not JSON"),
        ("[1, 2]", "is a JSON list"),
        ('{"text": "hello"}', "has no messages"),
        ('{"messages": []}', "has no messages"),
        (
            (
                '{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content":'
                ' "b"}]}'
            ),
            (
                "message 2 has the unknown role 'asistant' (did you mean 'assistant'?): allowed are"
                " system, user, assistant."
            ),
        ),
        (
            '{"messages": [{"content": "b"}]}',
            "message 1 has the unknown role None: allowed are system, user, assistant.",
        ),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text"),
        ('{"messages": ["hello"]}', "message 1 has no text"),
        (
            (
                '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "'
                ' \\n"}]}'
            ),
            "message 2 is an empty response",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = _write(tmp_path / "bad.jsonl", json.dumps({"messages": CHAT}), line)
    with pytest.raises(sources.SourceError) as caught:
        sources.read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2") and problem in message and "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        sources.read_jsonl(tmp_path / "absent.jsonl")


def test_records_in_memory():
    records = [{"messages": CHAT}, {"id": "b", "messages": CHAT, "extra": 1}]
    assert [e["id"] for e in sources.from_records(records, "mine")] == ["mine:0", "b"]
    assert records[0] == {"messages": CHAT}  # the caller's record is left as it was
    with pytest.raises(sources.SourceError, match="mine, record 1 has no messages"):
        sources.from_records([{"messages": CHAT}, {}], "mine")


def test_tfds_records_come_back_as_python():
    stored = {
        "id": b"e1",
        "messages": {
            "role": np.array([b"user", b"assistant"], dtype=object),
            "content": ["Is 4 × 3 = 12?".encode(), b"Yes."],
        },
        "right": np.bool_(True),
        "count": np.int32(3),
        "claimed_json": b"null",
    }
    source = sources.TfdsSource([stored])
    assert len(source) == 1
    assert source[0] == {"id": "e1", "messages": CHAT, "right": True, "count": 3, "claimed": None}
    assert list(source) == [source[0]]
    with pytest.raises(IndexError, match="records 0 to 0, not 1"):
        source[1]


def test_importing_sources_leaves_tfds_out():
    """TFDS takes seconds to import; only `read_tfds` may pay for it."""
    import subprocess

    code = (
        "import sys, ip_jax.data.sources; print([m for m in ('tensorflow_datasets', 'grain',"
        " 'tensorflow') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
