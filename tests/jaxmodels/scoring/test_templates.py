"""Chat templates that would run code, take days or write gigabytes; rendered as transformers renders them."""

import resource
import time

import pytest

from jaxmodels.scoring import templates
from jaxmodels.scoring.templates import ChatTemplate

pytest.importorskip("transformers")
pytest.importorskip("jinja2.sandbox")
TIME, MEMORY, EITHER = "takes more than 0 s", "takes more than 500 MB|MemoryError", "takes more than|MemoryError"
HOSTILE = {
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        TIME,
    ),
    "an empty loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "repeated": ("{{ 'a' * 10000000000 }}", MEMORY),
    "a repeated list": ("{{ ([0] * 10000000000) | length }}", MEMORY),
    "aligned": ("{{ 'a'|center(10000000000) }}", MEMORY),
    "aligned by a method": ("{{ 'a'.ljust(10000000000) }}", MEMORY),
    "padded": ("{{ '1'.zfill(10000000000) }}", MEMORY),
    "formatted": ("{{ '%010000000000d' % 1 }}", "takes more than|width"),
    "formatted by a method": ("{{ '{:>9999999999}'.format(1) }}", MEMORY),
    "formatted by a filter": ("{{ '%1000000000d'|format(1) }}", MEMORY),
    "indented": ("{{ ('a\n' * 100000)|indent(100000) }}", EITHER),
    "expanded": ("{{ ('\t' * 100000).expandtabs(100000) }}", MEMORY),
    "joined": ("{{ range(99999)|join('a' * 100000) }}", MEMORY),
    "replaced": ("{{ ('a' * 100000)|replace('a', 'b' * 100000) }}", MEMORY),
    "as JSON": ("{{ [[1]]|tojson(indent=1000000000) }}", EITHER),
    "doubled": (
        "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        EITHER,
    ),
    "a doubled list": (
        "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
        EITHER,
    ),
    "a power": ("{{ 7 ** (7 ** (9 ** 9)) }}", EITHER),
    "a power of constants": ("{% if 9 ** (9 ** 9) > 1 %}a{% endif %}", EITHER),
    "products": (
        "{% set n = namespace(a=3) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}",
        EITHER,
    ),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion|takes more"),
    "nested lists": ("{{ " + "[" * 5_000 + "]" * 5_000 + " }}", "too many|nested|recursion|ends its process|more than"),
    "nested parentheses": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion|ends its process|more than"),
    "lorem ipsum": ("{{ lipsum(n=100000, min=1000, max=1001) }}", "takes more than"),
    "written": ("{% for i in range(110) %}{{ 'a' * 100000 }}{% endfor %}", "writes 11,000,000 characters"),
    "more than was said": ("{{ 'ab ' * 50000 }}", "writes 150,000 characters; at most 100,"),
    "code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "code by a format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "loader"),
    "its own error": ("{{ 1 / 0 }}\n", "division by zero"),
    "an error of several lines": ("{{ raise_exception('a\n\x1b[2Jb') }}", "^the chat template of chat: 'a'$"),
    "no template": ("{% for %}", "Expected"),
}


# Those that are ended with their process, of which a new one takes a second to start.
SLOW = {name for name, (_, said) in HOSTILE.items() if said in (TIME, EITHER)} - {"an empty loop"}
SLOW |= {"nested lists", "nested parentheses", "lorem ipsum", "a macro that calls itself"}


@pytest.mark.parametrize("what", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in HOSTILE])
def test_a_hostile_template_is_refused(what, monkeypatch, capfd):
    monkeypatch.setattr(templates, "SECONDS", 0.4)
    text, said = HOSTILE[what]
    before, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    with pytest.raises(ValueError, match=said) as refused:
        ChatTemplate(text, {}, "the chat template of chat").render([{"role": "user", "content": "a"}])
    assert str(refused.value).startswith("the chat template of chat: ")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400
    assert time.monotonic() - began < 20
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert capfd.readouterr() == ("", "")


def test_a_template_within_the_limits_is_rendered():
    text = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ 2 ** 3 }}{{ m.content }}{% endfor %}"
    text += "{% generation %}{{ 'a' * 3 }}{% endgeneration %}{% if add_generation_prompt %}[b]{% endif %}"
    chat = ChatTemplate(text, {"bos_token": "<s>"}, "the chat template of chat")
    messages = [{"role": "a", "content": "é\n"}]
    assert chat.render(messages) == "<s>[a] 8é\naaa[b]"
    assert chat.render(messages, generation=False) == "<s>[a] 8é\n"
