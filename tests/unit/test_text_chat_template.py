from __future__ import annotations

import json
import re
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from helpers.model_folder import CHATML_TEMPLATE, make_text_model
from tokenplane_api.text import chat_template as module
from tokenplane_api.text.chat_template import ChatTemplate, TemplateError
from tokenplane_core.backend.errors import ConfigError, RequestError

LLAMA3 = """\
{{- bos_token }}
{%- set ns = namespace(system='You help.') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- ns.system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate user/assistant, but message ' ~ loop.index0 ~ ' is ' ~ message.role) }}\
{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

GEMMA = """\
{{ bos_token }}
{% for message in messages %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {% if role == 'system' %}
        {% continue %}
    {% endif %}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
    {% if loop.index > 50 %}
        {% break %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

TRAINING = """\
{% macro turn(message) %}
<{{ message.role }}>{{ message.content }}</{{ message.role }}>
{% endmacro %}
{% for message in messages %}
  {% if message.role == 'assistant' %}
    {% generation %}
{{ turn(message) }}
    {% endgeneration %}
  {% else %}
{{ turn(message) }}
  {% endif %}
{% endfor %}
{% if thinking is defined and thinking %}<think>{% endif %}
{{ {'dict': dict(a=1), 'now': strftime_now('%Y'), 'last': messages[::-1][0].content, 'documents': documents} | tojson }}
"""

TEMPLATES = {"chatml": CHATML_TEMPLATE, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "training": TRAINING}

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": " <b>Tom & 'Jerry'</b> \"สวัสดี\" 👍\n"},
    {"role": "assistant", "content": "Yes,  of course.  "},
    {"role": "user", "content": "Thanks"},
]
UNFINISHED = [*CHAT, {"role": "assistant", "content": "You are wel "}]
TOOLS = [{"type": "function", "function": {"name": "zählen", "parameters": {"type": "object", "b": 1, "a": "<&>"}}}]
TOKENS: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = make_text_model(tmp_path_factory.mktemp("reference"), bos_token=TOKENS["bos_token"])
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(reference: Any, name: str, add_generation_prompt: bool, tools: Any) -> None:
    expected = reference.apply_chat_template(
        CHAT,
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        thinking=True,
    )
    template = ChatTemplate({"default": TEMPLATES[name]})
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "thinking": True}
    assert template.render(CHAT, **TOKENS, **options) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma"])
@pytest.mark.parametrize("content", ["You are wel ", "  two\nlines\n\n", "plain"])
def test_continues_the_final_message_as_transformers(reference: Any, name: str, content: str) -> None:
    chat = [*CHAT, {"role": "assistant", "content": content}]
    expected = reference.apply_chat_template(
        chat, chat_template=TEMPLATES[name], continue_final_message=True, tokenize=False
    )
    rendered = ChatTemplate({"default": TEMPLATES[name]}).render(chat, **TOKENS, continue_final_message=True)
    assert rendered == expected
    assert chat[-1]["content"] == content, "the caller's messages stay as they are"


def test_continued_message_must_survive_the_template() -> None:
    template = ChatTemplate({"default": "{% for message in messages %}{{ message.content[:4] }}{% endfor %}"})
    with pytest.raises(TemplateError, match="does not keep the last message"):
        template.render(UNFINISHED, **TOKENS, continue_final_message=True)


