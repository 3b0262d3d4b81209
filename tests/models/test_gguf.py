"""GGUF files: the embedded model's tokenizer and weights against transformers', small files of our
own writing, damaged files.
"""

import json
import re
import unicodedata

import gguf as gguf_library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gguf import CORPUS, SPECIALS, small_vocabulary, write_gguf

from ip_jax.models import gguf, hf
from ip_jax.models.gguf_file import open_gguf
from ip_jax.models.hub import resolve

NUMBERS = [
    "0",
    "7",
    "12345",
    "3.14159",
    "1,000,000",
    "-5",
    "1e-6",
    "0x1F",
    "2024-01-31",
    "½",
    "²³",
    "Ⅷ",
    "٣٤",
    "४२",
    "①",
    "GCD(140, 84)",
]
WORDS = [
    "I've",
    "DON'T",
    "they'll",
    "it's'd",
    "naïve",
    "Ångström",
    "привет",
    "東京都",
    "한국어",
    "مرحبا",
    "हिन्दी",
    "🙂👍🏽",
    "e\u0301",
    "\u200b",
    "ﬁ",
    "__init__",
    "a_b",
    "x²",
]
GAPS = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n ",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    ", ",
    "...",
    "?!",
]
CODE = [
    *CORPUS,
    "for i in range(10):\n\tprint(i ** 2)  # 2\n",
    "<|im_start|>user\nhi 5<|im_end|>\n<|im_start|>assistant\n",
    "<file_sep><|endoftext|> 1",
]


def varied_texts() -> list[str]:
    rng = np.random.default_rng(0)
    mixed = [
        "".join(rng.choice(NUMBERS + WORDS) + rng.choice(GAPS) for _ in range(6))
        for _ in range(200)
    ]
    return [
        *NUMBERS,
        *WORDS,
        *GAPS,
        *CODE,
        *mixed,
        *(gap + number for gap in GAPS for number in NUMBERS),
        "",
    ]


@pytest.fixture(scope="module")
def theirs():
    """transformers' own reading of the embedded file. It does not know the splitter 'smollm' and
    takes GPT-2's.
    """
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    path = resolve("smollm2-135m-instruct").path
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def reference_ids(theirs, specials: list[str], text: str) -> list[int]:
    """'smollm' in llama.cpp: each number character stands alone, GPT-2's splitting in between. So:
    transformers on every piece.
    """
    is_special = re.compile("(" + "|".join(map(re.escape, specials)) + ")")
    pieces = [
        part
        for chunk in is_special.split(text)
        for part in ([chunk] if chunk in specials else _split_numbers(chunk))
    ]
    return [token for piece in pieces if piece for token in theirs(piece).input_ids]


def _split_numbers(text: str) -> list[str]:
    pieces = [""]
    for character in text:
        pieces[-1:] = (
            [pieces[-1], character, ""] if is_number(character) else [pieces[-1] + character]
        )
    return pieces


def is_number(character: str) -> bool:
    """Unicode's categories Nd, Nl and No. (str.isnumeric also counts ideographs, which are letters
    to the tokenizer.)
    """
    return unicodedata.category(character)[0] == "N"


def test_tokenizer_equals_transformers(smollm2, theirs):
    specials = list(smollm2.tokenizer.get_added_vocab())
    assert specials == list(theirs.get_added_vocab()) and len(specials) == 17
    texts = varied_texts()
    assert len(set(texts)) >= 400
    for text in texts:
        assert smollm2.tokenizer(text).input_ids == reference_ids(theirs, specials, text), repr(
            text
        )


def test_tokenizer_equals_transformers_as_it_is_without_numbers(smollm2, theirs):
    texts = [text for text in varied_texts() if not any(map(is_number, text))]
    assert len(texts) > 30
    assert [smollm2.tokenizer(text).input_ids for text in texts] == [
        theirs(text).input_ids for text in texts
    ]


