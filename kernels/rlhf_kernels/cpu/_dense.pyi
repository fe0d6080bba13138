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
def turn(x: int, rows: int, columns: int, out: int, instruction_set: int, threads: int) -> None: ...
def sum_of_squares(x: int, n: int, instruction_set: int, threads: int) -> float: ...
