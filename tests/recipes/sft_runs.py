"""What the tests of fine-tuning share: command lines, and data of their own."""

import json
from pathlib import Path
from typing import Any

LORA = ("--model.adapter.method=lora", "--model.adapter.r=4", "--model.adapter.dropout=0.1")


def arguments(tiny_chat: Path, output: Path, *extra: str) -> list[str]:
    """Command line of a tiny run."""
    return [f"--config={tiny_chat / 'sft.yaml'}", f"--output_dir={output}", *extra]


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
