"""A step of distillation by regression under an engine: the mathematics of `maskdm_fast.distill`, nothing besides."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskdm_fast import distill, testing
from maskdm_fast.diffusion import Denoiser, Guidance
from maskdm_fast.models import UViT
from maskdm_fast.ops import backend
from maskdm_fast.optim import AdamWEMA
from maskdm_fast.train.config import DiffusionConfig, RegressionConfig, RunConfig
from maskdm_fast.train.metrics import Meter
from maskdm_fast.train.pieces import Held
from maskdm_fast.train.stages import Batch, RegressionStage, build_stage
from maskdm_fast.train.stages.parts import evaluation_flops
from maskdm_fast.train.weights import Weights
from maskdm_fast.train.world import World
from tests.train import test_waits
from tests.train.regression_toys import CASES, TOLD, WORLD, batch_of, counted, make_run, teacher_of, train


@pytest.fixture
def make(make_config):
    return functools.partial(make_run, make_config)


def method_of(config: RunConfig, told_teacher: bool = False) -> Callable[..., dict]:
    """What the options mean, in words of `maskdm_fast.distill`."""
    stage = config.stage
    shared = {"patch_size": config.model.patch_size, "guidance": Guidance(stage.guidance), "hflip": stage.hflip}
    clip = 1.0 if stage.predicts == "v" else stage.clip  # the teacher is of eps there
    shared |= {"strengths": stage.strengths, "told_teacher": told_teacher, "clip": clip}
    shared |= {} if stage.weight is None else {"weight": stage.weight}
    if stage.method == "progressive":
        strata = stage.batch_size if stage.even_levels else None
        return distill.ProgressiveDistillation(**shared, num_steps=stage.num_steps, num_strata=strata)
    if stage.method == "guided":
        method = distill.GuidedDistillation(**shared)
        if stage.level_draw is None:
            return method
        return replace(method, timesteps=replace(method.timesteps, kind=stage.level_draw))
    mapping = distill.StepMapping(1, stage.num_stages)
    return distill.ConsistencyDistillation(**shared, mapping=mapping, solver=stage.solver, huber=stage.huber)


class ByHand:
    """The same without an engine: plain calls of the method and of the optimizer."""

    def __init__(self, config: RunConfig, teacher: Weights) -> None:
        self.config, stage = config, config.stage
        schedule = config.diffusion.noise_schedule(config.model)
        networks = [UViT(config.model), UViT(config.model)]
        for network in networks:
            network.load_state_dict(teacher.tensors)
        self.network = networks[0] if stage.strengths is None else distill.GuidedNetwork(networks[0])
        self.student = Denoiser(self.network, schedule, config.diffusion.prediction)
        self.teacher = Denoiser(networks[1], schedule, teacher.config.diffusion.prediction)
        if stage.path == "data":
            self.teacher = None
        self.method = method_of(config)
        self.optimizer = AdamWEMA(
            self.network.parameters(),
            lr=stage.lr,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            ema_decay=stage.ema_decay,
            max_grad_norm=1.0,
        )

    def step(self, step: int) -> dict:
        config, batch = self.config, batch_of(self.config, step)
        draw = {"seed": config.seed, "step": step, "slots": batch.slots}
        labels = batch.labels if config.model.num_classes else None
        if config.stage.label_drop:
            labels = distill.networks.drop_labels(labels, config.stage.label_drop, **draw)
        out = self.method(self.student, self.teacher, batch.images, labels, **draw)
        out["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "loss": out["loss"].detach(),
            "distance": out["distance_per_image"].mean(),
            "grad_norm": self.optimizer.grad_norm.clone(),
        }


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_steps_are_the_mathematics(make, changes):
    config, teacher = make(**changes)
    stage, hand = build_stage(config, WORLD, None, teacher), ByHand(config, teacher)
    for step, row in enumerate(train(stage, config)):
        wanted = hand.step(step)
        assert float(wanted["grad_norm"]) > 1e-4
        for name, value in wanted.items():
            torch.testing.assert_close(row[name], value, rtol=1e-5, atol=0.0, msg=name)
        bins = torch.stack([value for name, value in row.items() if name.startswith("distance/")])
        assert float(bins[:, 1].sum()) == 4
        torch.testing.assert_close(bins[:, 0].sum() / 4, wanted["distance"])
    groups = stage.pieces()
    ema = dict(zip(dict(hand.network.named_parameters()), hand.optimizer.ema_parameters(), strict=True))
    for group, tensors in {"model": hand.network.state_dict(), "ema": ema}.items():
        assert groups[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(groups[group][name], tensor, rtol=1e-5, atol=1e-6, msg=f"{group} {name}")


@pytest.mark.parametrize("changes", [CASES[name] for name in ("guided", "progressive", "consistency")])
def test_micro_batches_are_the_batch(make, changes):
    """5 images in pieces of 2, 2 and 1, with the blocks computed again in the backward pass."""
    config, teacher = make(**changes, batch_size=5)
    machine = replace(config.machine, micro_batch_size=2, activation_checkpointing=True)
    rows = []
    for each in (config, replace(config, machine=machine)):
        stage = build_stage(each, WORLD, None, teacher)
        (network,) = [module for module in stage._engine.model.modules() if isinstance(module, UViT)]
        assert network.activation_checkpointing == each.machine.activation_checkpointing
        rows.append(train(stage, each, 0, 2))
    for whole, parts in zip(*rows, strict=True):
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", [CASES[name] for name in ("guided", "progressive", "consistency of a teacher")])
@pytest.mark.parametrize("stop", [0, 2])
def test_goes_on_from_pieces_bit_for_bit(make, changes, stop):
    config, teacher = make(**changes)
    whole, first, second = (build_stage(config, WORLD, None, teacher) for _ in range(3))
    rows = train(whole, config)
    train(first, config, 0, stop)
    state = {group: {name: tensor.clone() for name, tensor in part.items()} for group, part in first.pieces().items()}
    second.load(Held(state))
    for row, wanted in zip(train(second, config, stop), rows[stop:], strict=True):
        assert all(torch.equal(row[name], value) for name, value in wanted.items())
    for group, tensors in whole.pieces().items():
        assert all(torch.equal(second.pieces()[group][name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("changes", [CASES[name] for name in ("guided", "progressive", "consistency")])
def test_bf16_has_all_gradients(make, changes):
    """A network that gives its own targets is asked without gradients first: no rounded weight of that may stay."""
    config, teacher = make(**changes)
    moments = []
    for precision in ("fp32", "bf16"):
        stage = build_stage(replace(config, precision=precision), WORLD, None, teacher)
        train(stage, config, 0, 1)
        optimizer = stage.pieces()["optimizer"]
        moments.append({name: tensor for name, tensor in optimizer.items() if name.startswith("exp_avg.")})
    exact, found = moments
    for name, tensor in exact.items():
        if float(tensor.norm()) > 1e-6:  # the keys' biases have none
            assert float((found[name] - tensor).norm()) < 0.3 * float(tensor.norm()), name


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_flops_are_those_of_all_evaluations(make, changes, monkeypatch):
    config, teacher = make(**changes)
    stage = build_stage(config, WORLD, None, teacher)
    with counted(monkeypatch) as seen:
        train(stage, config, 0, 1)
    assert stage.flops_per_image(0) == sum(seen) / config.stage.batch_size * evaluation_flops(config)
    assert stage.tokens_per_image(0) == config.model.num_tokens + config.model.num_extras


@pytest.mark.skipif(not backend.has_native(), reason="the reference backend looks at values on the CPU, to check them")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_reads_no_values(make, changes):
    config, teacher = make(**changes, micro_batch_size=2)
    stage, meter = build_stage(config, WORLD, None, teacher), Meter(WORLD)
    slots = WORLD.micro_batches(4, 2)
    for step, guard in enumerate((contextlib.nullcontext(), test_waits.NoWait())):
        whole = batch_of(config, step)
        parts = [Batch(whole.images[part], whole.labels[part], part) for part in slots]
        with guard:
            meter.update(stage.step(parts, step), step + 1)
    meter.check()
    assert meter.means()["distance"] > 0


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, which fake tensors on it need")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_copies_nothing_between_host_and_device(make, changes, monkeypatch):
    """All of it, on fake tensors on a GPU. The first step copies tables there and makes the optimizer's state."""
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: False)  # it asks the driver
    monkeypatch.setattr(torch.Tensor, "backward", test_waits.backward)
    monkeypatch.setattr(torch.nn.Module, "to", test_waits.to_fake_cuda)
    config, teacher = make(**changes)
    world = World(torch.device("cuda", 0))
    schedule = config.diffusion.noise_schedule(config.model)  # checks its values, which fake tensors do not have
    monkeypatch.setattr(DiffusionConfig, "noise_schedule", lambda config, model: schedule)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, meter = build_stage(config, world, None, teacher), Meter(world)
        whole = batch_of(config, 0)
        batch = Batch(*(tensor.to(world.device) for tensor in (whole.images, whole.labels, whole.slots)))
        for step, guard in enumerate((contextlib.nullcontext(), testing.NoTransfer())):
            with guard:
                values = stage.step([batch], step)
                meter.update(values, step + 1)
    assert values["loss"].device == world.device


