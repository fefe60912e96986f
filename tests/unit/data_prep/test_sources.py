import asyncio
import hashlib
import http.server
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep.sources import (
    Source,
    check_unchanged,
    find_sources,
    identify,
    local_source,
    opened,
    text_files,
)
from data_prep.streams import reading
from tests.conftest import nobody
from zerobert.errors import ConfigError, DataError, MissingDependencyError

SUFFIXES = (".txt", ".md")


def names(*inputs: str) -> list[str]:
    return [source.name for source in find_sources(inputs, SUFFIXES)]


def content(source: Source) -> bytes:
    with opened(source) as file:
        return file.read()


def test_folders_are_searched_for_what_ends_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b/wiki_01", "b/wiki_00", "a.txt.gz", "p.png", ".hidden", ".git/x.txt", "c.MD"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = names(str(tmp_path), str(tmp_path / "p.png"), str(tmp_path / "c.MD"))
    assert capsys.readouterr().err == f"note: passed over for their suffix: {tmp_path}/p.png\n"
    assert [str(Path(name).relative_to(tmp_path)) for name in found] == [
        *("a.txt.gz", "c.MD", "b/wiki_00", "b/wiki_01", "p.png"),
    ]
    (tmp_path / "empty").mkdir()
    assert names(str(tmp_path / "empty")) == []
    with pytest.raises(DataError, match="none: no such file or folder"):
        names(str(tmp_path / "none"))
    with pytest.raises(DataError, match="xxx can't be read: File name too long"):
        names("x" * 300)
    with pytest.raises(ConfigError, match="got an empty name"):
        names("")


def test_what_is_passed_over_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").write_text("x")
    assert names(str(tmp_path)) == []
    assert capsys.readouterr().err == ""  # an error tells it
    (tmp_path / "a.txt").write_text("x")
    assert names(str(tmp_path)) == [f"{tmp_path}/a.txt"]
    shown = ", ".join(f"{tmp_path}/{number}.png" for number in range(5))
    line = f"note: passed over for their suffix: {shown} and 2 more\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("enwiki-20240101-pages-articles1.xml-p1p41242.bz2", ".xml"),
        ("enwiki-20240101-pages-articles1.XML-p1p41242", ".xml"),
        ("a.xml-p1", ".xml-p1"),
        ("a.xml-p1p2.bak", ".bak"),
    ],
)
def test_parts_of_a_split_dump_are_xml(name: str, suffix: str) -> None:
    assert Source(name=name, path=f"d/{name}", num_bytes=0, stamp="").suffix == suffix


def test_a_file_that_is_named_twice_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    assert names("a.txt", "./a.txt", str(tmp_path), "b.txt", "file://" + str(tmp_path)) == ["a.txt"]


@pytest.mark.parametrize("name", ["a::b.txt", "memory::x", "s3:", "a b\n.txt", "é?*[x].txt", "a#b"])
def test_what_exists_here_is_no_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("Here.")
    (source,) = find_sources([name], SUFFIXES)
    assert (source.name, source.filesystem, content(source)) == (name, None, b"Here.")


def test_what_looks_like_a_url_and_exists_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    Path("s3:/x.txt").write_text("Here.")
    (source,) = find_sources(["s3://x.txt"], SUFFIXES)
    assert (source.filesystem, content(source)) == (None, b"Here.")


