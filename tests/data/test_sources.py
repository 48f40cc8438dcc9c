"""Sources: what is read, in which order, and one clear line for everything that cannot be."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longspan.data import files
from longspan.data.sources import SourceError, SourceSpec, fingerprint, from_path, read, size_hint


def texts(path: Path | str, **fields) -> list[str]:
    return [document.text for document in read(SourceSpec(kind="files", path=str(path), **fields))]


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestStdlib:
    def test_is_real_text_in_a_fixed_order_without_other_peoples_code(self):
        documents = list(read(SourceSpec()))
        ids = [document.id for document in documents]
        assert ids == [document.id for document in read(SourceSpec())]
        assert len(set(ids)) == len(ids)
        assert "json/decoder.py" in ids
        assert "topics/assert" in ids
        skipped = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__")
        assert not [name for name in ids if set(name.split("/")[:-1]) & set(skipped)]
        size = sum(len(document.text.encode()) for document in documents)
        assert 5e6 < size < 40e6
        hint = size_hint(SourceSpec())
        assert hint is not None
        assert abs(hint - size) < 0.01 * size

    def test_limit(self):
        assert len(list(read(SourceSpec(limit=3)))) == 3
        assert size_hint(SourceSpec(limit=3)) is None


class TestFiles:
    def test_a_directory_takes_supported_files_recursively_and_counts_the_others(self, tmp_path: Path):
        (tmp_path / "b").mkdir()
        (tmp_path / ".hidden").mkdir()
        (tmp_path / "a.txt").write_text("first")
        (tmp_path / "b" / "c.md").write_text("second")
        (tmp_path / "z.py").write_text("third")
        (tmp_path / "empty.txt").write_text("  \n")
        (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
        (tmp_path / ".hidden" / "secret.txt").write_text("no")
        assert texts(tmp_path) == ["first", "second", "third"]
        assert files.find_files(str(tmp_path)).skipped == 1
        documents = list(read(from_path(str(tmp_path))))
        assert [document.id for document in documents] == ["a.txt", "b/c.md", "z.py"]

    def test_a_glob_crosses_directories(self, tmp_path: Path):
        (tmp_path / "x" / "y").mkdir(parents=True)
        (tmp_path / "x" / "y" / "two.log").write_text("two")
        (tmp_path / "x" / "one.log").write_text("one")
        (tmp_path / "x" / "other.txt").write_text("other")
        assert texts(f"{tmp_path}/**/*.log") == ["one", "two"]

    def test_text_is_kept_byte_for_byte_but_for_a_byte_order_mark(self, tmp_path: Path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\xc3\xa9\n")
        assert texts(tmp_path / "a.txt") == ["one\r\né\n"]

    def test_gzip(self, tmp_path: Path):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "row"}\n'))
        assert texts(tmp_path) == ["packed", "row"]
        assert size_hint(from_path(str(tmp_path))) is None

    @pytest.mark.parametrize("cut", ["\n", "é"])
    def test_a_long_text_is_cut_into_documents_at_line_breaks_or_characters(self, tmp_path, monkeypatch, cut):
        monkeypatch.setattr(files, "LONGEST_TEXT", 10)
        content = cut.join(["abcd"] * 9)
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        found = texts(tmp_path / "a.txt")
        assert len(found) > 3
        assert "".join(found) == content
        if cut == "\n":
            assert all(part.endswith("\n") for part in found[:-1])

    def test_jsonl_skips_blank_lines_and_empty_texts(self, tmp_path: Path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one", "n": 1}\n\n{"text": ""}\n{"text": null}\n{"text": "two"}')
        assert texts(path) == ["one", "two"]
        assert [document.id for document in read(from_path(str(path)))] == ["a.jsonl:1", "a.jsonl:5"]

    def test_prompts_and_responses(self, tmp_path: Path):
        path = write_jsonl(tmp_path / "a.jsonl", {"q": "2+2?", "a": "4"})
        (document,) = read(SourceSpec(kind="files", path=str(path), prompt_field="q", response_field="a"))
        assert (document.prompt, document.text) == ("2+2?", "4")

    @pytest.mark.parametrize("kind", ["parquet", "arrow-stream", "arrow-file"])
    def test_tables(self, tmp_path: Path, kind: str):
        table = pa.table({"body": ["one", None, "two"], "n": [1, 2, 3]})
        path = tmp_path / f"a.{kind.split('-')[0]}"
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=1)
        else:
            new = pa.ipc.new_stream if kind == "arrow-stream" else pa.ipc.new_file
            with new(str(path), table.schema) as writer:
                writer.write_table(table)
        assert texts(path, text_field="body") == ["one", "two"]
        with pytest.raises(SourceError, match=r"no column 'text': it has body, n; choose with text_field"):
            texts(path)
        with pytest.raises(SourceError, match=r"row 0: column 'n' holds a number, not text"):
            texts(path, text_field="n")


class TestBadInput:
    def refuses(self, path: Path | str, match: str, **fields) -> None:
        with pytest.raises(SourceError, match=match) as caught:
            texts(path, **fields)
        assert "\n" not in str(caught.value)

    def test_paths(self, tmp_path: Path):
        self.refuses(tmp_path / "nothing", r"nothing' does not exist")
        self.refuses(f"{tmp_path}/*.txt", r"no file matches")
        self.refuses(tmp_path, r"has no files; supported are \.txt")
        (tmp_path / "a.png").write_bytes(b"x")
        self.refuses(tmp_path, r"has only 1 files of other kinds; supported")

    def test_empty(self, tmp_path: Path):
        (tmp_path / "a.txt").touch()
        self.refuses(tmp_path / "a.txt", r"a\.txt holds no text")
        self.refuses(tmp_path, r"holds no text")

    def test_binary(self, tmp_path: Path):
        (tmp_path / "model").write_bytes(b"abc\0def")
        self.refuses(tmp_path / "model", r"model is a binary file, not text \(zero byte at offset 3\)")

    def test_not_utf8_names_the_byte(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(files, "LONGEST_TEXT", 8)
        (tmp_path / "a.txt").write_bytes(b"0123456\n" * 2 + b"caf\xe9 au lait")
        self.refuses(tmp_path / "a.txt", r"a\.txt is not UTF-8 text: byte 0xe9 at offset 19; .*iconv")
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
        self.refuses(tmp_path / "a.jsonl", r"byte 0xff at offset 24")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ('{"text": "a"}\n{"text": "b"\n', r"a\.jsonl line 2: not valid JSON \(.*, column \d+\)"),
            ('["a"]\n', r"line 1: expected an object with a column 'text', found a list"),
            ('{"body": "a", "id": 1}\n', r"line 1 has no column 'text': it has body, id"),
            ('{"text": 5}\n', r"line 1: column 'text' holds a number, not text"),
            ('{"text": "\\ud800"}\n', r"line 1: column 'text' has half a surrogate pair"),
        ],
    )
    def test_jsonl(self, tmp_path: Path, content: str, match: str):
        (tmp_path / "a.jsonl").write_text(content)
        self.refuses(tmp_path / "a.jsonl", match)

    def test_damaged_containers(self, tmp_path: Path):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed" * 1000)[:-12])
        self.refuses(tmp_path / "a.txt.gz", r"is not a complete gzip file")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
        self.refuses(tmp_path / "a.parquet", r"a\.parquet cannot be read as parquet")
        (tmp_path / "a.arrow").write_bytes(b"no")
        self.refuses(tmp_path / "a.arrow", r"a\.arrow cannot be read as arrow")

    def test_prompt_columns_need_columns(self, tmp_path: Path):
        (tmp_path / "a.txt").write_text("text")
        self.refuses(tmp_path / "a.txt", r"is plain text, but prompt_field", prompt_field="q", response_field="a")

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"kind": "files"}, "needs a path"),
            ({"kind": "web", "path": "x"}, "unknown"),
            ({"path": "x"}, "takes no path"),
            ({"weight": 0}, "weights are greater than 0"),
            ({"limit": 0}, "at least 1"),
            ({"kind": "hub", "path": "x", "prompt_field": "q"}, "go together"),
        ],
    )
    def test_contradictions(self, fields: dict, match: str):
        with pytest.raises(SourceError, match=match):
            SourceSpec(**fields)


class TestHub:
    SPEC = SourceSpec(kind="hub", path="some/name", split="test", revision="abc", limit=2)

    def test_rows_become_documents(self, monkeypatch):
        import datasets

        calls = []

        def load_dataset(path: str, name: str | None, *, split: str, revision: str):
            calls.append((path, name, split, revision))
            return iter([{"text": "one"}, {"text": ""}, {"text": "two"}, {"text": "three"}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        documents = list(read(self.SPEC))
        assert [document.text for document in documents] == ["one", "two"]
        assert documents[1].id == "some/name/test:2"
        assert calls == [("some/name", None, "test", "abc")]

    def test_streaming_a_local_data_set_through_the_library(self, tmp_path: Path):
        pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "train.parquet")
        spec = SourceSpec(kind="hub", path=str(tmp_path), streaming=True)
        assert [document.text for document in read(spec)] == ["one", "two"]

    def test_offline_is_said_in_one_line(self, tmp_path: Path):
        # In a process of its own: the hub library reads HF_HUB_OFFLINE when it is imported.
        code = (
            "from longspan.data.sources import *\n"
            "for streaming in (False, True):\n"
            "    try: list(read(SourceSpec(kind='hub', path='nobody/nothing', streaming=streaming)))\n"
            "    except SourceError as error: print(error)\n"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        assert len(lines) == 2, done
        for line in lines:
            assert line.startswith("hub data set 'nobody/nothing' cannot be read: ")
            assert "HF_HUB_OFFLINE is set" in line


class TestFingerprint:
    def test_tells_whether_anything_changed(self, tmp_path: Path):
        (tmp_path / "a.txt").write_text("one")
        spec = from_path(str(tmp_path))
        before = fingerprint(spec)
        assert json.loads(json.dumps(before)) == before
        assert fingerprint(spec) == before
        os.utime(tmp_path / "a.txt", (1, 1))
        touched = fingerprint(spec)
        assert touched != before
        (tmp_path / "b.txt").write_text("two")
        assert fingerprint(spec) != touched
        assert fingerprint(SourceSpec(kind="files", path=str(tmp_path), limit=1)) != fingerprint(spec)

    def test_a_missing_path_is_refused_at_once(self, tmp_path: Path):
        with pytest.raises(SourceError, match="does not exist"):
            fingerprint(from_path(str(tmp_path / "x")))


def test_from_path_knows_the_hub():
    assert from_path("hub:owner/name") == SourceSpec(kind="hub", path="owner/name")


def test_reading_and_preparing_need_neither_torch_nor_the_data_set_library():
    code = (
        "import sys, longspan.data.prepare, longspan.data.packing, longspan.data.order\n"
        "print(sorted({'torch', 'datasets', 'pyarrow', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
