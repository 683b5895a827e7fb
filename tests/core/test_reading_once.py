"""Ranks of a machine share what they read within one start, and only there."""

import os
from contextlib import contextmanager

import pytest

from tests.data.fake_source import FakeSource, pairs, stream_config
from tests.full_disk import full_disk
from unified_lm.core import agreement, cached_folder, distributed, files, reading_once
from unified_lm.core.errors import DataError
from unified_lm.core.reading_once import once
from unified_lm.data import sources, token_cache
from unified_lm.data.streams import TableStream
from unified_lm.models.tiny import tiny_tokenizer


@contextmanager
def start(name, monkeypatch):
    """What a rank is in during the start `name` of a run of two."""
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "world_size", lambda: 2)
        patched.setattr(agreement, "broadcast_object", lambda _: name)
        patched.setattr(reading_once, "broadcast_object", lambda _: name)
        with reading_once.reading_once():
            patched.undo()
            yield


@pytest.fixture
def read(tmp_path):
    """A file and a function that reads it through `once`; it counts its readings."""
    file = tmp_path / "rows.jsonl"
    file.write_text("first")

    def ask():
        def work():
            ask.count += 1
            return file.read_text()

        return once(tmp_path / "cache" / "stamp", [file], work)

    ask.count, ask.file = 0, file
    return ask


def test_within_a_start_a_file_is_read_once(read, monkeypatch):
    for _ in range(3):  # ranks of one machine, one after another
        with start("a", monkeypatch):
            assert read() == "first"
    assert read.count == 1


def test_another_start_reads_again_and_so_does_a_process_alone(read, monkeypatch):
    with start("a", monkeypatch):
        read()
    with start("b", monkeypatch):
        read()
    assert read.count == 2, "a stamp does not vouch for a file beyond its start"
    read()
    read()
    assert read.count == 4


def test_a_file_that_changed_is_read_again(read, monkeypatch):
    with start("a", monkeypatch):
        read()
        before = read.file.stat()
        read.file.write_text("other")  # of the same size
        os.utime(read.file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert read() == "other"


def test_what_failed_is_not_kept(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("first")

    def broken():
        raise ValueError("not what was written")

    with start("a", monkeypatch):
        with pytest.raises(ValueError, match="not what was written"):
            once(tmp_path / "stamp", [file], broken)
        assert once(tmp_path / "stamp", [file], file.read_text) == "first"


def test_a_full_cache_is_named_and_nothing_stays_of_it(read, tmp_path, monkeypatch):
    with start("a", monkeypatch):
        with full_disk(10), pytest.raises(DataError, match=r"cannot write the cache, .*cache/stamp..*: File too large\."):
            read()
        assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
        assert read() == "first"


def test_a_run_hashes_and_checks_its_data_once_per_machine(tmp_path, monkeypatch):
    """Two ranks open a folder and the token table of a stream: every byte is read by one of them."""
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.jsonl").write_text("".join(f'{{"query": "q{index} {i}", "pos": ["p"]}}\n' for i in range(4)))
    config = stream_config("pairs", batch_size=2, attention="bidirectional")
    where = sources.SourceConfig(path=str(folder))

    def open_all():
        opened = sources.open_sources(where, config.record_kind, 0)
        TableStream("emb", config, [FakeSource(pairs(5))], tiny_tokenizer(), 0)
        return [source.fingerprint for source in opened]

    expected = open_all()
    read = []
    checksum = files.checksum
    monkeypatch.setattr(cached_folder, "checksum", lambda path: read.append(path.name) or checksum(path))
    real_open = open
    monkeypatch.setattr(sources, "open", lambda *given: read.append(given[0].name) or real_open(*given), raising=False)
    for _ in range(2):
        with start("a", monkeypatch):
            assert open_all() == expected
    parsed = ["0.jsonl", "1.jsonl", "2.jsonl", *3 * ("meta.json", "records.arrow")]
    assert sorted(read) == sorted([*parsed, "table.json", *(f"{name}.bin" for name in token_cache._ARRAYS)])


def test_a_table_damaged_between_two_ranks_is_still_found(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))
    config = stream_config("pairs", batch_size=2, attention="bidirectional")

    def table():
        return TableStream("emb", config, [FakeSource(pairs(5))], tiny_tokenizer(), 0).tables[0]

    with start("a", monkeypatch):
        expected = table().ids.tolist()
        (ids,) = (tmp_path / "cache").glob("tokens/*/ids.bin")
        ids.write_bytes(b"\0" * ids.stat().st_size)
        with pytest.warns(UserWarning, match=r"ids\.bin is not what was written"):
            assert table().ids.tolist() == expected
