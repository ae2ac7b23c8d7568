"""What a push notes on its own disk."""

from __future__ import annotations

from pathlib import Path

from workloads.replication.journal import Begun, Closed, Journal, Sent


def test_open_uploads_and_their_parts_are_known_again(tmp_path: Path):
    journal = Journal(tmp_path / "journal")
    for name in ("one", "two"):
        journal.write(Begun(key=f"key-{name}", upload=name, chunk=8))
        journal.write(Sent(upload=name, number=1, etag=f'"{name}"'))
    journal.write(Closed(upload="one"))
    journal.close()
    again = Journal(tmp_path / "journal")
    assert again.open_uploads == [Begun(key="key-two", upload="two", chunk=8)]
    assert again.etags("two") == {1: '"two"'}
    assert again.etags("one") == {}


def test_a_line_cut_short_anywhere_is_dropped_and_the_rest_goes_on(tmp_path: Path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.write(Begun(key="key", upload="one", chunk=8))
    first = len(path.read_bytes())
    journal.write(Sent(upload="one", number=1, etag="etag"))
    journal.close()
    whole = path.read_bytes()
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        again = Journal(path)
        assert again.etags("one") == {}
        again.write(Sent(upload="one", number=2, etag="other"))
        again.close()
        third = Journal(path)
        assert third.etags("one") == {2: "other"}
        assert [each.upload for each in third.open_uploads] == ["one"]
        third.close()


def test_only_its_owner_may_read_it(tmp_path: Path):
    Journal(tmp_path / "journal").close()
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600
