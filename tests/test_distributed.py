"""Two processes on a CPU, with the step of the trainer, get the gradient of one."""

import itertools

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from random_input import make_input
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from psf.trainer import TrainStep

DESIGNS = ["joint", "decoupled"]
PARTS = ["backbone", "encoder", "location_decoder", "mask_decoder"]
# Keys of MODEL.PSF.CHECKPOINT, parts of a process's batch.
WAYS = {
    "whole": ([], 1),
    "accumulated": ([], 2),
    "recomputed": (PARTS, 1),
    "both": (PARTS, 2),
}


def batch():
    """Images of several sizes with 3, 0, 9 (more things than queries) and 1 segments."""
    classes = [[0, 1, 3], [], [0, 1, 2, 0, 1, 2, 0, 1, 2], [4]]
    sizes = [(64, 96), (96, 64), (64, 96), (80, 80)]
    shapes = zip(sizes, classes, strict=True)
    return [make_input(*size, c, seed=i) for i, (size, c) in enumerate(shapes)]


def build(cfg, design, checkpoint):
    cfg.MODEL.PSF.MASK_DECODER.NAME = design
    cfg.MODEL.PSF.CHECKPOINT = checkpoint
    torch.manual_seed(0)
    # Double precision, as ReLUs and normalisations of few cells blow up single rounding errors.
    model = build_model(cfg).double().train()
    for key, parameter in model.named_parameters():
        # Offsets start as whole pixels, where the slope of bilinear sampling jumps.
        if "sampling_offsets.bias" in key:
            parameter.data += 0.1 + 0.3 * torch.rand_like(parameter)
    return model


def gradients(model, data, parts):
    """By name, after a step."""
    step = TrainStep(
        model,
        [data],
        torch.optim.SGD(model.parameters(), lr=0.0),
        amp=False,
        clip_norm=None,
        accumulate_steps=parts,
    )
    step.iter = 0
    step._write_metrics = lambda losses, data_time: None
    step.run_step()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}


def work(rank, cfg, metadata, folder):
    """Write what a process of two finds: gradients, and how often they were averaged."""
    torch.set_num_threads(1)
    MetadataCatalog.get(metadata.pop("name")).set(**metadata)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for design, (way, (checkpoint, parts)) in itertools.product(DESIGNS, WAYS.items()):
        model = build(cfg, design, checkpoint)
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)  # as the trainer
        buckets = []

        def count(group, bucket, buckets=buckets):
            buckets.append(bucket.index())
            return default_hooks.allreduce_hook(group, bucket)

        model.register_comm_hook(None, count)
        data = batch()[2 * rank : 2 * rank + 2]
        found[design, way] = gradients(model, data, parts), sorted(buckets)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_gradient_of_two_processes_is_that_of_one(tiny_cfg, tmp_path):
    """However the batches are cut and whatever is computed twice; averaged once a step."""
    expected = {name: gradients(build(tiny_cfg, name, []), batch(), 1) for name in DESIGNS}
    metadata = MetadataCatalog.get(tiny_cfg.DATASETS.TRAIN[0]).as_dict()
    multiprocessing.spawn(work, (tiny_cfg, metadata, str(tmp_path)), nprocs=2)
    for rank in range(2):
        cases = torch.load(tmp_path / f"{rank}.pt")
        assert len(cases) == len(DESIGNS) * len(WAYS)
        for (design, way), (found, buckets) in cases.items():
            assert found.keys() == expected[design].keys()
            norm = torch.cat([g.flatten() for g in expected[design].values()]).norm()
            for key, grad in expected[design].items():
                error = (found[key] - grad).norm()
                assert error < 1e-6 * norm + 1e-5 * grad.norm(), (rank, design, way, key)
            assert buckets == list(range(len(buckets))), "every bucket was sent once"
