"""A judge that is a model behind an OpenAI-compatible endpoint: a rubric, a parser that fails
loudly, and a cache on disk so that nothing is asked twice.

    Judge("persuades", RUBRIC, Number("GRADE:", 0, 10), Endpoint("gpt-4.1-mini"))

is a scorer with the columns `persuades` (None where the answer could not be read) and
`persuades_said`, what the judge answered.
"""

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ip_jax.evals.scorers import SCORE_ERROR

LETTERS_OF_TOKEN = 4  # a rough mean of English text, for estimates


class JudgeError(ValueError):
    """A judge that cannot be used: it is not reached, has no key, or answers nonsense."""


@dataclass(frozen=True)
class Number:
    """Reads the whole or decimal number behind `tag`, from `low` to `high`."""

    tag: str
    low: float
    high: float

    def __call__(self, answer: str) -> float | None:
        """None where there is no such number, or one outside the scale."""
        found = re.search(re.escape(self.tag) + r"\s*(-?[0-9]+(?:\.[0-9]+)?)", answer, re.I)
        if found is None or not self.low <= float(found[1]) <= self.high:
            return None
        return float(found[1])


@dataclass(frozen=True)
class YesNo:
    """Reads YES or NO, as the whole answer or behind `tag`."""

    tag: str = ""

    def __call__(self, answer: str) -> bool | None:
        """None where the answer is neither."""
        found = re.search(rf"{re.escape(self.tag)}\W*(yes|no)\b", answer, re.I)
        if found is None or (not self.tag and answer.strip(" .\n").lower() != found[1].lower()):
            return None
        return found[1].lower() == "yes"


@dataclass(frozen=True)
class Endpoint:
    """A model that any OpenAI-compatible server offers. Address and key are read from the
    environment. `dollars`: of a million tokens in and out, for the estimate.
    """

    model: str
    address: str = "OPENAI_BASE_URL"
    key: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_new_tokens: int = 64
    at_once: int = 8
    retries: int = 5
    dollars: tuple[float, float] | None = None

    def client(self):
        """The official client. Raises JudgeError where the package or the key is missing."""
        try:
            from openai import OpenAI
        except ImportError as error:
            raise JudgeError(
                f'the judge {self.model} needs the package openai: pip install "ip_jax[judges]"'
            ) from error
        key = os.environ.get(self.key)
        if not key:
            raise JudgeError(f"the judge {self.model} has no key: set {self.key}")
        return OpenAI(base_url=os.environ.get(self.address), api_key=key, max_retries=self.retries)


@dataclass(frozen=True)
class Judge:
    """`rubric` is what the judge reads, with {prompt}, {completion} and columns of the example in
    braces. `parse` turns its answer into a value, None where it cannot.
    """

    name: str
    rubric: str
    parse: Number | YesNo
    model: Endpoint
    cache: str = "judged.sqlite"

    def __call__(self, example: Mapping[str, Any], completion: str) -> dict[str, Any]:
        """The two columns of one completion. Raises JudgeError as `score_all`."""
        return self.score_all([example], [completion])[0]

    def score_all(
        self, examples: Sequence[Mapping[str, Any]], completions: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The two columns of each completion; what was asked before is read from the cache. Raises
        JudgeError where the endpoint refuses, is not reached, or a rubric's column is missing.
        """
        asked = [self.asks(*pair) for pair in zip(examples, completions, strict=True)]
        with Answers(Path(self.cache)) as answers:
            known = {text: answers.get(self._key(text)) for text in dict.fromkeys(asked)}
            new = [text for text, answer in known.items() if answer is None]
            if new:
                client = self.model.client()
                with ThreadPoolExecutor(self.model.at_once) as threads:
                    found = threads.map(lambda text: self._ask(client, text), new)
                    for text, answer in zip(new, found, strict=True):
                        answers.put(self._key(text), answer)
                        known[text] = answer
        return [self._columns(known[text]) for text in asked]

    def _columns(self, answer: str) -> dict[str, Any]:
        """An answer that cannot be read is no verdict: it is counted, and shown as it is."""
        value = self.parse(answer)
        columns = {self.name: value, f"{self.name}_said": answer}
        if value is None:
            columns[SCORE_ERROR] = f"the judge's answer cannot be read: {answer[:200]!r}"
        return columns

    def asks(self, example: Mapping[str, Any], completion: str) -> str:
        """What the judge reads. Raises JudgeError for a column that the example lacks."""
        users = [turn["content"] for turn in example["messages"] if turn["role"] == "user"]
        values = {**example, "prompt": users[-1], "completion": completion}
        try:
            return self.rubric.format_map(values)
        except KeyError as error:
            raise JudgeError(
                f"the rubric of {self.name} names {error}, which the example {example.get('id')}"
                f" does not have: there is {', '.join(values)}"
            ) from error

    def check(self, example: Mapping[str, Any]) -> None:
        """One call before anything is trained. Raises JudgeError for an answer that cannot be
        read, and as `score_all`.
        """
        found = self(example, "An answer to try the judge with.")
        if found[self.name] is None:
            raise JudgeError(
                f"the judge {self.name} answers {found[f'{self.name}_said']!r}, which"
                f" {self.parse} cannot read: change the rubric or the parser"
            )

    def estimate(self, texts: Sequence[str]) -> str:
        """What judging texts of these lengths costs, in words; tokens by their letters."""
        tokens = sum(len(self.rubric) + len(text) for text in texts) // LETTERS_OF_TOKEN
        out = len(texts) * self.model.max_new_tokens
        said = f"{len(texts)} calls of {self.model.model}, about {tokens} tokens in, {out} out"
        if self.model.dollars is None:
            return said
        dollars = (tokens * self.model.dollars[0] + out * self.model.dollars[1]) / 1e6
        return f"{said}, about ${dollars:.2f}"

    def _key(self, text: str) -> str:
        model = {k: v for k, v in asdict(self.model).items() if k not in ("at_once", "retries")}
        return hashlib.sha256(json.dumps([model, text], sort_keys=True).encode()).hexdigest()

    def _ask(self, client, text: str) -> str:
        from openai import APIConnectionError, APIStatusError

        try:
            answer = client.chat.completions.create(
                model=self.model.model,
                messages=[{"role": "user", "content": text}],
                temperature=self.model.temperature,
                max_tokens=self.model.max_new_tokens,
            )
        except APIConnectionError as error:
            raise JudgeError(
                f"the judge {self.name} is not reached at {client.base_url}: {error}"
            ) from error
        except APIStatusError as error:
            raise JudgeError(
                f"the judge {self.name} refuses: {error.status_code}, {error.message}"
            ) from error
        return answer.choices[0].message.content or ""


class Answers:
    """The cache: one SQLite file, each answer written as it comes, several processes at once."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "Answers":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(self.path, timeout=30)
        self.database.execute("create table if not exists answers (key text primary key, answer)")
        return self

    def __exit__(self, *_) -> None:
        self.database.close()

    def get(self, key: str) -> str | None:
        """The answer, None where it has not been asked for."""
        found = self.database.execute("select answer from answers where key = ?", (key,)).fetchone()
        return found and found[0]

    def put(self, key: str, answer: str) -> None:
        """Stores an answer at once."""
        self.database.execute("insert or replace into answers values (?, ?)", (key, answer))
        self.database.commit()
