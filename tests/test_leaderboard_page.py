"""The leaderboard's page and Markdown say what leaderboard.json says, and look right."""

from __future__ import annotations

import http.server
import json
import math
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from typing import Any, ClassVar

import matplotlib.image
import numpy as np
import pytest

from rarefy.report.leaderboard import flops, leaderboard_html, leaderboard_markdown, text
from rarefy.report.leaderboard_plots import front
from rarefy.report.leaderboard_rows import row_of, rows_of
from rarefy.report.leaderboard_words import Hidden, headline, hidden_loss
from rarefy.report.words import number, size

EVIL = '"><script>alert(1)</script><img src=x onerror=y>|`$x_1$[b]'

# name, title, family, kind, ability, dense score, chance, items, fragility, partner
TASKS = [
    ("elements", "Elements: symbol to name", "factoid", "choice", "knowledge", 0.71, 0.1, 118, 1.9),
    ("capitals", "Capitals of countries", "factoid", "choice", "knowledge", 0.62, 0.1, 190, 1.7),
    ("sciq", "SciQ, closed book", "retrieval", "choice", "knowledge", 0.66, 0.25, 500, 0.8),
    ("sciq_open", "SciQ, open book", "retrieval", "choice", None, 0.88, 0.25, 500, 0.35),
    ("mmlu", "MMLU, letters", "choice", "choice", "knowledge", 0.253, 0.25, 1000, 0.1),
    ("arc_easy", "ARC, easy", "choice", "choice", "knowledge", 0.58, 0.25, 570, 0.6),
    ("piqa", "PIQA", "choice", "choice", "knowledge", 0.67, 0.5, 400, 0.3),
    ("hellaswag", "HellaSwag", "choice", "choice", "inference", 0.41, 0.25, 500, 0.4),
    ("news", "News summaries, ROUGE-L", "summary", "generate", None, 0.17, 0.0, 40, 0.5),
    ("rules", "Checkable instructions", "instruction", "generate", None, 0.38, 0.0, 120, 0.7),
    ("lambada", "LAMBADA, last word", "language", "generate", "inference", 0.34, 0.0, 400, 0.9),
    ("sst2", "SST-2", "language", "choice", "inference", 0.69, 0.5, 300, 0.4),
    ("humaneval", "HumanEval, bits of the solution", "code", "bits", None, 0.83, 0.0, 164, 0.25),
]
# recipe, methods, role, sparsity, bits, damage
RECIPES = [
    ("rtn-w8a8", ["rtn"], "quantization", None, 8.02, 0.012),
    ("rtn-int4-g64", ["rtn"], "quantization", None, 4.31, 0.16),
    ("rtn-int3-g64", ["rtn"], "quantization", None, 3.3, 0.5),
    ("gptq-int8-g64", ["gptq"], "quantization", None, 8.3, 0.005),
    ("gptq-int4-g64", ["gptq"], "quantization", None, 4.31, 0.045),
    ("gptq-int3-g64", ["gptq"], "quantization", None, 3.3, 0.27),
    ("awq-int4-g64", ["awq"], "quantization", None, 4.31, 0.07),
    ("magnitude-10", ["magnitude"], "pruning", 0.1, 15.4, 0.02),
    ("magnitude-30", ["magnitude"], "pruning", 0.3, 12.2, 0.25),
    ("magnitude-50", ["magnitude"], "pruning", 0.5, 9.0, 1.2),
    ("wanda-10", ["wanda"], "pruning", 0.1, 15.4, 0.01),
    ("wanda-30", ["wanda"], "pruning", 0.3, 12.2, 0.09),
    ("wanda-50", ["wanda"], "pruning", 0.5, 9.0, 0.42),
    ("wanda-2of4", ["wanda"], "pruning", 0.5, 9.0, 0.75),
    ("sparsegpt-10", ["sparsegpt"], "pruning", 0.1, 15.4, 0.01),
    ("sparsegpt-30", ["sparsegpt"], "pruning", 0.3, 12.2, 0.07),
    ("sparsegpt-50", ["sparsegpt"], "pruning", 0.5, 9.0, 0.36),
    ("svd-llm-80", ["svd-llm"], "low rank", None, 12.8, 0.8),
    ("shortgpt-6", ["shortgpt"], "surgery", None, 16.0, 0.4),
    ("sparsegpt-50-int4-g64", ["sparsegpt", "gptq"], "composition", 0.5, 3.31, 0.5),
]
LOST = [
    ("elements", "Which element has the symbol W?", "tungsten", "tungsten", "silver"),
    ("capitals", "What is the capital of Australia?", ["Canberra"], "Canberra", "Sydney"),
    ("sciq", "What do plants take in for photosynthesis besides water and light?",
     "carbon dioxide", "carbon dioxide", ""),
]  # fmt: skip


