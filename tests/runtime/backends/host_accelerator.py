"""Gemini on a machine without a GPU, for tests: its chunks, hooks and optimiser are the real ones, on the host.

It saves no memory: what Gemini takes for device memory is host memory too.
"""

import contextlib
import sys

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.zero.gemini.chunk.chunk import Chunk


class NoStream:
    def synchronize(self):
        pass

    def wait_stream(self, *_):
        pass


class HostAccelerator(CpuAccelerator):
    """Goes by the name of cuda, by which Gemini tells what is on the device from what is offloaded."""

    @property
    def name(self):
        return "cuda"

    def get_current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def synchronize(self, *_):
        pass

    def current_stream(self, *_):
        return None

    def stream(self, _):
        return contextlib.nullcontext()

    def Stream(self, *_, **__):  # noqa: N802
        return NoStream()

    def reset_peak_memory_stats(self, *_):
        pass

    def max_memory_allocated(self, *_):
        return 0

    def memory_allocated(self, *_):
        return 0


def install():
    """Make it the accelerator of this process."""
    print("host accelerator: Gemini runs on the CPU, and saves no memory", file=sys.stderr)
    close_chunk = Chunk.close_chunk

    def close_on_host(self):
        close_chunk(self)
        if self.cuda_shard is None and self.cpu_shard is not None and not self.is_gathered:
            self.cuda_shard = self.cpu_shard

    def move_nowhere(self, device, force_copy=False, non_blocking=False):
        assert not self.is_gathered
        if not self.optim_sync_flag:
            self._Chunk__paired_shard_move(non_blocking=non_blocking)
            self.optim_sync_flag = True
        elif self.cuda_shard is None:
            self.cuda_shard = self.cpu_shard

    Chunk.close_chunk, Chunk.shard_move = close_on_host, move_nowhere
    set_accelerator(HostAccelerator())
