"""Native decoding computes what transformers computes, for every model that it does not refuse."""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from operating import NINE
from tiny import save_tiny, tiny
from transformers import AutoModelForCausalLM, StaticCache

import rarefy
from rarefy.checkpoint.load import load_model
from rarefy.checkpoint.resolve import resolve
from rarefy.errors import RarefyError
from rarefy.formats.activation import IntActivation
from rarefy.formats.kv import KVFormat
from rarefy.kernels import library
from rarefy.runtime.decoder import Decoder, PlainLoop, open_loop
from rarefy.runtime.outline import FAMILIES as OUTLINED
from rarefy.runtime.packed import PackedLinear, round_inputs
from rarefy.runtime.sampling import Sampling, nucleus
from rarefy.runtime.stored import stored_model, stored_outline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

native = pytest.mark.skipif(not library.available(), reason=library.reason() or "no kernels")

IDS = [(37 * n + n * n) % 251 for n in range(48)]
READ, CLOSE = 13, 1e-5  # tokens that are read together; relative error that sums may differ by

INT4 = {"format": "int", "bits": 4, "group": 32}
ROW8 = {"format": "int", "bits": 8}
FORMATS: dict[str, list[dict[str, Any]]] = {
    "int4": [{"*": INT4}],
    "mixed": [{"*.0.*": "keep", "*down_proj": {**INT4, "bits": 2}, "*o_proj": ROW8, "*": INT4}],
    "everything": [{"model.embed_tokens": ROW8, "lm_head": ROW8, "*": {**INT4, "bits": 3}}],
    "sparse": [{"*": {"format": "sparse", "sparsity": 0.5, "scope": "matrix"}}],
    "bcq": [{"*": {"format": "bcq", "bits": 3, "group": 32}}],
    "2:4 int4": [{"*": {"format": "sparse", "kept": 2, "of": 4}}, {"*": INT4}],
    "low-rank": [{"*": {"format": "low-rank", "ratio": 0.8}}],
    "low-rank int4": [
        {"*": {"format": "low-rank", "ratio": 0.8}},
        {"*": {**INT4, "group": 8}},
    ],
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
BUILDERS = (stored_model, stored_outline)


def compressed(dense: Path, which: str, out: Path) -> Path:
    """A folder in one of the formats above."""
    stages = [{"solver": "nearest", "schemes": table} for table in FORMATS[which]]
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return rarefy.compress(dense, recipe, out).path


def decoded_model(folder: Path) -> Any:
    """The model with every matrix decoded, in float32; stock containers would round to 16 bits."""
    return load_model(rarefy.export(folder, folder.with_suffix(".plain"), dtype="float32"))


def expected(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    """transformers' logits at every position, [T, vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def error(decoder: Decoder, want: torch.Tensor) -> float:
    """Largest relative error over the positions from the first that was not read together."""
    decoder.reset()
    got = [decoder.feed(IDS[:READ]).clone()]
    got += [decoder.step(token).clone() for token in IDS[READ:]]
    want = want[READ - 1 :]
    return float(((torch.stack(got) - want).norm(dim=1) / want.norm(dim=1)).max())


@native
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_models_give_transformers_logits(family: str) -> None:
    _, model = tiny(family)
    assert error(Decoder(model), expected(model)) < CLOSE


@native
def test_biases_everywhere_count() -> None:
    _, model = tiny("llama", attention_bias=True, mlp_bias=True)
    assert error(Decoder(model), expected(model)) < CLOSE


@native
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)  # fmt: skip
def test_every_scaling_of_positions(rope: dict[str, Any]) -> None:
    _, model = tiny("llama", rope_parameters={"rope_theta": 10_000.0, **rope})
    plain = expected(tiny("llama")[1])
    want = expected(model)
    assert not torch.allclose(want, plain, rtol=1e-3) or rope["rope_type"] == "dynamic"
    assert error(Decoder(model), want) < CLOSE


@native
def test_rotation_of_a_part_of_each_head() -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    _, model = tiny("phi3", rope_parameters=rope)
    assert error(Decoder(model), expected(model)) < CLOSE


@native
@pytest.mark.parametrize("which", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_compressed_models_give_the_logits_of_their_decoded_matrices(
    family: str, which: str, tmp_path: Path
) -> None:
    dense = save_tiny(family, tmp_path / "dense", torch.bfloat16)
    folder = compressed(dense, which, tmp_path / "small")
    want = expected(decoded_model(folder))
    assert not torch.allclose(want, expected(load_model(dense)), rtol=1e-3)
    for build in BUILDERS if family in OUTLINED else (stored_model,):
        model = build(folder)
        assert error(Decoder(model), want) < CLOSE
        assert {p.dtype for p in model.parameters()} <= {torch.bfloat16, torch.float32}


def relative(found: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Error of each row in norm."""
    return (found - want).norm(dim=1) / want.norm(dim=1)


ROUNDED: dict[str, dict[str, Any]] = {
    "token": {**ROW8, "symmetric": True, "input": {"format": "int", "bits": 8}},
    "tensor": {**ROW8, "input": {"format": "int", "bits": 8, "per": "tensor", "dynamic": False}},
    "int4": {**INT4, "input": {"format": "int", "bits": 8}},
    "group": {**INT4, "input": {"format": "int", "bits": 8, "per": "group"}},
    "whole rows by group": {**ROW8, "input": {"format": "int", "bits": 8, "per": "group"}},
}


@native
@pytest.mark.parametrize("which", ROUNDED)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_inputs_are_rounded_as_the_recipe_says(family: str, which: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense")
    recipe, text = tmp_path / "r.yaml", tmp_path / "text.txt"
    table = {"*.o_proj": INT4, "*": ROUNDED[which]}
    recipe.write_text(yaml.safe_dump({"stages": [{"solver": "nearest", "schemes": table}]}))
    text.write_text("so many words are said that a few of them may repeat. " * 40)
    calibration = rarefy.Calibration(str(text), 4, 32)
    folder = rarefy.compress(dense, recipe, tmp_path / "small", calibration=calibration).path
    loop, obstacle = open_loop(folder)
    assert isinstance(loop, Decoder), obstacle
    got = [loop.feed(IDS[:READ]).clone()]
    got += [loop.step(token).clone() for token in IDS[READ:]]
    model = load_model(folder)
    want = expected(model)[READ - 1 :]
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.rounding = None
    exact = expected(model)[READ - 1 :]

    # A sum in another order may push an input over the edge between two codes, and rarely does.
    found, unrounded = relative(torch.stack(got), want), relative(exact, want)
    assert found.median() < CLOSE
    assert found.max() < 0.02
    assert unrounded.median() > 100 * found.median()


@native
@pytest.mark.parametrize("embedding", ["keep", ROW8])
def test_inputs_of_any_integers_may_be_rounded_at_opening(
    embedding: str | dict[str, Any], tmp_path: Path
) -> None:
    dense = save_tiny("llama", tmp_path / "dense", torch.bfloat16, tie_word_embeddings=True)
    recipe = tmp_path / "r.yaml"
    table = {"model.embed_tokens": embedding, "*.0.*.o_proj": "keep", "*": INT4}
    stages = [{"solver": "nearest", "schemes": table}]
    recipe.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    folder = rarefy.compress(dense, recipe, tmp_path / "small").path
    loop, obstacle = open_loop(folder, int8=True)
    assert isinstance(loop, Decoder), obstacle
    got = [loop.feed(IDS[:READ]).clone()]
    got += [loop.step(token).clone() for token in IDS[READ:]]

    model = stored_model(folder, torch.float32)
    exact = expected(model)[READ - 1 :]
    assert round_inputs(model, IntActivation(per="group")) == 3 * 7 - 1 + (embedding == ROW8)
    want = expected(model)[READ - 1 :]
    found, unrounded = relative(torch.stack(got), want), relative(exact, want)
    assert found.median() < CLOSE  # see above
    assert found.max() < 0.02
    assert unrounded.median() > 100 * found.median()


@native
def test_where_nothing_can_be_rounded_that_is_said(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RarefyError, match=r"no matrix has integers of .*leave --int8 out"):
        open_loop(dense, int8=True)
    with pytest.raises(RarefyError, match=r"the cache is .*leave --int8 out"):
        open_loop(dense, kv=KVFormat(4), int8=True)


@native
@pytest.mark.parametrize("weights", [{**ROW8, "symmetric": True}, {**ROW8, "group": 16}])
def test_outliers_are_apart_as_in_transformers(weights: dict[str, Any], tmp_path: Path) -> None:
    dense, recipe = save_tiny("llama", tmp_path / "dense"), tmp_path / "r.yaml"

    def made(threshold: float) -> Path:
        table = {"*": {**weights, "input": {"format": "llm-int8", "threshold": threshold}}}
        recipe.write_text(yaml.safe_dump({"stages": [{"solver": "nearest", "schemes": table}]}))
        return rarefy.compress(dense, recipe, tmp_path / f"{threshold}").path

    def answers(loop: Decoder | PlainLoop) -> torch.Tensor:
        # Tokens that are read together share their outliers; the last of a prompt is read alone.
        if isinstance(loop, PlainLoop):
            loop.feed(IDS[: READ - 1])
            loop.step(IDS[READ - 1])
        else:
            loop.feed(IDS[:READ])
        return torch.stack([loop.step(token).clone() for token in IDS[READ:]])

    folder = made(1.5)
    loop, obstacle = open_loop(folder)
    assert isinstance(loop, Decoder), obstacle
    want, got = answers(PlainLoop(load_model(folder))), answers(loop)
    without = answers(open_loop(made(1e9))[0])
    assert relative(got, want).median() < CLOSE
    assert relative(got, want).max() < 0.02
    assert relative(without, want).median() > 100 * CLOSE


@native
def test_other_roundings_are_left_to_transformers(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    table = {"*": {**ROW8, "input": {"format": "int", "bits": 4}}}
    recipe.write_text(yaml.safe_dump({"stages": [{"solver": "nearest", "schemes": table}]}))
    folder = rarefy.compress(save_tiny("llama", tmp_path / "d"), recipe, tmp_path / "s").path
    loop, obstacle = open_loop(folder)
    assert isinstance(loop, PlainLoop)
    assert "does not round the inputs" in obstacle


@native
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_blocks_of_different_width(family: str, tmp_path: Path) -> None:
    heads = 0.34 if family == "llama" else 0
    dense = save_tiny(family, tmp_path / "dense", **(NINE if heads else {"num_hidden_layers": 4}))
    recipe = tmp_path / "cut.yaml"
    stage = {"surgery": "llm-pruner", "heads": heads, "neurons": 0.25, "ranking": "model"}
    recipe.write_text(yaml.safe_dump({"stages": [stage | {"samples": 4, "length": 16}]}))
    text = tmp_path / "text.txt"
    text.write_text("so many words are said that a few of them may repeat. " * 40)
    folder = rarefy.compress(
        dense, recipe, tmp_path / "cut", calibration=rarefy.Calibration(str(text), 4, 32)
    ).path
    for build in BUILDERS if family in OUTLINED else (stored_model,):
        model = build(folder)
        widths = {block.mlp.down_proj.weight.shape[1] for block in model.model.layers}
        assert len(widths) > 1
        assert error(Decoder(model), expected(load_model(folder))) < CLOSE


@native
def test_halves_in_the_cache_cost_little_and_are_halves() -> None:
    _, model = tiny("llama")
    decoder = Decoder(model, cache=torch.float16)
    assert decoder.cache.bytes_per_token * 2 == Decoder(model).cache.bytes_per_token
    assert 1e-6 < error(decoder, expected(model)) < 1e-2


@native
def test_sixteen_bit_weights_stay_sixteen_bits(tmp_path: Path) -> None:
    _, model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    exact, rounded = Decoder(model), Decoder(deepcopy(model).half())
    held = exact.native.weight_bytes
    assert held == rounded.native.weight_bytes == sum(
        2 * p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n
    )  # fmt: skip
    assert error(exact, expected(model)) < CLOSE


@native
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_threads_change_nothing(family: str) -> None:
    _, model = tiny(family, intermediate_size=700)
    decoder = Decoder(model)

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        decoder.reset()
        steps = torch.stack([decoder.step(token).clone() for token in IDS])
        decoder.reset()
        return steps, decoder.feed(IDS).clone()

    alone = logits()
    torch.set_num_threads(3)
    try:
        together = logits()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together[0], alone[0])
    # Of a prompt torch computes the activation, whose last bit depends on where threads divide it.
    assert (together[1] - alone[1]).abs().max() < 1e-5 * alone[1].abs().max()


@native
def test_decoders_in_several_python_threads_do_not_meet() -> None:
    _, model = tiny("llama")
    want = Decoder(model).feed(IDS).clone()
    found: list[torch.Tensor] = []

    def work() -> None:
        torch.set_num_threads(2)
        decoder = Decoder(model)
        for _ in range(20):
            decoder.reset()
            for token in IDS:
                logits = decoder.step(token)
            found.append(logits.clone())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    torch.set_num_threads(1)
    assert len(found) == 60
    assert all(torch.allclose(logits, want, atol=1e-5) for logits in found)


@native
def test_what_is_known_is_not_read_again() -> None:
    _, model = tiny("llama")
    decoder = Decoder(model)
    fresh = {n: Decoder(model).feed(IDS[:n]).clone() for n in (20, 30)}
    decoder.feed(IDS[:20])
    held = [room[:, :20].clone() for room in decoder.cache.keys]
    assert torch.allclose(decoder.feed(IDS[:30]), fresh[30], atol=1e-5)
    kept = [room[:, :20] for room in decoder.cache.keys]
    assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
    other = [*IDS[:12], *reversed(IDS[:18])]
    assert torch.allclose(decoder.feed(other), Decoder(model).feed(other), atol=1e-5)
    assert decoder.tokens == other
    assert torch.allclose(decoder.feed(IDS[:20]), fresh[20], atol=1e-5)


@native
def test_more_tokens_than_fit_are_refused() -> None:
    _, model = tiny("llama")
    decoder = Decoder(model, capacity=20)
    decoder.feed(IDS[:20])
    with pytest.raises(RarefyError, match="20 tokens that there is room for"):
        decoder.step(1)
    with pytest.raises(RarefyError, match="no prompt"):
        decoder.feed([])


@native
def test_the_profile_counts_every_phase() -> None:
    decoder = Decoder(tiny("llama")[1])
    assert set(decoder.native.profile().values()) == {0.0}
    decoder.feed(IDS)
    shares = decoder.native.profile()
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())


@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("gpt2", {}, "its blocks are not norm, attention"),
        ("gemma2", {}, "its blocks are not norm, attention"),
        ("mixtral", {}, "its blocks are not norm, attention"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
    ],
)
def test_other_shapes_are_refused_with_a_reason(
    family: str, overrides: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path / "m", **overrides)
    loop, obstacle = open_loop(folder)
    assert isinstance(loop, PlainLoop)
    assert why in obstacle
    want = expected(load_model(folder), IDS[:20])[-1]
    assert torch.allclose(loop.feed(IDS[:20]), want, atol=1e-4)


def test_without_kernels_transformers_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "available", lambda: False)
    monkeypatch.setattr(library, "reason", lambda: "no compiler was found")
    loop, obstacle = open_loop(save_tiny("llama", tmp_path / "m"))
    assert isinstance(loop, PlainLoop)
    assert "no compiler was found" in obstacle


