#!/usr/bin/env python3
"""Train and evaluate Panoptic SegFormer.

python train_net.py --config-file configs/shapes/panoptic_segformer_shapes.yaml
python train_net.py --config-file ... --num-gpus 8
torchrun --nproc-per-node 2 train_net.py --config-file ...   # GPUs or CPUs
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import logging
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from psf.config import load_config
from psf.inference import optimize_for_inference
from psf.trainer import CONTACT_SHEET, CURVES, Trainer, summary, write_pictures
from psf.weights import Checkpointer, check_weights

logger = logging.getLogger("psf.train_net")


def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config of the command line, check it and freeze it; set up logging and seeds."""
    misplaced = [option for option in args.opts if option.startswith("--")]
    if misplaced:
        raise SystemExit(
            f"{misplaced[0]} comes after KEY VALUE pairs, which must be last on the command line"
        )
    try:
        cfg = load_config(args.config_file, args.opts)
        check_weights(cfg.MODEL.WEIGHTS)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="psf")
    return cfg


def main(args: argparse.Namespace) -> OrderedDict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``; print PQ and the paths of the pictures."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        optimize_for_inference(model)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            write_pictures(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        results = trainer.last_results
    if results and comm.is_main_process():
        report(results, Path(cfg.OUTPUT_DIR))
    return results


def report(results: OrderedDict[str, Any], output_dir: Path) -> None:
    """Print PQ and the paths of the pictures."""
    line = summary(results)
    if line is not None:
        sys.stdout.write(f"{line}\n")
    for name in (CONTACT_SHEET, CURVES):
        if (output_dir / name).is_file():
            sys.stdout.write(f"{output_dir / name}\n")


def run(args: argparse.Namespace) -> None:
    """Run :func:`main` in this process, in a process of torchrun, or in processes it starts."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        main(args)
        torch.distributed.destroy_process_group()
        return
    available = torch.cuda.device_count()
    if args.num_gpus > max(available, 1):
        raise SystemExit(
            f"--num-gpus {args.num_gpus}, but there are {available} CUDA devices. For several CPU "
            "processes use: torchrun --nproc-per-node N train_net.py ..."
        )
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    run(default_argument_parser().parse_args())
