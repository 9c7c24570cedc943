"""What a pass through the model adds to a why: the words, and the layers where a code has mixed them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from curator.errors import NotExplained, NoTokens
from curator.views.examples import Why
from curator.views.pulls import Driven, Token, Words, by_layer

SECONDS = 300


def explain(known: Why, project: Path, environment: Mapping[str, str]) -> Why:
    """Ask the model, in a process of its own: it needs torch, and runs the user's code.

    Args:
        known: a why of an example that has scores.
        project: the project's directory.
        environment: of this process, with the database's url.

    Raises:
        NoTokens: there are no words to divide the score among.
        NotExplained: the pass failed.
    """
    command = [sys.executable, "-m", "workers.explain", str(known.example_id)]
    there = {**environment, "CURATOR_PROJECT": str(project)}
    captured: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    try:
        done = subprocess.run(command, cwd=project, env=there, timeout=SECONDS, **captured)
    except subprocess.TimeoutExpired:
        raise NotExplained(reason=f"it took longer than {SECONDS} s") from None
    if done.returncode:
        reason = _reason(done.stderr)
        raise NoTokens if reason.startswith(NoTokens.code) else NotExplained(reason=reason)
    answer = json.loads(done.stdout.splitlines()[-1])
    return replace(
        known,
        driven_by=tuple(_with_layers(driven, s, answer["layers"]) for s, driven in enumerate(known.driven_by)),
        words=tuple(_words(driven, s, answer) for s, driven in enumerate(known.driven_by)),
    )


def _reason(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("fix: ")]
    return lines[-1].removeprefix("error ") if lines else "it said nothing"


def _with_layers(driven: Driven, s: int, layers: Sequence[Any]) -> Driven:
    """What was split without the model stays: it is of the stored vector itself."""
    return driven if driven.by_layer else replace(driven, by_layer=by_layer([(n, None, p[s]) for n, p in layers]))


def _words(driven: Driven, s: int, answer: Mapping[str, Any]) -> Words:
    tokens = tuple(Token(at, word, pull_S[s]) for at, (word, pull_S) in enumerate(answer["tokens"]))
    return Words(driven.validation_set, driven.slice, answer["how"], tokens)