@pytest.mark.parametrize("latent_bound", [None, 4.5])
def test_targets_of_another_prediction_have_a_bound(make, latent_bound):
    """Those of a teacher of eps at the noisy end of the cosine schedule, where 1 / alpha is 20,000."""
    told = {"strengths": TOLD, "method": "guided", "teacher_predicts": "eps"}
    latents = {} if latent_bound is None else {"latent_scale": 1.0, "latent_bound": latent_bound, "hflip": 0.0}
    bound = 1.0 if latent_bound is None else latent_bound
    for options, wanted in (
        ({"predicts": "v"}, bound),
        ({"predicts": "x0"}, bound),
        ({"predicts": "v", "clip": 2.0}, 2.0),
        ({"predicts": "eps"}, None),
        ({}, None),
        ({"predicts": "x0", "teacher_predicts": "v"}, None),
    ):
        config, teacher = make(**{**told, **options}, **latents)
        stage = build_stage(config, WORLD, None, teacher)
        method, (_, network) = stage._loss.func, stage._loss.args
        assert method.clip == wanted
        xt = torch.linspace(-3, 3, 2 * 16 * 12).view(2, 16, 12)
        here = distill.regression.Instant.at(network.schedule, torch.full((2,), 999))
        largest = float(method.estimate(network, xt, here, torch.tensor([0, 1]), torch.ones(2)).abs().max())
        if network.prediction == "eps":
            assert largest > 100 if wanted is None else largest <= wanted


