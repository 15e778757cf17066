"""What autograd knows of the operators."""

from typing import Any

import torch
from torch import Tensor

from blasst.errors import NotSupportedError
from blasst.ops.library import CACHES, REPORTS, arguments_of, call, names


def _save_for_backward(
    ctx: Any, inputs: tuple[object, ...], output: tuple[Tensor | None, ...]
) -> None:
    arguments = arguments_of("prefill", inputs)
    out, *reports = output
    reported = dict(zip(REPORTS, reports, strict=True))
    saved = {name: arguments[name] for name in names("prefill_backward") if name in arguments}
    saved |= {"out": out, "lse": reported.pop("lse"), "bits": reported["bits"]}
    ctx.scores = arguments["scores"] or "exact"
    ctx.cache = next((n for n in ("k", "v") if arguments[n].dtype in CACHES), None)
    ctx.may_skip = arguments["test"] != "none"
    ctx.others = {name: value for name, value in saved.items() if not isinstance(value, Tensor)}
    ctx.names = [name for name in saved if name not in ctx.others]
    ctx.save_for_backward(*(saved[name] for name in ctx.names))
    ctx.mark_non_differentiable(*(t for t in reported.values() if t is not None))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.others
    if ctx.scores != "exact":
        raise NotSupportedError(
            f"blasst.attention with scores={ctx.scores!r} has no backward pass: run it under "
            "torch.no_grad(), or pass scores='exact'"
        )
    if ctx.cache is not None:
        raise NotSupportedError(
            f"{ctx.cache} is {saved[ctx.cache].dtype}; blasst.attention over keys or values in 8 "
            "bits has no backward pass: run it under torch.no_grad()"
        )
    if saved["lse"] is None or (ctx.may_skip and saved["bits"] is None):
        raise NotSupportedError(
            "torch.ops.blasst.prefill has a backward pass only with want_lse=True and, where tiles "
            "may be skipped, want_bits=True"
        )
    dout = torch.zeros_like(saved["out"]) if dout is None else dout
    dq, dk, dv, dsinks = call("prefill_backward", dout=dout, dlse=dlse, **saved)
    gradients = {"q": dq, "k": dk, "v": dv, "sinks": None if saved["sinks"] is None else dsinks}
    return tuple(gradients.get(name) for name in names("prefill"))


def _no_decode_backward(*_: object) -> None:
    raise NotSupportedError(
        "blasst.attention with phase='decode' has no backward pass: run it under torch.no_grad(), "
        "or pass phase='prefill'"
    )


def _no_merge_backward(*_: object) -> None:
    raise NotSupportedError(
        "blasst.merge has no backward pass: run it under torch.no_grad(), or attend to all keys in "
        "one call"
    )


def _no_second_backward(*_: object) -> None:
    raise NotSupportedError("blasst.attention has no second derivative")


_LIBRARY = torch.library.Library("blasst", "FRAGMENT")


class _Prefill(torch.autograd.Function):
    """What `torch.library.register_autograd` makes, but cheaper.

    That one asks the operator's schema for each of its 30 arguments, which the schema makes anew
    each time: 0.4 ms a call.
    """

    @staticmethod
    def forward(ctx: Any, keys: torch.DispatchKeySet, *inputs: object) -> tuple[Tensor | None, ...]:
        output = _below_autograd(keys, *inputs)
        _save_for_backward(ctx, inputs, output)
        ctx.inputs = len(inputs)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *_backward(ctx, *gradients)[: ctx.inputs])


def _below_autograd(keys: torch.DispatchKeySet, *inputs: object) -> tuple[Tensor | None, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        below = keys & torch._C._after_autograd_keyset
        return torch.ops.blasst.prefill.default.redispatch(below, *inputs)


def _prefill(keys: torch.DispatchKeySet, *inputs: object) -> tuple[Tensor | None, ...]:
    differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
    return (_Prefill.apply if differentiable else _below_autograd)(keys, *inputs)


_LIBRARY.impl("prefill", _prefill, "Autograd", with_keyset=True)
torch.library.register_autograd("blasst::prefill_backward", _no_second_backward)
torch.library.register_autograd("blasst::decode", _no_decode_backward)
torch.library.register_autograd("blasst::merge", _no_merge_backward)
