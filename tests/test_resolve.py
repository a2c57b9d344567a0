"""Every way to name a model; the GGUF file is written here from a tiny random Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rarefy.checkpoint import resolve as resolve_module
from rarefy.checkpoint.gguf_import import file_sha256, import_gguf
from rarefy.checkpoint.resolve import resolve
from rarefy.errors import RarefyError

BYTES = sorted(ByteLevel.alphabet())
VOCAB = ["<unk>", "<s>", "</s>", "<eot>", *BYTES, "ĠĠ"]
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    return model.half().float()  # weights that float16 holds exactly


def interleaved(weight, heads):
    """GGUF stores the two rotary halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_tensors(writer, model):
    for name, tensor in model.state_dict().items():
        weight = tensor
        if name.startswith("model.layers."):
            _, _, block, inner = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{block}.{NAMES[inner]}.weight"
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(inner)
            weight = interleaved(tensor, heads) if heads else tensor
        elif name == "lm_head.weight":
            continue
        else:
            target = {"model.norm.weight": "output_norm.weight"}.get(name, "token_embd.weight")
        writer.add_tensor(target, weight.numpy())


def write_gguf(path, model, *, add_bos=False, pre="smollm", architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("apache-2.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCAB)
    writer.add_token_types([3 if token.startswith("<") and token != "<" else 1 for token in VOCAB])
    writer.add_token_merges(["Ġ Ġ"])
    for kind, token in {"bos": 1, "eos": 2, "unk": 0, "eot": 3}.items():
        getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)
    write_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_imported_gguf_computes_the_same_logits(tmp_path):
    model = tiny_llama()
    out = import_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_imported_gguf_is_a_plain_tied_float16_checkpoint(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama())
    out = import_gguf(file, tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {w.dtype for w in weights.values()} == {torch.float16}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    source = json.loads((out / "source.json").read_text())
    assert (source["file"], source["sha256"]) == ("m.gguf", file_sha256(file))
    assert "apache-2.0" in (out / "LICENSE_NOTE.txt").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


@pytest.mark.parametrize("add_bos", [False, True])
def test_imported_tokenizer_behaves_as_declared(tmp_path, add_bos):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama(), add_bos=add_bos)
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(file, tmp_path / "out"))
    ids = tokenizer("a  1")["input_ids"]
    # A digit stands alone, so that both spaces before it are one token.
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>"] * add_bos + ["a", "ĠĠ", "1"]
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<s>x</s>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_other_pre_tokenizers_are_left_alone(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama(), pre="gpt-2")
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(file, tmp_path / "out"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  1")["input_ids"]) == ["a", "Ġ", "Ġ", "1"]


def test_bad_gguf_files_are_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RarefyError, match="does not exist"):
        import_gguf(tmp_path / "none.gguf", out)
    for name, content in {"text": b"not a model, only text", "empty": b""}.items():
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(content)
        with pytest.raises(RarefyError, match="not a complete GGUF file"):
            import_gguf(bad, out)
    whole = write_gguf(tmp_path / "m.gguf", tiny_llama())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-20000])
    with pytest.raises(RarefyError, match="not a complete GGUF file"):
        import_gguf(cut, out)
    strange = write_gguf(tmp_path / "s.gguf", tiny_llama(), architecture="strange")
    with pytest.raises(RarefyError, match="transformers cannot read"):
        import_gguf(strange, out)
    with pytest.raises(RarefyError, match="exists already"):
        import_gguf(whole, tmp_path)
    assert not out.exists()


def test_weights_beyond_float16_are_refused(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    with pytest.raises(RarefyError, match=r"model\.norm\.weight .* float16"):
        import_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")


def test_a_gguf_is_imported_once_by_content(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "a.gguf", tiny_llama())
    first = resolve(file)
    assert (first / "config.json").is_file()
    (tmp_path / "b.gguf").write_bytes(file.read_bytes())
    monkeypatch.setattr(resolve_module, "import_gguf", None)
    assert resolve(str(tmp_path / "b.gguf")) == first


def test_two_at_once_make_it_once(tmp_path):
    made = []
    together = threading.Barrier(2)

    def make(out):
        made.append(out)
        threading.Event().wait(0.2)
        out.mkdir()

    def ask():
        together.wait()
        resolve_module._made_once(tmp_path / "deep" / "x", make)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [tmp_path / "deep" / "x"]


def folder_with(path, *names, index=None):
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    if index is not None:
        (path / "model.safetensors.index.json").write_text(index)
    return path


def test_a_complete_folder_is_itself(tmp_path):
    whole = folder_with(tmp_path / "a", "config.json", "model.safetensors", "pytorch_model.bin")
    assert resolve(whole) == resolve(str(whole)) == whole
    index = json.dumps({"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}})
    names = ("config.json", "one.safetensors", "two.safetensors")
    assert resolve(folder_with(tmp_path / "b", *names, index=index)) == tmp_path / "b"


@pytest.mark.parametrize(
    ("names", "index", "message"),
    [
        (["model.safetensors"], None, "has no config.json"),
        (["config.json", "pytorch_model.bin"], None, "pytorch_model.bin, a pickle.*convert"),
        (["config.json"], None, r"has no \*\.safetensors"),
        (
            ["config.json", "one.safetensors"],
            '{"weight_map": {"x": "two.safetensors"}}',
            "lacks two",
        ),
        (["config.json", "one.safetensors"], "{", "not a safetensors index"),
    ],
)
def test_incomplete_folders_are_refused(tmp_path, names, index, message):
    with pytest.raises(RarefyError, match=message):
        resolve(folder_with(tmp_path / "m", *names, index=index))


def test_what_looks_like_a_path_never_reaches_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    missing = tmp_path / "none"
    for ref in (missing, str(missing), "./none", "../none", "~/none", "a/b/c", "none.gguf", "a/"):
        with pytest.raises(RarefyError, match="there is no model folder or file at"):
            resolve(ref)
    (tmp_path / "file.bin").write_text("")
    with pytest.raises(RarefyError, match="is not a model"):
        resolve(tmp_path / "file.bin")


def test_hub_failures_are_told_apart(monkeypatch):
    def failing(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    failing(HFValidationError("bad"))
    with pytest.raises(RarefyError, match="'demoo' is neither a local folder nor a model"):
        resolve("demoo")
    failing(LocalEntryNotFoundError("offline"))
    with pytest.raises(RarefyError, match="the hub cannot be reached"):
        resolve("someone/model")


def test_offline_mode_of_the_hub_is_one_sentence(tmp_path):
    ask = "from rarefy.checkpoint.resolve import resolve; resolve('someone/model')"
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=variables, capture_output=True, text=True, check=False
    )
    assert "RarefyError: 'someone/model' is not a local folder, and the hub" in done.stderr


def test_a_hub_model_is_checked_like_a_folder(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder_with(tmp_path / "m", "config.json"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RarefyError, match=r"has no \*\.safetensors"):
        resolve("someone/model")
    assert asked["name"] == "someone/model"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


@pytest.mark.slow
@pytest.mark.network
def test_demo_answers_a_question(monkeypatch):
    monkeypatch.undo()  # the shared cache, where the model may be already
    folder = resolve("demo")
    assert resolve("demo") == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer)
    assert int(answer[-1]) == tokenizer.eos_token_id
    assert tokenizer("hello")["input_ids"][0] != tokenizer.bos_token_id
