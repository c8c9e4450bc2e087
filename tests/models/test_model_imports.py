import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
import gkd_dsl.models
for module in pkgutil.walk_packages(gkd_dsl.models.__path__, "gkd_dsl.models."):
    importlib.import_module(module.name)
from gkd_dsl.models.describe import describe, random_init
from gkd_dsl.models.resolve import list_taps
info = describe(sys.argv[1])
list_taps(random_init(info, overrides={"num_hidden_layers": 2}), "s")
try:
    describe("org/nothing", offline=True)
except gkd_dsl.models.errors.ModelError:
    pass
print(sorted(set(sys.modules) & {"torch", "transformers", "numpy", "tokenizers"}))
"""


def test_the_checker_side_imports_neither_torch_nor_transformers(save):
    done = subprocess.run(
        [sys.executable, "-c", CODE, save("bert")], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"
