"""Make ``cases/``: the most telling of the recorded numbers, small enough for the repository.

python tests/release/ship_cases.py      # from the project's folder, beside the recordings
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from release_cases import REFERENCE, SHIPPED, SMALL_SEED, arrays, numbers, seeded

# The beginnings of the names that are kept of each file.
KEPT = {
    "small/forward_A": (
        "img_rgb_uint8/0",
        "backbone/2",
        "neck/1",
        "neck/3",
        "pos_enc/3",
        "transformer/enc_layer_1",
        "transformer/dec_layer_",
        "transformer/out_init_reference",
        "location/all_",
        "infer/0/topk_",
        "infer/0/things/mask_tail",
        "infer/0/things/mask_inter/1",
        "infer/0/stuff/mask_tail",
        "infer/0/stuff/mask_inter/1",
        "infer/0/stuff/cls_logits",
        "infer/0/stuff/query_inter/2",
        "infer/0/merge/",
        "infer/0/panoptic",
    ),
    "small/forward_AB": (
        "img_rgb_uint8/",
        "mlvl_masks/",
        "transformer/enc_arg_query_key_padding_mask",
        "transformer/enc_arg_valid_ratios",
        "transformer/enc_layer_1",
        "args/query",
        "location/all_",
        "infer/1/topk_query_index",
        "infer/1/things/mask_tail",
        "infer/1/stuff/mask_tail",
    ),
    "small/loss_A": ("gt/", "lsa/", "grad/"),
    "small/loss_A_alive": ("gt/", "lsa/"),
    "small/loss_A_no_things": ("gt/", "lsa/"),
    "small/loss_B_no_stuff": ("gt/", "lsa/"),
    "merge/crafted_r50": ("in/", "mid/", "out/panoptic"),
    "merge/crafted_pvt_swin": ("in/", "mid/", "out/panoptic"),
    "merge/random_0": ("in/", "mid/", "out/panoptic"),
    "backbones/pvt_v2_tiny": ("in_uint8/", "out/"),
    "backbones/swin_micro": ("in_uint8/", "out/"),
    "misc/pipeline": (
        "test/",
        "train_in/rgb",
        "train_in/masks",
        "train/flip/img",
        "train/flip/masks",
        *(f"train/resize_{way}/{what}" for way in ("up", "down") for what in ("img", "masks")),
        *(f"train/crop{i}/crop" for i in range(4)),
        *(f"train/crop{i}/randint" for i in range(4)),
        *(f"train/crop{i}_then_resize/{what}" for i in range(4) for what in ("img", "masks")),
    ),
    "full/r50": (
        "override/",
        "img_rgb_uint8",
        "all_bbox_preds",
        "cls_scores_last",
        "things/mask_tail",
        "stuff/mask_tail",
        "merge/",
        "panoptic",
        "gt/",
    ),
}
NUMBERS = ("losses", "total", "grad_norms", "grad_total_norm", "clip_total_norm", "assign")
MODELS = ("r50", "r101", "pvtv2b5", "swinl")


def main() -> None:
    for name, kept in KEPT.items():
        chosen = {k: v.numpy() for k, v in arrays(REFERENCE, name).items() if k.startswith(kept)}
        write(name, chosen)
        if (REFERENCE / f"{name}.json").is_file() and not name.startswith(("backbones", "merge")):
            content = numbers(REFERENCE, name)
            pack(name, {k: content[k] for k in (*NUMBERS, "step_delta_norms") if k in content})
    # What is not the seed's of the small model's weights.
    weights = arrays(REFERENCE, "small/state_dict")
    write(
        "small/overrides",
        {
            name: value.numpy()
            for name, value in weights.items()
            if value.is_floating_point() and not value.equal(seeded(SMALL_SEED, name, value.shape))
        },
    )
    pack("misc/resize_sizes", numbers(REFERENCE, "misc/resize_sizes"))
    for model in MODELS:
        content = numbers(REFERENCE, f"keys/{model}")
        for entry in content["entries"].values():
            entry.pop("init", None)
        pack(f"keys/{model}", content)


def write(name: str, values: dict[str, np.ndarray]) -> None:
    path = SHIPPED / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **values)


def pack(name: str, content: dict | list) -> None:
    path = SHIPPED / f"{name}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


if __name__ == "__main__":
    main()
