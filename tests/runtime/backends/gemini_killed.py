"""`gkd` on the host accelerator, killed in the backward of a step: python gemini_killed.py RANK STEP run SPEC ..."""

import os
import signal
import sys

from colossalai.zero import GeminiDDP
from host_accelerator import install

from gkd_dsl.cli.main import main

if __name__ == "__main__":
    rank, step = sys.argv[1:3]
    del sys.argv[1:3]
    install()
    ACCUMULATE = 2
    reduced = GeminiDDP.grad_handle
    begun = [0]
    backward = GeminiDDP.backward

    def counted(self, loss):
        begun[0] += 1
        backward(self, loss)

    def killed(*arguments, **more):
        if os.environ["RANK"] == rank and begun[0] == ACCUMULATE * int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return reduced(*arguments, **more)

    GeminiDDP.backward, GeminiDDP.grad_handle = counted, staticmethod(killed)
    main()
