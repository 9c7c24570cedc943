"""Label Studio's JSON: the tasks that people review, and the annotations that come back.

A task carries the number and the digest of its example, so an annotation finds its way back whatever number Label
Studio gives its task, and one of another project is noticed. See https://labelstud.io/guide/task_format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curator.errors import NotLabelStudio
from curator.types import Review

REVIEW, LABEL, NOTE = "review", "label", "note"
"""The names of the controls in the labelling interface, which results come back under."""

CONFIG = f"""<View>
  <Header value="Should this be trained on?"/>
  <Text name="text" value="$text"/>
  <Text name="about" value="$about"/>
  <Choices name="{REVIEW}" toName="text" choice="single" required="true" showInLine="true">
    <Choice value="{Review.KEEP}" hint="It is fine."/>
    <Choice value="{Review.DROP}" hint="It is bad."/>
    <Choice value="{Review.RELABEL}" hint="Its label is wrong."/>
  </Choices>
  <TextArea name="{LABEL}" toName="text" placeholder="with relabel: what the label should be" maxSubmissions="1"/>
  <TextArea name="{NOTE}" toName="text" placeholder="why" maxSubmissions="1"/>
</View>
"""
"""The labelling interface that belongs to the tasks."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one person said of one task. ``origin`` names this state of it: changed there, it is another."""

    position: int
    example_id: int
    digest: str
    said: Review
    label: str | None
    note: str | None
    actor: str | None
    at: str
    origin: str


def task(example_id: int, digest: str, text: str, about: str, suggested: tuple[Review, float, str] | None) -> object:
    """One task to import into Label Studio.

    Args:
        example_id: its number.
        digest: its digest, as hexadecimal digits.
        text: what is to be read.
        about: facts beside it.
        suggested: a pre-annotation: the word, how sure it is, and whose it is; None for a blind review.
    """
    made: dict[str, object] = {"data": {"example": example_id, "digest": digest, "text": text, "about": about}}
    if suggested:
        said, score, model = suggested
        choice = {
            "id": REVIEW, "from_name": REVIEW, "to_name": "text", "type": "choices", "value": {"choices": [str(said)]},
        }  # fmt: skip
        made["predictions"] = [{"model_version": model, "score": score, "result": [choice]}]
    return made


def read(path: Path) -> Iterator[Annotation]:
    """The annotations of an export ("JSON", not "JSON-MIN"), in the order of the file; skipped ones are left out.

    Raises:
        NotLabelStudio: the file is none, or a task in it is none of curator's.
    """
    try:
        tasks = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise NotLabelStudio(path=path, reason=error) from error
    if not isinstance(tasks, list):
        raise NotLabelStudio(path=path, reason="it is no list of tasks")
    for position, each in enumerate(tasks, start=1):
        try:
            yield from _of_task(position, each)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"task {position} is not one that `curator reviews export` wrote ({type(error).__name__}: {error})"
            raise NotLabelStudio(path=path, reason=reason) from error


def _of_task(position: int, given: Mapping[str, Any]) -> Iterator[Annotation]:
    data = given["data"]
    for annotation in given["annotations"]:
        if annotation.get("was_cancelled") or not (values := _values(annotation["result"])).get(REVIEW):
            continue
        at = str(annotation.get("updated_at") or annotation.get("created_at") or "")
        yield Annotation(
            position=position,
            example_id=int(data["example"]),
            digest=str(data["digest"]),
            said=_word(values[REVIEW]),
            label=values.get(LABEL),
            note=values.get(NOTE),
            actor=_actor(annotation.get("completed_by")),
            at=at,
            origin=f"label-studio/{annotation['id']}/{at}",
        )


def _values(result: list[Mapping[str, Any]]) -> dict[str, str]:
    """What was chosen or written, by the name of its control; of several lines of text all."""
    found = {}
    for each in result:
        value = each["value"]
        words = value.get("choices") or value.get("text") or ()
        text = words if isinstance(words, str) else "\n".join(words)
        if text.strip():
            found[each["from_name"]] = text.strip()
    return found


def _word(given: str) -> Review:
    """Only what the interface offers: nobody undoes a review from there."""
    said = Review(given)
    if said is Review.UNDO:
        raise ValueError(given)
    return said


def _actor(given: object) -> str | None:
    """Label Studio gives a number, or the person."""
    if isinstance(given, Mapping):
        given = given.get("email") or given.get("id")
    return None if given is None else f"label-studio:{given}"
