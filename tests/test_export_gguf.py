"""GGUF files: another reader computes what we compute, and refusals come before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFReader
from gguf.quants import dequantize
from tiny import VOCAB, save_tiny
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.checkpoint.load import load_model
from rarefy.checkpoint.reader import Checkpoint
from rarefy.data.tokens import TokenSet
from rarefy.engine.skeleton import Skeleton
from rarefy.errors import RarefyError
from rarefy.export import gguf as exporter
from rarefy.export import imatrix as statistic
from rarefy.export.gguf_model import gguf_model
from rarefy.export.imatrix import measure, read_imatrix, write_imatrix
from rarefy.export.mixes import fitting, mix_named, type_for

if TYPE_CHECKING:
    from pathlib import Path

IDS = (torch.arange(2 * 24) * 37 % 251).view(2, 24)


def compressed(folder: Path, family: str, scheme: dict[str, Any], **options: Any) -> Path:
    """A tiny model of the family, its linears rounded to nearest in one format."""
    dense = save_tiny(family, folder / "dense", **options)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stages": [{"solver": "nearest", "schemes": {"*": scheme}}]}))
    return rarefy.compress(dense, recipe, folder / "packed").path


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def read_elsewhere(file: Path) -> torch.Tensor:
    """Logits in transformers, which knows nothing of our names and orders."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return logits_of(model.eval())


