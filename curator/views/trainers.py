"""Entries that make an export a dataset of LLaMA-Factory (``dataset_info.json``) or Axolotl (``datasets:``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

LLAMA_FACTORY: Final[Mapping[str, Mapping[str, Any]]] = {
    "text": {"columns": {"prompt": "text"}},
    "prompt,completion": {"columns": {"prompt": "prompt", "response": "completion"}},
    "instruction,input,output": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "conversations": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
}
"""By shape. A classification (``text,label``) is no task of either trainer."""

AXOLOTL: Final[Mapping[str, Mapping[str, Any]]] = {
    "text": {"type": "completion", "field": "text"},
    "prompt,completion": {
        "type": {
            "field_instruction": "prompt",
            "field_output": "completion",
            "format": "{instruction}",
            "no_input_format": "{instruction}",
        }
    },
    "instruction,input,output": {"type": "alpaca"},
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "conversations": {
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
}


def llama_factory(name: str, path: str, shape: str) -> str:
    """``dataset_info.json`` with one dataset; its folder is LLaMA-Factory's ``dataset_dir``."""
    return json.dumps({name: {"file_name": path, **LLAMA_FACTORY[shape]}}, indent=1)


def axolotl(path: str, kind: str, shape: str) -> str:
    """A ``datasets:`` block, relative to the export. ``kind``: json, parquet, or "" for a saved dataset."""
    entry = {"path": path, **({"ds_type": kind} if kind else {}), **AXOLOTL[shape]}
    return "\n".join(["datasets:", *_yaml([entry], "  ")])


def _yaml(value: Any, indent: str) -> list[str]:
    """Nested tables and lists of tables as YAML; leaves as JSON, which YAML contains."""
    if isinstance(value, list):
        lines = [line for item in value for line in _dashed(_yaml(item, indent + "  "), indent)]
        return lines
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}:", *_yaml(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {json.dumps(item)}")
    return lines


def _dashed(lines: list[str], indent: str) -> list[str]:
    return [f"{indent}- {lines[0].lstrip()}", *lines[1:]]
