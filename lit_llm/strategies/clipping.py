"""One rule for gradient norms under every strategy."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients in place so that their joint 2-norm is at most ``max_norm``.

    Gradients are grouped by device mesh first: under FSDP2 with tensor parallel some are DTensors
    of one mesh, some of another and some plain, and torch's own clipping refuses the mixture.
    A norm below the limit leaves the gradients untouched, which saves a pass over them.

    Args:
        parameters: Parameters whose ``grad`` is clipped; those without one are passed over.
        max_norm: The largest norm allowed; ``None`` only measures.

    Returns:
        The norm before clipping, a 0-dim tensor.
    """
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    if not groups:
        return torch.tensor(0.0)
    norms = []
    for group in groups.values():
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    # On CUDA the comparison would wait for the device, which costs more than the pass it saves.
    if max_norm is not None and (total.is_cuda or bool(total > max_norm)):
        for group in groups.values():
            nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
