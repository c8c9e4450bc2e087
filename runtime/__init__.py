"""Everything that touches a tensor."""

import logging

# transformers imports torchao where it is installed, and that tells of kernels that this machine has no use for.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
