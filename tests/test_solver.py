import pytest
import torch
from detectron2.modeling import build_model

from psf.solver import (
    build_optimizer,
    check_reference_world_size,
    full_model_clip_norm,
    scale_to_batch_size,
)


def rates(cfg, model):
    """Learning rate and weight decay of every parameter by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.fixture
def solver_cfg(tiny_cfg):
    tiny_cfg.SOLVER.BASE_LR = 0.01
    tiny_cfg.SOLVER.WEIGHT_DECAY = 0.001
    tiny_cfg.SOLVER.WEIGHT_DECAY_NORM = 0.002
    tiny_cfg.SOLVER.BACKBONE_MULTIPLIER = 0.5
    tiny_cfg.SOLVER.SAMPLING_MULTIPLIER = 0.1
    return tiny_cfg


def test_every_parameter_has_its_rate(solver_cfg):
    model = build_model(solver_cfg)
    found = rates(solver_cfg, model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = {
        "backbone.stem.conv1.weight": (0.005, 0.001),
        "backbone.stem.conv1.norm.weight": (0.005, 0.002),
        "encoder.layers.0.self_attn.sampling_offsets.weight": (0.001, 0.001),
        "encoder.layers.0.self_attn.value_proj.weight": (0.01, 0.001),
        "encoder.layers.0.norm1.weight": (0.01, 0.002),
        "location_decoder.reference_points.bias": (0.001, 0.001),
        "location_decoder.query_embed.weight": (0.01, 0.001),
        "mask_decoder.thing_heads.0.weight": (0.01, 0.001),
    }
    for name, (rate, decay) in expected.items():
        assert found[name] == (pytest.approx(rate), pytest.approx(decay)), name


def test_frozen_parameters_are_left_out(solver_cfg):
    solver_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    model = build_model(solver_cfg)
    assert not any(name.startswith("backbone.stem") for name in rates(solver_cfg, model))


def test_clipping(solver_cfg):
    clip = solver_cfg.SOLVER.CLIP_GRADIENTS
    assert full_model_clip_norm(solver_cfg) is None
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", 0.1
    assert full_model_clip_norm(solver_cfg) == 0.1


def test_detectron2s_own_clipping_still_works(solver_cfg):
    clip = solver_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "value", 1e-3
    model = build_model(solver_cfg)
    optimizer = build_optimizer(solver_cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert max(p.grad.max() for p in model.parameters()) == pytest.approx(1e-3)


def test_optimizer_checkpoints_whose_steps_share_memory_still_load(solver_cfg, tmp_path):
    """Earlier versions kept the step counts of a parameter group as views of one tensor."""
    model = build_model(solver_cfg)
    optimizers = [build_optimizer(solver_cfg, model) for _ in range(2)]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    saved = optimizers[0].state_dict()
    steps = torch.full((len(saved["state"]),), 7.0).unbind()
    for state, step in zip(saved["state"].values(), steps, strict=True):
        state["step"] = step
    torch.save(saved, tmp_path / "optimizer.pth")
    optimizers[1].load_state_dict(torch.load(tmp_path / "optimizer.pth"))
    optimizers[1].step()
    assert {float(state["step"]) for state in optimizers[1].state.values()} == {8.0}


class TestBatchSize:
    @pytest.fixture
    def schedule_cfg(self, solver_cfg):
        solver = solver_cfg.SOLVER
        solver.BASE_LR, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS = 8e-4, 1000, (600,), 10
        solver.CHECKPOINT_PERIOD, solver_cfg.TEST.EVAL_PERIOD = 100, 50
        solver.IMS_PER_BATCH, solver.REFERENCE_BATCH_SIZE = 2, 8
        solver.EMA_DECAY = 0.9
        return solver_cfg

    def test_a_quarter_of_the_images_takes_four_times_the_iterations(self, schedule_cfg):
        scaled = scale_to_batch_size(schedule_cfg)
        solver = scaled.SOLVER
        assert pytest.approx(2e-4) == solver.BASE_LR
        assert pytest.approx(0.9**0.25) == solver.EMA_DECAY
        assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (4000, (2400,), 40)
        assert (solver.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (400, 200)
        assert solver.IMS_PER_BATCH == 2
        assert scale_to_batch_size(scaled) == scaled, "scaling is done once"
        assert schedule_cfg.SOLVER.MAX_ITER == 1000

    @pytest.mark.parametrize("reference", [0, 2])
    def test_nothing_to_scale(self, schedule_cfg, reference):
        schedule_cfg.SOLVER.REFERENCE_BATCH_SIZE = reference
        assert scale_to_batch_size(schedule_cfg) is schedule_cfg

    def test_two_rules_are_one_too_many(self, schedule_cfg):
        schedule_cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
        with pytest.raises(ValueError, match=r"BATCH_SIZE is 8 and .*WORLD_SIZE is 8: both scale"):
            scale_to_batch_size(schedule_cfg)

    def test_a_batch_that_cannot_be_shared(self, schedule_cfg):
        schedule_cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
        check_reference_world_size(schedule_cfg)
        schedule_cfg.SOLVER.REFERENCE_WORLD_SIZE = 2
        schedule_cfg.SOLVER.IMS_PER_BATCH = 4
        check_reference_world_size(schedule_cfg)
        schedule_cfg.SOLVER.IMS_PER_BATCH = 5
        with pytest.raises(ValueError, match=r"BATCH is 5, which is not a multiple of .*, 2:"):
            check_reference_world_size(schedule_cfg)
