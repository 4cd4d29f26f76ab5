#!/usr/bin/env python3
"""Inference of the whole model: time, memory and FLOPs, by stage and compared to others.

python benchmarks/model.py                                # R50 at 640 x 640, prints a table
python benchmarks/model.py --size 800 1333 --backbone Swin-L --output benchmarks/results
python benchmarks/model.py --plain ../before --ways "psf float32" "plain float32"

Each way runs in its own process, and the ways take turns within each round. Figures are medians
over the rounds, ratios are medians of each round's ratio. Hugging Face's Mask2Former takes part if
transformers is installed. --plain adds another checkout of this project, with its extension built.

Weights are random. Ours are scaled so that about sixty queries are candidates and their masks cover
about a seventh of the image, as post-processing depends on both. Mask2Former's are not scaled; no
segment reaches its threshold, so its post-processing does the least work possible.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psf  # isort: skip  # noqa: F401  before torch is loaded (psf.threads)

import torch
from cpu_time import environment
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/coco/panoptic_segformer_R50_24ep.yaml"

PVT = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
# The paper's model with other backbones: differences from the config above.
BACKBONES: dict[str, list[Any]] = {
    "R50": [],
    "PVTv2-B0": [*PVT, "MODEL.TIMM.NAME", "pvt_v2_b0"],
    "PVTv2-B2": [*PVT, "MODEL.TIMM.NAME", "pvt_v2_b2"],
    "PVTv2-B5": [*PVT, "MODEL.TIMM.NAME", "pvt_v2_b5"],
    "Swin-L": [
        *("MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.SWIN.EMBED_DIM", 192, "MODEL.SWIN.DEPTHS", [2, 2, 18, 2]),
        *("MODEL.SWIN.NUM_HEADS", [6, 12, 24, 48]),
    ],
}

# Ways of this project: keys of MODEL.PSF.TEST.
FAST = {"PRECISION": "bfloat16", "MASK_DECODER_LAYERS": 2}
OWN_WAYS: dict[str, dict[str, Any]] = {
    "psf float32": {},
    "psf float32 compiled": {"COMPILE": True},
    "psf bfloat16": {"PRECISION": "bfloat16"},
    "psf fast, not compiled": FAST,
    "psf fast": {**FAST, "COMPILE": True},
    "psf fast, CUDA graphs": {**FAST, "COMPILE": True, "PAD_TO": 64},
}
PLAIN = "plain float32"
PEERS = {
    "Mask2Former float32": torch.float32,
    "Mask2Former bfloat16": torch.bfloat16,
}
NO_POST = ", no post-processing"
WAYS = [*OWN_WAYS, PLAIN, *PEERS, *(name + NO_POST for name in PEERS)]

# Names of weights, and in older checkouts.
RENAMED = {"encoder.": "pixel_encoder.", "cross_attn.mask_head.": "cross_attn."}

# Numbers of candidates, and fraction of the image that a mask covers, after scaling the weights.
THINGS, STUFF, COVER = 40, 20, 1 / 7


def own_model(backbone: str, device: str, test_keys: dict[str, Any]) -> nn.Module:
    """Build the imported checkout's model, with random weights."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from psf import add_psf_config

    cfg = get_cfg()  # older checkouts have no psf.load_config
    add_psf_config(cfg)
    cfg.merge_from_file(str(CONFIG), allow_unsafe=False)
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, *BACKBONES[backbone]])
    for key, value in test_keys.items():
        cfg.MODEL.PSF.TEST[key] = value
    torch.manual_seed(0)
    return build_model(cfg).eval()


