"""Models that pick their attention from a table of their own, not through the interface."""

import sys
from functools import partial, wraps
from types import ModuleType
from typing import Any, NoReturn

from transformers import PreTrainedModel

from blasst.errors import NotSupportedError
from blasst.hf.layers import NAME


def refuse_in_class_tables() -> None:
    """Give such tables an entry that says what they have, in place of a bare KeyError."""
    check = PreTrainedModel._check_and_adjust_attn_implementation

    @wraps(check)
    def check_with_entries(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation == NAME:
            _add_entries(sys.modules[type(model).__module__])
        return check(model, attn_implementation, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = check_with_entries


def _add_entries(modeling: ModuleType) -> None:
    for name, table in vars(modeling).items():
        if name.endswith("_ATTENTION_CLASSES") and isinstance(table, dict) and NAME not in table:
            table[NAME] = partial(_refuse, name, tuple(table))


def _refuse(table: str, known: tuple[str, ...], *_: Any, **__: Any) -> NoReturn:
    raise NotSupportedError(
        f"attn_implementation is {NAME!r}; this model picks its attention from {table}, which has "
        f"{', '.join(known)}, and does not call Transformers' attention interface (if another part "
        f"of it does, name that part: attn_implementation={{'text_config': {NAME!r}}})"
    )