def test_tokenizer_on_the_published_texts(smollm2, theirs, data_dir):
    texts = set()
    for file in sorted((data_dir / "gcd_sycophancy").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines()[:150]:
            texts |= {message["content"] for message in json.loads(line)["messages"]}
    assert len(texts) > 400
    for text in texts:
        ids = smollm2.tokenizer(text).input_ids
        assert ids == reference_ids(theirs, SPECIALS, text), text
        assert smollm2.tokenizer.decode(ids) == text


def test_special_tokens_and_chat_template(smollm2, theirs):
    ours = smollm2.tokenizer
    for role in (
        "bos_token_id",
        "eos_token_id",
        "unk_token_id",
        "pad_token_id",
        "chat_template",
        "vocab_size",
    ):
        assert getattr(ours, role) == getattr(theirs, role), role
    messages = [
        {"role": "system", "content": "Be 1 brief."},
        {"role": "user", "content": "Hi\n\n2"},
        {"role": "assistant", "content": "Yes."},
    ]
    for turns in (messages, messages[1:], messages[:2]):
        assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(
            turns, tokenize=False
        )
    assert ours.decode(ours("a<|im_end|>b").input_ids, skip_special_tokens=True) == "ab"


def test_config_of_the_embedded_model(smollm2):
    """The published config.json of HuggingFaceTB/SmolLM2-135M-Instruct."""
    config = smollm2.config
    assert (config.family, config.vocab_size, config.d_model, config.d_ff, config.n_layers) == (
        "llama",
        49152,
        576,
        1536,
        30,
    )
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.attention[0].rope.theta, config.max_positions, config.tied_embeddings) == (
        100000.0,
        8192,
        True,
    )
    assert config.norm_eps == pytest.approx(1e-5)


@pytest.mark.slow
def test_weights_equal_transformers(smollm2):
    """All 272 tensors of transformers' own dequantisation, q and k back in Hugging Face's row
    order.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    path = resolve("smollm2-135m-instruct").path
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert len(theirs) == 272
    _assert_params(smollm2.params, theirs)


def _assert_params(params, theirs: dict[str, np.ndarray], atol: float = 1e-6):
    places = 0
    for path, array in jax.tree.leaves_with_path(params):
        path = tuple(key.key for key in path)
        for layer in range(len(array)) if path[0] == "layers" else [None]:
            one = np.asarray(array if layer is None else array[layer], np.float32)
            name = hf.hf_name(path, layer)
            np.testing.assert_allclose(
                one if path == ("embed",) else one.T, theirs[name], rtol=0, atol=atol, err_msg=name
            )
            places += 1
    assert places == len(theirs)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def tiny(request):
    """A small random model of each family: transformers' config and state dict."""
    torch = pytest.importorskip("torch")
    import transformers

    sizes = dict(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    extra = {"llama": {"head_dim": 32}, "qwen2": {}, "qwen3": {"head_dim": 32}}[request.param]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(request.param, **sizes | extra)
    )
    torch.manual_seed(0)
    return model.config, {
        name: torch.randn_like(parameter).numpy() for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1"])
def test_small_files_of_every_family(tiny, kind, tmp_path):
    """Untied head, qkv biases, norms of heads and heads * head_dim != width included; rounding
    within the quantisation's own step.
    """
    config, weights = tiny
    file = open_gguf(write_gguf(tmp_path / "tiny.gguf", config, weights, kind=kind))
    read = gguf.read_config(file)
    assert (read.family, read.tied_embeddings, read.qkv_bias) == (
        config.model_type,
        False,
        config.model_type == "qwen2",
    )
    assert read == hf.from_hf_config(
        config.to_dict()
        | {
            "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
            "rms_norm_eps": read.norm_eps,
        }
    )
    params = gguf.read_params(file, read, jnp.float32)
    step = {
        "F32": 0,
        "F16": 2e-3,
        "BF16": 2e-2,
        "Q8_0": 2e-2,
        "Q4_1": 0.35,
        "Q4_0": 0.6,
        "Q5_1": 0.2,
    }[kind]
    _assert_params(params, weights, atol=step)
    if kind == "F32":
        halved = gguf.read_params(file, read, jnp.bfloat16)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), halved, params
        )


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_splitters_equal_transformers(tiny, pre, tmp_path):
    """On a vocabulary learned across word boundaries, so that another way of splitting gives other
    ids.
    """
    from transformers import AutoTokenizer

    config, weights = tiny
    path = write_gguf(tmp_path / "tiny.gguf", config, weights, pre=pre)
    ours, theirs = (
        gguf.read_tokenizer(open_gguf(path)),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name),
    )
    texts = [text for text in varied_texts() if text == unicodedata.normalize("NFC", text)]
    # llama.cpp adds it for this splitter unless the file says otherwise
    bos = [1] if pre == "llama-bpe" else []
    for text in texts:
        assert ours(text).input_ids == bos + theirs(text, add_special_tokens=False).input_ids, repr(
            text
        )
    if pre == "qwen2":
        # Qwen2Tokenizer normalises to NFC
        assert ours("e\u0301").input_ids == ours("\u00e9").input_ids


