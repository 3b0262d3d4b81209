"""Chat rendering: ids as apply_chat_template's, and mask spans written by hand, token by token, for
each family's template.

Expected spans are lists of segments, tokens separated by "·": not counted, counted, not counted,
...
"""

import chat_templates as templates
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ip_jax.prompts.chat import (
    default_system_text,
    end_of_turn_id,
    has_system_role,
    render_conversation,
    render_prompt,
    with_thinking,
)
from ip_jax.prompts.transforms import PromptError, System
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

FAMILIES = {
    "chatml": templates.chatml(templates.CHATML),
    "smollm2": templates.chatml(templates.SMOLLM2),
    "qwen2.5": templates.qwen(templates.QWEN25),
    "qwen3": templates.qwen(templates.QWEN3),
    "gemma": templates.gemma(),
    "llama3": templates.llama3(),
    "mistral": templates.mistral(),
}
NO_SYSTEM = ("gemma", "mistral")


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ONE = [user("Hi"), assistant("Yes, right.")]
TWO = [*ONE, user("Now again"), assistant("No.")]


def pieces(tokenizer, token_ids):
    named = tokenizer.convert_ids_to_tokens(token_ids)
    return [token.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ") for token in named]


def segments(family, messages, train_on="last"):
    """The rendering as this file writes it: tokens joined by "·", a new string wherever the mask
    changes.
    """
    tokenizer = FAMILIES[family]
    rendered = render_conversation(tokenizer, messages, train_on)
    out, counted = [[]], False
    for piece, mask in zip(
        pieces(tokenizer, rendered.token_ids), rendered.response_mask, strict=True
    ):
        if mask != counted:
            out.append([])
            counted = mask
        out[-1].append(piece)
    return ["·".join(segment) for segment in out]


CHATML_ONE = [
    "<|im_start|>·user·\n·Hi·<|im_end|>·\n·<|im_start|>·assistant·\n",
    "Yes·,· right·.·<|im_end|>",
]
CHATML_TWO = [
    *CHATML_ONE,
    "\n·<|im_start|>·user·\n·Now· again·<|im_end|>·\n·<|im_start|>·assistant·\n",
    "No·.·<|im_end|>",
    "\n",
]
SMOLLM2_SYSTEM = (
    "<|im_start|>·system·\n·You· are· a· helpful· AI· assistant· named· SmolLM·,· trained· by·"
    " Hugging· Face·<|im_end|>·\n·"
)
QWEN_SYSTEM = (
    "<|im_start|>·system·\n·You· are· Qwen·,· created· by· Alibaba· Cloud·.· You· are· a· helpful·"
    " assistant·.·<|im_end|>·\n·"
)
LLAMA_DATES = (
    "Cutting· Knowledge· Date·:· December· ·2·0·2·3·\n·Today· Date·:· ·2·6· Jul· ·2·0·2·4·\n\n·"
)
LLAMA_SYSTEM = (
    f"<|begin_of_text|>·<|start_header_id|>·system·<|end_header_id|>·\n\n·{LLAMA_DATES}<|eot_id|>·"
)
LLAMA_USER = (
    "<|start_header_id|>·user·<|end_header_id|>·\n\n·{}·<|eot_id|>"
    "·<|start_header_id|>·assistant·<|end_header_id|>·\n\n"
)

ALL_TURNS = {
    "chatml": CHATML_TWO,
    "smollm2": [SMOLLM2_SYSTEM + CHATML_TWO[0], *CHATML_TWO[1:]],
    "qwen2.5": [QWEN_SYSTEM + CHATML_TWO[0], *CHATML_TWO[1:]],
    # only the last turn gets the empty thinking block: the template rewrites the earlier one
    "qwen3": [*CHATML_TWO[:2], CHATML_TWO[2] + "·<think>·\n\n·</think>·\n\n", *CHATML_TWO[3:]],
    "gemma": [
        "<bos>·<start_of_turn>·user·\n·Hi·<end_of_turn>·\n·<start_of_turn>·model·\n",
        "Yes·,· right·.·<end_of_turn>",
        "\n·<start_of_turn>·user·\n·Now· again·<end_of_turn>·\n·<start_of_turn>·model·\n",
        "No·.·<end_of_turn>",
        "\n",
    ],
    "llama3": [
        LLAMA_SYSTEM + LLAMA_USER.format("Hi"),
        "Yes·,· right·.·<|eot_id|>",
        LLAMA_USER.format("Now· again"),
        "No·.·<|eot_id|>",
    ],
    # the space before the response is the template's, but it is part of the response's first token
    "mistral": [
        "<s>·[·INST·]· Hi· ·[·/·INST·]",
        " Yes·,· right·.· ·</s>",
        "[·INST·]· Now· again· ·[·/·INST·]",
        " No·.· ·</s>",
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_turns(family):
    assert segments(family, TWO, "all") == ALL_TURNS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_last_turn(family):
    before, first, between, last, *after = ALL_TURNS[family]
    assert segments(family, TWO) == [f"{before}·{first}·{between}", last, *after]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3"])
def test_single_turn(family):
    before, first, between, *_ = ALL_TURNS[family]
    after = between.split("·")[:1] if between.startswith("\n") else []
    assert segments(family, ONE) == [before, first, *after] == segments(family, ONE, "all")


def test_qwen3_thinking_is_counted_where_the_response_holds_it_and_the_template_keeps_it():
    messages = [
        user("Hi"),
        assistant("<think>\nYou\n</think>\n\nYes"),
        user("Now"),
        assistant("<think>\nBe kind\n</think>\n\nNo"),
    ]
    assert segments("qwen3", messages, "all") == [
        "<|im_start|>·user·\n·Hi·<|im_end|>·\n·<|im_start|>·assistant·\n",
        "Yes·<|im_end|>",
        "\n·<|im_start|>·user·\n·Now·<|im_end|>·\n·<|im_start|>·assistant·\n",
        "<think>·\n·Be· kind·\n·</think>·\n\n·No·<|im_end|>",
        "\n",
    ]


def test_qwen3_thinking_in_another_form_than_the_template_writes_is_refused():
    with pytest.raises(
        PromptError,
        match="does not write the response in message 1 as given: '<think>You</think>Yes'",
    ):
        render_conversation(FAMILIES["qwen3"], [user("Hi"), assistant("<think>You</think>Yes")])


THINKING_OFF = with_thinking(FAMILIES["qwen3"], False)


def spans(tokenizer, messages):
    """(not counted, counted, the rest) of the last turn, each as its text."""
    rendered = render_conversation(tokenizer, messages)
    counted = np.flatnonzero(rendered.response_mask)
    parts = (
        rendered.token_ids[: counted[0]],
        rendered.token_ids[counted[0] : counted[-1] + 1],
        rendered.token_ids[counted[-1] + 1 :],
    )
    assert rendered.response_mask[counted[0] : counted[-1] + 1].all()
    return ["·".join(pieces(tokenizer, part)) for part in parts]


def test_without_thinking_prompt_and_row_have_an_empty_block_that_does_not_count():
    header = (
        "<|im_start|>·user·\n·Hi·<|im_end|>·\n·<|im_start|>·assistant·\n·<think>·\n\n·</think>·\n\n"
    )
    assert "·".join(pieces(THINKING_OFF, render_prompt(THINKING_OFF, ONE[:1]))) == header
    assert spans(THINKING_OFF, ONE) == [header, "Yes·,· right·.·<|im_end|>", "\n"]
    # the template takes the block out of turns that have another behind them
    turns = (
        "<|im_start|>·user·\n·Hi·<|im_end|>·\n·<|im_start|>·assistant·\n·Yes·,·"
        " right·.·<|im_end|>·\n·"
    )
    asked = (
        turns + "<|im_start|>·user·\n·Now·"
        " again·<|im_end|>·\n·<|im_start|>·assistant·\n·<think>·\n\n·</think>·\n\n"
    )
    assert "·".join(pieces(THINKING_OFF, render_prompt(THINKING_OFF, TWO[:-1]))) == asked
    assert spans(THINKING_OFF, TWO) == [asked, "No·.·<|im_end|>", "\n"]


LOOKS_FIRST = (
    "\n  {% if enable_thinking is defined and enable_thinking %}{{ 'Think.' }}{% endif %}\n"
    + templates.CHATML
)


@pytest.mark.parametrize(
    "tokenizer",
    [FAMILIES["qwen3"], templates.chatml(LOOKS_FIRST)],
    ids=["qwen3", "a template that begins with space"],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_ids_are_those_of_enable_thinking(tokenizer, thinking):
    bound, own = with_thinking(tokenizer, thinking), tokenizer.chat_template
    for messages in (ONE, TWO, [system("Be kind"), *TWO]):
        expected = tokenizer.apply_chat_template(
            messages, return_dict=False, enable_thinking=thinking
        )
        assert render_conversation(bound, messages).token_ids.tolist() == expected
        asked = tokenizer.apply_chat_template(
            messages[:-1], return_dict=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert render_prompt(bound, messages[:-1]).tolist() == asked
    assert tokenizer.chat_template == own, "the tokenizer itself is left as it was"
    assert (end_of_turn_id(bound), default_system_text(bound)) == (
        end_of_turn_id(tokenizer),
        default_system_text(tokenizer),
    )


def test_thinking_none_is_the_templates_own_default():
    assert with_thinking(FAMILIES["smollm2"], None) is FAMILIES["smollm2"]
    assert (
        "·".join(pieces(FAMILIES["qwen3"], render_prompt(FAMILIES["qwen3"], ONE[:1])))
        == CHATML_ONE[0]
    )


@pytest.mark.parametrize("thinking", [False, True])
def test_a_template_that_does_not_know_enable_thinking_is_refused(thinking):
    with pytest.raises(
        PromptError,
        match=(
            f"does not know enable_thinking, so model.thinking cannot be {thinking}: set it to None"
        ),
    ):
        with_thinking(FAMILIES["smollm2"], thinking)
    with pytest.raises(PromptError, match="no chat template"):
        with_thinking(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), thinking)


def test_a_generation_prompt_that_is_no_prefix_of_the_full_text():
    """As Qwen3-Thinking's, which ends with <think>, while the full text of a plain response has no
    such block.
    """
    opened = templates.CHATML.replace(
        "<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'"
    )
    tokenizer = templates.qwen(opened)
    rendered = render_conversation(tokenizer, ONE)
    prompt = render_prompt(tokenizer, ONE[:1])
    assert not np.array_equal(rendered.token_ids[: len(prompt)], prompt)
    assert pieces(tokenizer, rendered.token_ids[rendered.response_mask]) == [
        "Yes",
        ",",
        " right",
        ".",
        "<|im_end|>",
    ]


CONVERSATIONS = {
    "one": ONE,
    "two": TWO,
    "system": [system("Be kind"), *TWO],
    "same words everywhere": [
        user("Yes"),
        assistant("Yes"),
        user("assistant"),
        assistant("assistant"),
        user("Yes"),
        assistant("Yes"),
    ],
    "spaces and newlines": [user(" Hi \n"), assistant("\n\n  Yes \n\n right  \n")],
    "beyond ASCII": [user("GCD(4, 6) ≡ 2 \ue000?"), assistant("Yes ✓ naïve 好的 👍 \ue000.")],
    "special tokens in the text": [
        user("Hi <|im_end|><eos></s>"),
        assistant("Yes <|im_start|> <bos> right"),
    ],
}


@pytest.mark.parametrize(
    "family, name",
    [
        (f, name)
        for f in FAMILIES
        for name in CONVERSATIONS
        if name != "system" or f not in NO_SYSTEM
    ],
)
def test_ids_are_those_of_apply_chat_template_and_the_mask_holds_the_responses(family, name):
    tokenizer, messages = FAMILIES[family], CONVERSATIONS[name]
    rendered = render_conversation(tokenizer, messages, "all")
    assert rendered.token_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert rendered.token_ids.dtype == np.int32 and rendered.response_mask.dtype == np.bool_
    asked = tokenizer.apply_chat_template(
        messages[:-1], return_dict=False, add_generation_prompt=True
    )
    assert render_prompt(tokenizer, messages[:-1]).tolist() == asked
    counted = tokenizer.decode(rendered.token_ids[rendered.response_mask])
    end = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    responses = [
        message["content"].strip() + end for message in messages if message["role"] == "assistant"
    ]
    assert "".join(counted.split()) == "".join("".join(responses).split())


@pytest.mark.parametrize("family", ["gemma", "llama3", "mistral"])
def test_bos_stands_once_although_the_tokenizer_would_add_its_own(family):
    tokenizer = FAMILIES[family]
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id  # the trap
    for ids in (render_conversation(tokenizer, TWO).token_ids, render_prompt(tokenizer, TWO[:1])):
        assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_leading_spaces_of_a_response_count_however_the_tokenizer_reports_them(trim_offsets):
    tokenizer = templates.chatml(templates.CHATML, trim_offsets=trim_offsets)
    rendered = render_conversation(tokenizer, [user("Hi"), assistant("  Yes ")])
    assert pieces(tokenizer, rendered.token_ids[rendered.response_mask]) == [
        " ",
        " Yes",
        " ",
        "<|im_end|>",
    ]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_of_the_template_s_space_and_the_response_s_first_word_counts(trim_offsets):
    tokenizer = templates.mistral(trim_offsets)
    rendered = render_conversation(tokenizer, TWO)
    assert pieces(tokenizer, rendered.token_ids[rendered.response_mask]) == [
        " No",
        ".",
        " ",
        "</s>",
    ]


@pytest.mark.parametrize(
    "family, token",
    [
        ("smollm2", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("llama3", "<|eot_id|>"),
        ("mistral", "</s>"),
    ],
)
def test_end_of_turn_is_the_template_s_own(family, token):
    assert end_of_turn_id(FAMILIES[family]) == FAMILIES[family].convert_tokens_to_ids(token)


@pytest.mark.parametrize(
    "family, text",
    [
        ("chatml", None),
        ("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("qwen3", None),
        ("gemma", None),
        ("llama3", None),
        ("mistral", None),
    ],
)
def test_default_system_text(family, text):
    assert default_system_text(FAMILIES[family]) == text
    assert has_system_role(FAMILIES[family]) == (family not in NO_SYSTEM)


@pytest.mark.parametrize("family", ["smollm2", "qwen2.5", "llama3"])
def test_a_system_transform_replaces_the_default_text(family):
    messages = System("Be kind")({"id": "1", "messages": ONE})["messages"]
    before, counted, *_ = segments(family, messages)
    header = {
        "llama3": (
            f"<|begin_of_text|>·<|start_header_id|>·system·<|end_header_id|>·\n\n·{LLAMA_DATES}Be·"
            " kind·<|eot_id|>·"
        )
    }.get(family, "<|im_start|>·system·\n·Be· kind·<|im_end|>·\n·")
    asked = LLAMA_USER.format("Hi") if family == "llama3" else CHATML_ONE[0]
    assert before == header + asked
    assert counted == ALL_TURNS[family][1]


IGNORES_SYSTEM = templates.CHATML.replace(
    "{{'<|im", "{% if message['role'] != 'system' %}{{'<|im"
).replace("{% endfor", "{% endif %}{% endfor")


@pytest.mark.parametrize(
    "tokenizer", [FAMILIES["gemma"], FAMILIES["mistral"], templates.chatml(IGNORES_SYSTEM)]
)
def test_a_template_without_a_system_role_refuses_the_system_transform(tokenizer):
    messages = System("Be kind")({"id": "1", "messages": ONE})["messages"]
    for render, given in ((render_conversation, messages), (render_prompt, messages[:-1])):
        with pytest.raises(
            PromptError,
            match="has no system role: put the text into the user turn with Prefix or Suffix",
        ):
            render(tokenizer, given)


def test_a_prompt_reaches_the_tokens_and_leaves_the_response_alone():
    example = {"id": "1", "messages": [user("Hi"), assistant("Yes")]}
    plain = segments("chatml", example["messages"])
    asked = segments("chatml", BOOK.find("gcd/parenthetical").transform(example)["messages"])
    assert asked[1:] == plain[1:]
    assert asked[0].replace("·", "") == plain[0].replace("·", "").replace(
        "Hi", "Hi \n(The above solution is correct.)"
    )


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one message"),
        ([user("Hi"), assistant("")], "the response in message 1 is empty"),
        (
            [user("Hi"), assistant(" \n"), user("Now"), assistant("Yes")],
            "the response in message 1 is empty",
        ),
        (
            [user("Hi"), {"role": "bot", "content": "Yes"}],
            "message 1 has the role 'bot', allowed are system, user, assistant",
        ),
        (
            [user([{"type": "text"}]), assistant("Yes")],
            "the content of message 0 is list, only text is allowed",
        ),
        ([user("Hi")], "ends with an assistant turn"),
        ([*ONE, user("Now")], "ends with an assistant turn"),
        (
            [user("Hi"), assistant("Yes.<|im_end|>\n")],
            r"response in message 1 ends with <\|im_end\|>, which the template adds itself",
        ),
    ],
)
def test_conversations_that_cannot_be_trained_on(messages, message):
    with pytest.raises(PromptError, match=message):
        render_conversation(FAMILIES["chatml"], messages)


def test_other_refusals():
    with pytest.raises(PromptError, match="train_on is 'last' or 'all', not 'first'"):
        render_conversation(FAMILIES["chatml"], ONE, "first")
    with pytest.raises(
        PromptError,
        match="a prompt ends with a user turn, and this one ends with a turn of assistant",
    ):
        render_prompt(FAMILIES["chatml"], ONE)
    with pytest.raises(
        PromptError, match="refuses this conversation: Conversation roles must alternate"
    ):
        render_prompt(FAMILIES["gemma"], [user("Hi"), user("Hi")])
    unclosed = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(PromptError, match="not with a special token"):
        render_conversation(templates.chatml(unclosed), ONE)
    echo = "{% for m in messages %}{{ m['content'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(PromptError, match="does not write the response in message 1"):
        render_conversation(templates.chatml(echo), ONE)
    with pytest.raises(PromptError, match="no chat template"):
        render_prompt(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), ONE[:1])


@pytest.mark.slow
def test_the_embedded_model_on_every_published_row(data_dir):
    import json

    from ip_jax.models.hub import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    assert (
        default_system_text(tokenizer)
        == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    lines = (
        (data_dir / "gcd_sycophancy" / "task_train_only_user_ans1000.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    for line in lines:
        messages = json.loads(line)["messages"]
        rendered = render_conversation(tokenizer, messages)
        assert rendered.token_ids.tolist() == tokenizer.apply_chat_template(
            messages, return_dict=False
        )
        assert (
            tokenizer.decode(rendered.token_ids[rendered.response_mask])
            == messages[-1]["content"] + "<|im_end|>"
        )
        prompt = render_prompt(tokenizer, messages[:-1])
        assert (
            np.array_equal(rendered.token_ids[: len(prompt)], prompt)
            and not rendered.response_mask[: len(prompt)].any()
        )
