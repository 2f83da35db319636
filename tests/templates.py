"""Chat templates with tools, in the forms that models have, for tests of what reads their calls."""

_HEAD = (
    "{% if tools %}<|im_start|>system\nTools:"
    "{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
)
_TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_RESULT = (
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ m.content }}{% endif %}"
)


def _calls(call):
    return "{% for c in m.tool_calls or [] %}" + call + "{% endfor %}"


_OBJECT = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
HERMES = (
    _HEAD
    + _RESULT
    + _calls(f"{{% if not loop.first %}}\n{{% endif %}}<tool_call>\n{_OBJECT}\n</tool_call>")
    + _TAIL
)
BARE = _HEAD + _RESULT + _calls(_OBJECT.replace('arguments"', 'parameters"')) + _TAIL
LISTED = (
    _HEAD
    + _RESULT
    + "{% if m.tool_calls %}[TOOL_CALLS] [{% endif %}"
    + _calls(f"{{% if not loop.first %}}, {{% endif %}}{_OBJECT}")
    + "{% if m.tool_calls %}]{% endif %}"
    + _TAIL
)
PYTHON = (
    _HEAD
    + "{% if m.tool_calls %}<|tool_call_start|>\n```python\n"
    + _calls(
        "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
        "{% if not loop.first %},{% endif %}"
        "{{ k }}={{ v | tojson }}{% endfor %})\n"
    )
    + "```\n<|tool_call_end|>\n{% endif %}"
    + _RESULT
    + _TAIL
)
XML = (
    _HEAD
    + _RESULT
    + _calls(
        "<function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>{{ v }}"
        "</parameter>{% endfor %}</function>"
    )
    + _TAIL
)
NO_TOOLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_RESULTS = HERMES.replace(_RESULT, "{% if m.role != 'tool' %}{{ m.content }}{% endif %}")
