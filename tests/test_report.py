"""The page, the card and the tables say what the report says, and nothing gets out of them."""

from __future__ import annotations

import copy
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from rarefy.evaluate.bootstrap import Estimate
from rarefy.evaluate.distances import TokenDistances, summarise
from rarefy.evaluate.footprint import Footprint
from rarefy.evaluate.run import Evaluation, Protocol
from rarefy.evaluate.speed import Speed
from rarefy.report import plots, words
from rarefy.report.card import card
from rarefy.report.compare import (
    caption,
    comparison_markdown,
    comparison_rows,
    comparison_table,
    reference_row,
)
from rarefy.report.html import _beside, command, render_comparison_html, render_html

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
EVIL = '"><script>alert(1)</script><img src=x onerror=y>|`$x_1$[b]'


def _speed(decode: float) -> Speed:
    return Speed("cpu", 2, 128, 32, 1.0, 0.5, 256.0, decode, (0.5,), (decode,), 900_000_000,
                 400_000_000, "7 x Linear float32")  # fmt: skip


def _size(disk: int, bits: float | None, breakdown: dict[str, int]) -> Footprint:
    covered = 0.0 if bits is None else 1.0
    return Footprint(1, disk, disk - 100, 134_000_000, bits, bits or 16.0, 8 * disk / 134e6,
                     268e6 / disk, 268e6 / disk, covered, 0.79 * covered, breakdown)  # fmt: skip


def _nodes(bits: float) -> list[dict[str, Any]]:
    return [
        {
            "name": f"model.layers.{block}.{kind}", "kind": "linear",
            "format": f"int{bits:.0f} g64 asymmetric", "solver": "gptq", "weights": 1000,
            "bytes": int(bits * 125), "bits": bits, "error": 0.01 * (1 + block) * (1 + at),
            "seconds": 0.1,
        }
        for block in range(30)
        for at, kind in enumerate(KINDS)
    ]  # fmt: skip


def make(name: str = "smol-int4", kl: float = 0.17, bits: float = 4.25) -> dict[str, Any]:
    """A report as an evaluation would write it."""
    rng = np.random.default_rng(int(100 * bits))
    windows = []
    for _ in range(16):
        values = torch.tensor(kl * rng.lognormal(-0.9, 1.35, size=511))
        nll = torch.tensor(rng.exponential(2.85, size=511))
        agree = torch.tensor((rng.random(511) > kl).astype(float))
        delta = torch.tensor(rng.normal(-0.01, 0.07, size=511))
        windows.append(TokenDistances(values, agree, nll, nll + kl, delta))
    rest = {"embedding": 56_000_000, "other": 100_000}
    disk = int(28e6 * 2 + 106e6 * bits / 8)
    manifest = {
        "recipe": {"name": f"gptq{bits:.0f}", "stages": [{"solver": "gptq", "format": "int"}]},
        "recipe_name": name,
        "source": {"ref": "acme/smol-135m", "sha256": "a" * 64, "license": "apache-2.0"},
        "calibration": {"corpus": "web", "sequences": 128, "length": 512, "tokens": 65536,
                        "sha256": "b" * 64, "sample": "It was a dark night"},
        "seed": 0, "seconds": 212.4, "peak_memory_bytes": 1_200_000_000,
        "nodes": _nodes(bits),
        "kept": [{"name": "model.embed_tokens", "weights": 28_000_000, "bytes": 56_000_000,
                  "why": "not a linear of a block"}],
        "fallbacks": [{"node": "model.layers.3.mlp.up_proj", "what": "rounded",
                       "why": "the Gram matrix is singular"}],
    }  # fmt: skip
    evaluation = Evaluation(
        name=name,
        quant_method="rarefy",
        protocol=Protocol("acme/smol-135m", "wiki", "c" * 64, "Anarchism is a", 16, 512, 16 * 511,
                          False, "float32 on cpu", 49152),
        quality=summarise(windows, list(range(16))),
        footprint=_size(disk, bits, {"linear, compressed": disk - 56_100_000, **rest}),
        footprint_dense=_size(268_000_000, None, {"linear, kept": 211_900_000, **rest}),
        speed=_speed(21.0),
        speed_dense=_speed(14.0),
        manifest=manifest,
        versions={"rarefy": "0.1.0", "torch": "2.13.0"},
    )  # fmt: skip
    return evaluation.report()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return make()