@torch.no_grad()
def scale_heads(model: Any, image: Tensor) -> None:
    """Scale heads so that each layer has a realistic number of candidates and size of masks."""
    from psf.modeling.mask_decoder import MatchedQueries
    from psf.modeling.runtime import valid_sizes

    decoder = model.mask_decoder
    maps, valid_shapes = model.extract_features(model.preprocess_images([{"image": image}]))
    memory, locations, outputs = model.transformer(maps, *valid_sizes(maps, valid_shapes))
    queries = MatchedQueries(
        *(
            [torch.arange(n, device=image.device)]
            for n in (locations.query.shape[1], len(decoder.stuff_query.weight))
        )
    )
    classes = decoder.predict_classes(outputs, locations, last_only=False)
    masks = decoder.predict_masks(
        outputs, locations, memory, valid_shapes, queries, last_only=False
    )
    for i, layer in enumerate(decoder.layers):
        things, stuff = (logits[i][0] for logits in classes)
        for head, logits, number in (
            (decoder.thing_heads[i], things.amax(-1), THINGS),
            (decoder.stuff_heads[i], stuff, STUFF),
        ):
            _rescale(head, logits, 2.0, 1 - number / len(logits), math.log(0.3 / 0.7))
        values = torch.cat([layers[i][0] for layers in masks]).flatten()[::97]
        _rescale(layer.cross_attn.mask_head.mask_proj, values, 3.0, 1 - COVER, 0.0)


def _rescale(linear: nn.Linear, values: Tensor, spread: float, part: float, at: float) -> None:
    """Scale a layer to results of a given spread, a given part of which is below ``at``."""
    factor = spread / values.std()
    shift = at - factor * values.quantile(part)
    linear.weight *= factor
    linear.bias.copy_(factor * linear.bias + shift)


def mask2former(device: str) -> tuple[nn.Module, Any]:
    """Hugging Face's Mask2Former with a ResNet-50 and 133 classes, and its post-processor."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        ResNetConfig,
    )

    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, id2label={i: str(i) for i in range(133)}, num_queries=100
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).to(device).eval()
    return model, Mask2FormerImageProcessor()


class Stages:
    """Times and peak memory of the parts of our model."""

    MODULES = ("backbone", "input_proj", "encoder", "location_decoder")
    DECODING = ("forward", "predict_classes", "predict_masks")

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure the parts of the model in this context."""
        modules = {name: getattr(self.model, name, None) for name in self.MODULES}
        modules["encoder"] = modules["encoder"] or self.model.pixel_encoder  # older checkouts
        owners = [(module, "forward", name) for name, module in modules.items()]
        owners += [(self.model.mask_decoder, name, "mask_decoder") for name in self.DECODING]
        for owner, method, stage in owners:
            setattr(owner, method, self._timed(getattr(owner, method), stage))
        try:
            yield
        finally:
            for owner, method, _ in owners:
                delattr(owner, method)

    def _timed(self, call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            reset_peak()
            start = now()
            result = call(*args, **kwargs)
            self.seconds[stage] = self.seconds.get(stage, 0) + now() - start
            self.peaks[stage] = max(self.peaks.get(stage, 0), peak_mb())
            return result

        return timed


def now() -> float:
    """Seconds, after the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """Reset the peak of memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Peak MB of tensors on a GPU, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 / 1e6 for x in lines if x.startswith("VmHWM"))


def own_call(way: str, args: argparse.Namespace, image: Tensor) -> tuple[Any, Callable[[], Any]]:
    """Our model, and a function that predicts ``image`` (3, H, W), 0..255, on the device."""
    model = own_model(args.backbone, args.device, OWN_WAYS.get(way, {}))
    weights = torch.load(args.weights)
    if hasattr(model, "pixel_encoder"):
        for new, old in RENAMED.items():
            weights = {name.replace(new, old): value for name, value in weights.items()}
    model.load_state_dict(weights)
    if way != PLAIN:
        from psf.inference import optimize_for_inference

        optimize_for_inference(model)
    return model, lambda: model([{"image": image}] * args.batch_size)


def peer_call(way: str, args: argparse.Namespace, image: Tensor) -> Callable[[], Any]:
    """A function that predicts with Mask2Former."""
    model, processor = mask2former(args.device)
    dtype = PEERS[way.removesuffix(NO_POST)]
    batch = (image[None] / 255).expand(args.batch_size, -1, -1, -1)
    sizes = [tuple(args.size)] * args.batch_size

    def call() -> Any:
        with nullcontext() if dtype == torch.float32 else torch.autocast(args.device, dtype):
            outputs = model(pixel_values=batch)
        if way.endswith(NO_POST):
            return outputs
        return processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)

    return call


