"""Arithmetic of distillation, and what --dry-run says of it, against what PyTorch counts."""

import contextlib
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from maskdm_fast import cli, ops
from maskdm_fast.diffusion import Denoiser, make_schedule
from maskdm_fast.distill import (
    METHODS,
    Critic,
    CriticHead,
    Generator,
    GuidanceScales,
    Networks,
    falling_levels,
    frozen,
    sid,
)
from maskdm_fast.distill.costs import Pass, evaluations, fake_passes, generator_passes
from maskdm_fast.models import CONFIGS, UViT, UViTConfig
from maskdm_fast.ops import backend
from maskdm_fast.train.config import (
    AnyStage,
    DiffusionConfig,
    MachineConfig,
    PolicyDistillationConfig,
    RegressionConfig,
    RunConfig,
    ScoreDistillationConfig,
)
from maskdm_fast.train.costs import pass_parts, saved_by, total
from maskdm_fast.train.estimate import describe, estimate
from maskdm_fast.train.launches import count_launches
from maskdm_fast.train.plan import plan_of
from maskdm_fast.train.stages.policy import evaluations as policy_evaluations

TINY = UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2, num_classes=3)
EMOJI = CONFIGS["emoji32"]
BATCH = 2
LATE = 10**9
needs_native = pytest.mark.skipif(not backend.has_native(), reason="the native library is not built")


class Update:
    """Losses of a method on new networks, as a stage asks for them."""

    def __init__(self, name: str, config: UViTConfig, *, num_steps: int = 1, trained: str = "all", **options: object):
        self.method, self.config = replace(METHODS[name](), **options), config
        fake = UViT(config)
        if name == "dmd2" and self.method.needs_images:
            fake = Critic(fake, CriticHead(config.dim))
        schedule, shape = make_schedule("cosine"), (config.num_tokens, config.token_dim)
        levels = falling_levels(self.method.input_level, num_steps)
        teacher, fake, student = (
            Denoiser(network, schedule, "v") for network in (UViT(config).requires_grad_(False), fake, UViT(config))
        )
        self.networks = Networks(teacher, fake, Generator(student, shape, levels, trained))
        side = config.image_size
        self._images = torch.zeros(BATCH, side, side, config.channels, dtype=torch.uint8)
        self._labels = torch.zeros(BATCH, dtype=torch.int64) if config.num_classes else None
        self._draw = {"seed": 0, "step": 0, "slots": torch.arange(BATCH)}

    def fake_loss(self) -> Tensor:
        with frozen(self.networks.generator.denoiser.model):
            return self.method.fake_loss(self.networks, self._labels, self._images, **self._draw)["loss"]

    def generator_loss(self) -> Tensor:
        with frozen(self.networks.fake.model):
            return self.method.generator_loss(self.networks, self._labels, images_seen=LATE, **self._draw)["loss"]


def counted(loss: Callable[[], Tensor]) -> int:
    ops.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def kept(loss: Callable[[], Tensor], update: Update) -> int:
    """Bytes that autograd keeps from a forward pass, weights apart."""
    models = (update.networks.teacher.model, update.networks.fake.model, update.networks.generator.denoiser.model)
    own = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held = loss()
    assert held.requires_grad
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own)


@contextlib.contextmanager
def thawed(update: Update, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Tensor]]:
    """The generator's loss as if all three networks were trained by it."""

    @contextlib.contextmanager
    def nothing(*models: object) -> Iterator[None]:
        yield

    with monkeypatch.context() as patch:
        patch.setattr(sid, "frozen", nothing)
        for model in (update.networks.teacher.model, update.networks.fake.model):
            model.requires_grad_(True)
        networks, labels, draw = update.networks, update._labels, update._draw
        yield lambda: update.method.generator_loss(networks, labels, images_seen=LATE, **draw)["loss"]