def _without_manifest(report: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(report) | {
        "manifest": {}, "speed": None, "speed_dense": None, "quant_method": "",
    }  # fmt: skip


class _Page(HTMLParser):
    """Collects tags, attributes and text; notes tags that do not close in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _pages(report: dict[str, Any]) -> list[str]:
    return [
        render_html(report),
        render_html(_without_manifest(report)),
        render_comparison_html([report, make("rtn4", 0.3)]),
    ]


def test_pages_ask_the_network_for_nothing(report):
    for text in _pages(report):
        page = _Page(text)
        assert page.open == []
        assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
        assert "http" not in text and "url(http" not in text and "@import" not in text
        for name, value in page.attributes:
            if name in ("href", "xlink:href", "src"):
                assert value and value.startswith("#")


def test_a_malicious_name_stays_text():
    report = make(EVIL)
    report["protocol"]["against"] = report["protocol"]["text"] = EVIL
    report["manifest"]["nodes"][0]["name"] = f"model.layers.0.{EVIL}"
    report["manifest"]["recipe"]["name"] = EVIL
    for text in _pages(report):
        page = _Page(text)
        assert EVIL in page.text
        assert not {"script", "img"} & set(page.tags)


def test_the_page_says_the_numbers(report):
    text = _Page(render_html(report)).text
    footprint, kl = report["footprint"], report["quality"]["kl_mean"]
    assert words.headline(report) in text
    assert words.headline(report).startswith(f"{268e6 / footprint['disk_bytes']:.1f}x smaller")
    assert f"[{kl['low']:.3f}, {kl['high']:.3f}]" in text
    assert "the Gram matrix is singular" in text
    assert "not a linear of a block" in text
    assert "int4 g64 asymmetric" in text
    assert "rarefy evaluate smol-int4 --against acme/smol-135m" in text
    assert "name: gptq4" in text


def test_the_page_of_a_folder_without_a_manifest(report):
    text = _Page(render_html(_without_manifest(report))).text
    assert words.headline(report) in text
    assert "Recipe" not in text and "Peak memory" not in text


def test_overlapping_runs_claim_no_speed_up(report):
    changed = copy.deepcopy(report)
    assert "unclear" not in "".join(row[3] for row in _beside(changed) if "Decode" in row[0])
    changed["speed"]["decode_runs"] = [13.0, 21.0, 22.0]
    assert [row[3] for row in _beside(changed) if "Decode" in row[0]] == ["unclear"]


def test_commands_are_quoted_for_the_shell(report):
    changed = copy.deepcopy(report)
    changed["name"] = "x; rm -rf y"
    assert "'x; rm -rf y'" in command(changed)


def test_plots_have_theme_colours_only(report):
    text = plots.kl_histogram(report["quality"]) + plots.layers(report["manifest"]["nodes"])
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text)) <= {
        "none", "var(--ink)", "var(--muted)", "var(--rule)", "var(--paper)",
        "var(--series-1)", "var(--series-2)",
    }  # fmt: skip
    assert "q_proj" in text and "xmlns" not in text


def test_layers_average_experts_by_weights():
    nodes = [
        {"name": f"model.layers.0.mlp.experts.{e}.up_proj", "weights": w, "error": x, "bits": b}
        for e, (w, x, b) in enumerate([(100, 0.1, 4.0), (300, 0.3, 2.0)])
    ]
    outside = {"name": "lm_head", "weights": 5, "error": 0.5, "bits": 8.0}
    ((block, error, bits),) = plots._points([*nodes, outside])["up_proj"]
    assert (block, error, bits) == (0, pytest.approx(0.25), 2.5)


def test_layers_without_errors_draw_nothing():
    assert (
        plots.layers([{"name": "model.layers.0.q", "weights": 1, "error": None, "bits": 4}]) == ""
    )


@pytest.fixture(scope="module")
def three() -> list[dict[str, Any]]:
    return [make("gptq3", 0.9, 3.25), make("gptq4", 0.1), make("rtn4", 0.3)]


def test_rows_are_best_first(three):
    assert [row.name for row in comparison_rows(three)] == ["gptq4", "rtn4", "gptq3"]
    assert comparison_rows(three)[0].kl == three[1]["quality"]["kl_mean"]
    assert comparison_rows(three)[2].disk_bytes == three[0]["footprint"]["disk_bytes"]


def test_the_reference_stands_first_in_the_tables(three):
    lines = comparison_markdown(three).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        "dense (reference)", "gptq4", "rtn4", "gptq3",
    ]  # fmt: skip
    assert {line.count("|") for line in lines[:6]} == {lines[0].count("|")}
    assert "Reference: acme/smol-135m" in lines[-1]
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(comparison_table(three))
    text = console.export_text()
    assert text.index("dense (ref") < text.index("gptq4") < text.index("rtn4")
    kl = three[1]["quality"]["kl_mean"]
    assert f"[{words.number(kl['low'])}, {words.number(kl['high'])}]" in text


def test_results_measured_on_other_text_are_not_passed_off_as_comparable(three):
    changed = copy.deepcopy(three)
    changed[1]["protocol"]["sha256"] = "d" * 64
    assert "NOT measured alike" in caption(changed)
    assert reference_row(changed) is None
    assert "dense (reference)" not in comparison_markdown(changed)


def test_a_pipe_in_a_name_keeps_the_markdown_table_whole():
    line = comparison_markdown([make("a|b")]).splitlines()[3]
    assert r"a\|b" in line


def _metadata(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_card_metadata(report):
    text = card(report)
    data = _metadata(text)
    assert data["base_model"] == "acme/smol-135m"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["tags"] == ["rarefy", "int4"]
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == report["quality"]["perplexity"]["value"]
    assert text.index("import rarefy") < text.index("from transformers")
    assert words.headline(report) in text


def test_card_of_a_local_base_names_no_hub_model(report):
    changed = copy.deepcopy(report)
    changed["manifest"]["source"] = {"ref": "/home/me/models/smol"}
    changed["quant_method"] = "compressed-tensors"
    text = card(changed)
    assert "base_model" not in _metadata(text)
    assert "license" not in _metadata(text)
    assert "import rarefy" not in text
    assert "compressed-tensors" in _metadata(text)["tags"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.171234, "0.171"), (17.44, "17.4"), (1234.5, "1,234"), (0, "0"), (None, "–"),
        (9.999, "10.0"), (3e-7, "3.00e-07"), (-0.25, "-0.250"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert words.number(value) == text


def test_units():
    assert words.size(77_345_678) == "77.3 MB"
    assert words.size(2_500_000_000) == "2.50 GB"
    assert words.size(999) == "999 B"
    assert words.percent(0.9999) == "100.0 %" and words.percent(1) == "100 %"
    assert words.seconds(200) == "3 min 20 s"
    assert words.seconds(3900) == "1 h 05 min"
    assert words.estimate({"value": 1.0, "low": None, "high": None}) == "1.00"
    assert Estimate(1.0).low is None
