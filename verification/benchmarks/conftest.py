def pytest_benchmark_update_machine_info(config, machine_info):
    """The committed baseline says what kind of machine it comes from, not which."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