def loops(model: Any) -> Iterator[Decoder | PlainLoop]:
    if library.available():
        yield Decoder(model)
    yield PlainLoop(model)


def test_greedy_tokens_are_those_of_generate() -> None:
    _, model = tiny("llama")
    ids = torch.tensor([IDS[:10]])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, min_new_tokens=30,
        do_sample=False,
    )[0, 10:].tolist()  # fmt: skip
    for loop in loops(model):
        assert list(loop.stream(IDS[:10], Sampling(30))) == want
        stop = want[7]
        first = want.index(stop) + 1
        assert list(loop.stream(IDS[:10], Sampling(30, stops=frozenset({stop})))) == want[:first]


def test_draws_follow_seed_temperature_and_share() -> None:
    _, model = tiny("llama")
    for loop in loops(model):

        def draw(loop: Decoder | PlainLoop = loop, **rules: Any) -> list[int]:
            return list(loop.stream(IDS[:10], Sampling(20, **rules)))

        assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1)
        assert draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
        assert draw(temperature=1.0, top_p=1e-6) == draw()
        assert draw(temperature=1e-4) == draw()


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_the_share(
    spread: float, share: float
) -> None:
    g = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(spread * torch.randn(3000, generator=g, dtype=torch.float64), 0)
    values, tokens = nucleus(probabilities, share)
    order = probabilities.argsort(descending=True)
    count = 1
    while count < 3000 and float(probabilities[order[:count]].sum()) < share:
        count += 1
    assert abs(len(tokens) - count) <= 1  # the last bit of a sum of three thousand terms
    assert torch.equal(probabilities[tokens], values)
    assert set(tokens[: count - 1].tolist()) == set(order[: count - 1].tolist())