def test_a_name_that_is_no_text_can_be_shown(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt"))
    path.write_text("Here.")
    (source,) = find_sources([str(tmp_path)], SUFFIXES)
    assert source.name == f"{tmp_path}/a\\xff.txt"
    assert content(source) == b"Here."


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is a pipe or device, and text is read twice"):
        names(str(tmp_path))


def test_what_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir()
        (folder / "a.txt").write_text("x")
        for path in (folder / "closed", folder / "a.txt"):
            path.chmod(0)
        with nobody():
            with pytest.raises(DataError, match="closed can't be read: Permission denied"):
                names(name)
            with pytest.raises(DataError, match=r"b\.txt can't be read: Permission denied"):
                names(str(folder / "closed" / "b.txt"))
            with pytest.raises(DataError, match=r"a\.txt can't be read: Permission denied"):
                identify(local_source(folder / "a.txt"))
        (folder / "closed").chmod(0o755)


def test_a_file_is_known_by_its_hash_and_watched_by_its_age(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 3_000_000)
    source = local_source(path)
    seen: list[int] = []
    assert identify(source, seen.append) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert sum(seen) == source.num_bytes == 3_000_000
    check_unchanged(source)
    path.write_bytes(b"y")
    with pytest.raises(DataError, match=r"a\.txt was changed while it was read"):
        check_unchanged(source)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: no such file"):
        check_unchanged(source)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


def test_urls_are_read_as_files_and_as_folders(
    memory: fsspec.AbstractFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("/c/b.txt", "/c/d/a.txt", "/c/.git/x.txt", "/c/p.png", "/c/a::b.txt"):
        memory.pipe(name, name.encode())
    folder = find_sources(["memory://c"], SUFFIXES)
    assert capsys.readouterr().err == "note: passed over for their suffix: memory:///c/p.png\n"
    assert [source.name for source in folder] == [
        *("memory:///c/a::b.txt", "memory:///c/b.txt", "memory:///c/d/a.txt"),
    ]
    assert [content(source) for source in folder] == [b"/c/a::b.txt", b"/c/b.txt", b"/c/d/a.txt"]
    (file,) = find_sources(["memory://c/p.png", "memory:///c/p.png"], SUFFIXES)
    assert (file.num_bytes, content(file)) == (8, b"/c/p.png")
    assert (folder[0].suffix, folder[0].compression) == (".txt", "")
    with pytest.raises(DataError, match="memory://none: no such file or folder"):
        names("memory://none")


def test_a_url_is_known_by_what_its_storage_says(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/a.txt", b"one")
    (source,) = find_sources(["memory://a.txt"], SUFFIXES)
    assert identify(source) == source.stamp != ""
    check_unchanged(source)
    memory.pipe("/a.txt", b"two")
    with pytest.raises(DataError, match=r"a\.txt was changed while it was read"):
        check_unchanged(source)
    memory.rm("/a.txt")
    with pytest.raises(DataError, match=r"a\.txt: no such file"):
        content(source)


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("nonsense://x", ConfigError, "fsspec knows no nonsense://"),
        ("zzz+y.1-x://x", ConfigError, r"fsspec knows no zzz\+y.1-x://"),
        ("a::s3://x", DataError, "no such file"),
    ],
)
def test_urls_of_no_kind(url: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        names(url)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        MissingDependencyError, match=r"s3://b/x: Install s3fs .*; pip install s3fs"
    ):
        names("s3://b/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match="pip install fsspec"):
        names("s3://b/x")


class _Handler(http.server.BaseHTTPRequestHandler):
    body = b"From far away.\n" * 1000
    tag = '"one"'

    def _answer(self) -> None:
        found = self.path.startswith("/a.txt")
        self.send_response(200 if found else 404)
        self.send_header("ETag", self.tag)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command == "GET" and found:
            self.wfile.write(self.body)

    do_GET = do_HEAD = _answer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_web_is_read(
    server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    address = f"http://127.0.0.1:{server.server_port}"
    (source,) = find_sources([f"{address}/a.txt?x=1"], SUFFIXES)
    assert (source.suffix, source.num_bytes) == (".txt", 15_000)
    assert identify(source) == 'ETag "one"'
    assert content(source) == _Handler.body
    check_unchanged(source)
    monkeypatch.setattr(_Handler, "tag", '"two"')
    with pytest.raises(DataError, match="was changed while it was read"):
        check_unchanged(source)
    with pytest.raises(DataError, match="none: no such file"):
        names(f"{address}/none")


def test_a_server_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:9/a\.txt(:| can't be read:) "):
        names("http://127.0.0.1:9/a.txt")


@pytest.mark.parametrize("error", [TimeoutError(), asyncio.TimeoutError(), ConnectionResetError()])
def test_what_networks_raise_is_ours(error: Exception) -> None:
    with pytest.raises(DataError, match=r"^x can't be read: "), reading("x"):
        raise error


def test_text_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.txt file; `python -m data_prep text"):
        text_files(tmp_path)
    for name in ("b.TXT", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in text_files(tmp_path)] == ["a.txt", "b.TXT"]
    (tmp_path / "d.txt.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"d\.txt\.gz is packed"):
        text_files(tmp_path)
