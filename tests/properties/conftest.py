"""The tiny models of the method library's tests serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "stdlib_methods"))
