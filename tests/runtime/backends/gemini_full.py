"""`gkd` on the host accelerator, whose memory is full in the second step: python gemini_full.py run SPEC ..."""

import torch
from host_accelerator import install

from gkd_dsl.cli.main import main
from gkd_dsl.runtime.step import StepModule

if __name__ == "__main__":
    install()
    forward, calls = StepModule.forward, []

    def full(self, *args, **more):
        calls.append(1)
        if len(calls) > self.plan.stage.accumulate:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *args, **more)

    StepModule.forward = full
    main()
