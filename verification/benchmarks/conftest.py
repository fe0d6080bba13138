def pytest_benchmark_update_machine_info(config, machine_info):
    """The committed baseline says what kind of machine it comes from, not which."""
    machine_info.pop("node", None)
