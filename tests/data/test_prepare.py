"""prepare: cached by content, one builder at a time, and nothing half-written after any kind of death."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from longspan.data import prepare as module
from longspan.data import shards, writer
from longspan.data.prepare import PrepareSettings, TokenizerSettings, prepare
from longspan.data.sources import SourceError, SourceSpec
from longspan.data.store import Progress, StoreError, TokenStore
from longspan.data.tokenizer import Tokenizer, TokenizerError, byte_level

SMALL = TokenizerSettings(vocab_size=300)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"def function_{number}(): return {number}\n" * 20)
    return folder


def settings(tmp_path: Path, **changes) -> PrepareSettings:
    source = SourceSpec(kind="files", path=str(tmp_path / "texts"), name="texts")
    defaults = {
        "sources": (source,),
        "tokenizer": SMALL,
        "cache": tmp_path / "cache",
        "workers": 1,
        "shard_bytes": 3000,
    }
    return PrepareSettings(**(defaults | changes))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_the_second_time_nothing_is_built(tmp_path: Path, texts: Path, monkeypatch):
    stages = []
    first = prepare(settings(tmp_path, name="my text!"), progress=lambda stage, done, total: stages.append(stage))
    assert first.directory.name.startswith("my-text-")
    assert list(dict.fromkeys(stages)) == ["tokenizer", "tokens"]
    assert first.tokenizer.vocab_size == 300
    assert first.store.tokenizer_sha256 == first.tokenizer.sha256
    monkeypatch.setattr(module, "build_store", None)
    monkeypatch.setattr(module, "_lock", None)  # a cache that may only be read will do
    (first.directory.parent / f"{first.directory.name}.building").mkdir()  # left by a kill right at the end
    again = prepare(settings(tmp_path, name="my text!", workers=2))
    assert again.directory == first.directory
    assert again.tokenizer.sha256 == first.tokenizer.sha256
    assert not list((tmp_path / "cache").glob("*.building"))


def test_anything_that_matters_makes_another_store(tmp_path: Path, texts: Path):
    def directory(**changes) -> Path:
        return prepare(settings(tmp_path, **changes)).directory

    before = directory()
    different = [
        directory(tokenizer=TokenizerSettings(vocab_size=280)),
        directory(tokenizer=TokenizerSettings(vocab_size=300, digits="single")),
        directory(tokenizer=TokenizerSettings(kind="bytes")),
        directory(validation_fraction=0.1),
        directory(sources=(SourceSpec(kind="files", path=str(texts), name="texts", limit=5),)),
    ]
    (texts / "new.txt").write_text("one more")
    different.append(directory())
    assert len({before, *different}) == 7
    assert "digits" not in SMALL.described()  # the stores of earlier versions keep their names
    assert directory(shard_bytes=10_000, workers=2) == different[-1]


def test_an_existing_tokenizer(tmp_path: Path, texts: Path):
    byte_level().save(tmp_path / "given")
    given = TokenizerSettings(kind="file", path=str(tmp_path / "given"))
    prepared = prepare(settings(tmp_path, tokenizer=given))
    assert prepared.tokenizer.sha256 == byte_level().sha256
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        prepare(settings(tmp_path, tokenizer=TokenizerSettings(kind="file", path=str(tmp_path / "x"))))
    with pytest.raises(ValueError, match=r"tokenizer\.path goes with data\.tokenizer\.kind=file"):
        TokenizerSettings(path="x")


class TestTrainingTexts:
    def texts(self, tmp_path: Path, **tokenizer) -> list[str]:
        return list(module._training_texts(settings(tmp_path, tokenizer=TokenizerSettings(**tokenizer)), None))

    def test_held_out_documents_are_not_seen(self, tmp_path: Path, texts: Path):
        everything = {path.read_text() for path in texts.iterdir()}
        fraction = 0.3
        chosen = list(module._training_texts(settings(tmp_path, validation_fraction=fraction), None))
        assert set(chosen) == {text for text in everything if shards.split_hash(text) >= fraction * 2**64}

    def test_documents_are_evenly_spaced_up_to_the_budget(self, tmp_path: Path, texts: Path):
        chosen = self.texts(tmp_path, train_bytes=6000)
        names = [int(text.split("_")[1].split("(")[0]) for text in chosen]
        assert sum(map(len, chosen)) <= 6000
        assert sum(map(len, chosen)) > 5000
        gaps = np.diff(names)
        assert names[0] < 8
        assert names[-1] > 32
        assert gaps.max() <= 2 * gaps.min() + 1


class TestWrongRequests:
    def test_leave_nothing(self, tmp_path: Path, texts: Path):
        missing = SourceSpec(kind="files", path=str(tmp_path / "nowhere"))
        with pytest.raises(SourceError, match="does not exist"):
            prepare(settings(tmp_path, sources=(missing,)))
        assert not (tmp_path / "cache").exists()
        (texts / "bad.txt").write_bytes(b"caf\xe9")
        with pytest.raises(SourceError, match="not UTF-8"):
            prepare(settings(tmp_path))
        with pytest.raises(TokenizerError, match="vocab_size=10"):
            prepare(settings(tmp_path, sources=(SourceSpec(limit=1),), tokenizer=TokenizerSettings(vocab_size=10)))
        with pytest.raises(StoreError, match=r"data\.sources is empty"):
            prepare(settings(tmp_path, sources=()))
        assert not list((tmp_path / "cache").iterdir())

    @pytest.mark.parametrize("where", ["shard", "join", "manifest"])
    def test_no_space_left(self, tmp_path: Path, texts: Path, monkeypatch, where: str):
        def full(*_args, **_kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        place = {
            "shard": (shards.np, "savez"),
            "join": (writer.SplitWriter, "append"),
            "manifest": (writer.json, "dump"),
        }
        with monkeypatch.context() as patch:
            patch.setattr(*place[where], full)
            with pytest.raises(OSError, match=r"no space left on device while writing .*data-.*cache") as caught:
                prepare(settings(tmp_path))
        assert caught.value.errno == errno.ENOSPC
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "cache").iterdir())
        prepare(settings(tmp_path))


SCRIPT = """
    import os, signal, sys, multiprocessing
    from longspan.data import shards, writer
    from longspan.data.prepare import *
    from longspan.data.sources import SourceSpec

    def die(*_):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    seen = 0
    def progress(stage, done, total):
        global seen
        seen += stage == "tokens"
        if {point!r} == "tokenizer" and stage == "tokenizer" or {point!r} == "shards" and seen == 4:
            die()

    if __name__ == "__main__":
        if {point!r} == "write":
            shards.np.savez = lambda file, **_: (file.write(b"PK half"), file.flush(), die())
        if {point!r} == "join":
            writer.SplitWriter.seal = die
        if {point!r} == "rename":
            writer.sync_directory = die
        source = SourceSpec(kind="files", path={texts!r}, name="texts")
        prepare(PrepareSettings(sources=(source,), tokenizer=TokenizerSettings(vocab_size=300), cache={cache!r},
            workers={workers}, shard_bytes=3000), progress=progress)