def test_splitters_differ_from_each_other(tiny, tmp_path):
    """The comparison above would catch a mix-up: no two splitters agree on these texts."""
    config, weights = tiny
    ids = {}
    for pre in gguf.SPLITTERS:
        file = open_gguf(write_gguf(tmp_path / f"{pre}.gguf", config, weights, pre=pre))
        ids[pre] = str(
            [
                gguf.read_tokenizer(file)(text, add_special_tokens=False).input_ids
                for text in varied_texts()
            ]
        )
    assert len(set(ids.values())) == len(gguf.SPLITTERS)


def test_damaged_files(tiny, tmp_path):
    """Cut anywhere, or not GGUF at all: one sentence that names the file, never another
    exception.
    """
    config, weights = tiny
    whole = write_gguf(tmp_path / "whole.gguf", config, weights).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [
        0,
        3,
        4,
        7,
        20,
        100,
        999,
        5000,
        len(whole) // 2,
        len(whole) - 5000,
        len(whole) - 64,
    ]:
        cut.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"cut\.gguf is not a complete GGUF file .*; fetch it again\."
        ) as error:
            open_gguf(cut)
        assert "\n" not in str(error.value)
    cut.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ValueError, match=r"cut\.gguf is not a complete GGUF file"):
        open_gguf(cut)


def test_a_file_is_read_again_only_when_it_has_changed(tiny, tmp_path):
    config, weights = tiny
    path = write_gguf(tmp_path / "m.gguf", config, weights)
    first = open_gguf(path)
    assert open_gguf(str(path)) is first
    write_gguf(path, config, weights, pre="smollm")
    assert (
        open_gguf(path).metadata["tokenizer.ggml.pre"]
        == "smollm"
        != first.metadata["tokenizer.ggml.pre"]
    )


def test_refused_contents(tiny, tmp_path):
    config, weights = tiny
    path = tmp_path / "odd.gguf"

    def opened(pre="gpt-2", changes=None, without=""):
        kept = {name: array for name, array in weights.items() if name != without}
        return open_gguf(write_gguf(path, config, kept, pre=pre, changes=changes))

    with pytest.raises(
        ValueError,
        match=(
            r"odd\.gguf.*splits text as 'chatglm-bpe'; supported is kind 'gpt2' with gpt-2, smollm"
        ),
    ):
        gguf.read_tokenizer(opened(pre="chatglm-bpe"))
    with pytest.raises(ValueError, match=r"odd\.gguf uses scaled rope"):
        gguf.read_config(opened(changes={f"{config.model_type}.rope.scaling.type": "yarn"}))
    file = opened(without="model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ValueError, match=r"odd\.gguf has no tensor 'blk\.1\.ffn_down\.weight'"):
        gguf.read_params(file, gguf.read_config(file), jnp.float32)


def test_unsupported_architecture(tmp_path):
    writer = gguf_library.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "other.gguf")
    with pytest.raises(
        ValueError,
        match=(
            r"other\.gguf holds the architecture 'mamba'.*supported in GGUF files are llama, qwen2"
        ),
    ):
        gguf.read_config(file)
    with pytest.raises(
        ValueError, match=r"other\.gguf lacks the metadata 'tokenizer\.ggml\.model'"
    ):
        gguf.read_tokenizer(file)


def test_unreadable_quantisation(tiny, tmp_path, monkeypatch):
    """Kinds that the library knows by name but cannot dequantise (here taken from its table) are
    refused by name.
    """
    config, weights = tiny
    file = open_gguf(write_gguf(tmp_path / "q.gguf", config, weights, kind="Q8_0"))
    monkeypatch.delitem(gguf_library.quants._type_traits, gguf_library.GGMLQuantizationType.Q8_0)
    with pytest.raises(
        ValueError,
        match=(
            r"q\.gguf: the tensor token_embd\.weight is stored as Q8_0, which the gguf library"
            r" cannot read"
        ),
    ):
        gguf.read_params(file, gguf.read_config(file), jnp.float32)


def test_small_vocabulary_is_one():
    tokens, merges = small_vocabulary()
    assert len(tokens) == 400 and len(merges) > 50
