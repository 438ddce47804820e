from datetime import datetime

import pytest

from eellm.errors import RequestError
from eellm.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "a < b"}, {"role": "assistant", "content": None, "x": "é"}]


def render(source: str, *, prompt: bool = False) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, now=lambda: datetime(2024, 7, 26))
    return template.render(MESSAGES, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>a < b"),
        ("{% if add_generation_prompt %}yes{% else %}no{% endif %}", "no"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # blocks leave no lines behind
        ("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}", "1"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{% endfor %}", "2"),
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "x": "é"}'),  # None is dropped, nothing is escaped
        ("{{ {'a': '<'} | tojson(indent=1) }}", '{\n "a": "<"\n}'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "a < b!"),
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "2"),
        ("{% if tools %}tools{% endif %}{{ documents is none }}", "True"),
        ("{{ nobody }}", ""),
    ],
)
def test_templates_find_what_hugging_face_gives_them(source, text):
    assert render(source) == text


def test_the_prompt_for_the_answer_is_asked_for():
    assert render("{{ add_generation_prompt }}", prompt=True) == "True"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% if %}", "not valid Jinja: line 1"),
        ("{{ messages[7].content }}", "refuses these messages"),
        ("{{ 'a' + 1 }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{% include 'secret' %}", "refuses these messages"),
    ],
)
def test_what_goes_wrong_in_a_template_is_an_error_for_the_user(source, message):
    with pytest.raises(RequestError, match=message):
        render(source)
