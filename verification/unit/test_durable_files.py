import errno
import os
import threading

import pytest

from rlhf_core.durable_files import write_atomically


class TestWriteAtomically:
    def test_a_failure_keeps_the_old_content_and_leaves_nothing_beside_it(self, tmp_path, monkeypatch):
        path = tmp_path / "config.json"
        write_atomically(path, b"old")

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_reader_never_sees_half_a_file(self, tmp_path):
        path = tmp_path / "f"
        contents = {bytes([letter]) * 200_000 for letter in b"ab"}
        write_atomically(path, min(contents))
        seen, done = set(), threading.Event()

        def watch():
            while not done.is_set():
                seen.add(path.read_bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        for number in range(40):
            write_atomically(path, sorted(contents)[number % 2])
        done.set()
        thread.join()
        assert seen <= contents