@torch.inference_mode()
def serve(way: str, args: argparse.Namespace) -> None:
    """Predict once per line of the standard input; answer each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # all other output
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(3, *args.size, generator=generator)
    model = None
    if way in OWN_WAYS or way == PLAIN:
        model, call = own_call(way, args, image.to(args.device))
    else:
        call = peer_call(way, args, image.to(args.device))
    for _ in range(2):
        result = call()
    facts: dict[str, Any] = {}
    if model is not None:
        infos = result[0]["panoptic_seg"][1]
        facts["segments"] = len(infos)
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        stages = Stages(model) if line == "stages\n" and model is not None else None
        with nullcontext() if stages is None else stages.watch():
            reset_peak()
            cpu, start = time.process_time(), now()
            call()
            wall = now() - start
            answer: dict[str, Any] = {"wall": wall, "cpu": time.process_time() - cpu}
            answer["peak_mb"] = peak_mb()
        if stages is not None:
            rest = wall - sum(stages.seconds.values())
            answer["stages"] = {**stages.seconds, "post-processing": rest}
            answer["peaks_mb"] = {**stages.peaks, "post-processing": answer["peak_mb"]}
        print(json.dumps(answer), file=answers)


class Way:
    """A process that predicts on request."""

    def __init__(self, name: str, argv: list[str], plain: Path | None) -> None:
        self.name = name
        environment = dict(os.environ)
        own = plain if name == PLAIN else ROOT
        environment["PYTHONPATH"] = f"{own}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        self.process = subprocess.Popen(
            [sys.executable, __file__, *argv, "--serve", name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def run(self, what: str = "run") -> dict[str, Any]:
        """Predict once; returns wall-clock and CPU seconds, peak memory, optionally stages."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"'{self.name}' failed; see the messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Network(nn.Module):
    """Our model from an image to classes, for fvcore."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        """(1, 3, H, W) to tensors."""
        from psf.modeling.runtime import valid_sizes

        maps, valid_shapes = self.model.extract_features([image[0]])
        memory, locations, outputs = self.model.transformer(maps, *valid_sizes(maps, valid_shapes))
        classes = self.model.mask_decoder.predict_classes(outputs, locations, last_only=True)
        return [memory.features, *classes]


def flops(backbone: str, size: list[int]) -> dict[str, float]:
    """
    Count multiply-adds in 1e9 by stage (fvcore), and parameters in 1e6.

    Without masks, whose number depends on the image, and without the sampling of deformable
    attention, about 1 % of the total, which fvcore cannot trace.
    """
    from fvcore.nn import FlopCountAnalysis

    model = own_model(backbone, "cpu", {})

    def attention(inputs: list[Any], outputs: list[Any]) -> int:
        (*_, queries, _), (*_, keys, _) = (inputs[i].type().sizes() for i in (0, 1))
        channels = math.prod(inputs[0].type().sizes()) // queries
        return int(2 * queries * keys * channels)

    count = FlopCountAnalysis(Network(model), torch.rand(1, 3, *size))
    count = count.set_op_handle("aten::scaled_dot_product_attention", attention)
    count = count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with unittest.mock.patch("psf.layers.ms_deform_attn.ms_deform_attn_fused", _no_samples):
        by_module = count.by_module()
    stages = (*Stages.MODULES, "mask_decoder")
    result = {}
    for stage in stages:
        own = f"model.{stage}"
        called = {name for name in by_module if name == own or name.startswith(f"{own}.")}
        # The mask decoder is not called itself: what its outermost parts count.
        direct = by_module[own] or sum(by_module[name] for name in _outermost(called, by_module))
        result[stage] = round(direct / 1e9, 2)
    result["total"] = round(count.total() / 1e9, 2)
    result["parameters, 1e6"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    return result


def _no_samples(value: Tensor, shapes: Any, points: Any, offsets: Tensor, logits: Any) -> Tensor:
    """Zeros of the shape of the deformable attention's result (N, Q, M * D)."""
    return offsets.new_zeros(*offsets.shape[:2], value.shape[2] * value.shape[3])


