import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable

import pytest
import zstandard

from data_prep.streams import reading, unpacked
from zerobert.errors import DataError

Pack = Callable[[bytes], bytes]

ZSTD: Pack = zstandard.ZstdCompressor(write_checksum=True).compress  # as the zstd command does
PACKS = [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", ZSTD)]
# Bytes that do not shrink stand beside some that do, so that members are longer than one read.
TEXT = os.urandom(300_000) + b"The same line.\n" * 50_000


def read(raw: bytes, compression: str) -> bytes:
    with unpacked(io.BytesIO(raw), compression) as file:
        return file.read()


@pytest.mark.parametrize(("compression", "pack"), PACKS)
def test_members_are_read_to_the_end_of_the_last(compression: str, pack: Pack) -> None:
    assert read(pack(TEXT), compression) == TEXT
    assert read(pack(TEXT) + pack(b"") + pack(b"end"), compression) == TEXT + b"end"


@pytest.mark.parametrize(("compression", "pack"), PACKS)
@pytest.mark.parametrize("num_missing", [1, 4, 1000, 299_000])
def test_a_cut_member_is_an_error(compression: str, pack: Pack, num_missing: int) -> None:
    for whole in (pack(TEXT), pack(b"first") + pack(TEXT)):
        with pytest.raises(DataError, match="x is cut short or damaged"), reading("x"):
            read(whole[:-num_missing], compression)


@pytest.mark.parametrize(("compression", "pack"), PACKS)
def test_what_is_not_packed_is_an_error(compression: str, pack: Pack) -> None:
    for raw in (b"", b"plain text\n" * 100, pack(TEXT)[:300] + b"no" + pack(TEXT)[302:]):
        with pytest.raises(DataError, match=r"^x (is cut short or damaged|can't be read)"):
            with reading("x"):
                read(raw, compression)


def test_zstd_frames_of_every_kind() -> None:
    skipped = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    assert read(skipped + ZSTD(b"one") + skipped + ZSTD(b"two"), ".zst") == b"onetwo"
    with pytest.raises(EOFError):
        read(ZSTD(b"one") + skipped[:-1], ".zst")
    for window_log in (27, 31):  # zstd --long=27 and --long=31
        settings = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
        packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        raw = packer.compress(TEXT) + packer.flush()
        assert read(raw, ".zst") == TEXT


@pytest.mark.parametrize(("compression", "pack"), [("", bytes), *PACKS])
def test_what_is_measured_is_what_lies_on_disk(compression: str, pack: Pack) -> None:
    raw = pack(TEXT)
    seen: list[int] = []
    with unpacked(io.BytesIO(raw), compression, seen.append) as file:
        assert file.read() == TEXT
    assert sum(seen) == len(raw)
