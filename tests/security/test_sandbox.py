"""Chat templates of strangers end in seconds and in bounded memory, and reach nothing."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fuzzing.judge import Arena, judge
from fuzzing.targets import target
from helpers.bytewise import byte_tokenizer
from helpers.chat_templates import CHATML, THINKING
from lorakeet.chat import sandbox
from lorakeet.chat.template import render_chat
from lorakeet.errors import DataError

DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = DOUBLED %}{% endfor %}{{ ns.x }}"
HOSTILE = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n+1) }}{{ m(n+1) }}{% endmacro %}{{ m(0) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 9 ** 9 ** 9 * 9 ** 9999 }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ (['a' * 100000] * 100000)|join }}",
    "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "{% generation %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endgeneration %}",
    DOUBLE.replace("START", "'a'").replace("DOUBLED", "ns.x ~ ns.x"),
    DOUBLE.replace("START", "'a'").replace("DOUBLED", "ns.x + ns.x"),
    DOUBLE.replace("START", "[1]").replace("DOUBLED", "[ns.x, ns.x]"),
    DOUBLE.replace("START", "[1]").replace("DOUBLED", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x|tojson }}"),
    "{% set ns = namespace(n=2) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "x" * (sandbox.LONGEST_TEMPLATE + 1),
    "{{ 1 / 0 }}",
    "{{ [] | first | upper | nothing }}",
]


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_are_refused(template: str, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "MOST_STEPS", 50_000)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert judge(target("template").run, template.encode(), arena) is None
    with pytest.raises(DataError, match="refuses the conversation"):
        render_chat(tokenizer, [{"role": "user", "content": "Why?"}], False)


@pytest.mark.parametrize(
    "template", [CHATML, THINKING, "{{ -5 % 3 }}{{ 2 ** 3 }}{{ 'a' * 3 }}{{ [1] + [2] }}{{ 1 ~ 'x' }}"]
)
def test_benign_templates_give_the_text_of_transformers(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "Why? "}, {"role": "assistant", "content": "Because."}] * 3
    [expected], _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, **tokenizer.special_tokens_map
    )
    assert render_chat(tokenizer, messages, True) == expected
