"""Chat templates written in the styles of well-known families, with the tokens at which their teachers stop.

They have what matters for loss masks: openings, ends, places of system text and tools, and what history leaves out.
"""

# ruff: noqa: E501 - a line of a template is easier to read whole

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(
    r"<\|[^|<>'\" ]+\|>|<｜[^｜<>]+｜>|</?s>|\[/?[A-Z_]{4,}\]|</?think>|<(?:start|end)_of_turn>|<(?:bos|eos|sop)>|\[gMASK\]"
)


@dataclass(frozen=True)
class Family:
    """A template, and what an answer is in it.

    `says`: the targets of a plain answer that is the last message; `says_before`: of an earlier one, by default the
    same. `end`: the tokenizer's end of sequence; `stops`: further ends in the teacher's generation config. `pieces`: its
    tokenizer is of SentencePiece's kind, in which a space belongs to the word after it.
    """

    name: str
    template: str
    end: str
    says: str
    says_before: str = ""
    stops: tuple[str, ...] = ()
    pieces: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer with the template's special tokens, one token each."""
        made = _of_pieces(self.end) if self.pieces else _of_bytes(self.end)
        extra = {self.end, *self.stops} if self.pieces else {self.end, *self.stops, *_SPECIAL.findall(self.template)}
        made.add_special_tokens({"additional_special_tokens": sorted(extra)})
        made.chat_template = self.template
        return made


