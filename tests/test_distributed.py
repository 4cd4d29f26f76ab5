"""Two processes on a CPU, with the step of the trainer, get the gradient of one."""

import itertools

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model
from learning_options import FOR_DECOUPLED, LEARNING_OPTIONS
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from training_step import build_exact_model, odd_batch, take_step

DESIGNS = {
    "joint": [],
    "decoupled": [],
    "joint, all options": LEARNING_OPTIONS["all"],
    "decoupled, all options": FOR_DECOUPLED["all but points"],
}
PARTS = ["backbone", "encoder", "location_decoder", "mask_decoder"]
# Values of MODEL.PSF.CHECKPOINT and SOLVER.ACCUMULATE_STEPS.
WAYS = {"plain": ([], 1), "recomputed and accumulated": (PARTS, 2)}


def build(cfg, design, checkpoint):
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.PSF.MASK_DECODER.NAME", design.partition(",")[0], *DESIGNS[design]])
    cfg.MODEL.PSF.CHECKPOINT = checkpoint
    return build_exact_model(cfg)


def work(rank, cfg, metadata, folder):
    """Save the gradients that a process of two finds, and how often they were averaged."""
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
        data = odd_batch()[2 * rank : 2 * rank + 2]
        gradients, _ = take_step(model, data, accumulate_steps=parts)
        gradients = {name.removeprefix("module."): grad for name, grad in gradients.items()}
        found[design, way] = gradients, sorted(buckets)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_gradient_of_two_processes_is_that_of_one(tiny_cfg, tmp_path):
    """However batches are split and whatever is recomputed; averaged once per step."""
    expected = {
        design: take_step(build(tiny_cfg, design, []), odd_batch())[0] for design in DESIGNS
    }
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
