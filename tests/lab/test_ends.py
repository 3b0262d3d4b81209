"""Where a completion ends: at every end token of a model, as transformers stops."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_experiment import make_experiment, make_tokenizer, write_model

from ip_jax.data.sources import SourceError
from ip_jax.lab.base_model import load_base, load_tokenizer, stop_ids
from ip_jax.lab.experiment import ModelConfig
from ip_jax.lab.inspection import system_slot
from ip_jax.models import hub
from ip_jax.models.decoder import split_decoder
from ip_jax.prompts.chat import (
    completion_text,
    end_ids,
    end_of_turn_id,
    render_conversation,
    render_prompt,
)
from ip_jax.sampling.plan import BUCKETS, buckets_up_to
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.training.sharding import make_mesh

ASKED = [{"role": "user", "content": "Is this right?"}]
TOLD = [*ASKED, {"role": "assistant", "content": "\n\nYes, it is."}]


@pytest.fixture
def tokenizer():
    """ChatML, whose answers end with <|im_end|>, of a model that ends with <|endoftext|>."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


@pytest.fixture
def base_model(tokenizer, tmp_path):
    """A model that says nothing but `eos_token`: all weights but the embedding, final norm and
    head are 0, and the head prefers that token whatever comes in.
    """
    (tmp_path / "model").mkdir()
    folder = write_model(tmp_path / "model", tokenizer=tokenizer)
    tensors = load_file(folder / "model.safetensors")
    direction = np.ones_like(tensors["model.embed_tokens.weight"][0])
    embed = np.tile(0.01 * direction, (len(tensors["model.embed_tokens.weight"]), 1))
    embed[tokenizer.eos_token_id] *= 100
    tensors = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    tensors["model.embed_tokens.weight"] = embed.astype(np.float32)
    tensors["model.norm.weight"] = direction
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_sampling_stops_where_transformers_stops(base_model):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = ModelConfig(str(base_model), weights="float32")
    ours = load_base(model, make_mesh())
    prompt = render_prompt(ours.tokenizer, ASKED)
    theirs = AutoModelForCausalLM.from_pretrained(base_model).generate(
        torch.tensor(prompt)[None],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=ours.tokenizer.eos_token_id,
        pad_token_id=0,
    )[0, len(prompt) :]
    ends = stop_ids(model, ours.tokenizer)
    assert set(ends) == {end_of_turn_id(ours.tokenizer), ours.tokenizer.eos_token_id}
    decoder = split_decoder(ours.config, ours.params)

    def sampled(stops):
        options = SamplerOptions(stop_ids=stops, slots=1, prefill_prompts=1)
        request = Request(np.asarray(prompt), example_id=0, max_new_tokens=8)
        return sample(*decoder, [[request]], options)[0][0][0]

    completion = sampled(ends)
    assert completion.token_ids.tolist() == theirs.tolist() == [ours.tokenizer.eos_token_id]
    assert completion.ended
    assert completion_text(ours.tokenizer, completion.token_ids, completion.ended) == ""
    alone = sampled((end_of_turn_id(ours.tokenizer),))
    assert len(alone.token_ids) == 8, "the template's end alone is not enough"


def test_the_models_own_files_name_further_ends(base_model, tokenizer):
    config = base_model / "generation_config.json"
    for named, expected in ((5, (5,)), ([7, 5], (7, 5)), (None, ())):
        config.write_text(json.dumps({"eos_token_id": named}))
        assert hub.end_ids(str(base_model)) == expected
    config.write_text(json.dumps({"eos_token_id": [7, 5]}))
    end, eos = end_of_turn_id(tokenizer), tokenizer.eos_token_id
    found = stop_ids(ModelConfig(str(base_model)), load_tokenizer(ModelConfig(str(base_model))))
    assert found == (end, eos, 7, 5)
    tokenizer.eos_token = None
    assert end_ids(tokenizer) == (end,)


def test_training_may_close_an_answer_with_both_ends(tokenizer):
    plain = render_conversation(tokenizer, TOLD)
    closed = render_conversation(tokenizer, TOLD, close_with_eos=True)
    assert closed.token_ids.tolist() == [*plain.token_ids.tolist(), tokenizer.eos_token_id]
    assert closed.response_mask[-1] and not plain.response_mask[-1]
    assert closed.response_mask.sum() == plain.response_mask.sum() + 2, "with the newline before it"


def test_a_response_encoded_apart_leaves_the_prompt_as_sampling_reads_it():
    """With a token for three newlines, which the header's and the response's then become."""
    tokenizer = make_tokenizer(("\n\n\n",) * 50)
    assert len(tokenizer("\n\n\n").input_ids) == 1
    asked = render_prompt(tokenizer, ASKED)
    together = render_conversation(tokenizer, TOLD)
    apart = render_conversation(tokenizer, TOLD, encode_apart=True)
    assert not np.array_equal(together.token_ids[: len(asked)], asked)
    np.testing.assert_array_equal(apart.token_ids[: len(asked)], asked)
    assert not apart.response_mask[: len(asked)].any() and apart.response_mask[len(asked)]
    assert tokenizer.decode(apart.token_ids) == tokenizer.decode(together.token_ids)


def test_prompts_may_be_as_long_as_the_models_positions():
    assert buckets_up_to(1024) == BUCKETS and BUCKETS[-1] == 2048
    assert buckets_up_to(9000) == (*BUCKETS, 4096, 8192, 16384)


def test_the_system_slot_is_named(tokenizer):
    experiment = make_experiment("nowhere")
    assert system_slot(experiment, tokenizer) == "absent: neither rows nor template set one"
    rows = experiment.training["user_right"]
    for text, said in (
        ("Be kind.", "set by the rows: 'Be kind.'"),
        ("", "empty, set so by the rows"),
    ):
        system = [{"role": "system", "content": text}]
        changed = [row | {"messages": [*system, *row["messages"]]} for row in rows]
        assert (
            system_slot(make_experiment("n", training={"user_right": changed}), tokenizer) == said
        )
    default = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    )
    tokenizer.chat_template = default + tokenizer.chat_template
    assert system_slot(experiment, tokenizer) == "the template's default text: 'Be good.'"


def test_rows_of_one_id_are_refused():
    experiment = make_experiment("nowhere")
    rows = [*experiment.training["user_right"], experiment.training["user_right"][2]]
    with pytest.raises(SourceError, match="rows of user_right: rows 3 and 11 have the same id"):
        make_experiment("nowhere", training={"user_right": rows})
