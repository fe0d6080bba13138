"""Operators over tensors that stay where they are, written down once and done again with what is in them then.

A decoding step does the same for every token. In a small model it takes longer to say than to compute: to look at
layers, shapes and dtypes, and to make room for results.
"""

from collections.abc import Callable

import torch

from rlhf_kernels.native import done

Operator = Callable[..., torch.Tensor]
Do = Callable[..., torch.Tensor]
"""Does an operator to tensors: ``do(operator, *inputs)``."""


def do_at_once(operator: Operator, *inputs: torch.Tensor) -> torch.Tensor:
    """Return ``operator(*inputs)``."""
    return operator(*inputs)


class Chain:
    """A chain of operators, each of which reads the results of those before it, or views of them."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []

    def do(self, operator: Operator, *inputs: torch.Tensor) -> torch.Tensor:
        """Return ``operator(*inputs)``, without a gradient, and write it down: :meth:`again` renews the result.

        An operator may have a method ``prepared``, which returns where the result for these inputs will be and the
        calls that put it there, or None where it cannot say.
        """
        prepared = operator.prepared(*inputs) if hasattr(operator, "prepared") else None
        if prepared is not None:
            self._calls += prepared[1]
            return done(prepared)
        result = operator(*inputs)
        self._calls.append(lambda: result.copy_(operator(*inputs)))
        return result

    def again(self) -> None:
        """Do the whole chain anew."""
        for call in self._calls:
            call()
