"""The files that travel with the weights from one checkpoint folder to the next."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Everything that a reader of the result may ask for; the model card is written anew.
PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def travel(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config and licences."""
    for pattern in PATTERNS:
        for file in source.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, folder / file.name)
