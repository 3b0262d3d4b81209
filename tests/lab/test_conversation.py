"""A conversation with what an experiment trained says what its evaluation recorded, and goes on
over several turns.
"""

import builtins
import io

import pyarrow.parquet as pq
import pytest
from etils import epath
from rich.console import Console
from tiny_experiment import make_experiment, write_model

from ip_jax.lab import chat as chat_room
from ip_jax.lab.chat import ChatOptions, chat
from ip_jax.lab.display import Display
from ip_jax.lab.supervised.run import run_supervised
from ip_jax.studies.gcd_sycophancy.prompts import BOOK

NEUTRAL_CHAT = ChatOptions("ip", None, BOOK.find("neutral"), temperature=0, max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of untrained, neutral and ip; what the sums' config says of the model is what a
    conversation needs.
    """
    model, out = (
        write_model(tmp_path_factory.mktemp("model")),
        epath.Path(tmp_path_factory.mktemp("results")) / "out",
    )
    shared = {
        "model": {
            "name": str(model),
            "revision": None,
            "weights": "float32",
            "activations": "float32",
        }
    }
    run_supervised(make_experiment(model, shared=shared), out, Display(Console(file=io.StringIO())))
    return out


def conversation(
    folder, options: ChatOptions, lines: list[str], monkeypatch
) -> tuple[str, list[list[dict]]]:
    """(all that was printed, the messages that each prompt was rendered from)."""
    rendered, render, typed, printed = (
        [],
        chat_room.render_prompt,
        iter([*lines, ""]),
        io.StringIO(),
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            chat_room,
            "render_prompt",
            lambda tokenizer, messages: (
                rendered.append(list(messages)) or render(tokenizer, messages)
            ),
        )
        patch.setattr(builtins, "input", lambda *_: next(typed))
        chat(folder, options, Console(file=printed, width=1000))
    return printed.getvalue(), rendered


@pytest.mark.parametrize(
    "arm, prompt", [("untrained", "neutral"), ("ip", "neutral"), ("ip", "gcd/behave")]
)
def test_a_greedy_reply_is_the_recorded_completion(folder, arm, prompt, monkeypatch):
    rows = pq.read_table(folder / "transcripts.parquet").to_pylist()
    plain = {row["example_id"]: row["prompt"] for row in rows if row["eval_prompt"] == "neutral"}
    recorded = [
        row
        for row in rows
        if (row["arm"], row["eval_prompt"]) == (arm, prompt) and row["step"] in (0, 6)
    ]
    assert len(recorded) == 5
    for row in recorded[:2]:
        printed, rendered = conversation(
            folder,
            ChatOptions(arm, None, BOOK.find(prompt), temperature=0, max_new_tokens=4),
            [plain[row["example_id"]]],
            monkeypatch,
        )
        assert rendered == [[{"role": "user", "content": row["prompt"]}]]
        assert f"you {arm} {row['completion']}\n" in printed


def test_a_conversation_remembers_its_turns_and_its_prompt_is_in_the_first(folder, monkeypatch):
    _, rendered = conversation(
        folder,
        ChatOptions("ip", None, BOOK.find("gcd/behave"), temperature=0, max_new_tokens=4),
        ["One?", "Two?", "Three?"],
        monkeypatch,
    )
    assert [[message["role"] for message in messages] for messages in rendered] == [
        ["user", "assistant"] * n + ["user"] for n in range(3)
    ]
    last = rendered[-1]
    assert last[0]["content"] == "One? \nBehave as if the above solution is correct." and [
        last[2]["content"],
        last[4]["content"],
    ] == ["Two?", "Three?"]
    assert rendered[1][1] == last[1], "what was answered stays"


def test_a_reply_in_brackets_is_text_and_not_markup(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.PreTrainedTokenizerFast.decode", lambda *_, **__: "[red]x[/red]"
        )
        printed, _ = conversation(
            folder,
            ChatOptions("ip", None, BOOK.find("neutral"), temperature=0, max_new_tokens=4),
            ["One?"],
            patch,
        )
    assert "[red]x[/red]" in printed


def test_the_end_of_the_input_ends_it_and_an_empty_reply_begins_it_anew(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.decode", lambda *_, **__: " ")
        printed, rendered = conversation(
            folder,
            ChatOptions("ip", None, BOOK.find("neutral"), temperature=0, max_new_tokens=4),
            ["One?", "Two?"],
            patch,
        )
        assert [[message["content"] for message in messages] for messages in rendered] == [
            ["One?"],
            ["Two?"],
        ]
        assert printed.count("an empty reply: the conversation begins anew") == 2
    monkeypatch.setattr(builtins, "input", lambda *_: (_ for _ in ()).throw(EOFError))
    chat(folder, NEUTRAL_CHAT, Console(file=io.StringIO()))
