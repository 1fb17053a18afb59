"""Log lines as JSON: one object per line, with time, level, event, and the ids of the open span."""

import datetime
import json
import logging
import math
from collections.abc import Callable
from typing import Any

Ids = Callable[[], dict[str, str]]


def no_ids() -> dict[str, str]:
    """Outside of any trace."""
    return {}


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with NaN and infinities, which JSON has not, as null; "nonfinite" names them."""
    bad = [name for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)]
    if not bad:
        return fields
    return {name: None if name in bad else value for name, value in fields.items()} | {"nonfinite": bad}


def json_line(event: str, level: str, ids: dict[str, str], fields: dict[str, Any]) -> str:
    """One line without its end. ts is RFC 3339 in UTC."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"ts": now, "level": level, "event": event, **ids, **finite(fields)}, allow_nan=False)


class JsonFormatter(logging.Formatter):
    """Makes the same lines of what goes through `logging` (our warnings, and other packages')."""

    def __init__(self, ids: Ids = no_ids):
        super().__init__()
        self._ids = ids

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, an exception's traceback in "stack"."""
        fields: dict[str, Any] = {"logger": record.name, "msg": record.getMessage()}
        if record.exc_info and (error := record.exc_info[1]):
            fields |= {"exc_type": type(error).__name__, "exc_msg": str(error)}
            fields["stack"] = self.formatException(record.exc_info)
        return json_line("log", record.levelname.lower(), self._ids(), fields)
