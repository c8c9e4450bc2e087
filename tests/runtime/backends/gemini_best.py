"""`gkd` on the host accelerator, where each evaluation is worse than the one before: python gemini_best.py run SPEC ..."""

from host_accelerator import install

from gkd_dsl.cli.main import main
from gkd_dsl.runtime.evaluate import Evaluator

if __name__ == "__main__":
    install()
    evaluated = Evaluator.__call__

    def worse(self, names, batches, backend, clock):
        return dict.fromkeys(evaluated(self, names, batches, backend, clock), 1.0 / (1 + clock.step))

    Evaluator.__call__ = worse
    main()
