"""Chatting: what is typed reaches the model through its template, and its answer comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

import rarefy.cli
from rarefy.checkpoint.load import load_model
from rarefy.runtime.conversation import Conversation, with_stops
from rarefy.runtime.decoder import PlainLoop
from rarefy.runtime.sampling import Sampling

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
COUNT = 12
RUN = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that writes letters only, so that its answers can be read."""
    path = tmp_path_factory.mktemp("chat") / "m"
    save_tiny("llama", path)
    model = load_model(path)
    tokenizer = tiny_tokenizer()
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz ")["input_ids"]
    head = torch.zeros_like(model.lm_head.weight)
    g = torch.Generator().manual_seed(3)
    head[letters] = torch.randn(len(letters), head.shape[1], generator=g)
    model.lm_head.weight.data = head
    model.save_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def answer(folder: Path, messages: list[dict[str, str]]) -> str:
    """What transformers alone answers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=COUNT, do_sample=False)
    found: str = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def say(*args: object, typed: str) -> str:
    done = RUN.invoke(rarefy.cli.app, ["chat", *map(str, args)], input=typed)
    assert done.exit_code == 0, done.output
    return done.stdout


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_every_turn_sees_the_earlier_ones_until_they_are_cleared(folder: Path) -> None:
    first = answer(folder, [user("hello")])
    second = answer(folder, [user("hello"), assistant(first), user("and then?")])
    alone = answer(folder, [user("and then?")])
    assert len({first, second, alone}) == 3
    typed = "hello\nand then?\n\n/clear\nand then?\n/quit\nnot this\n"
    said = say(folder, "--max-tokens", COUNT, typed=typed)
    assert [line for line in said.splitlines() if line.strip()] == [first, second, alone]


def test_the_system_message_comes_first_and_survives_clearing(folder: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    want = answer(folder, [system, user("hello")])
    assert want != answer(folder, [user("hello")])
    said = say(
        folder, "--max-tokens", COUNT, "--system", "be brief", typed="hello\n/clear\nhello\n"
    )
    assert [line for line in said.splitlines() if line.strip()] == [want, want]


def test_the_end_of_the_input_ends_the_chat(folder: Path) -> None:
    assert say(folder, typed="") == ""


def test_two_models_answer_next_to_each_other(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = load_model(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    here, there = (answer(path, [user("hello")]) for path in (folder, other))
    assert here != there
    said = say(folder, "--beside", other, "--max-tokens", COUNT, typed="hello\n")
    [line] = [line for line in said.splitlines() if here[:5] in line]
    assert line.index(there[:5]) < line.index(here[:5])
    assert said.count(f"{COUNT} tokens, ") == 2


def test_draws_depend_on_the_seed_alone(folder: Path) -> None:
    def draw(seed: int) -> str:
        rules = ("--max-tokens", COUNT, "--temperature", 1, "--seed", seed)
        return say(folder, *rules, typed="hello\n")

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_characters_of_several_tokens_come_whole(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    script = tokenizer("Grüße, 世界")["input_ids"]

    class Scripted(PlainLoop):
        def feed(self, ids: Any) -> torch.Tensor:
            self.tokens = [*ids]
            return self.step(-1)

        def step(self, token: int) -> torch.Tensor:
            at = 0 if token < 0 else self.at + 1
            self.at = at
            return torch.nn.functional.one_hot(torch.tensor(script[at]), 320).float()

    loop = Scripted(load_model(folder))
    talk = Conversation(loop, tokenizer, Sampling(len(script)))
    pieces = list(talk.say("hello"))
    assert "".join(pieces) == "Grüße, 世界"
    assert "世" in pieces
    assert talk.made == len(script)


def test_answers_end_where_the_folder_says(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rules = with_stops(Sampling(stops=frozenset({3})), folder, tokenizer)
    assert rules.stops == {3, 257, tokenizer.eos_token_id}


def test_models_without_a_template_continue_the_text(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "plain")
    done = RUN.invoke(rarefy.cli.app, ["chat", str(path), "--max-tokens", "3"], input="hello\n")
    assert done.exit_code == 0, done.output
    assert "has no chat template" in done.output
