"""Chat templates that would run code, take days or write gigabytes; rendered as transformers renders them."""

import resource
import sys
import time

import pytest

from jaxmodels.scoring import templates
from jaxmodels.scoring.templates import limited

sandbox = pytest.importorskip("jinja2.sandbox")
HOSTILE = {
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "takes more than",
    ),
    "an empty loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than"),
    "repeated": ("{{ 'a' * 10000000000 }}", "takes more than"),
    "aligned": ("{{ 'a'|center(10000000000) }}", "takes more than"),
    "formatted": ("{{ '%010000000000d' % 1 }}", "takes more than|width"),
    "doubled": (
        "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "more than",
    ),
    "a power": ("{{ 7 ** 7 ** 9 ** 9 }}", "power"),
    "code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "a file": ("{% include '/etc/passwd' %}", "loader"),
    "its own error": ("{{ 1 / 0 }}\n", "division by zero"),
    "no template": ("{% for %}", "Expected"),
}


def rendered(text, **values):
    templates.check(text, "the chat template of chat")
    with limited("the chat template of chat"):
        return sandbox.ImmutableSandboxedEnvironment().from_string(text).render(**values)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_refused(what, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    text, said = HOSTILE[what]
    before, tracer, began = resource.getrlimit(resource.RLIMIT_AS), sys.gettrace(), time.process_time()
    with pytest.raises(ValueError, match=said) as refused:
        rendered(text)
    assert str(refused.value).startswith("the chat template of chat: ")
    assert str(refused.value).isprintable()
    assert time.process_time() - began < 5
    assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == (before, tracer)


def test_a_template_within_the_limits_is_rendered():
    template = "{% for m in messages %}[{{ m.role }}] **{{ m.content }}**{% endfor %}"
    assert rendered(template, messages=[{"role": "a", "content": "b"}]) == "[a] **b**"
    templates.check("{% generation %}{{ 'a' * 3 }}{% endgeneration %}", "tags of transformers")
