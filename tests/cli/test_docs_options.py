"""The page of options, which is made when the docs are built, has every option of every command with what it says."""

from docs.options_hook import MARK, RECIPES, on_page_markdown, options_of
from eellm.cli.main import VERBS
from tests.unit.test_public import options_of as names_of


def test_every_verb_has_its_section_and_every_option_its_row():
    page = on_page_markdown(f"# Options\n\n{MARK}\n")
    assert MARK not in page
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(sections) == list(VERBS)
    assert {name: "| `" in text for name, text in sections.items()} == dict.fromkeys(VERBS, True)
    for verb, cls in RECIPES.items():
        rows = [line.split("`")[1] for line in sections[verb].splitlines() if line.startswith("| `")]
        assert rows == list(names_of(cls))


def test_an_option_has_its_default_its_words_and_its_docstring():
    rows = {option.name: option for option in options_of(RECIPES["train"])}
    assert rows["parallel.tp"].default == "`1`"
    assert rows["model.vocab-size"].default == "*needed*"
    assert rows["train.deterministic"].default == "`false`"
    assert rows["parallel.recompute"].text.endswith("(`none`, `selective`, `full`)")
    assert all(option.text for option in rows.values())


def test_other_pages_stay_as_they_are():
    assert on_page_markdown("# Home") == "# Home"
