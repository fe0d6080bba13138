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
def sum_of_squares(x: int, n: int, instruction_set: int, threads: int) -> float: ...
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
    sums: int,
    instruction_set: int,
    threads: int,
) -> None: ...
def column_sums(x: int, rows: int, columns: int, stride: int, out: int, instruction_set: int, threads: int) -> None: ...
