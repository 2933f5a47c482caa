"""How an operator is made known to torch: schema, implementation, shape rule, FLOP formula."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from flash_attn._checks import check_devices


def define(
    library: torch.library.Library,
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Optional[Callable[..., Any]] = None,
    flops: Optional[Callable[..., int]] = None,
    draws: bool = False,
) -> None:
    """Define operator `name` for every device type.

    Args:
        fake: shape rule; an operator without one is for eager calls only.
        flops: FLOP formula, of the operator's own arguments.
        draws: whether it uses torch's random generator.
    """
    namespace, short_name = name.split("::")
    tags = [torch.Tag.pt2_compliant_tag] if fake is not None else []
    if draws:
        tags.append(torch.Tag.nondeterministic_seeded)
    library.define(short_name + schema, tags=tuple(tags))
    library.impl(short_name, implementation, "CompositeExplicitAutograd")
    # Results take no part in autograd. torch's default would let them, and only warn in backward.
    library.impl(short_name, torch.library.fallthrough_kernel, "Autograd")
    if fake is not None:
        names = tuple(inspect.signature(implementation).parameters)
        torch.library.register_fake(name, _on_one_device(name, names, fake), lib=library)
    if flops is not None:
        # Not register_flop_formula: torch 2.4's takes overloads, which its counter never looks up.
        flop_registry[getattr(getattr(torch.ops, namespace), short_name)] = flops


def define_shared(library: torch.library.Library, name: str, *rule: Any, **options: Any) -> Any:
    """Define an operator by a name that FlashAttention-3's extension has, and return it.

    Other packages carry that extension (xformers): who comes first keeps the name. This package's
    operator then has an underscore in front of it, and works all the same.
    """
    namespace, short_name = name.split("::")
    operators = getattr(torch.ops, namespace)
    if hasattr(operators, short_name):
        short_name = f"_{short_name}"
    define(library, f"{namespace}::{short_name}", *rule, **options)
    return getattr(operators, short_name)


def _on_one_device(
    name: str, arguments: tuple[str, ...], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """`fake`, after the rule that all tensors are on the first one's device.

    Real calls have it among their checks, but one "meta" tensor is enough to bring a call here.
    """

    @wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(arguments, args)), **kwargs}
        tensors = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        check_devices(name, **tensors)
        return fake(*args, **kwargs)

    return checked