"""


class TestKill:
    """Processes that really get SIGKILL while they build."""

    def killed(self, tmp_path: Path, point: str, workers: int = 1) -> str:
        script = tmp_path / f"{point}.py"
        names = {"point": point, "texts": str(tmp_path / "texts"), "cache": str(tmp_path / "cache"), "workers": workers}
        script.write_text(textwrap.dedent(SCRIPT).format(**names))
        # Into files: a pipe would stay open as long as a process that outlives its parent holds it.
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            done = subprocess.run([sys.executable, script], stdout=out, stderr=err, check=False)
        assert done.returncode == -signal.SIGKILL, (tmp_path / "err").read_text()
        return (tmp_path / "out").read_text()

    @pytest.mark.parametrize("point", ["tokenizer", "write", "shards", "join", "rename"])
    def test_the_same_command_then_finishes(self, tmp_path: Path, texts: Path, point: str, monkeypatch):
        clean = prepare(settings(tmp_path, cache=tmp_path / "clean"))
        self.killed(tmp_path, point)
        assert not list((tmp_path / "cache").glob("*/manifest.json"))
        redone, trained = [], []
        tokenize, train = shards.tokenize_shard, module.train_bpe
        monkeypatch.setattr(
            shards, "tokenize_shard", lambda shard, *rest: (redone.append(shard), tokenize(shard, *rest))
        )
        monkeypatch.setattr(
            module, "train_bpe", lambda texts, size, *rest: trained.append(size) or train(texts, size, *rest)
        )
        prepared = prepare(settings(tmp_path))
        assert contents(prepared.directory) == contents(clean.directory)
        n_shards = 7
        # What was finished is not done again.
        left = {"tokenizer": n_shards, "write": n_shards, "shards": n_shards - 4, "join": 0, "rename": 0}
        assert len(redone) == left[point]
        assert len(trained) == (point == "tokenizer")
        assert list((tmp_path / "cache").iterdir()) == [prepared.directory]

    def test_worker_processes_do_not_outlive_it(self, tmp_path: Path, texts: Path):
        workers = [int(pid) for pid in self.killed(tmp_path, "shards", workers=2).split()]
        assert len(workers) == 2
        deadline = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        orphans = [pid for pid in workers if alive(pid)]
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        assert not orphans, "tokenisation processes wait for a parent that is dead"
        assert prepare(settings(tmp_path)).store.n_tokens("train") > 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_of_two_at_once_one_builds_and_the_other_waits(tmp_path: Path, texts: Path, monkeypatch):
    builds, waited, results = [], threading.Event(), []
    build = module.build_store

    def slow(
        directory: Path,
        sources: Sequence[SourceSpec],
        tokenizer: Tokenizer,
        *,
        validation_fraction: float,
        workers: int,
        shard_bytes: int,
        progress: Progress | None,
        building: Path,
    ) -> TokenStore:
        builds.append(1)
        assert waited.wait(30)
        return build(
            directory,
            sources,
            tokenizer,
            validation_fraction=validation_fraction,
            workers=workers,
            shard_bytes=shard_bytes,
            progress=progress,
            building=building,
        )

    def wait(stage: str, _done: int, _total: int | None) -> None:
        if stage == "waiting":
            waited.set()

    monkeypatch.setattr(module, "build_store", slow)
    threads = [
        threading.Thread(target=lambda: results.append(prepare(settings(tmp_path), progress=wait).directory))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(results) == 4
    assert set(results) == set((tmp_path / "cache").iterdir())
