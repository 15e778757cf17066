"""What a calibration has finished, in a file: one that was stopped goes on from there."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from blasst.calibration.measurement import Measurements
from blasst.calibration.result import Candidate
from blasst.files import check_folder, replace_file

_ABOUT = "calibration"


class Kept:
    """Passes that were measured and candidates that were tried."""

    def __init__(self, path: Path | None, made_by: str, measured: Measurements) -> None:
        """Read what is there into `measured`.

        Args:
            path: the file, None: nothing is kept.
            made_by: of the model and everything that is asked.
            measured: what the passes add to.

        Raises:
            ValueError: the file is of another calibration, or cannot be written.
        """
        self._path, self._made_by, self._measured = path, made_by, measured
        self._done: list[list[object]] = []
        self._candidates: list[Candidate] = []
        if path is None:
            return
        check_folder(path.parent)
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it") from None
        if about.get("made_by") != self._made_by:
            raise ValueError(
                f"{path} holds a calibration of another model, or with other options; remove it or "
                "name another file"
            )
        self._measured.restore(arrays, about["measured"])
        self._done = about["done"]
        self._candidates = [Candidate(**one) for one in about["candidates"]]

    def has(self, *step: object) -> bool:
        """Whether this step is done."""
        return list(step) in self._done

    def add(self, *step: object) -> None:
        """This step is done, and what it measured is there."""
        self._done.append(list(step))
        self._write()

    def candidate(self, *asked: object) -> Candidate | None:
        """What came of phase, target, order and heads; None: not tried yet."""
        same = (c for c in self._candidates if (c.phase, c.target, c.order, c.heads) == asked)
        return next(same, None)

    def add_candidate(self, found: Candidate) -> Candidate:
        """It was tried."""
        self._candidates.append(found)
        self._write()
        return found

    def _write(self) -> None:
        if self._path is None:
            return
        arrays, measured = self._measured.kept()
        about = {
            "made_by": self._made_by,
            "done": self._done,
            "candidates": [asdict(one) for one in self._candidates],
            "measured": measured,
        }
        replace_file(self._path, save(arrays, {_ABOUT: json.dumps(about)}))

    def remove(self) -> None:
        """The calibration is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
