"""The chunks of ColossalAI's own search and manager: python packed_by_gemini.py '[[FOLDER, TASK, MIN, RANGE], ...]'"""

import json
import os
import sys

import torch
import torch.distributed as dist
from colossalai.zero.gemini.chunk import ChunkManager
from colossalai.zero.gemini.chunk.search_utils import search_chunk_configuration

from gkd_dsl.models.describe import describe
from gkd_dsl.runtime.models.load import build


def packed(folder, task, least, reach):
    """The size of all chunks, that of the largest, and how many parameters a byte of them shares its chunk with."""
    model = build(describe(folder, task=task)).to(torch.bfloat16)
    group = dist.group.WORLD
    found, *_ = search_chunk_configuration(model, reach, 1024, min_chunk_size_m=least, process_group=group)
    manager = ChunkManager(found, init_device=torch.device("cpu"))
    parameters = list(model.parameters())
    for parameter in parameters:
        manager.register_tensor(parameter, "fp16_param", 1, group)
    manager.close_all_groups()
    chunks = manager.get_chunks(parameters)
    total = sum(chunk.chunk_size for chunk in chunks)
    counted = sum(manager.get_chunk(parameter).chunk_size for parameter in parameters)
    return int(total), int(max(chunk.chunk_size for chunk in chunks)), counted / total


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(json.dumps([packed(*job) for job in json.loads(sys.argv[1])]))