@pytest.mark.parametrize("rules", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_rules_are_refused(rules: dict[str, float]) -> None:
    with pytest.raises(RarefyError):
        Sampling(**rules)


@pytest.mark.parametrize("which", ["int4", "everything", "low-rank int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_stored_models_run_in_transformers(family: str, which: str, tmp_path: Path) -> None:
    if family == "gpt2" and which == "everything":
        pytest.skip("the names of this table are Llama's")
    folder = compressed(save_tiny(family, tmp_path / "dense"), which, tmp_path / "small")
    model = stored_model(folder, torch.float32)
    assert torch.allclose(expected(model), expected(decoded_model(folder)), atol=1e-4)
    packed = [m for m in model.modules() if type(m).__name__ == "PackedLinear"]
    assert packed


@pytest.mark.parametrize("which", ["int4", "everything", "2:4 int4"])
def test_packed_modules_compile_with_a_static_cache(which: str, tmp_path: Path) -> None:
    folder = compressed(save_tiny("llama", tmp_path / "dense"), which, tmp_path / "small")
    model = stored_model(folder, torch.float32)
    want = expected(model)
    cache = StaticCache(config=model.config, max_cache_len=64)
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.inference_mode():
        for start, stop in ((0, READ), *((n, n + 1) for n in range(READ, READ + 6))):
            ids = torch.tensor([IDS[start:stop]])
            places = torch.arange(start, stop).unsqueeze(0)
            out = step(input_ids=ids, position_ids=places, past_key_values=cache)
            assert torch.allclose(out.logits[0], want[start:stop], atol=1e-4)


@pytest.mark.slow
@pytest.mark.network
@native
def test_the_default_model_gives_transformers_tokens(tmp_path: Path) -> None:
    folder = compressed(resolve("demo"), "int4", tmp_path / "small")
    ids = [1, 504, 3575, 282, 4649, 314]
    for path in (resolve("demo"), folder):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        prompt = torch.tensor([ids])
        want = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, min_new_tokens=80,
            do_sample=False,
        )[0, len(ids) :].tolist()  # fmt: skip
        decoder = Decoder(stored_model(path))
        assert list(decoder.stream(ids, Sampling(80))) == want
