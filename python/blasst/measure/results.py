"""Results kept one by one in a file, so that a run which was stopped goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blasst.hf.weights import stored


class Results:
    """Finished pieces of work by key, in a file that is added to line by line."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or begin the file.

        Raises:
            ValueError: the file is of an evaluation of something else.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._open(path, fingerprint)
        # Written anew without a line that a killed run left half-written.
        working = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            working.write_text("".join(json.dumps(line) + "\n" for line in whole))
            working.replace(path)
        finally:
            working.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> "Results":
        """What another process keeps in the file; this one must not add to it."""
        results = cls.__new__(cls)
        results._open(path, fingerprint)
        return results

    def _open(self, path: Path, fingerprint: str) -> list[dict[str, Any]]:
        """The lines of the file, which is of this run, or begins now."""
        self._path = path
        begun = {"fingerprint": fingerprint}
        whole = self._read() if path.exists() else []
        if not whole or [set(line) for line in whole] == [{"fingerprint"}]:
            whole = [begun]  # nothing was found yet, of whatever it was to be
        if whole[0] != begun:
            raise ValueError(
                f"{path} holds results of another model, calibration or length; choose another "
                "folder or remove it"
            )
        self._known: dict[str, Any] = {line["key"]: line["value"] for line in whole[1:]}
        return whole

    def _read(self) -> list[dict[str, Any]]:
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def get(self, *key: Any) -> Any | None:
        """What was found for this key, None if nothing yet."""
        return self._known.get(json.dumps(key))

    def put(self, value: Any, *key: Any) -> Any:
        """Keep a result."""
        line = json.dumps({"key": json.dumps(key), "value": value})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[json.dumps(key)] = value
        return value

    def all(self, kind: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Keys that begin with `kind`, without it, and their values."""
        for key, value in self._known.items():
            first, *rest = json.loads(key)
            if first == kind:
                yield tuple(rest), value


def fingerprint(model: PreTrainedModel, *rest: Any) -> str:
    """Changes whenever results would; of each weight tensor it looks at 64 values."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    made_of = hashlib.sha256(json.dumps([config, rest], default=str).encode())
    for part in (part for weights in model.parameters() for part in stored(weights)):
        values = part.flatten()
        some = values[:: max(1, len(values) // 64)].float().cpu()
        made_of.update(some.numpy().tobytes())
    return made_of.hexdigest()
