"""The model card: README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from rarefy.report import words
from rarefy.report.compare import caption

if TYPE_CHECKING:
    from rarefy.report.words import Report

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card(report: Report) -> str:
    """Return the text of the model card.

    Args:
        report: content of report.json.
    """
    manifest, quality = report["manifest"], report["quality"]
    base = manifest.get("source", {}).get("ref") or report["protocol"]["against"]
    on_hub = bool(_HUB_ID.fullmatch(base)) and not Path(base).exists()
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=manifest.get("source", {}).get("license"),
        tags=_tags(report),
        model_name=report["name"],
        eval_results=_results(report),
    )
    rows = [
        ("Mean KL to the dense model, nats", words.estimate(quality["kl_mean"])),
        ("Same most likely token", words.estimate(quality["agreement"], share=True)),
        ("Perplexity", words.estimate(quality["perplexity"])),
        ("Perplexity of the dense model", words.estimate(quality["perplexity_dense"])),
        ("Weights on disk", words.size(report["footprint"]["disk_bytes"])),
        (
            "Bits per weight, compressed linears",
            words.number(report["footprint"]["bits_compressed"]),
        ),
        ("Bits per weight, whole model", words.number(report["footprint"]["bits_model"])),
        ("Linear weights compressed", words.percent(report["footprint"]["coverage_linear"])),
    ]
    body = [
        f"# {report['name']}",
        f"A compressed copy of `{base}`: {words.headline(report)}.",
        "## Use",
        f"```python\n{_usage(report)}\n```",
        "## What it costs and what it saves",
        "\n".join(["| | |", "|:--|--:|", *(f"| {what} | {value} |" for what, value in rows)]),
        caption([report]),
        "## How it was made",
        _made(manifest),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def _usage(report: Report) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({report['name']!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({report['name']!r})",
    ]
    ours = report["quant_method"] == "rarefy"
    return "\n".join((["import rarefy  # reads the packed weights"] if ours else []) + lines)


def _tags(report: Report) -> list[str]:
    """Return the tags by which the Hub finds compressed models."""
    formats = {str(node["format"]).split()[0] for node in report["manifest"].get("nodes", [])}
    tags = ["rarefy", report["quant_method"], *sorted(formats)]
    return list(dict.fromkeys(tag for tag in tags if tag))


def _results(report: Report) -> list[EvalResult]:
    quality = report["quality"]
    metrics = {
        "perplexity": ("Perplexity", quality["perplexity"]["value"]),
        "kl_divergence": ("Mean KL to the dense model, nats", quality["kl_mean"]["value"]),
        "top1_agreement": ("Top-1 agreement with the dense model", quality["agreement"]["value"]),
    }
    text = report["protocol"]["text"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=text,
            dataset_name=text,
            metric_type=key,
            metric_name=name,
            metric_value=value,
        )
        for key, (name, value) in metrics.items()
    ]


def _made(manifest: dict[str, Any]) -> str:
    if not manifest:
        return "No manifest was found beside the weights."
    calibration = manifest.get("calibration")
    sentence = f"With rarefy, recipe `{manifest.get('recipe_name', '')}`"
    if calibration:
        sentence += (
            f", calibrated on {calibration['sequences']} sequences of {calibration['length']} "
            f"tokens of {calibration['corpus']}"
        )
    count = len(manifest.get("fallbacks", []))
    return (
        f"{sentence}, in {words.seconds(manifest.get('seconds'))}. "
        f"Fallbacks: {count or 'none'}. The full account is in `manifest.json`."
    )
