"""Small chat templates, in the styles of well-known ones, that leave out or double parts of a chat."""

from __future__ import annotations

LLAMA31_PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Knows no tool calls, no tools, no reasoning and no parts: it would print a list as Python does."""

CHATML_JSON_CALLS = (
    "{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Encodes arguments as JSON, so that arguments that are JSON text already come out encoded twice."""

DEEPSEEK_TEXT_CALLS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' and message['content'] is none %}{{ '<|Assistant|>' }}"
    "{% for tool in message['tool_calls'] %}{{ tool['function']['name'] + '\n```json\n' }}"
    "{{ '' + tool['function']['arguments'] + '\n```' }}{% endfor %}{{ eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Assistant|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'tool' %}{{ '<|tool_output|>' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
"""Wants arguments as text and null content beside calls, whose text it leaves out."""

GEMMA_PARTS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|turn|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] | trim }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
"""Reads parts as well as text."""

XML_CALLS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}{{ '<function=' + call.function.name + '>' }}"
    "{% for name, value in call.function.arguments.items() %}"
    "{{ '<parameter=' + name + '>' }}{{ value if value is string else value | tojson }}{{ '</parameter>' }}"
    "{% endfor %}{{ '</function>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes calls in XML."""

FIRST_CALL_ONLY = CHATML_JSON_CALLS.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
NO_TOOL_RESULTS = CHATML_JSON_CALLS.replace(
    "{%- for message in messages %}", "{%- for message in messages if message.role != 'tool' %}"
)
NO_SYSTEM = CHATML_JSON_CALLS.replace(
    "{%- for message in messages %}", "{%- for message in messages if message.role != 'system' %}"
)
DEVELOPER_IGNORED = CHATML_JSON_CALLS.replace(
    "{%- for message in messages %}", "{%- for message in messages if message.role != 'developer' %}"
)
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y, %H:%M') + '<|im_end|>\n' }}" + CHATML_JSON_CALLS
ENDS = {LLAMA31_PLAIN: "<|eot_id|>", DEEPSEEK_TEXT_CALLS: "</s>", GEMMA_PARTS: "<|end|>"}