@pytest.mark.parametrize("messages", [[], [{"role": "assistant"}], [{"role": "assistant", "content": None}]])
def test_continuing_needs_a_text(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(TemplateError, match="no text content to continue"):
        ChatTemplate({"default": CHATML_TEMPLATE}).render(messages, **TOKENS, continue_final_message=True)


def test_error_is_what_the_template_said() -> None:
    template = ChatTemplate({"default": MISTRAL})
    with pytest.raises(TemplateError) as caught:
        template.render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], **TOKENS)
    assert str(caught.value) == "Roles must alternate user/assistant, but message 1 is user"
    assert isinstance(caught.value, RequestError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ 'a' + messages[0] }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | tojson(indent='x', sort_keys=missing.y) }}", "missing"),
        ("{{ range(10000000) }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
    ],
)
def test_failing_template_is_a_template_error(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate({"default": source}).render(CHAT, **TOKENS)


def test_missing_tokens_are_undefined_not_none() -> None:
    template = ChatTemplate({"default": "[{{ bos_token }}{{ eos_token is defined }}]"})
    assert template.render([], bos_token=None, eos_token=None) == "[False]"


def test_now_is_now() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%Y-%m-%d %H') }}"})
    before, rendered, after = datetime.now(), template.render([], **TOKENS), datetime.now()
    assert rendered in {f"{moment:%Y-%m-%d %H}" for moment in (before, after)}


def test_runaway_loops_end() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match=f"more than {module.MAX_LOOP_STEPS} loop steps"):
        ChatTemplate({"default": source}).render([], **TOKENS)


def test_recursive_loops_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOOP_STEPS", 9)
    template = ChatTemplate({"default": "{% for x in messages recursive %}x{{ loop(x) if x }}{% endfor %}"})
    nested: Any = [[[], []], [[], []]]
    assert template.render(nested, **TOKENS) == "xxxxxx"
    with pytest.raises(TemplateError, match="more than 9 loop steps"):
        template.render(nested * 2, **TOKENS)


def test_output_size_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CHARACTERS", 1000)
    template = ChatTemplate({"default": "{% for message in messages %}{{ message.content }}{% endfor %}"})
    message = {"role": "user", "content": "x" * 500}
    assert len(template.render([message] * 2, **TOKENS)) == 1000
    with pytest.raises(TemplateError, match="wrote more than 1000 characters"):
        template.render([message] * 3, **TOKENS)


def test_each_rendering_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOOP_STEPS", 100)
    template = ChatTemplate({"default": "{% for x in range(60) %}{{ x }} {% endfor %}"})
    expected = " ".join(map(str, range(60)))
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(template.render([], **TOKENS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.strip() for result in results] == [expected] * 4
    assert template.render([], **TOKENS).strip() == expected


def test_says_which_variables_the_template_reads() -> None:
    assert "tools" in ChatTemplate({"default": LLAMA3}).variables
    assert "tools" not in ChatTemplate({"default": MISTRAL}).variables


def test_tool_template_is_used_when_there_are_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "with tools"})
    assert template.render(CHAT, **TOKENS) == "plain"
    assert template.render(CHAT, **TOKENS, tools=TOOLS) == "with tools"
    with pytest.raises(TemplateError, match="no default chat template, only 'rag'"):
        ChatTemplate({"rag": "x"}).render(CHAT, **TOKENS)


def test_first_source_of_the_folder_wins(tmp_path: Path) -> None:
    make_text_model(tmp_path, chat_template=None)
    assert ChatTemplate.load(tmp_path) is None

    def rendered(path: Path | None = None) -> str:
        template = ChatTemplate.load(tmp_path, path)
        assert template is not None
        return template.render(CHAT, **TOKENS)

    (tmp_path / "processor_config.json").write_text('{"chat_template": "processor"}')
    assert rendered() == "processor"
    named = [{"name": "default", "template": "tokenizer config"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert rendered() == "tokenizer config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "own json file"}')
    assert rendered() == "own json file"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert rendered() == "own file"
    other = tmp_path / "other.json"
    other.write_text('{"chat_template": "asked for"}')
    assert rendered(other) == "asked for"
    other.write_text('{"eos_token": "</s>"}')
    assert rendered(other) == "own file"


def test_broken_template_names_file_and_line(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message.role }\n{% endfor %}")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'chat_template.jinja'}: line 2")):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("\n\n{{ 1 | no_such_filter }}")
    with pytest.raises(ConfigError, match=r"line 3 is not valid Jinja: No filter named 'no_such_filter'"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [1]}')
    with pytest.raises(ConfigError, match="neither a string nor a list of named templates"):
        ChatTemplate.load(tmp_path)
