def whiten(
    x: int,
    mask: int,
    is_double: bool,
    n: int,
    shift_mean: bool,
    epsilon: float,
    out: int,
    instruction_set: int,
    threads: int,
) -> None: ...
