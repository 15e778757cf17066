"""Policies of a model's layers: which tiles their attention may visit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blasst.errors import NotSupportedError
from blasst.hf.layers import entry_of, modules_of_layers
from blasst.hf.masks import require
from blasst.hf.settings import Setting
from blasst.hf.thresholds import POLICY_KEY
from blasst.hf.tracing import module_of
from blasst.ops.library import CACHES
from blasst.policies import Call, Visit, VisitPolicy, from_dict


def set_policy(
    model: nn.Module, policy: VisitPolicy | None, layers: Iterable[int] | None = None
) -> Setting:
    """Say which tiles a model's attention may visit; its thresholds stay as they are.

    A whole model can also carry its policy in its configuration: `blasst_policy`, a mapping with a
    "kind", for example `LlamaConfig(..., blasst_policy={"kind": "bands", "length": 2048})`.

    Args:
        model: runs with `attn_implementation="blasst"`; also wrapped, or a part of a model.
        policy: of these layers; None: what the configuration says.
        layers: default: all that are causal. Others have no policies.

    Returns:
        For a `with` statement, after which the model is as it was before.

    Raises:
        TypeError: something else than a policy.
        ValueError: the model runs another attention, or has no such layer, or the policy is for
            another model.
    """
    if not isinstance(policy, VisitPolicy | None):
        raise TypeError(f"policy is {policy!r}; it must be one, for example blasst.Bands(2048)")
    modules = modules_of_layers(model, layers)
    if policy is not None:
        causal = [module for module in modules if getattr(module, "is_causal", False)]
        if modules and not causal:
            raise NotSupportedError(
                f"{type(model).__name__} has no causal attention layers; policies need them"
            )
        modules = causal
        policy.check(_inside(model))
    setting = Setting(modules)
    for module in modules:
        module.blasst_policy = policy
    return setting


def _inside(model: nn.Module) -> PreTrainedModel:
    """The outermost model of Transformers in a model, or in what wraps it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def visit_of(module: nn.Module, call: Call, causal: bool) -> Visit:
    """`visit_under` the layer's policy, or the configuration's; without one every tile."""
    policy = policy_of(module)
    return Visit() if policy is None else visit_under(policy, module, call, causal)


def visit_under(
    policy: VisitPolicy,
    module: nn.Module,
    call: Call,
    causal: bool,
    longest: Callable[[], Tensor] | None = None,
    *,
    is_packed: bool = False,
) -> Visit:
    """What a policy lets a call visit.

    Args:
        policy: `policy_of` the layer.
        module: the attention layer.
        call: what it is asked.
        causal: whether the call is.
        longest: keys of the longest request, []; default: all that the call has room for.
        is_packed: a request holds several sequences.
    """
    if not causal:
        raise NotSupportedError(
            f"{type(module).__name__} is not causal; blasst_policy needs causal layers"
        )
    if is_packed and policy.chooses_blocks:
        raise NotSupportedError(
            "a policy that chooses blocks is not supported for packed sequences: it would choose "
            "among the keys of all of them"
        )
    if call.key.dtype in CACHES and policy.chooses_blocks:
        raise NotSupportedError(
            "a policy that chooses blocks looks at keys, which a cache in 8 bits has not"
        )
    visit = policy.visit(call)
    keys = call.key.shape[1]
    if visit.longest is not None and keys > visit.longest:
        require(
            (torch.tensor(keys) if longest is None else longest()) <= visit.longest,
            f"blasst_policy is {policy.to_dict()}, which is for at most {visit.longest} keys; a "
            f"request has more (the cache has room for {keys})",
            may_wait=call.phase != "decode",
        )
    return visit


def policy_of(module: nn.Module) -> VisitPolicy | None:
    """What `set_policy` has set, else what the configuration says; None: every tile is visited."""
    policy = vars(module).get("blasst_policy")  # getattr is slow where there is none
    if policy is not None:
        return policy
    entry = _entry_of(module)
    return None if entry is None else from_dict(entry)


def _entry_of(module: nn.Module) -> Any:
    """What the configuration says, the layer's or that of the model around it."""
    if torch.compiler.is_compiling():
        own = getattr(module.config, POLICY_KEY, None)
        return _entry_when_compiled(id(module)) if own is None else own
    return entry_of(module, POLICY_KEY)


@torch.compiler.assume_constant_result
def _entry_when_compiled(identity: int) -> Any:
    return entry_of(module_of(identity), POLICY_KEY)
