"""Conversations become prompts: malformed ones are named, strangers' templates stay in their sandbox."""

from enum import StrEnum

import pytest

from jaxinfer.errors import InvalidRequest
from jaxinfer.frontend.chat import render

ECHO = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
USER = {"role": "user", "content": "Hi"}


def test_a_conversation_is_rendered_with_its_variables():
    template = "{{ bos_token }}" + ECHO + "{% if add_generation_prompt %}assistant:{{ mood }}{% endif %}"
    assert render(template, [USER], bos_token="<s>", mood="glad") == "<s>user: Hi\nassistant:glad"
    assert render(template, [USER], add_generation_prompt=False) == "user: Hi\n"


def test_blocks_are_trimmed_as_templates_expect():
    assert render("  {% if true %}\nyes\n  {% endif %}\nend", [USER]) == "yes\nend"


def test_loops_may_break_and_generation_blocks_render_as_their_inside():
    loop = "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"
    assert render(loop + "{% endfor %}", [USER]) == "013"
    block = "{% set a = 1 %}{% generation %}{{ messages[0].content }}{% set a = 2 %}{% endgeneration %}{{ a }}"
    assert render(block, [USER]) == "Hi1"


def test_json_is_written_as_it_stands():
    tools = [{"name": "größe", "html": "<b>&</b>"}]
    assert render("{{ tools | tojson }}", [USER], tools) == '[{"name": "größe", "html": "<b>&</b>"}]'
    assert render("{{ tools | tojson(indent=2) }}", [USER], [{"a": 1}]) == '[\n  {\n    "a": 1\n  }\n]'


def test_a_template_knows_the_date():
    assert render("{{ strftime_now('%Y') }}", [USER]).isdigit()


def test_empty_optional_fields_are_missing_to_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    keys = "{% for key in messages[0] %}{{ key }} {% endfor %}"
    assert render(keys, [call]) == "role tool_calls "


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_found_under_each_of_its_names(name):
    template = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
    assert render(template, [{**USER, name: "hm"}]) == "hm hm"


def test_enums_and_tuples_shrink_to_plain_values():
    class Role(StrEnum):
        user = "user"

    assert render(ECHO, ({"role": Role.user, "content": "Hi"},)) == "user: Hi\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages is missing"),
        ("Hi", "messages is a str"),
        (USER, "messages is a dict"),
        ([], "messages is empty"),
        (["Hi"], r"messages\[0\] is a str"),
        ([USER, 3], r"messages\[1\] is a int"),
        ([USER, {"content": "x"}], r'messages\[1\]\["role"\] is missing'),
        ([{"role": 3, "content": "x"}], r'messages\[0\]\["role"\] is a int'),
        ([{"role": "", "content": "x"}], r'messages\[0\]\["role"\] is empty'),
        ([USER, {"role": "user"}], r'messages\[1\]\["content"\] is missing'),
        ([{"role": "user", "content": None}], r'messages\[0\]\["content"\] is missing'),
        ([{"role": "user", "content": 3}], r'messages\[0\]\["content"\] is a int'),
        ([{"role": "user", "content": [{"text": "x"}]}], r'messages\[0\]\["content"\]\[0\] must be a dict'),
        ([{"role": "user", "content": ["x"]}], r'messages\[0\]\["content"\]\[0\] must be a dict'),
        ([{**USER, "image": object()}], r"messages\[0\]\['image'\] is a object"),
        ([{**USER, "data": [b"x"]}], r"messages\[0\]\['data'\]\[0\] is a bytes"),
    ],
)
def test_a_malformed_message_is_refused_by_index_and_field(messages, message):
    with pytest.raises(InvalidRequest, match=message):
        render(ECHO, messages)


@pytest.mark.parametrize(("tools", "message"), [("f", "tools is a str"), ([print], r"tools\[0\] is a builtin")])
def test_malformed_tools_are_refused(tools, message):
    with pytest.raises(InvalidRequest, match=message):
        render(ECHO, [USER], tools)


def test_a_variable_that_is_not_plain_data_is_refused():
    with pytest.raises(InvalidRequest, match="mood is a object"):
        render(ECHO, [USER], mood=object())


def test_what_the_template_raises_reaches_the_caller():
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", [USER])
    with pytest.raises(InvalidRequest, match="'nothing' is undefined"):
        render("{{ nothing.at_all }}", [USER])
    with pytest.raises(InvalidRequest, match="line 2"):
        render("\n{% if %}", [USER])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ().__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.x }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__.os.popen('id').read() }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n.__call__ = 1 %}",
        "{{ '%s'.__mod__.x }}{{ '{0.__class__.__mro__.x}'.format(1) }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% include '/etc/passwd' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_malicious_template_is_refused(attack):
    with pytest.raises(InvalidRequest, match="template refuses"):
        render(attack, [USER])


def test_rendering_leaves_the_callers_messages_alone():
    messages = [{**USER, "tool_calls": None, "thinking": "hm"}]
    render(ECHO, messages)
    assert messages == [{**USER, "tool_calls": None, "thinking": "hm"}]