def _outermost(names: set[str], counts: dict[str, int]) -> list[str]:
    """Names with a count that are not inside another one with a count."""
    counted = [name for name in names if counts[name]]
    return [n for n in counted if not any(n.startswith(f"{other}.") for other in counted)]


def machine(device: str, threads: int) -> dict[str, Any]:
    """Machine, commit and versions."""
    peer = ["transformers"] if importlib.util.find_spec("transformers") else []
    facts = {**environment("torch", *peer), "threads": threads, "load": os.getloadavg()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def available(args: argparse.Namespace) -> list[str]:
    """The requested ways that can run on this machine."""
    names = args.ways or WAYS
    if args.plain is None:
        names = [name for name in names if name != PLAIN]
    if args.device != "cuda":
        names = [name for name in names if "CUDA" not in name]
    peers = args.backbone == "R50" and importlib.util.find_spec("transformers")
    return [name for name in names if peers or not name.startswith("Mask2Former")]


def measure(ways: list[Way], rounds: int) -> list[dict[str, Any]]:
    """One row per way: medians, and the median ratio of its time to the first way's."""
    answers: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            answers[way.name].append(way.run())
    first = answers[ways[0].name]
    rows = []
    for way in ways:
        own = answers[way.name]
        row: dict[str, Any] = {"way": way.name, **way.facts}
        for key in ("wall", "cpu"):
            row[f"{key}_ms"] = round(1e3 * statistics.median(a[key] for a in own), 1)
        row["peak_mb"] = round(max(a["peak_mb"] for a in own))
        ratios = [a["wall"] / b["wall"] for a, b in zip(own, first, strict=True)]
        row["times_first"] = round(statistics.median(ratios), 2)
        row["wall_ms_range"] = [round(1e3 * f(a["wall"] for a in own), 1) for f in (min, max)]
        if way.name == PLAIN or (way.name in OWN_WAYS and "COMPILE" not in OWN_WAYS[way.name]):
            detailed = [way.run("stages") for _ in range(rounds)]
            row["stages_ms"] = {
                stage: round(1e3 * statistics.median(d["stages"][stage] for d in detailed), 1)
                for stage in detailed[0]["stages"]
            }
            row["stages_peak_mb"] = {k: round(v) for k, v in detailed[-1]["peaks_mb"].items()}
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default: 2)")
    parser.add_argument("--backbone", choices=BACKBONES, default="R50")
    parser.add_argument("--size", type=int, nargs=2, default=[640, 640], metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all")
    parser.add_argument("--plain", type=Path, help="another checkout of the project")
    parser.add_argument("--output", type=Path, help="folder for a JSON file of the results")
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args)
        return
    torch.set_num_threads(args.threads)
    facts = machine(args.device, args.threads)
    print(json.dumps(facts, indent=1))
    counts = flops(args.backbone, args.size)
    print(json.dumps(counts, indent=1))
    with tempfile.TemporaryDirectory() as folder:
        model = own_model(args.backbone, args.device, {})
        generator = torch.Generator().manual_seed(0)
        scale_heads(model, 255 * torch.rand(3, *args.size, generator=generator).to(args.device))
        weights = f"{folder}/weights.pth"
        torch.save(model.state_dict(), weights)
        del model
        argv = [*sys.argv[1:], "--weights", weights]
        ways = [Way(name, argv, args.plain) for name in available(args)]
        rows = measure(ways, args.rounds)
        for way in ways:
            way.process.stdin.close()  # type: ignore[union-attr]
            way.process.wait()
    for row in rows:
        print(
            f"{row['way']:42} {row['wall_ms']:8.1f} ms  cpu {row['cpu_ms']:8.1f} ms  "
            f"x{row['times_first']:5.2f}  {row['peak_mb']:6d} MB  {row.get('stages_ms', '')}"
        )
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "_" for c in facts.get("gpu") or facts["cpu"])
        size = "x".join(map(str, args.size))
        batch = f"_batch{args.batch_size}" if args.batch_size > 1 else ""
        path = args.output / f"model_{args.device}_{name}_{args.backbone}_{size}{batch}.json"
        case = {"backbone": args.backbone, "size": args.size, "batch_size": args.batch_size}
        content = {"machine": facts, **case, "multiply_adds_1e9": counts, "ways": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
