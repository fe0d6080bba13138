from numpy import float64, int64
from numpy.typing import NDArray

def activation(
    x: int,
    grad: int,
    n: int,
    element_type: int,
    element_bytes: int,
    kind: int,
    out: int,
    instruction_set: int,
    threads: int,
) -> None: ...
def sums_of_squares(
    addresses: NDArray[int64], counts: NDArray[int64], sums: NDArray[float64], instruction_set: int, threads: int
) -> None: ...
def norm(
    x: int,
    rows: int,
    width: int,
    weight: int,
    bias: int,
    epsilon: float,
    centered: bool,
    out: int,
    instruction_set: int,
    threads: int,
) -> None: ...
def norm_gradients(
    x: int,
    grad: int,
    rows: int,
    width: int,
    weight: int,
    epsilon: float,
    centered: bool,
    grad_x: int,
    grad_weight: int,
    grad_bias: int,
    instruction_set: int,
    threads: int,
) -> None: ...
def column_sums(x: int, rows: int, columns: int, stride: int, out: int, instruction_set: int, threads: int) -> None: ...
def combine(a: int, b: int, n: int, product: bool, out: int, instruction_set: int, threads: int) -> None: ...
def rotate(
    x: int,
    rows: int,
    heads: int,
    width: int,
    cos: int,
    sin: int,
    back: bool,
    out: int,
    instruction_set: int,
    threads: int,
) -> None: ...