class Wrapped(torch.nn.Module):
    """Stands for what an engine puts around a network, which prepares for a backward pass."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, []

    def forward(self, *arguments, **keywords):
        self.calls.append(torch.is_grad_enabled())
        return self.network(*arguments, **keywords)


def test_an_engine_is_asked_only_for_what_has_a_backward_pass(make):
    config, teacher = make(**CASES["consistency"], micro_batch_size=2)
    stage = build_stage(config, WORLD, None, teacher)
    network = stage._engine.model
    stage._engine.model = wrapped = Wrapped(network)
    stage = RegressionStage(config, stage._engine, network, None, False, WORLD)
    train(stage, config, 0, 1)
    assert wrapped.calls == [True, True]


def test_a_student_begins_as_its_teacher(make):
    config, teacher = make(**CASES["guided"])
    tensors = dict(build_stage(config, WORLD, None, teacher).pieces()["model"])
    assert not tensors.pop("strength_embed").any()
    assert tensors.keys() == {f"network.{name}" for name in teacher.tensors}
    assert all(torch.equal(tensors[f"network.{name}"], tensor) for name, tensor in teacher.tensors.items())
    start = teacher_of(teacher.config, {name: 2.0 * tensor for name, tensor in teacher.tensors.items()})
    found = build_stage(config, WORLD, start, teacher).pieces()["model"]["network.head.weight"]
    assert torch.equal(found, start.tensors["head.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "progressive", "num_steps": 4, "teacher_predicts": "eps"},
            "first distil the teacher into a student",
        ),
        ({"method": "progressive", "num_steps": 501}, "num_steps is 1002, want 1 to 1000"),
        ({"method": "progressive", "num_steps": 4, "cuda_graph": True}, "cuda_graph records denoising only"),
        ({"sampling_levels": (100.0,)}, r"the sampling levels are \[100.0\], want falling ones between 80 and 0\.0064"),
        ({"sampling_levels": (0.5, 1e-3), "schedule": "flow", "path": "data"}, "falling ones between 80 and 0.002"),
        ({"teacher_stage": RegressionConfig()}, "the teacher teacher: it comes from regression-distillation"),
    ],
)
def test_what_cannot_be_distilled(make, changes, message):
    config, teacher = make(**changes)
    with pytest.raises(ValueError, match=message):
        build_stage(config, WORLD, None, teacher)


def test_a_run_that_is_not_the_student_of_its_teacher(make):
    config, teacher = make(**CASES["progressive"])
    wrong = {
        "a student of teacher has prediction v, but the run x0": {
            "diffusion": replace(config.diffusion, prediction="x0")
        },
        "a student of teacher has schedule cosine, but the run linear": {
            "diffusion": replace(config.diffusion, schedule="linear")
        },
        "another network than its teacher teacher: dim 16 -> 32": {"model": replace(config.model, dim=32)},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            build_stage(replace(config, **changes), WORLD, None, teacher)
    with pytest.raises(ValueError, match="a distillation needs a teacher"):
        build_stage(config, WORLD, None, None)
