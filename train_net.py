#!/usr/bin/env python3
"""Train and evaluate Panoptic SegFormer.

python train_net.py --config-file configs/shapes/panoptic_segformer_shapes.yaml
python train_net.py --config-file ... --num-gpus 8
torchrun --nproc-per-node 2 train_net.py --config-file ...   # GPUs or CPUs
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import contextlib
import logging
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import psf.threads  # isort: skip  # noqa: F401  before torch is loaded

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from psf.config import load_config
from psf.console import log_to
from psf.files import named, one_line, write_text
from psf.inference import optimize_for_inference
from psf.predictor import inference_checkpointer
from psf.run_folder import CONFIG, check_folder, claimed, require_folder
from psf.trainer import CONTACT_SHEET, CURVES, Trainer, summary, write_pictures
from psf.weights import LAST_CHECKPOINT, check_weights

logger = logging.getLogger("psf.train_net")


@one_line()
def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config of the command line, check it and freeze it."""
    misplaced = [option for option in args.opts if option.startswith("--")]
    if misplaced:
        raise SystemExit(
            f"{misplaced[0]} comes after KEY VALUE pairs, which must be last on the command line"
        )
    cfg = load_config(args.config_file, args.opts)
    check_weights(cfg.MODEL.WEIGHTS)
    if args.eval_only:
        check_evaluation(cfg, resume=args.resume)
    else:
        check_folder(cfg.OUTPUT_DIR, resume=args.resume)
    require_folder(cfg.OUTPUT_DIR)
    cfg.freeze()
    return cfg


def check_evaluation(cfg: CfgNode, *, resume: bool) -> None:
    """
    Check what ``--eval-only`` needs.

    Raises:
        ValueError: there are no weights, or no data set.
    """
    if not resume and not cfg.MODEL.WEIGHTS:
        raise ValueError("--eval-only: there are no weights. Set MODEL.WEIGHTS, or add --resume")
    if resume and not Path(cfg.OUTPUT_DIR, LAST_CHECKPOINT).is_file():
        raise ValueError(f"--eval-only --resume: there is no checkpoint in '{cfg.OUTPUT_DIR}'")
    if not cfg.DATASETS.TEST:
        raise ValueError("--eval-only: DATASETS.TEST is empty, name the data sets to evaluate")


def start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Set up logging and seeds; a training also writes its config. As Detectron2's ``default_setup``.
    """
    rank = comm.get_rank()
    # The tables of a training's evaluations are in the folder and in the log.
    log_to(cfg.OUTPUT_DIR, rank=rank, hidden=() if args.eval_only else ("psf.evaluation",))
    logger.info(
        "%s on %s, processes: %d, threads of each: %d. The log is '%s'",
        "Evaluation" if args.eval_only else "Training",
        cfg.MODEL.DEVICE,
        comm.get_world_size(),
        torch.get_num_threads(),
        Path(cfg.OUTPUT_DIR, "log.txt"),
    )
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA
    logger.debug("Environment info:\n%s", collect_env_info())
    logger.debug("Command line arguments: %s", args)
    logger.debug("Running with full config:\n%s", cfg.dump())
    if comm.is_main_process() and not args.eval_only:
        write_text(Path(cfg.OUTPUT_DIR, CONFIG), cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def main(args: argparse.Namespace) -> OrderedDict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``; print PQ and the paths of the pictures."""
    cfg = setup(args)
    results = evaluate(cfg, args) if args.eval_only else train(cfg, args)
    if results and comm.is_main_process():
        report(results, Path(cfg.OUTPUT_DIR))
    return results


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> OrderedDict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS``, or with ``--resume`` the last checkpoint."""
    with one_line():
        start(cfg, args)
        Trainer.check_test_sets(cfg)
        model = Trainer.build_model(cfg).eval()
        checkpointer = inference_checkpointer(cfg, model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        optimize_for_inference(model)
        results: OrderedDict[str, Any] = Trainer.test(cfg, model)
    if comm.is_main_process():
        write_pictures(cfg, model)
        verify_results(cfg, results)
    return results


def train(cfg: CfgNode, args: argparse.Namespace) -> OrderedDict[str, Any] | None:
    """Train; returns the results of the last evaluation."""
    is_main = comm.is_main_process()
    with one_line(), claimed(cfg.OUTPUT_DIR) if is_main else contextlib.nullcontext():
        start(cfg, args)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        with named(cfg.OUTPUT_DIR):
            trainer.train()
        return trainer.last_results


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