def _of_bytes(end: str) -> PreTrainedTokenizerFast:
    """Byte-level, as Llama 3's, Qwen's and most: two line ends are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", *alphabet, "ĊĊ", "Ġa"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end)


def _of_pieces(end: str) -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a space is part of the word after it, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    characters = [chr(code) for code in range(33, 127)]
    words = [f"▁{character}" for character in characters]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters, *words]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("▁", character) for character in characters]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end, unk_token="<unk>")


_NO_SYSTEM = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{%- endif %}"
_ALTERNATE = (
    "{%- for m in messages %}{%- if m.role not in ('system', 'user', 'assistant') or m.tool_calls %}"
    "{{- raise_exception('only text of user and assistant') }}{%- endif %}{%- endfor %}"
)
_SPLIT = (
    "{%- set text = m.content or '' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in text %}{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
)
_LAST = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
)
_TOOLS_FIRST = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}"
    "{%- endif %}{{- '# Tools\n' }}{%- for t in tools %}{{- t | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
)
_CALLS = (
    "{%- for c in m.tool_calls or [] %}{%- set f = c.function %}"
    "{{- '<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}\n</tool_call>' }}"
    "{%- endfor %}"
)
_RESULT = "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
_CHATML_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
_CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    + _CHATML_PROMPT
)
_QWEN25 = (
    _TOOLS_FIRST + "{%- for m in messages %}{%- if m.role == 'tool' %}" + _RESULT + "{%- elif m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' + (m.content or '') }}"
    + _CALLS
    + "{{- '<|im_end|>\n' }}{%- elif m.role == 'user' %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}" + _CHATML_PROMPT
)
_QWEN3 = (
    _LAST
    + _TOOLS_FIRST
    + "{%- for m in messages %}{%- if m.role == 'tool' %}"
    + _RESULT
    + "{%- elif m.role == 'assistant' %}"
    + _SPLIT
    + "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- text }}" + _CALLS + "{{- '<|im_end|>\n' }}{%- elif m.role == 'user' %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    + _CHATML_PROMPT
    + "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
)
_QWEN35 = (
    _LAST
    + _TOOLS_FIRST
    + "{%- for m in messages %}{%- if m.role == 'tool' %}"
    + _RESULT
    + "{%- elif m.role == 'assistant' %}"
    + _SPLIT
    + "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- text }}" + _CALLS + "{{- '<|im_end|>\n' }}{%- elif m.role == 'user' %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    + _CHATML_PROMPT
    + "{%- if add_generation_prompt %}{{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is "
    "false else '<think>\n' }}{%- endif %}"
)
_LLAMA2 = (
    _ALTERNATE + "{%- set ns = namespace(system='') %}{%- for m in messages %}{%- if m.role == 'system' %}"
    "{%- set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{%- elif m.role == 'user' %}"
    "{{- bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}{%- set ns.system = '' %}"
    "{%- else %}{{- ' ' + m.content + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
_LLAMA3 = (
    _ALTERNATE + "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_LLAMA31 = (
    "{{- bos_token }}{%- set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' }}"
    "{%- for t in tools or [] %}{{- t | tojson + '\n' }}{%- endfor %}"
    "{{- (messages[0].content | trim if messages[0].role == 'system' else '') + '<|eot_id|>' }}{%- for m in rest %}"
    "{%- if m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if m.tool_calls %}{%- set f = m.tool_calls[0].function %}"
    "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}' }}"
    "{%- else %}{{- m.content | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def _gemma(text: str, *, system: bool) -> str:
    begin = "{%- set ns = namespace(system='') %}" + ("" if system else _NO_SYSTEM)
    return (
        _ALTERNATE + begin + "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}"
        "{%- set ns.system = m.content + '\n\n' %}{%- else %}"
        "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + ns.system }}"
        "{%- set ns.system = '' %}" + text + "{{- '<end_of_turn>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
    )


_PARTS = (
    "{%- if m.content is string %}{{- m.content | trim }}{%- else %}{%- for part in m.content %}"
    "{{- part.text | trim }}{%- endfor %}{%- endif %}"
)
_MISTRAL = (
    _ALTERNATE + _NO_SYSTEM + "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '[INST] ' + m.content + ' [/INST]' }}{%- else %}{{- ANSWER + eos_token }}{%- endif %}{%- endfor %}"
)
_MISTRAL_TOOLS = (
    _LAST
    + "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{%- if tools and loop.index0 == ns.last %}"
    "{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST]' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') }}"
    "{{- m.content + '[/INST]' }}{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS][' + (m.tool_calls[0].function | tojson) + ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}"
)
_MISTRAL_V7 = (
    "{{- bos_token }}{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m.role == 'user' %}{{- '[INST]' }}" + _PARTS.replace(" | trim", "") + "{{- '[/INST]' }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{%- elif m.tool_calls %}"
    "{{- '[TOOL_CALLS]' + m.tool_calls[0].function.name + '[ARGS]' + (m.tool_calls[0].function.arguments | tojson) }}"
    "{{- eos_token }}{%- else %}" + _PARTS.replace(" | trim", "") + "{{- eos_token }}{%- endif %}{%- endfor %}"
)


def _phi(line: str, tools: str = "") -> str:
    return (
        ("" if tools else _ALTERNATE) + "{%- for m in messages %}{%- if m.tool_calls %}"
        "{{- raise_exception('no calls') }}{%- endif %}{{- '<|' + m.role + '|>"
        + line
        + "' + m.content }}"
        + tools
        + "{{- '<|end|>"
        + line
        + "' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>"
        + line
        + "' }}"
        "{%- else %}{{- eos_token }}{%- endif %}"
    )


_PHI_TOOLS = "{%- if tools and loop.first %}{{- '<|tool|>' + (tools | tojson) + '<|/tool|>' }}{%- endif %}"
_DEEPSEEK = (
    "{%- set ns = namespace(tool=false) %}{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}"
    "{{- m.content }}{%- elif m.role == 'user' %}{%- set ns.tool = false %}{{- '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'tool' %}{%- set ns.tool = true %}"
    "{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
    "{%- elif m.content is none %}{%- set f = m.tool_calls[0].function %}{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}"
    "{{- f.name + '\n```json\n' + f.arguments + '\n```<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
    "{%- else %}{{- '' if ns.tool else '<｜Assistant｜>' }}{%- set ns.tool = false %}"
    "{{- TEXT + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt and not ns.tool %}{{- PROMPT }}{%- endif %}"
)
_DEEPSEEK31 = (
    _ALTERNATE + "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}"
    "{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}{%- else %}"
    "{{- '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}"
)
_HARMONY = (
    "{{- '<|start|>system<|message|>Reasoning: medium<|end|>' }}"
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{%- if tools or messages[0].role == 'system' %}{{- '<|start|>developer<|message|>' }}"
    "{{- (messages[0].content if messages[0].role == 'system' else '') + (tools | tojson if tools else '') + '<|end|>' }}"
    "{%- endif %}{%- for m in rest %}{%- if m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|start|>functions to=assistant<|message|>' + m.content + '<|end|>' }}"
    "{%- elif m.tool_calls %}{%- set f = m.tool_calls[0].function %}{%- set later = rest[loop.index0:] | "
    "rejectattr('tool_calls') | selectattr('role', 'equalto', 'assistant') | list %}{%- if m.thinking and not later %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{- (f.arguments | tojson) + '<|call|>' }}"
    "{%- elif loop.last and not add_generation_prompt %}{%- if m.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
_GLM4 = (
    "{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\n' + (tools | tojson) }}{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}{%- elif m.tool_calls %}"
    "{%- set f = m.tool_calls[0].function %}{{- '<|assistant|>' + f.name + '\n' + (f.arguments | tojson) }}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
_GLM45 = (
    _LAST + "{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\n' + (tools | tojson) }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}"
    "{%- elif m.role == 'assistant' %}" + _SPLIT + "{{- '<|assistant|>\n<think>' }}"
    "{{- thought if loop.index0 > ns.last else '' }}{{- '</think>' }}{%- if text %}{{- '\n' + text }}{%- endif %}"
    "{%- for c in m.tool_calls or [] %}{{- '\n<tool_call>' + c.function.name + '\n' + (c.function.arguments | tojson) }}"
    "{{- '</tool_call>' }}{%- endfor %}{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '\n<think></think>' }}{%- endif %}{%- endif %}"
)
_GRANITE = (
    "{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson) + '<|end_of_text|>\n' }}"
    "{%- endif %}{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + (m.content or '') }}"
    "{%- for c in m.tool_calls or [] %}{{- '<|tool_call|>' + (c.function | tojson) }}{%- endfor %}"
    "{{- '<|end_of_text|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
_COMMAND = (
    _ALTERNATE + "{{- bos_token }}{%- for m in messages %}{{- '<|START_OF_TURN_TOKEN|>' }}"
    "{{- {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}"
    "{{- m.content | trim + '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"
)
_OLMO = (
    _ALTERNATE + "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)
_ZEPHYR = (
    _ALTERNATE + "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)
_VICUNA = (
    _ALTERNATE + "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content + '\n\n' }}"
    "{%- elif m.role == 'user' %}{{- 'USER: ' + m.content + '\n' }}"
    "{%- else %}{{- 'ASSISTANT: ' + m.content + eos_token + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)
_FALCON = (
    _ALTERNATE + "{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}{%- elif m.role == 'user' %}"
    "{{- 'User: ' + m.content }}{%- else %}{{- 'Assistant: ' + m.content }}{%- endif %}{{- '\n\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)
_NEMOTRON = _QWEN3.replace(
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}",
    "{{- '<think>\n' + thought + '\n</think>\n' if loop.index0 > ns.last and thought else '<think></think>' }}",
).replace(
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
    "{%- if add_generation_prompt %}{{- '<think></think>' if enable_thinking is false else '<think>\n' }}{%- endif %}",
)
_IM = "<|im_end|>"
_DS = "<｜end▁of▁sentence｜>"
_THOUGHT = "m.content.split('</think>')[-1].lstrip('\n')"
_NO_THINKING = {"enable_thinking": False}

FAMILIES = [
    Family("Llama 2", _LLAMA2, "</s>", " {} </s>", pieces=True),
    Family("Llama 3", _LLAMA3, "<|end_of_text|>", "{}<|eot_id|>", stops=("<|eot_id|>",)),
    Family("Llama 3.1", _LLAMA31, "<|eot_id|>", "{}<|eot_id|>", stops=("<|eom_id|>", "<|end_of_text|>")),
    Family("ChatML on a base tokenizer", _CHATML, "<|endoftext|>", "{}<|im_end|>"),
    Family("Yi", _CHATML, _IM, "{}<|im_end|>"),
    Family("InternLM 2", "{{- bos_token }}" + _CHATML, "</s>", "{}<|im_end|>", stops=(_IM,)),
    Family("Hermes, tool use", _QWEN25, _IM, "{}<|im_end|>"),
    Family("Qwen2.5", _QWEN25, _IM, "{}<|im_end|>", stops=("<|endoftext|>",)),
    Family("Qwen3", _QWEN3, _IM, "<think>\n\n</think>\n\n{}<|im_end|>", "{}<|im_end|>", stops=("<|endoftext|>",)),
    Family("Qwen3, thinking off", _QWEN3, _IM, "{}<|im_end|>", arguments=_NO_THINKING),
    Family("Qwen3.5", _QWEN35, _IM, "{}<|im_end|>"),
    Family("Qwen3.5, thinking off", _QWEN35, _IM, "{}<|im_end|>", arguments=_NO_THINKING),
    Family("SmolLM3", _QWEN3, _IM, "<think>\n\n</think>\n\n{}<|im_end|>", "{}<|im_end|>"),
    Family("Nemotron 3", _NEMOTRON, _IM, "{}<|im_end|>"),
    Family(
        "Gemma 2", _gemma("{{- m.content | trim }}", system=False), "<eos>", "{}<end_of_turn>", stops=("<end_of_turn>",)
    ),
    Family("Gemma 3", _gemma(_PARTS, system=True), "<eos>", "{}<end_of_turn>", stops=("<end_of_turn>",)),
    Family("Mistral v0.1", _MISTRAL.replace("ANSWER", "m.content"), "</s>", "{}</s>", pieces=True),
    Family("Mixtral", _MISTRAL.replace("ANSWER", "' ' + m.content"), "</s>", " {}</s>", pieces=True),
    Family("Mistral Nemo", _MISTRAL_TOOLS, "</s>", "{}</s>"),
    Family("Mistral v7", _MISTRAL_V7, "</s>", "{}</s>"),
    Family("Phi-3", _phi("\n"), "<|endoftext|>", "{}<|end|>", stops=("<|assistant|>", "<|end|>")),
    Family("Phi-3 without a generation config", _phi("\n"), "<|endoftext|>", "{}<|end|>"),
    Family("Phi-4-mini", _phi("", _PHI_TOOLS), "<|endoftext|>", "{}<|end|>", stops=("<|end|>",)),
    Family(
        "DeepSeek V3", _DEEPSEEK.replace("TEXT", "m.content").replace("PROMPT", "'<｜Assistant｜>'"), _DS, "{}" + _DS
    ),
    Family(
        "DeepSeek R1",
        _DEEPSEEK.replace("TEXT", _THOUGHT).replace("PROMPT", "'<｜Assistant｜><think>\n'"),
        _DS,
        "{}" + _DS,
    ),
    Family("DeepSeek V3.1", _DEEPSEEK31, _DS, "{}" + _DS),
    Family("DeepSeek V3.1, thinking on", _DEEPSEEK31, _DS, "{}" + _DS, arguments={"thinking": True}),
    Family(
        "GPT-OSS",
        _HARMONY,
        "<|return|>",
        "<|channel|>final<|message|>{}<|return|>",
        "<|channel|>final<|message|>{}",
        stops=("<|endoftext|>", "<|call|>"),
    ),
    Family("GLM-4", _GLM4, "<|endoftext|>", "\n{}", "\n{}<|user|>", stops=("<|user|>", "<|observation|>")),
    Family(
        "GLM-4.5",
        _GLM45,
        "<|endoftext|>",
        "\n<think></think>\n{}",
        "\n<think></think>\n{}<|user|>",
        stops=("<|user|>", "<|observation|>"),
    ),
    Family("Granite 3", _GRANITE, "<|end_of_text|>", "{}<|end_of_text|>"),
    Family("Command R", _COMMAND, "<|END_OF_TURN_TOKEN|>", "{}<|END_OF_TURN_TOKEN|>"),
    Family("OLMo 2", _OLMO, "<|endoftext|>", "{}<|endoftext|>"),
    Family("Zephyr", _ZEPHYR, "</s>", "{}</s>", pieces=True),
    Family("Vicuna", _VICUNA, "</s>", " {}</s>", pieces=True),
    Family("Falcon 3", _OLMO, "<|endoftext|>", "{}<|endoftext|>", arguments={}),
    Family("Falcon 7B", _FALCON, "<|endoftext|>", " {}\n\n"),
]
