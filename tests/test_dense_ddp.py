"""Detection metrics and losses give with two processes what they give with one."""
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch import distributed as dist

from autotimm.losses import FCOSLoss, YOLOXLoss
from autotimm.metrics import MetricManager, default_metrics

# Found and true objects of each image
COUNTS = [(12, 3), (5, 0), (0, 2), (8, 4), (9, 1), (3, 2), (20, 5)]


def item(count: int, **more: Tensor) -> dict[str, Tensor]:
    "An image with some boxes, and their masks."
    corner = torch.randint(0, 30, (count, 2)).float()
    boxes = torch.cat([corner, corner + 10 + torch.randint(0, 20, (count, 2))], 1)
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    x, y = torch.arange(64), torch.arange(64)[:, None]
    return dict(boxes=boxes, labels=torch.randint(0, 2, (count,)),
                masks=(x >= x0) & (x < x1) & (y >= y0) & (y < y1), **more)


def precision(which: list[int]) -> dict[str, float]:
    "The metrics of some images; seven images of which each has its own number of objects."
    torch.manual_seed(0)
    images = [(item(found, scores=torch.rand(found)), item(true)) for found, true in COUNTS]
    for found, true in images:
        near = min(len(found["boxes"]), len(true["boxes"]))
        for k in ("boxes", "labels", "masks"): found[k][:near] = true[k][:near]
    metrics = MetricManager(default_metrics("instance_segmentation"), 2,
                            task="instance_segmentation")
    for i in which: metrics.update("val", [images[i][0]], [images[i][1]])
    return {k: v.item() for k, v in metrics.compute("val").items()}


def gradients(which: slice, grad: bool = True) -> list[Tensor]:
    "The losses of some of four images, the first of them empty, and their gradients if asked for."
    torch.manual_seed(1)
    cls, boxes, one = torch.randn(4, 50, 3), torch.rand(4, 50, 4).cumsum(-1), torch.randn(4, 50)
    labels, true, share = (torch.randint(-6, 3, (4, 50)).clamp(min=-1),
                           torch.rand(4, 50, 4).cumsum(-1), torch.rand(4, 50))
    labels[0] = -1
    given = [o.requires_grad_() for o in (cls, boxes, one)]
    targets = [o[which] for o in (labels, true, share)]
    loss = (FCOSLoss(3)(cls[which], boxes[which], one[which], *targets)["total_loss"]
            + YOLOXLoss(3)(cls[which], one[which], boxes[which], *targets)["total_loss"])
    return [loss.detach(), *(torch.autograd.grad(loss, given) if grad else [])]


def work(rank: int, port: int, out: str) -> None:
    "One of two processes."
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    dealt, alone = precision(list(range(rank, 7, 2))), precision(list(range(7)) if rank == 0
                                                                 else [])
    losses = gradients(slice(2 * rank, 2 * rank + 2))
    # In validation one process may have a batch more, whose loss must not wait for the other.
    if rank == 0:
        with torch.no_grad(): gradients(slice(0, 2), grad=False)
    for o in losses: dist.all_reduce(o)
    if rank == 0: torch.save((dealt, alone, [o / 2 for o in losses]), out)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_are_as_good_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path / "out.pt")), 2)
    dealt, alone, losses = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = precision(list(range(7)))
    assert expected["val/map"] > 0.05 and expected["val/mask_map"] > 0.05
    assert dealt == alone == expected       # four images and three; seven and none
    for ours, one in zip(losses, gradients(slice(0, 4))): torch.testing.assert_close(ours, one)