def _estimate(value: float, width: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def _damage(task: tuple[Any, ...], damage: float) -> dict[str, Any]:
    """A task's record for a model that is damaged so much; 0: the dense model."""
    name, _, _, kind, _, dense, chance, items, fragility = task
    headroom = dense - chance
    if kind == "bits":
        score = dense * (1 + fragility * damage)
        relative, shift = dense / score, score - dense
    else:
        score = chance + headroom * math.exp(-fragility * damage * 1.6)
        relative, shift = score / dense, score - dense
    flips = None
    if kind == "choice":
        won = round(items * 0.08 * min(damage, 1))
        lost = won + round(items * (dense - score))
        both = round(items * dense) - lost
        rest = items - both - lost - won
        flips = {"both": both, "lost": lost, "won": won, "wrong_same": rest // 2,
                 "wrong_other": rest - rest // 2, "flips_percent": 100 * (lost + won) / items,
                 "all_flips_percent": 100 * (lost + won + rest - rest // 2) / items}  # fmt: skip
    p = None if flips is None else min(1.0, math.exp(-((lost - won) ** 2) / (lost + won + 1) / 2))
    error = math.sqrt(dense * (1 - dense) / items)
    return {
        "task": name, "items": items, "clusters": items, "dense": _estimate(dense, 2 * error),
        "score": _estimate(score, 2 * error), "difference": _estimate(shift, error),
        "relative": relative, "matches": relative >= 0.95, "chance": chance,
        "headroom": headroom, "sensitive": kind == "bits" or headroom > 3 * error,
        "flips": flips, "p_value": p, "p_holm": None if p is None else min(1.0, 40 * p),
        "choice_kl": _estimate(0.3 * damage, 0.01) if kind == "choice" else None,
        "agreement": {"rouge_l": 0.8, "chrf": 70.0, "identical": 0.25}
        if kind == "generate" else None, "metrics": {},
    }  # fmt: skip


def _cost(bits: float, sparsity: float | None, damage: float) -> dict[str, Any]:
    disk = int(56.7e6 + 106e6 * bits / 8)
    return {
        "parameters": 134_515_008, "nonzero": int(134_515_008 - 106e6 * (sparsity or 0)),
        "linear_parameters": 106_168_320, "disk_bytes": disk, "ratio_16bit": 269.03e6 / disk,
        "ratio_stored": 269.03e6 / disk, "bits_linear": bits, "bits_model": 8 * disk / 134.5e6,
        "flops": 269e6, "flops_effective": 269e6 - 212e6 * (sparsity or 0), "tokens": 512,
        "ttft_s": 0.31, "prefill_tok_s": 410.0 + 9 * bits, "decode_tok_s": 30 - bits + damage,
        "latency_s": 2.1, "peak_bytes": 700_000_000 + disk, "mfu": 0.31, "mbu": 0.22,
        "peak_flops": 1.1e11, "peak_bandwidth": 1.9e10, "compress_s": 20 + 300 * damage,
        "compress_peak_bytes": 900_000_000, "joules_per_token": 1.25, "energy_source": "modelled",
    }  # fmt: skip


def _entry(recipe: tuple[Any, ...]) -> dict[str, Any]:
    name, methods, role, sparsity, bits, damage = recipe
    tasks = {task[0]: _damage(task, damage) for task in TASKS}
    kept: dict[str, list[float]] = {}
    for task in TASKS:
        if tasks[task[0]]["sensitive"]:
            kept.setdefault(task[2], []).append(tasks[task[0]]["relative"])
    families = {family: math.prod(r) ** (1 / len(r)) for family, r in kept.items()}
    cost = _cost(bits, sparsity, damage)
    perplexity = 17.27 * math.exp(0.9 * damage)
    ratios = {"knowledge": families["factoid"], "inference": families["language"]}
    return {
        "recipe": name, "description": f"{name}: made for the test.", "methods": methods,
        "role": role, "cost": cost, "tasks": tasks, "families": families,
        "level": {"sparsity": sparsity, "bits": bits, "parameters": 134_515_008},
        "quality": {
            "perplexity": _estimate(perplexity, 0.04 * perplexity),
            "perplexity_dense": _estimate(17.27, 0.7), "kl_mean": _estimate(damage, damage / 9),
            "agreement": _estimate(math.exp(-damage), 0.01),
            "interval": "95 % percentile bootstrap over 8 documents",
        },
        "tracks": {
            "performance": {"om": 100 * np.sqrt(np.mean(np.square([*ratios.values()]))),
                            "geometric": 100 * math.prod(ratios.values()) ** 0.5,
                            "ratios": ratios},
            "generalization": None,
            "inference_consumption": {"om": 110.0 + bits, "geometric": 108.0 + bits,
                                      "ratios": {"size": 1.9, "memory": 1.1}},
        },
        "lost": [dict(zip(("task", "question", "answer", "dense", "this"), fact, strict=True))
                 for fact in LOST] if damage > 0.02 else [],
    }  # fmt: skip


def board(count: int = 20) -> dict[str, Any]:
    """A leaderboard.json with so many recipes."""
    infos = [
        {"name": name, "title": title, "version": 1, "family": family, "kind": kind,
         "metric": {"choice": "acc", "generate": "contains", "bits": "bits_per_byte"}[kind],
         "higher": kind != "bits", "source": "a package 1.0", "smoke": 20, "ability": ability,
         "partner": "sciq_open" if name == "sciq" else None, "text": kind == "generate",
         "items": items, "clusters": items}
        for name, title, family, kind, ability, _, _, items, _ in TASKS
    ]  # fmt: skip
    dense = _entry(("dense", [], "dense", None, 16.0, 0.0))
    dense["description"], dense["lost"], dense["tracks"] = "as it came", [], {}
    dense["cost"] |= {"compress_s": None, "compress_peak_bytes": None}
    result = {
        "model": "demo", "profile": "full", "created": "2025-03-01 12:00", "comparisons": 180,
        "reference": "The dense model is SmolLM2-135M as packaged: its linears were already in "
        "4.5-bit blocks, and are taken as they are.",
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 16_000_000_000,
                    "device": "cpu"},
        "versions": {"rarefy": "0.1.0", "lm_eval": "0.4.13"}, "tasks": infos, "dense": dense,
        "entries": [_entry(recipe) for recipe in RECIPES[:count]],
        "failed": [{"recipe": "asvd-80", "error": "layer 3: the matrix is singular"}],
    }  # fmt: skip
    return json.loads(json.dumps(result))


class _Page(HTMLParser):
    """Collects tags, attributes, text and table rows; notes tags that do not close in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.rows: dict[str, list[tuple[str | None, str]]] = {}
        self._row: list[list[Any]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        if tag == "tr" and "id" in values:
            self._row = self.rows.setdefault(values["id"], [])
        if tag in ("td", "th"):
            self._row.append([values.get("data-v"), ""])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr":
            self._row = []

    def handle_data(self, data):
        self.text += data
        if self._row:
            self._row[-1][1] += data


def _without_numbers() -> dict[str, Any]:
    """No family, task, track or speed has a value, and what may be absent is."""
    result = board(3)
    for entry in [result["dense"], *result["entries"]]:
        entry["families"] = dict.fromkeys(entry["families"])
        entry["tasks"], entry["tracks"], entry["quality"] = {}, {}, {}
        entry["level"] = {"sparsity": None, "bits": None, "parameters": None}
        entry["cost"] = dict.fromkeys(entry["cost"]) | {"energy_source": "none"}
        entry["lost"] = []
    for key in ("created", "machine", "versions", "failed", "profile", "comparisons"):
        del result[key]
    return result


def _without_speed() -> dict[str, Any]:
    result = board(8)
    for entry in [result["dense"], *result["entries"]]:
        for key in ("ttft_s", "prefill_tok_s", "decode_tok_s", "latency_s", "peak_bytes", "mfu",
                    "mbu", "joules_per_token"):  # fmt: skip
            entry["cost"][key] = None
        entry["cost"]["energy_source"] = "none"
    return result


def _awkward() -> dict[str, Any]:
    """Texts that want to be markup, answers of all kinds, scores of nothing and of infinity."""
    result = board(4)
    first, second, third, _ = result["entries"]
    result["model"] = first["recipe"] = first["description"] = result["reference"] = EVIL
    result["tasks"][0]["title"] = result["tasks"][0]["source"] = EVIL
    result["failed"] = [{"recipe": EVIL, "error": EVIL}]
    second["lost"] = [{"task": "gone", "question": EVIL, "answer": ["a", EVIL], "dense": None,
                       "this": ""}]  # fmt: skip
    second["families"]["factoid"] = 0.0
    second["quality"]["perplexity"] = {"value": math.inf, "low": None, "high": None}
    third["quality"]["kl_mean"] = {"value": math.nan, "low": None, "high": None}
    third["role"] = "new kind"
    for estimate in third["tasks"].values():
        estimate["difference"] |= {"low": None, "high": None}
    result["dense"]["tasks"] = {}
    return result


BOARDS = {
    "twenty": board,
    "one": lambda: board(1),
    "none": lambda: board(0),
    "numbers missing": _without_numbers,
    "speed missing": _without_speed,
    "awkward": _awkward,
}


@pytest.mark.parametrize("make", BOARDS.values(), ids=BOARDS)
def test_the_page_is_whole_and_needs_nothing_else(make):
    page = leaderboard_html(make())
    parsed = _Page(page)
    assert parsed.tags.count("script") == 1 and "img" not in parsed.tags
    assert not [value for key, value in parsed.attributes if key == "src"]
    links = [value or "" for key, value in parsed.attributes if key in ("href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not any(key.startswith("on") or key == "target" for key, _ in parsed.attributes)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    ids = [value for key, value in parsed.attributes if key == "id"]
    targets = {link[1:] for link in links if link.startswith(("#recipe", "#dense"))}
    assert targets <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_board_has_the_numbers_of_the_dict_and_no_others():
    made = board()
    rows = _Page(leaderboard_html(made)).rows
    order = sorted(
        range(20),
        key=lambda at: (
            -sum(d["matches"] for d in made["entries"][at]["tasks"].values() if d["sensitive"]),
            made["entries"][at]["quality"]["kl_mean"]["value"],
        ),
    )
    assert list(rows) == ["dense", *(f"recipe-{at}" for at in order)]
    for at, entry in enumerate(made["entries"]):
        values = [value for value, _ in rows[f"recipe-{at}"]]
        families = [entry["families"].get(f) for f in ("factoid", "choice", "retrieval", "summary",
                    "instruction", "language", "code")]  # fmt: skip
        sensitive = [damage for damage in entry["tasks"].values() if damage["sensitive"]]
        flips = [damage["flips"] for damage in entry["tasks"].values() if damage["flips"]]
        turned = sum(flip["lost"] + flip["won"] for flip in flips)
        items = sum(d["items"] for d in entry["tasks"].values() if d["flips"])
        expected = [
            entry["cost"]["disk_bytes"], entry["level"]["bits"],
            entry["quality"]["kl_mean"]["value"], entry["quality"]["perplexity"]["value"],
            *families, sum(damage["matches"] for damage in sensitive), turned / items,
            entry["cost"]["decode_tok_s"],
        ]  # fmt: skip
        assert values == [None, *("" if value is None else str(value) for value in expected)]
        cells = [shown.strip().rstrip("*") for _, shown in rows[f"recipe-{at}"]]
        assert cells[0].endswith(entry["recipe"]) and cells[1] == size(expected[0])
        assert cells[5:12] == [number(value) for value in families]
        assert cells[12] == f"{expected[11]} of {len(sensitive)}"


def test_a_family_is_coloured_by_its_tasks_and_starred_when_sure():
    made = board(5)
    entry = made["entries"][0]
    for damage in entry["tasks"].values():
        damage |= {"matches": True, "p_holm": 1.0}

    def facts() -> tuple[str, bool]:
        cell = row_of("x", entry, made).families["factoid"]
        return cell.state, cell.sure

    assert facts() == ("match", False)
    entry["tasks"]["elements"]["matches"] = False
    assert facts() == ("part", False)
    entry["tasks"]["capitals"]["matches"] = False
    assert facts() == ("lost", False)
    entry["tasks"]["capitals"] |= {"p_holm": 0.01}
    entry["tasks"]["capitals"]["flips"] |= {"lost": 30, "won": 2}
    assert facts() == ("lost", True)
    entry["tasks"]["capitals"]["flips"] |= {"lost": 2, "won": 30}
    assert facts() == ("lost", False)
    entry["families"]["factoid"] = None
    assert facts() == ("none", False)


def test_a_task_without_headroom_counts_nowhere():
    made = board(1)
    entry = made["entries"][0]
    before = row_of("x", entry, made)
    assert not entry["tasks"]["mmlu"]["sensitive"]
    entry["tasks"]["mmlu"]["matches"] = not entry["tasks"]["mmlu"]["matches"]
    after = row_of("x", entry, made)
    assert (before.matched, before.tasks) == (after.matched, after.tasks) == (11, 11)
    assert _Page(leaderboard_html(made)).text.count("no: too little headroom") == 2


def test_the_headline_names_the_smallest_match_or_the_closest():
    made = board()
    dense = row_of("dense", made["dense"], made)
    rows = rows_of(made)
    assert headline(rows, dense).startswith("rtn-w8a8 is the smallest that still matches: 163 MB")
    worse = [row for row in rows if row.matched < row.tasks]
    assert headline(worse, dense).endswith("magnitude-10 comes closest, on 10 of 11")
    assert headline([], dense) == "No recipe was finished"
    empty = _without_numbers()
    assert headline(rows_of(empty), dense) == "No task was scored"
    for damage in made["entries"][0]["tasks"].values():
        damage["sensitive"] = False
    made["entries"] = made["entries"][:1]
    assert headline(rows_of(made), dense) == "No task could show damage"


def test_the_hidden_loss_is_certain_large_and_small_in_perplexity():
    made = board()
    found = hidden_loss(rows_of(made), made)
    assert isinstance(found, Hidden) and found.row.name == "rtn-int4-g64"
    damage = found.row.entry["tasks"]["elements"]
    assert f"keeps only {100 * damage['relative']:.1f} % of the dense score" in found.sentence
    assert f"{damage['flips']['lost']} right answers turned wrong" in found.sentence
    for entry in made["entries"]:
        for damage in entry["tasks"].values():
            damage["p_holm"] = 0.2
    none = hidden_loss(rows_of(made), made)
    assert none == (
        "Of the recipes that raise perplexity by at most 25.0 %, none lost more than 5 % on a "
        "task of facts beyond chance."
    )
    loud = board()
    for entry in loud["entries"]:
        entry["quality"]["perplexity"]["value"] = 2 * 17.27
    assert hidden_loss(rows_of(loud), loud) == ""


def test_the_front_holds_what_no_other_beats():
    points = [(1.0, 0.5), (2.0, 0.9), (2.0, 0.7), (3.0, 0.8), (4.0, 1.0)]
    assert front(points, more_x=False, more_y=True) == [(1.0, 0.5), (2.0, 0.9), (4.0, 1.0)]
    assert front(points, more_x=True, more_y=True) == [(4.0, 1.0)]
    assert front(points, more_x=False, more_y=False) == [(1.0, 0.5)]
    assert front(points, more_x=True, more_y=False) == [(1.0, 0.5), (2.0, 0.7), (3.0, 0.8),
                                                        (4.0, 1.0)]  # fmt: skip


def test_the_drawings_name_every_recipe_and_every_method():
    page = leaderboard_html(board())
    drawings = re.findall(r"<svg role.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings[:3]:
        named = [name for name, *_ in RECIPES if re.search(rf"<text[^>]*>{name}</text>", drawing)]
        assert len(named) == 20
        assert {f"recipe-{at}" for at in range(20)} <= set(
            re.findall(r'<a href="#([\w-]+)"', drawing)
        )
    assert "score kept" in drawings[0] and "<title>gptq-int4-g64: 114 MB" in drawings[0]
    sparsity = re.findall(r"<text[^>]*>([^<]*)</text>", drawings[3])
    assert {"magnitude", "wanda", "sparsegpt", "perplexity", "Capitals of countries"} <= {*sparsity}
    bits = re.findall(r"<text[^>]*>([^<]*)</text>", drawings[4])
    assert {"rtn", "gptq"} <= {*bits} and "awq" not in bits and "wanda" not in bits


def test_what_was_lost_is_told_with_all_answers():
    parsed = _Page(leaderboard_html(board()))
    told = parsed.text.split("Facts that were lost")[1].split("Task by task")[0]
    for _, question, answer, _, wrong in LOST:
        assert question in told and text(answer) in told and wrong in told
    assert "Energy" in parsed.text and "modelled" in parsed.text
    assert "generalization" not in parsed.text
    assert "Ratios, performance: knowledge 0.9" in parsed.text
    assert "asvd-80" in parsed.text and "layer 3: the matrix is singular" in parsed.text
    assert "180 comparisons" in parsed.text and "4.5-bit blocks" in parsed.text
    assert (text(None), text(" "), text(["a", "b"]), text(3)) == ("–", "–", "a / b", "3")
    assert (flops(2.69e8), flops(None)) == ("269 MFLOP", "–")


@pytest.mark.parametrize("make", BOARDS.values(), ids=BOARDS)
def test_the_markdown_tables_are_regular(make):
    made = make()
    lines = leaderboard_markdown(made).splitlines()
    tables = [[]]
    for line in lines:
        tables[-1].append(line) if line.startswith("|") else tables.append([])
    board_table, task_table = [table for table in tables if table]
    assert len(board_table) == 3 + len(made["entries"])
    assert len(task_table) == 2 + len(made["tasks"])
    for table in (board_table, task_table):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<script" not in "\n".join(lines)


def test_the_markdown_has_the_numbers_and_marks_what_does_not_match():
    lines = leaderboard_markdown(board()).splitlines()
    row = next(line for line in lines if line.startswith("| wanda-30 |"))
    entry = board()["entries"][11]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == [
        "218 MB",
        "12.2",
        "0.0900",
        number(entry["quality"]["perplexity"]["value"]),
    ]
    assert cells[5] == rf"**{number(entry['families']['factoid'])}\***"
    assert cells[6] == number(entry["families"]["choice"]) and cells[8] == "–"
    assert "- asvd-80: layer 3: the matrix is singular" in lines


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Serves the pages given and notes every request of the browser, which has no other way."""

    pages: ClassVar[dict[str, str]] = {}
    seen: ClassVar[list[str]] = []

    def do_GET(self):
        self.seen.append(self.path)
        page = self.pages.get(re.sub(r"^http://[^/]+", "", self.path))
        self.send_response(200 if page else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((page or "").encode())

    def do_CONNECT(self):
        self.seen.append(self.path)
        self.send_error(502)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def proxy():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def browse(proxy, tmp_path):
    """Open pages in a headless browser whose only way out is the proxy."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip("no chromium on this machine")

    def run(pages: dict[str, str], *flags: str) -> str:
        _Proxy.pages, _Proxy.seen = pages, []
        address = f"127.0.0.1:{proxy.server_address[1]}"
        command = [
            binary, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
            f"--proxy-server={address}", "--proxy-bypass-list=<-loopback>", *flags,
            "http://page.test/",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run


def test_the_picture_is_there_in_light_and_in_dark(browse, tmp_path):
    page = {"/": leaderboard_html(board())}
    pictures = []
    for scheme in ("1", "0"):
        file = tmp_path / f"{scheme}.png"
        browse(page, "--window-size=1400,3000", f"--screenshot={file}",
               f"--blink-settings=preferredColorScheme={scheme}")  # fmt: skip
        pictures.append(matplotlib.image.imread(file)[..., :3])
    light, dark = pictures
    assert light.shape == dark.shape == (3000, 1400, 3)
    assert light.mean() > 0.85 and dark.mean() < 0.2
    for picture in pictures:
        background = np.median(picture.reshape(-1, 3), axis=0)
        inked = (np.abs(picture - background) > 0.1).any(axis=(1, 2))
        assert inked.mean() > 0.3, "most of the page is blank"
        assert inked[2000:].any()


_MEASURE = """
<body style="margin:0"><script>
const page = width => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => done(frame.contentDocument);
  frame.src = "/page";
  document.body.append(frame);
});
const recipes = table => [...table.tBodies[0].rows].map(row => row.cells[0].textContent.trim());
(async () => {
  const found = {};
  for (const width of [1400, 420]) found[width] = (await page(width)).documentElement.scrollWidth;
  const table = (await page(1400)).querySelector("table.board");
  const head = table.tHead.rows[0].cells[1];
  head.click();
  found.up = recipes(table).slice(0, 3);
  head.click();
  found.down = recipes(table).slice(0, 3);
  document.body.textContent = JSON.stringify(found);
})();
</script>
"""


def test_nothing_sticks_out_and_columns_sort(browse):
    made = board()
    page = leaderboard_html(made).replace("<details", "<details open")
    dom = browse({"/": _MEASURE, "/page": page}, "--dump-dom", "--window-size=1500,1000",
                 "--virtual-time-budget=20000")  # fmt: skip
    found = json.loads(re.search(r"\{.*\}", dom)[0])
    assert found["1400"] <= 1400 and found["420"] <= 420
    sizes = {entry["recipe"]: entry["cost"]["disk_bytes"] for entry in made["entries"]}
    for key, worst in (("up", min), ("down", max)):
        first, second, third = (name.split()[-1] for name in found[key])
        assert first == "dense", "the reference stays on top"
        assert sizes[second] == worst(sizes.values())
        assert sizes[third] == sorted(sizes.values(), reverse=key == "down")[1]


def test_the_page_asks_for_nothing(browse):
    def asked(page: str) -> set[str]:
        browse({"/": page}, "--dump-dom")
        own = {"http://page.test/", "http://page.test/favicon.ico"}
        return {url for url in _Proxy.seen if url not in own and "google" not in url}

    page = leaderboard_html(board())
    assert asked(page) == set()
    assert asked(page + '<img src="http://elsewhere.test/x.png">') == {
        "http://elsewhere.test/x.png"
    }
