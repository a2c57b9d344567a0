"""The quantized cache of keys and values: codes, windows, bytes, its interface, damage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import save_tiny, tiny
from torch.nn import functional as F
from transformers import DynamicCache
from typer.testing import CliRunner

from rarefy.cli import app
from rarefy.data.tokens import TokenSet
from rarefy.errors import RarefyError
from rarefy.evaluate.distances import compare_logits, summarise
from rarefy.evaluate.incremental import read_incrementally
from rarefy.formats.kv import Coded, KVFormat
from rarefy.formats.packing import unpack
from rarefy.runtime.kv_cache import KiviLayer, KVCache, kv_cache, stored_bytes

if TYPE_CHECKING:
    from pathlib import Path

FORM = KVFormat(bits=4, group=8, residual=16)
PER = ("channel", "token")


def states(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of two rows and three heads, [2, 3, T, 32]."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 3, tokens, 32, generator=g) for _ in range(2))
    return keys + 5, values


def filled(form: KVFormat, keys: torch.Tensor, values: torch.Tensor, step: int) -> KiviLayer:
    layer = KiviLayer(form)
    for at in range(0, keys.shape[2], step):
        layer.update(keys[:, :, at : at + step], values[:, :, at : at + step])
    return layer


def codes(layer: KiviLayer) -> list[torch.Tensor]:
    return [
        tensor
        for old in (layer.old_keys, layer.old_values)
        for tensor in (old.words, old.scale, old.low)
    ]


def window_of(ids: torch.Tensor) -> TokenSet:
    return TokenSet(ids, torch.arange(len(ids)), "test", "", "")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_do_not_depend_on_how_tokens_arrive(bits: int) -> None:
    form = KVFormat(bits=bits, group=8, residual=16)
    given = states(61)
    one, some, once = (filled(form, *given, step) for step in (1, 7, 61))
    assert once.old_keys.tokens == 48
    assert once.old_values.tokens == 45
    for other in (some, once):
        for a, b in zip(codes(one), codes(other), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_appending_never_changes_old_codes() -> None:
    keys, values = states(70)
    layer, before = KiviLayer(FORM), None
    for at in range(70):
        layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        now = codes(layer)
        if before is not None:
            for old, new in zip(before, now, strict=True):
                assert torch.equal(old, new[:, :, : old.shape[2]])
        before = [tensor.clone() for tensor in now]
    assert layer.old_values.tokens == 54


def test_the_prompt_is_read_exactly_and_then_its_codes_are_met() -> None:
    keys, values = states(61)
    layer = KiviLayer(FORM)
    first = layer.update(keys[:, :, :60], values[:, :, :60])
    assert torch.equal(first[0], keys[:, :, :60])
    assert torch.equal(first[1], values[:, :, :60])
    k, v = layer.update(keys[:, :, 60:], values[:, :, 60:])
    assert torch.equal(k[:, :, 48:], keys[:, :, 48:])
    assert torch.equal(v[:, :, 44:], values[:, :, 44:])
    assert torch.equal(k[:, :, :48], Coded.encode(keys[:, :, :48], FORM, "channel").decode(k.dtype))
    assert torch.equal(v[:, :, :44], Coded.encode(values[:, :, :44], FORM, "token").decode(v.dtype))
    assert not torch.equal(k[:, :, :48], keys[:, :, :48])
    assert not torch.equal(v[:, :, :44], values[:, :, :44])


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_every_number_lies_within_half_a_step(bits: int, per: str, shift: float) -> None:
    x = states(64)[1] * torch.logspace(-2, 2, 32) + shift
    coded = Coded.encode(x, KVFormat(bits=bits, group=16, residual=16), per)
    shape = (2, 3, 4, 16, 32) if per == "channel" else (2, 3, 64, 2, 16)
    error = (coded.decode(torch.float32) - x).abs().reshape(shape)
    assert (error <= coded.scale.float() * 0.5 + x.abs().max() * 1e-6).all()
    used = unpack(coded.words, bits, 32).reshape(shape)
    inner = 3 if per == "channel" else 4
    assert (used.amax(inner) == (1 << bits) - 1).float().mean() > 0.95


def test_groups_without_a_range_and_numbers_that_are_none() -> None:
    x = torch.full((1, 1, 8, 8), 1.7)
    x[..., 3] = 0.0
    for per in PER:
        back = Coded.encode(x, KVFormat(group=8, residual=8), per).decode(torch.float32)
        torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    x[0, 0, 0, 0] = float("nan")
    back = Coded.encode(x, KVFormat(group=8, residual=8), "channel").decode(torch.float32)
    assert back[..., 0].isnan().all()
    assert back[..., 1:].isfinite().all()


@pytest.mark.parametrize("tokens", [5, 16, 17, 61, 96])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_declared(bits: int, tokens: int, dtype: torch.dtype) -> None:
    form = KVFormat(bits=bits, group=8, residual=16)
    layer = filled(form, *(x.to(dtype) for x in states(tokens)), 3)
    tensors = [*codes(layer), layer.keys, layer.values]
    held = sum(t.untyped_storage().nbytes() for t in tensors)
    assert held == layer.nbytes == 2 * form.layer_bytes(tokens, 3, 32, dtype.itemsize)


def test_bytes_of_a_token() -> None:
    # 2 (b + 32 / G) bits a number: KIVI's count.
    for bits, per_number in ((2, 3.0), (4, 5.0), (8, 9.0)):
        form = KVFormat(bits=bits)
        assert form.bytes_per_token(3, 64) * 8 / (2 * 3 * 64) == per_number
        grown = form.layer_bytes(512, 3, 64, 2) - form.layer_bytes(256, 3, 64, 2)
        assert grown == 256 * form.bytes_per_token(3, 64)


def test_a_loud_channel_spoils_keys_grouped_by_token_only() -> None:
    keys = states(64)[1]
    keys[..., 3] += 40
    form = KVFormat(bits=2)
    error = {per: (Coded.encode(keys, form, per).decode(keys.dtype) - keys).norm() for per in PER}
    assert error["channel"] < 0.2 * error["token"]


def test_rows_move_with_their_codes() -> None:
    keys, values = states(61)
    index = torch.tensor([1, 1, 0])
    new = (x[index][:, :, :1] for x in states(1, seed=3))
    layer = filled(FORM, keys, values, 61)
    whole = layer.update(*(torch.zeros(2, 3, 0, 32) for _ in range(2)))
    layer.batch_select_indices(index)
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    k, v = layer.update(*new)
    for got, want in zip((k, v), whole, strict=True):
        assert torch.equal(got[:, :, :61], want[torch.tensor([0, 1, 1])])
    layer.batch_repeat_interleave(2)
    again, _ = layer.update(*(torch.zeros(6, 3, 0, 32) for _ in range(2)))
    assert torch.equal(again[:, :, :61], k[:, :, :61].repeat_interleave(2, 0))


def test_cropping_the_window_leaves_no_trace() -> None:
    keys, values = states(61)
    layer = filled(FORM, keys, values, 61)
    longer = filled(FORM, keys, values, 61)
    longer.update(*states(2, seed=1))
    longer.crop(-2)
    assert longer.get_seq_length() == 61
    assert torch.equal(longer.keys, layer.keys)
    # Two values have left the window for good; they are met as their codes say.
    assert longer.values.shape[2] == layer.values.shape[2] - 2
    longer.crop(0)
    assert longer.get_seq_length() == 61


@pytest.mark.parametrize("size", [0, 3, 40, 43, 48, 50, 60])
def test_cropping_codes_keeps_what_older_tokens_are(size: int) -> None:
    keys, values = states(61)
    layer = filled(FORM, keys, values, 61)
    none = [torch.zeros(2, 3, 0, 32) for _ in range(2)]
    k, v = layer.update(*none)
    layer.crop(size - 61)
    assert layer.get_seq_length() == size
    after = layer.update(*none)
    assert torch.equal(after[0], k[:, :, :size])
    assert torch.equal(after[1], v[:, :, :size])
    layer.update(*states(40, seed=2))
    assert layer.get_seq_length() == size + 40
    with pytest.raises(ValueError, match="negated"):
        layer.crop(3)


def test_reset_and_offload() -> None:
    given = states(61)
    layer = filled(FORM, *given, 61)
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0
    layer.update(*given)
    assert all(
        torch.equal(a, b) for a, b in zip(codes(layer), codes(filled(FORM, *given, 5)), strict=True)
    )


def test_keys_are_stored_after_the_rotary_embedding() -> None:
    _, model = tiny("llama")
    cache = kv_cache(model, KVFormat(group=8, residual=16))
    with torch.no_grad():
        model(torch.full((1, 6), 65), past_key_values=cache)
    first = cache.layers[0]
    torch.testing.assert_close(first.values[:, :, 0], first.values[:, :, 5])
    assert (first.keys[:, :, 0] - first.keys[:, :, 5]).abs().max() > 0.1


def decoded(model: Any, cache: Any, ids: torch.Tensor, new: int) -> list[int]:
    """Greedy tokens by hand."""
    found = []
    with torch.no_grad():
        for _ in range(new):
            logits = model(ids, past_key_values=cache).logits
            ids = logits[:, -1:].argmax(-1)
            found.append(int(ids))
    return found


PROMPT = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [2, 4])
def test_generate_reads_the_codes(bits: int) -> None:
    _, model = tiny("llama")
    form = KVFormat(bits=bits, group=8, residual=16)
    cache = kv_cache(model, form)
    made = model.generate(PROMPT, past_key_values=cache, max_new_tokens=40, do_sample=False,
                          eos_token_id=None)[0, 40:].tolist()  # fmt: skip
    assert made == decoded(model, kv_cache(model, form), PROMPT, 40)
    assert cache.get_seq_length() == 79
    heads, width = 2, 16
    assert stored_bytes(cache) == 3 * form.layer_bytes(79, heads, width, 4)
    assert cache.bytes_per_token() == 3 * form.bytes_per_token(heads, width)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_a_window_as_long_as_the_text_changes_nothing(options: dict[str, int]) -> None:
    _, model = tiny("llama")
    plain, quantized = (
        model.generate(PROMPT, past_key_values=kv_cache(model, form), max_new_tokens=20,
                       do_sample=False, eos_token_id=None, **options)
        for form in (16, KVFormat(bits=2, group=8, residual=64))
    )  # fmt: skip
    assert torch.equal(plain, quantized)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_beams_and_look_ahead_run_over_codes(options: dict[str, int]) -> None:
    _, model = tiny("llama")
    form = KVFormat(bits=8, group=8, residual=16)
    plain, quantized = (
        model.generate(PROMPT, past_key_values=cache, max_new_tokens=12, do_sample=False,
                       eos_token_id=None, **options)
        for cache in (None, kv_cache(model, form))
    )  # fmt: skip
    assert plain.shape == quantized.shape
    assert (plain == quantized).float().mean() > 0.9


def test_sliding_layers_keep_their_own_cache() -> None:
    _, model = tiny("gemma2")
    cache = kv_cache(model, FORM)
    kinds = [isinstance(layer, KiviLayer) for layer in cache.layers]
    assert kinds == [False, True]
    ids = PROMPT.repeat(2, 1)
    with torch.no_grad():
        for at in range(40):
            got = model(ids[:, at : at + 1], past_key_values=cache).logits
        want = model(ids).logits[:, -1:]
    assert F.cosine_similarity(got, want, -1).min() > 0.99
    assert stored_bytes(cache) > 0
    with pytest.raises(RarefyError, match="no layer of full attention"):
        kv_cache(tiny("mistral")[1], 4)


def test_spellings() -> None:
    assert KVFormat.parse("4") == KVFormat.parse("kv4") == KVFormat(bits=4)
    assert KVFormat.parse("kv2-g16-r64") == KVFormat(bits=2, group=16, residual=64)
    assert KVFormat.parse("16") is None
    _, model = tiny("llama")
    assert type(kv_cache(model, "kv16")) is DynamicCache
    assert isinstance(kv_cache(model, 4), KVCache)
    for wrong in ("kv", "four", "kv1", "4-g32-r100", "kv4-r0"):
        with pytest.raises(RarefyError, match=f"'{wrong}' is no format of a cache"):
            KVFormat.parse(wrong)
    with pytest.raises(RarefyError, match="32 does not divide heads of 16 channels"):
        model(PROMPT, past_key_values=kv_cache(model, 4))
    with pytest.raises(RarefyError, match="empty"):
        kv_cache(model, 4).bytes_per_token()
    with pytest.raises(ValueError, match="keys_per"):
        KVFormat(keys_per="row")


def speaking(kappa: float = 1.0) -> Any:
    """A tiny model in which much depends on attention, with loud channels in its keys.

    The keys of one rotary pair are multiplied by kappa and the queries divided: the same function.
    """
    _, model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight *= 2
            attention.o_proj.weight *= 4
            for row in (3, 11):
                attention.k_proj.weight.view(2, 16, 64)[:, row] *= kappa
                attention.q_proj.weight.view(4, 16, 64)[:, row] /= kappa
        model.lm_head.weight *= 2
    return model


@pytest.fixture(scope="module")
def spoken() -> TokenSet:
    """Text drawn from the model itself: on it, any change of the model costs likelihood."""
    torch.manual_seed(0)
    prompts = torch.randint(0, 256, (8, 2), generator=torch.Generator().manual_seed(2))
    ids = speaking().generate(prompts, do_sample=True, top_k=0, max_new_tokens=126,
                              eos_token_id=None, pad_token_id=258)  # fmt: skip
    return window_of(ids)


FORMS = {f"kv{bits}": KVFormat(bits=bits, group=8, residual=16) for bits in (8, 4, 2)}


def test_damage_falls_with_bits(spoken: TokenSet) -> None:
    found = read_incrementally(speaking(), spoken, FORMS)
    kl = [found[name].quality.kl_mean.value for name in FORMS]
    assert kl[0] < kl[1] / 5 < kl[2] / 25
    loss = [found[name].quality.perplexity.value for name in FORMS]
    full = found["kv2"].quality.perplexity_dense.value
    assert abs(loss[0] / full - 1) < 0.01
    assert full < loss[1] < loss[2]
    for name, form in FORMS.items():
        assert found[name].bytes == 3 * form.layer_bytes(127, 2, 16, 4)
        assert found[name].bytes_full == 3 * 2 * 127 * 2 * 16 * 4


def test_the_reference_is_the_ordinary_perplexity(spoken: TokenSet) -> None:
    model = speaking()
    found = read_incrementally(model, spoken, {"kv8": FORMS["kv8"]}, step=7)["kv8"].quality
    with torch.no_grad():
        logits = model(spoken.ids).logits[:, 15:-1]
    pairs = zip(logits, spoken.ids[:, 16:], strict=True)
    want = summarise([compare_logits(p, p, ids) for p, ids in pairs], range(8))
    assert found.predictions == 8 * 112
    # The interval, too: it is over windows, so these must not be mixed up.
    for end in ("value", "low", "high"):
        got = getattr(found.perplexity_dense, end)
        assert got == pytest.approx(getattr(want.perplexity_dense, end), rel=1e-4)
    assert found.kl_mean.value > 0


def test_loud_channels_do_not_matter_to_keys_grouped_by_channel(spoken: TokenSet) -> None:
    two = FORMS["kv2"]
    forms = {"channel": two, "token": KVFormat(2, two.group, two.residual, keys_per="token")}
    soft, loud = (read_incrementally(speaking(k), spoken, forms, step=4) for k in (1.0, 32.0))
    kl = {
        (per, name): reading[per].quality.kl_mean.value
        for per in forms
        for name, reading in (("soft", soft), ("loud", loud))
    }
    assert kl["channel", "loud"] == pytest.approx(kl["channel", "soft"], rel=0.05)
    assert kl["token", "loud"] > 2 * kl["channel", "loud"]


def test_short_windows_are_refused(spoken: TokenSet) -> None:
    with pytest.raises(RarefyError, match="do not outgrow a residual window of 128"):
        read_incrementally(speaking(), spoken, {"kv4": KVFormat()})


def test_the_command_line_reads_through_a_cache(tmp_path: Path) -> None:
    folder, report = save_tiny("llama", tmp_path / "dense"), tmp_path / "report.json"
    (tmp_path / "text.txt").write_text("a red sea and a blue sky " * 40)
    command = ["evaluate", folder, "--against", folder, "--text", tmp_path / "text.txt",
               "--sequences", 3, "--length", 64, "--no-speed", "--json", report]  # fmt: skip

    def run(kv: str) -> Any:
        return CliRunner().invoke(app, [str(word) for word in (*command, "--kv", kv)])

    done = run("kv2-g8-r16")
    assert done.exit_code == 0, done.output
    assert "kv2 g8 r16" in done.output
    found = json.loads(report.read_text())
    form = KVFormat(bits=2, group=8, residual=16)
    assert found["cache"]["bytes"] == 3 * form.layer_bytes(63, 2, 16, 4)
    assert found["quality"]["kl_mean"]["value"] == 0 < found["cache"]["quality"]["kl_mean"]["value"]
    done = run("kv2.5")
    assert done.exit_code == 2
    assert "'kv2.5' is no format of a cache" in done.output


def test_chat_answers_from_codes(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "dense"))

    def answer(*options: str) -> str:
        command = ["chat", folder, "--max-tokens", "60", *options]
        done = CliRunner().invoke(app, command, input="a red sea and a blue sky\n/quit\n")
        assert done.exit_code == 0, done.output
        return done.stdout

    coded = answer("--kv", "kv2-g8-r16")
    assert answer("--kv", "kv2-g8-r128") == answer("--kv", "16") != coded