def types_in(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_another_reader_computes_the_same(family: str, tmp_path: Path) -> None:
    # transformers' reader knows no window, and takes the heads of Qwen3 to be 128 wide.
    options = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 128}}
    dense = save_tiny(family, tmp_path / "dense", **options.get(family, {}))
    file = rarefy.export(dense, tmp_path / "m.gguf", format="gguf", type="F32")
    torch.testing.assert_close(
        read_elsewhere(file), logits_of(load_model(dense)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ({"format": "ggml", "type": "q4_1"}, "Q4_1"),
        ({"format": "ggml", "type": "iq4_nl"}, "IQ4_NL"),
        ({"format": "int", "bits": 4, "group": 32, "symmetric": True}, "Q4_0"),
        ({"format": "int", "bits": 3, "group": 32}, "Q4_0"),
        ({"format": "int", "bits": 8, "symmetric": True}, "Q8_0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_compressed_matrices_keep_their_codes(
    scheme: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    packed = compressed(tmp_path, "llama", scheme)
    said: list[str] = []
    file = rarefy.export(packed, tmp_path / "m.gguf", format="gguf", say=said.append)
    found = types_in(file)
    assert {found["blk.2.attn_q.weight"], found["blk.0.ffn_down.weight"]} == {kind}
    assert found["token_embd.weight"] == "F16"
    assert found["output_norm.weight"] == "F32"
    assert "21 matrices keep their codes, exactly" in said
    ours, theirs = logits_of(load_model(packed)), read_elsewhere(file)
    assert float((ours - theirs).norm() / ours.norm()) < 2e-3  # the embedding is float16
    again = rarefy.export(packed, tmp_path / "n.gguf", format="gguf", type=kind)
    assert types_in(again)["blk.2.attn_q.weight"] == kind
    assert np.array_equal(tensor(file, "blk.1.attn_k.weight"), tensor(again, "blk.1.attn_k.weight"))


def tensor(file: Path, name: str) -> np.ndarray:
    return np.array(next(t.data for t in GGUFReader(file).tensors if t.name == name))


def test_rounded_minima_are_told(tmp_path: Path) -> None:
    packed = compressed(tmp_path, "llama", {"format": "int", "bits": 4, "group": 32})
    said: list[str] = []
    rarefy.export(packed, tmp_path / "m.gguf", format="gguf", say=said.append)
    assert any("float16 moved values by up to" in text for text in said)


def test_a_mix_gives_every_tensor_its_type(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 288}
    dense = save_tiny("llama", tmp_path / "dense", **wide)
    file = rarefy.export(dense, tmp_path / "m.gguf", format="gguf", type="q4_k_m", embedding="Q5_1")
    found = types_in(file)
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    assert found["blk.2.attn_v.weight"] == "Q6_K"
    assert found["blk.0.ffn_down.weight"] == "Q5_0"  # 288 columns: what stands in for Q4_K
    assert found["token_embd.weight"] == found["output.weight"] == "Q5_1"
    reader = GGUFReader(file)
    assert reader.get_field("general.file_type").contents() == 15
    assert reader.get_field("llama.rope.freq_base").contents() == 10000.0
    read = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    W = Checkpoint(dense).read("model.layers.1.mlp.up_proj.weight")
    values = torch.from_numpy(dequantize(read.data, read.tensor_type))
    assert float((values - W).norm() / W.norm()) < 0.08


def test_the_mixes_of_a_thirty_block_model() -> None:
    _, mix = mix_named("Q4_K")
    high = [
        i for i in range(30) if type_for(mix, f"blk.{i}.attn_v.weight", 30, head=False) != "q4_k"
    ]
    assert high == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    _, small = mix_named("Q3_K_M")
    down = [type_for(small, f"blk.{i}.ffn_down.weight", 30, head=False) for i in (0, 1, 2, 3, 5)]
    assert down == ["q5_k", "q4_k", "q4_k", "q4_k", "q4_k"]
    values = [type_for(small, f"blk.{i}.attn_v.weight", 30, head=False) for i in (0, 1, 2, 29)]
    assert values == ["q5_k", "q5_k", "q4_k", "q4_k"]
    assert type_for(small, "blk.0.ffn_down.weight", 2, head=False) == "q4_k"
    assert type_for(small, "output.weight", 30, head=True) == "q6_k"
    assert [fitting(n, 576) for n in ("q4_k", "q6_k", "q3_k", "q4_0", "f16")] == [
        "q5_0", "q8_0", "iq4_nl", "q4_0", "f16"
    ]  # fmt: skip
    assert fitting("q4_0", 100) == "f16"


def test_the_importance_is_the_mean_square_of_each_input(tmp_path: Path) -> None:
    dense = save_tiny("qwen2", tmp_path / "dense")
    skeleton = Skeleton(Checkpoint(dense), torch.device("cpu"), factored=False)
    names = gguf_model(skeleton).names
    found = measure(skeleton, names, IDS, lambda *_: None)
    model, seen = load_model(dense), {}
    for path in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.__setitem__(path, args[0].square().mean((0, 1)))
        )
    logits_of(model)
    expected = {
        "blk.1.attn_k.weight": seen["model.layers.1.self_attn.k_proj"],
        "blk.0.ffn_down.weight": seen["model.layers.0.mlp.down_proj"],
        "token_embd.weight": seen["lm_head"],
    }
    for name, mean in expected.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-6)
    assert len(found) == 2 * 7 + 1
    tokens = TokenSet(IDS, torch.zeros(2), "some text", "", "")
    write_imatrix(tmp_path / "i.gguf", found, tokens)
    again = read_imatrix(tmp_path / "i.gguf")
    assert found.keys() == again.keys()
    assert all(torch.allclose(found[name], again[name], rtol=1e-6) for name in found)


def test_a_corpus_as_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistic, "ROWS", 2)
    monkeypatch.setattr(statistic, "LENGTH", 32)
    dense = save_tiny("llama", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("a stone that rolls gathers no moss, " * 20)
    for name, imatrix in (("plain", None), ("weighted", text)):
        rarefy.export(dense, tmp_path / f"{name}.gguf", format="gguf", type="Q4_0", imatrix=imatrix)
    kept = tmp_path / "weighted.imatrix.gguf"
    again = rarefy.export(dense, tmp_path / "again.gguf", format="gguf", type="Q4_0", imatrix=kept)
    part = "blk.0.ffn_down.weight"
    weighted = tensor(tmp_path / "weighted.gguf", part)
    assert not np.array_equal(weighted, tensor(tmp_path / "plain.gguf", part))
    assert np.array_equal(weighted, tensor(again, part))


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    real, calls = exporter.encode, []

    def broken(kind: str, weight: torch.Tensor, importance: Any = None) -> Any:
        calls.append(kind)
        if len(calls) == 9:
            raise RuntimeError("stop")
        return real(kind, weight, importance)

    monkeypatch.setattr(exporter, "encode", broken)
    with pytest.raises(RuntimeError, match="stop"):
        rarefy.export(dense, tmp_path / "m.gguf", format="gguf", type="Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("refuse") / "dense")


REFUSED = [
    ({"out": "folder"}, "ends in .gguf"),
    ({"type": "Q4_K_X"}, "no GGUF type 'Q4_K_X'; did you mean 'Q4_K_"),
    ({"imatrix": "nowhere.gguf"}, "no importance matrix at nowhere.gguf"),
    ({"imatrix": "nothing"}, "no corpus called 'nothing'"),
    ({"dtype": "float16"}, "--dtype belongs to dense, not to gguf"),
]


@pytest.mark.parametrize(
    ("options", "why"), REFUSED, ids=lambda x: "" if isinstance(x, str) else str(x)
)
def test_senseless_orders_are_refused(
    options: dict[str, str], why: str, dense: Path, tmp_path: Path
) -> None:
    order = {"out": "m.gguf"} | options
    out = tmp_path / order.pop("out")
    with pytest.raises(RarefyError, match=why):
        rarefy.export(dense, out, format="gguf", **order)
    assert not list(tmp_path.iterdir())


def test_an_importance_matrix_of_another_model_is_refused(dense: Path, tmp_path: Path) -> None:
    tokens = TokenSet(IDS, torch.zeros(2), "some text", "", "")
    for content, why in (
        ({"blk.9.attn_q.weight": torch.ones(64)}, "says nothing of blk.0.attn_q.weight"),
        ({"token_embd.weight": torch.ones(32)}, "32 columns for token_embd.weight, which has 64"),
    ):
        file = tmp_path / f"{len(content)}{why[:3].strip()}.gguf"
        write_imatrix(file, content, tokens)
        with pytest.raises(RarefyError, match=why):
            rarefy.export(dense, tmp_path / "m.gguf", format="gguf", type="Q4_0", imatrix=file)
    with pytest.raises(RarefyError, match="not an importance matrix"):
        model = rarefy.export(dense, tmp_path / "f.gguf", format="gguf")
        rarefy.export(dense, tmp_path / "m.gguf", format="gguf", type="Q4_0", imatrix=model)


def test_models_that_gguf_cannot_express_are_refused(tmp_path: Path) -> None:
    gpt = save_tiny("gpt2", tmp_path / "gpt2")
    rounded = compressed(
        tmp_path, "llama", {"format": "int", "bits": 8, "input": {"format": "int", "bits": 8}}
    )
    scaled = save_tiny(
        "llama",
        tmp_path / "scaled",
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    for folder, why in (
        (gpt, "not of gpt2"),
        (rounded, r"is rounded \(a8 token\), which GGUF cannot say"),
        (scaled, "rope scaling of type 'dynamic'"),
    ):
        with pytest.raises(RarefyError, match=why):
            rarefy.export(folder, tmp_path / "m.gguf", format="gguf")


def test_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    file = folder / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"use_regex":true', '"use_regex":false').replace(
        '"use_regex": true', '"use_regex": false'))  # fmt: skip
    assert file.read_text() != text
    with pytest.raises(RarefyError, match="no GGUF name for"):
        rarefy.export(folder, tmp_path / "m.gguf", format="gguf")


def test_vocabulary_and_special_tokens(dense: Path, tmp_path: Path) -> None:
    reader = GGUFReader(rarefy.export(dense, tmp_path / "m.gguf", format="gguf"))
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == VOCAB
    assert tokens[256:260] == ["<s>", "</s>", "<pad>", "[PAD259]"]
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[255:260] == [1, 3, 3, 3, 5]
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 257
