"""One line of JSON for each thing worth knowing; prompts and answers stay out unless the operator asks for them.

Flows in: Python's logging. Flows out: lines on standard error.
"""

from __future__ import annotations

import datetime
import json
import logging
import traceback
from dataclasses import dataclass, field
from typing import Any, TextIO

LOGGER = logging.getLogger("e2llm.server")


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time, level, event, and what was given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = where_from(record.exc_info[1])
        return json.dumps(line, default=str)


def where_from(error: BaseException) -> dict[str, Any]:
    """Type and places of an exception. Not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return {"type": type(error).__name__, "at": [f"{f.filename}:{f.lineno} {f.name}" for f in frames[-8:]]}


def configure_logging(stream: TextIO) -> None:
    """Our lines and uvicorn's, as JSON on `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    for name in ("e2llm.server", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(logging.INFO)


@dataclass
class RequestRecord:
    """What the log will say of one request; filled on the way."""

    request_id: str
    fields: dict[str, Any] = field(default_factory=dict)
