"""Models that compute attention themselves, or pick it from a table of their own."""

import sys
from functools import partial, wraps
from types import ModuleType
from typing import Any, NoReturn

from transformers import PreTrainedModel

from blasst.errors import NotSupportedError
from blasst.hf.layers import INTERFACE, NAME
from blasst.hf.positions import note_positions

_TABLES = "_ATTENTION_CLASSES"
_NAME_A_PART = (
    "(if another part of the whole model does, name that part: "
    f"attn_implementation={{'text_config': {NAME!r}}}, or 'encoder', 'decoder', as its "
    "configuration has it)"
)


def refuse_unreachable_models() -> None:
    """Refuse the former; give the tables an entry that says what they have, for a bare KeyError."""
    check = PreTrainedModel._check_and_adjust_attn_implementation

    @wraps(check)
    def check_reachable(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation == NAME:
            modeling = sys.modules[type(model).__module__]
            _add_entries(modeling)
            _refuse_own_attention(type(model), modeling)
            note_positions(model)
        return check(model, attn_implementation, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = check_reachable


def _refuse_own_attention(kind: type[PreTrainedModel], modeling: ModuleType) -> None:
    """Transformers takes a registered name for any model, and some never look at it."""
    if hasattr(modeling, INTERFACE) or any(name.endswith(_TABLES) for name in vars(modeling)):
        return
    if kind._supports_attention_backend:  # a part of it does
        return
    classes = [thing for thing in vars(modeling).values() if isinstance(thing, type)]
    if any("Attention" in c.__name__ and c.__module__ == modeling.__name__ for c in classes):
        raise NotSupportedError(
            f"attn_implementation is {NAME!r}; {kind.__name__} does not call Transformers' "
            f"attention interface, but computes attention itself {_NAME_A_PART}"
        )


def _add_entries(modeling: ModuleType) -> None:
    for name, table in vars(modeling).items():
        if name.endswith(_TABLES) and isinstance(table, dict) and NAME not in table:
            table[NAME] = partial(_refuse, name, tuple(table))


def _refuse(table: str, known: tuple[str, ...], *_: Any, **__: Any) -> NoReturn:
    raise NotSupportedError(
        f"attn_implementation is {NAME!r}; this model picks its attention from {table}, which has "
        f"{', '.join(known)}, and does not call Transformers' attention interface {_NAME_A_PART}"
    )
