"""Factoid questions: facts of countries and elements, easy enough for a small model.

The answers come from two published tables. What those have out of date, and what has two right
answers, is left out by name below.
"""

from __future__ import annotations

import json
import sqlite3
import zipfile
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING

from rarefy.data.packages import fetch
from rarefy.tasks.loaders import loader, row
from rarefy.tasks.matching import options, shuffled
from rarefy.tasks.scorers import contains, normalise
from rarefy.tasks.sources import PINS, content

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rarefy.tasks.frozen import Row

_WRONG = 9
_LEAST_PEOPLE = 3_000_000
_LAST_ELEMENT = 94
# No longer a country, not generally agreed to be one, or with a capital that is two or has moved.
_UNSETTLED = {
    "Bolivia", "Burundi", "Hong Kong", "Israel", "Kazakhstan", "Palestine", "Puerto Rico",
    "Serbia and Montenegro", "South Africa", "Sri Lanka", "Western Sahara",
}  # fmt: skip
_ON_TWO_CONTINENTS = {
    "Armenia", "Azerbaijan", "Egypt", "Georgia", "Indonesia", "Papua New Guinea", "Russia",
    "Turkey", "Yemen",
}  # fmt: skip
_CONTINENTS = (
    "Africa", "Antarctica", "Asia", "Europe", "North America", "Oceania", "South America",
)  # fmt: skip
_OLD_CURRENCIES = {"BGN", "BYR", "HRK", "SLL", "VEF", "ZMK"}
_UNUSUAL_DEMONYMS = {"Cape Verdian", "Kirghiz", "Tadzhik"}
# A symbol that is a word would be found in any sentence.
_WORDS = {"Am", "As", "At", "Be", "He", "I", "In", "No"}
_ALSO = {
    "Afghan": ["Afghani"],
    "Aluminum": ["Aluminium"],
    "Argentinean": ["Argentine", "Argentinian"],
    "British": ["Briton"],
    "Cesium": ["Caesium"],
    "Croatian": ["Croat"],
    "Danish": ["Dane"],
    "Dutch": ["Dutchman", "Netherlander"],
    "Ecuadorean": ["Ecuadorian"],
    "Finnish": ["Finn"],
    "Kuwait City": ["Kuwait"],
    "Kyiv": ["Kiev"],
    "Laotian": ["Lao"],
    "Polish": ["Pole"],
    "Saudi Arabian": ["Saudi"],
    "Serbian": ["Serb"],
    "Slovak": ["Slovakian"],
    "Spanish": ["Spaniard"],
    "Sulfur": ["Sulphur"],
    "Swedish": ["Swede"],
    "Turkish": ["Turk"],
    "United States": ["USA", "United States of America"],
    "Uzbekistani": ["Uzbek"],
    "Washington D.C.": ["Washington"],
}
_QUOTAS = {
    "capital": 70, "country": 55, "continent": 40, "demonym": 40, "currency": 15,
    "symbol": 35, "element": 25, "number": 20,
}  # fmt: skip


@loader("facts", items=300)
def facts() -> list[Row]:
    """Facts of eight kinds: ``question, answers, choices`` (ten, or all continents), ``gold``.

    Cluster: the country or element, of which there may be several facts.
    """
    known = [*_country_facts(), *_element_facts()]
    pools: dict[str, list[str]] = {}
    for fact in known:
        pools.setdefault(fact["kind"], []).append(fact["answers"][0])
    pools["continent"] = list(_CONTINENTS)
    rows = []
    for kind, quota in _QUOTAS.items():
        fit = [fact for fact in known if fact["kind"] == kind and not _given_away(fact)]
        for fact in shuffled(kind, fit, key=lambda fact: str(fact["question"]))[:quota]:
            choices = options(fact["question"], fact["answers"], pools[kind], _WRONG)
            gold = choices.index(fact["answers"][0])
            rows.append(row({**fact, "choices": choices, "gold": gold}, fact["about"]))
    return rows


def _given_away(fact: Row) -> bool:
    asked = normalise(fact["question"]).split()
    return any(word in asked for answer in fact["answers"] for word in normalise(answer).split())


def _fact(kind: str, about: str, question: str, *answers: str) -> Row:
    also = [alias for answer in answers for alias in _ALSO.get(answer, [])]
    return {"kind": kind, "about": about, "question": question, "answers": [*answers, *also]}


def _country_facts() -> Iterator[Row]:
    countries = _countries()
    money = Counter(code for country in countries for code in country["currencies"] or [])
    names = [str(country["name"]) for country in countries]
    for country in countries:
        if (country["population"] or 0) < _LEAST_PEOPLE or country["name"] in _UNSETTLED:
            continue
        name, capital = str(country["name"]), str(country["capital"])
        the = f"the {name}" if name.startswith(("United", "Neth", "Phil")) else name
        the = f"the {name}" if "Republic" in name else the
        yield _fact("capital", name, f"What is the capital of {the}?", capital)
        # "Guinea" would be found in "Guinea-Bissau".
        if not any(other != name and contains(other, [name]) for other in names):
            yield _fact("country", name, f"Which country has the capital {capital}?", name)
        people = [d for d in country["demonym"].split(",") if d not in _UNUSUAL_DEMONYMS]
        if people:
            plurals = [f"{person}s" for person in people if person[-1] not in "ehs"]
            yield _fact("demonym", name, f"What is a person from {the} called?", *people, *plurals)
        continent = country["region"] if country["region"] in _CONTINENTS else country["subregion"]
        if continent in _CONTINENTS and name not in _ON_TWO_CONTINENTS:
            yield _fact("continent", name, f"On which continent is {the}?", str(continent))
        codes = country["currencies"] or []
        if len(codes) == 1 and money[codes[0]] == 1 and codes[0] not in _OLD_CURRENCIES:
            question = f"What is the three-letter code of the currency of {the}?"
            yield _fact("currency", name, question, codes[0])


def _countries() -> list[Row]:
    prefix = "countryinfo/data/"
    with zipfile.ZipFile(fetch("countryinfo", *PINS["countryinfo"])) as wheel:
        files = sorted(n for n in wheel.namelist() if n.startswith(prefix) and n.endswith(".json"))
        found = (json.loads(wheel.read(file)) for file in files)
        return [row for row in found if isinstance(row.get("capital"), str) and row.get("demonym")]


def _element_facts() -> Iterator[Row]:
    query = "select atomic_number, symbol, name from elements where atomic_number <= ? order by 1"
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(content("mendeleev", "mendeleev/elements.db"))
        elements = database.execute(query, (_LAST_ELEMENT,)).fetchall()
    for number, symbol, name in elements:
        if symbol not in _WORDS:
            yield _fact("symbol", name, f"What is the chemical symbol of {name.lower()}?", symbol)
        yield _fact("element", name, f"Which chemical element has the symbol {symbol}?", name)
        yield _fact("number", name, f"What is the atomic number of {name.lower()}?", str(number))
