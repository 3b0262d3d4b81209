"""Chat templates as the models ship them (branches for tools left out), and small tokenizers of
each family's kind.
"""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{"
    " '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
    " Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)

QWEN25 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') !="
    " (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate"
    " user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{%"
    " set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{"
    " '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0"
    " % 2 == 0) %}{{ raise_exception('Conversation roles must alternate"
    " user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST]"
    " ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' +"
    " message['content'] + ' ' + eos_token }}{% else %}{{ raise_exception('Only user and assistant"
    " roles are supported!') }}{% endif %}{% endfor %}"
)

GPT2_SPLIT = Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
LLAMA3_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (  # an earlier word wins where two would share letters
    "SmolLM helpful AI named trained by Hugging Face Qwen created Alibaba Cloud Cutting Knowledge"
    " Date December Today Jul INST system user assistant model You are a right Yes No Hi Thanks Be"
    " kind Now again Sure"
).split()


def _bpe(alphabet: list[str], space: str, newline: str, **options) -> models.BPE:
    """A BPE model in which each of WORDS, alone or after a space, and two newlines merge to one
    token, and nothing else.
    """
    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    merges = list(dict.fromkeys(merges)) + [(space, word) for word in WORDS] + [(newline, newline)]
    vocab = dict.fromkeys([*alphabet, *(left + right for left, right in merges)])
    return models.BPE(
        vocab={token: index for index, token in enumerate(vocab)}, merges=merges, **options
    )


def byte_level(
    template: str,
    specials: list[str],
    split: Regex = GPT2_SPLIT,
    trim_offsets: bool = True,
    **names,
):
    """As GPT-2, SmolLM2, Qwen2.5 and Llama-3: bytes, words with a leading space, runs of newlines.

    `bos_token` in `names` is added by the tokenizer itself too, as Llama-3's does: the template's
    must stay the only one.
    """
    tokenizer = Tokenizer(_bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ", "Ċ"))
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), byte_pieces]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(
        tokenizer, template, specials, [processors.ByteLevel(trim_offsets=trim_offsets)], names
    )


def sentence_pieces(template: str, specials: list[str], **names):
    """As Gemma: spaces become "▁", unknown characters fall back to bytes, no regular expression
    splits the text.
    """
    alphabet = [*(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁", "\n"]
    tokenizer = Tokenizer(_bpe(alphabet, "▁", "\n", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finish(tokenizer, template, specials, [], names)


def _finish(
    tokenizer: Tokenizer, template: str, specials: list[str], steps: list, names: dict
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    if "bos_token" in names:
        bos = names["bos_token"]
        steps.append(
            processors.TemplateProcessing(
                f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        )
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def chatml(template: str, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    return byte_level(
        template,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        trim_offsets=trim_offsets,
        eos_token="<|im_end|>",
    )


def qwen(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(
        template,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        LLAMA3_SPLIT,
        trim_offsets=False,
        eos_token="<|im_end|>",
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # in Qwen3 they are added, but not special
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    return sentence_pieces(GEMMA, specials, bos_token="<bos>", eos_token="<eos>")


def llama3() -> PreTrainedTokenizerFast:
    specials = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return byte_level(LLAMA31, specials, LLAMA3_SPLIT, trim_offsets=False, **names)


def mistral(trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    return byte_level(
        MISTRAL, ["<s>", "</s>"], trim_offsets=trim_offsets, bos_token="<s>", eos_token="</s>"
    )