CASES = [
    ("sid", {}),
    ("sid", {"num_steps": 3}),
    ("sid", {"guidance": GuidanceScales(teacher=2.0, fake=2.0, fake_training=2.0)}),
    ("sid", {"guidance": GuidanceScales(fake=0.0, fake_training=0.0)}),
    ("sida", {}),
    ("sida", {"guidance": GuidanceScales(teacher=2.0, fake=2.0, fake_training=2.0)}),
    ("dmd2", {}),
    ("dmd2", {"num_steps": 2}),
    ("dmd2", {"adversarial": 0.0, "fake_adversarial": 0.0}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_flops_of_updates_are_those_that_pytorch_counts(name, options):
    """Exactly, pass by pass. The closed form is near: it takes a network for products of weights alone, and an encoder,
    here two of three blocks, for half of one."""
    update = Update(name, TINY, **options)
    steps = options.get("num_steps", 1)
    closed = evaluations(update.method, update.networks.generator)
    forward = total(pass_parts(TINY, [(16, 1.0)], BATCH, Pass("network", "none"))).flops
    for loss, passes, said in (
        (update.fake_loss, fake_passes, closed.fake),
        (update.generator_loss, generator_passes, closed.generator),
    ):
        found = counted(loss)
        parts = [pass_parts(TINY, [(16, 1.0)], BATCH, one) for one in passes(update.method, steps, "all")]
        assert sum(total(some).flops for some in parts) == found
        assert found / forward == pytest.approx(said, rel=0.15)


def test_one_of_several_steps_is_trained_for_the_price_of_one():
    method = METHODS["sid"]()
    means = [sum(one.evaluations for one in of(method, 3, "one")) for of in (fake_passes, generator_passes)]
    assert means == [2.0 + 3.0, 1.0 + 3.0 + 2.0 + 2.0]
    update = Update("sid", TINY, num_steps=3, trained="one")
    number = 0
    while update.networks.generator.for_training(None, seed=0, step=number, slots=torch.arange(1)).grad_fn is None:
        number += 1
    assert evaluations(method, update.networks.generator).generator == means[1]


def test_frozen_networks_save_arithmetic_and_memory(monkeypatch):
    """SiD on emoji32: 13 evaluations become 11, and the generator's update keeps 70 % of the bytes."""
    update = Update("sid", EMOJI)
    forward = total(pass_parts(EMOJI, [(64, 1.0)], BATCH, Pass("network", "none"))).flops
    fake, generator = counted(update.fake_loss), counted(update.generator_loss)
    lean = kept(update.generator_loss, update)
    with thawed(Update("sid", EMOJI), monkeypatch) as loss:
        whole = counted(loss)
    with thawed(other := Update("sid", EMOJI), monkeypatch) as loss:
        wasteful = kept(loss, other)
    assert (fake + generator) / forward == pytest.approx(11.0, rel=0.025)
    assert (fake + whole) / forward == pytest.approx(13.0, rel=0.025)
    assert 1.0 - generator / whole == pytest.approx(0.21, abs=0.01)
    assert lean / wasteful == pytest.approx(0.70, abs=0.01)
    # What is kept is what the estimate of the memory counts.
    passes = generator_passes(update.method, 1, "all")
    assert lean == pytest.approx(BATCH * sum(saved_by(EMOJI, 64, one).kept for one in passes), rel=0.03)


def test_distribution_matching_keeps_the_graph_of_the_generator_alone():
    update = Update("dmd2", EMOJI, adversarial=0.0, fake_adversarial=0.0)
    whole = BATCH * saved_by(EMOJI, 64, Pass("generator", "weights")).kept
    assert kept(update.generator_loss, update) == pytest.approx(whole, rel=0.03)
    judged = Update("dmd2", EMOJI)
    encoder = BATCH * saved_by(EMOJI, 64, Pass("fake", "inputs", tap="encoder", head=True)).kept
    assert kept(judged.generator_loss, judged) == pytest.approx(whole + encoder, rel=0.03)


def run_of(stage: AnyStage, **changes: object) -> RunConfig:
    model = replace(EMOJI, num_classes=3) if isinstance(stage, RegressionConfig) and stage.strengths else EMOJI
    return RunConfig(model=model, diffusion=DiffusionConfig(prediction="v"), stage=stage, **changes)


@pytest.mark.parametrize(
    "stage",
    [
        RegressionConfig(),
        RegressionConfig(path="data"),
        RegressionConfig(solver="heun"),
        RegressionConfig(method="progressive", num_steps=4),
        RegressionConfig(method="guided", strengths=(0.0, 4.0)),
    ],
)
def test_evaluations_of_regression_are_those_of_its_configuration(stage):
    plan = plan_of(run_of(stage))
    (update,) = plan.updates
    assert sum(plan.evaluations(update).values()) == stage.evaluations()
    assert [network.name for network in plan.networks if not network.trained] == ["teacher"] * stage.asks_teacher


def test_evaluations_of_a_policy_are_those_of_its_stage():
    stage = PolicyDistillationConfig(num_steps=4, num_policy_updates=2, resample=True)
    plan = plan_of(run_of(stage))
    found = {"policy": 0.0, "value": 0.0}
    for update in plan.updates:
        for name, count in plan.evaluations(update).items():
            found[name] += update.share * count
    assert tuple(found.values()) == policy_evaluations(stage.method())


def test_every_stage_can_be_counted():
    for kind in typing.get_args(AnyStage):
        options = {"method": "progressive", "num_steps": 2} if kind is RegressionConfig else {}
        plan = plan_of(run_of(kind(**options)))
        assert plan.trained[0] is plan.networks[0]
        assert {update.network for update in plan.updates} == {network.name for network in plan.trained}


@needs_native
def test_launches_are_the_mean_of_a_period():
    """A generator's update comes in every second step; one micro-batch, and two."""
    blocks = EMOJI.num_blocks
    counts = {}
    for every in (1, 2):
        counts[every] = count_launches(run_of(ScoreDistillationConfig(fake_updates=every)))
    often, seldom = counts[1].of_step(1), counts[2].of_step(1)
    # Fake: generator, and the network there and back; generator: three there and back.
    assert often["masked_attention"] == (3 + 6) * blocks
    assert seldom["masked_attention"] == (3 + 3) * blocks
    assert (often["sid_loss"], seldom["sid_loss"]) == (2, 1)
    assert (often["adamw_ema"], seldom["adamw_ema"]) == (4, 3)  # the gradient's norm, and the step
    assert counts[1].of_step(3)["masked_attention"] == 3 * often["masked_attention"]


@needs_native
def test_dry_run_tells_what_a_distillation_takes():
    config = run_of(ScoreDistillationConfig(method="dmd2", batch_size=64), machine=MachineConfig(micro_batch_size=32))
    found = estimate(config)
    plan = plan_of(config)
    values = found.parameters
    assert values == plan.network("teacher").values < plan.network("fake").values
    fake, generator = plan.updates
    assert (sum(plan.evaluations(fake).values()), sum(plan.evaluations(generator).values())) == (7.0, 6.0)
    forward = total(pass_parts(EMOJI, [(64, 1.0)], 64, Pass("network", "none"))).flops
    assert found.work.flops / forward == pytest.approx(7.0 + 6.0 / 5, rel=0.05)
    memory = found.memory
    assert memory.total == sum(memory.steady.values()) + sum(memory.passes.values())
    text = describe(config, ("h100",), (2,))
    for words in (
        "emoji32, not read here",
        f"generator, {values:,} parameters, trained and averaged; fake, {plan.network('fake').values:,} parameters, "
        f"trained; teacher, {values:,} parameters, frozen",
        "update of the generator, in one of 5 steps: 3 of the generator, 1 of the teacher, 2 of the fake",
        "ddp",
    ):
        assert words in text
    assert "masking gain" not in text
    late = describe(run_of(ScoreDistillationConfig(method="sida")), ("h100",), (1,))
    assert "counted as from image 200,000 on" in late
    told = describe(run_of(RegressionConfig(method="guided", strengths=(0.0, 4.0))), ("h100",), (1,))
    assert "one that is told its guidance is asked once" in told
    policy = PolicyDistillationConfig(num_steps=2, value="vit", value_width=32)
    text = describe(run_of(policy, precision="bf16"), ("h100",), (1,))
    assert "update of the value, 2 times a step: 4 of the value" in text and "the value is float32" in text


@needs_native
def test_bench_estimates_a_distillation(capsys):
    command = ["bench", "--estimate", "--preset", "emoji32-distill-sid", "--hardware", "h100"]
    assert cli.main(command) == 0
    assert "loss, generator" in capsys.readouterr().out
    assert cli.main([*command, "--mask-ratio", "0.5"]) == 2
    assert "--mask-ratio is for stages of denoising" in capsys.readouterr().err
