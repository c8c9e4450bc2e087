"""Codes that no file alone can bring about, each with the reason and the test that does."""

WHILE_RUNNING: dict[str, str] = {
    "E0407": "a `--set` of a parameter that the spec lacks; tests/meaning/test_parameters.py",
    "E0420": "a run of a spec whose parameter has no value; tests/cli/test_run_codes.py",
    "E0435": "a library that is not installed, which hangs on the machine; tests/meaning/test_adapters_of_specs.py",
    "E0801": "shapes of tensors on the first batch; tests/runtime/test_step_by_hand.py",
    "E0802": "a loss or a gradient that is not finite; tests/runtime/test_backends.py",
    "E0803": "memory that ran out in a step; tests/runtime/test_backends.py",
    "E0804": "a full disk or a folder that cannot be written; tests/runtime/test_checkpoint.py",
    "E0805": "a checkpoint that is damaged or of another spec; tests/runtime/test_checkpoint.py",
    "E0806": "a run folder that is taken; tests/cli/test_run_codes.py",
    "E0807": "what a run needs and is not there; tests/cli/test_run_codes.py",
    "E0808": "stored outputs that are missing, damaged or of something else; tests/runtime/teachers/test_cached_teachers.py",
}
