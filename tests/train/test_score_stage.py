"""A step of score distillation under an engine: the mathematics of `maskdm_fast.distill`, and nothing besides."""

import math
from dataclasses import replace

import pytest
import torch

from maskdm_fast import distill
from maskdm_fast.train import PRESETS
from maskdm_fast.train.config import RunConfig, ScoreDistillationConfig
from maskdm_fast.train.generation import generate
from maskdm_fast.train.metrics import Meter, TrainingDivergedError
from maskdm_fast.train.pieces import Held
from maskdm_fast.train.stages import ScoreDistillationStage, build_stage
from maskdm_fast.train.stages.parts import Trained
from tests.train.by_hand import STEPS, WORLD, ScoreByHand, build, take_steps, teacher_of

CASES = {
    "sid": {"method": "sid"},
    "sid, two steps, one trained": {"num_steps": 2, "trained_steps": "one"},
    "sid, two steps, classes with lsg": {"num_steps": 2, "guidance": "lsg", "guidance_scale": 2.0, "num_classes": 3},
    "sid, another recipe": {
        "fake_updates": 2,
        "fake_lr": 3e-3,
        "max_grad_value": 0.05,
        "max_grad_norm": 0.2,
        "weight_decay": 0.1,
        "betas": (0.5, 0.9),
        "fake_betas": (0.0, 0.99),
        "weighting": "karras",
        "level_draw": "uniform",
        "alpha": 0.5,
    },
    "sid, the teacher is guided": {"guidance": "teacher", "guidance_scale": 3.0, "num_classes": 3},
    "sid, an unconditional fake network": {"guidance": "zero", "num_classes": 3},
    "sida": {"method": "sida", "freeze_images": 4, "adversarial_from": 8},
    "dmd2": {"method": "dmd2", "fake_updates": 2, "num_classes": 3, "input_level": 10.0, "hflip": 0.5},
    "dmd2 without a discriminator": {"method": "dmd2", "fake_updates": 1, "adversarial": 0.0, "fake_adversarial": 0.0},
}

AT_ONCE = {
    "sid": {},
    "sida": {"freeze_images": 0, "adversarial_from": 0},
    "dmd2": {"fake_updates": 1, "input_level": 10.0},
}
"""Methods whose parts all count from the first step on."""


@pytest.fixture
def make(make_student):
    """`make_student`, with the number of classes."""

    def make(num_classes: int = 0, **changes) -> RunConfig:
        config = make_student(**changes)
        return replace(config, model=replace(config.model, num_classes=num_classes))

    return make


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_steps_are_the_mathematics(make, changes):
    config = make(**changes)
    stage, hand = build(config), ScoreByHand(config)
    rows = take_steps(stage, config)
    trained = 0
    for step, row in enumerate(rows):
        wanted = hand.step(step)
        trained += "generator_loss" in wanted
        for name, value in wanted.items():
            torch.testing.assert_close(row[name], value, rtol=1e-5, atol=0.0)
        assert ("generator_loss" in row) == ("generator_loss" in wanted), step
    every = config.stage.fake_updates or 1
    assert trained == (3 if config.stage.method == "sida" else STEPS // every)
    groups = stage.pieces()
    ema = dict(zip(dict(hand.student.named_parameters()), hand.optimizers[hand.student].ema_parameters(), strict=True))
    for group, tensors in {
        "model": hand.student.state_dict(),
        "ema": ema,
        "fake_model": hand.fake.state_dict(),
    }.items():
        assert groups[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(groups[group][name], tensor, rtol=1e-5, atol=1e-6, msg=f"{group} {name}")
    assert int(groups["optimizer"]["step.head.weight"]) == trained
    head = "network.head.weight" if config.stage.method == "dmd2" and config.stage.needs_images else "head.weight"
    assert int(groups["fake_optimizer"][f"step.{head}"]) == STEPS


@pytest.mark.parametrize("method", ["sid", "sida", "dmd2"])
def test_micro_batches_are_the_batch(make, method):
    """5 images in pieces of 2, 2 and 1."""
    config = make(method=method, batch_size=5, lr=1e-4, **AT_ONCE[method])
    split = replace(config, machine=replace(config.machine, micro_batch_size=2))
    whole, parts = (take_steps(build(each), each, 0, 2) for each in (config, split))
    for first, second in zip(whole, parts, strict=True):
        assert first.keys() == second.keys() and len([name for name in first if name.startswith("distance/")]) == 6
        assert sum(float(value[1]) for value in first.values() if isinstance(value, tuple)) == 5
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["sid", "dmd2"])
def test_activation_checkpointing_changes_nothing(make, method):
    config = make(method=method, fake_updates=1, num_steps=2, input_level=10.0)
    checkpointed = replace(config, machine=replace(config.machine, activation_checkpointing=True))
    rows = []
    for each in (config, checkpointed):
        stage, calls = build(each), []
        for network in (stage._teacher.model, stage._fake.module, stage._generator.module):
            block = next(module for module in network.modules() if type(module).__name__ == "Block")
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        rows.append((take_steps(stage, each, 0, 2), len(calls)))
    assert rows[1][0] == rows[0][0]
    assert rows[1][1] > 1.4 * rows[0][1]  # what has a backward pass is computed twice


def test_bf16(make):
    """Products in 16 bits: near the steps of float32, which stay the precision of what is trained."""
    config = make(num_steps=2)
    short = replace(config, precision="bf16")
    stage = build(short)
    assert {parameter.dtype for parameter in stage._teacher.model.parameters()} == {torch.bfloat16}
    (exact, _), (found, _) = take_steps(build(config), config, 0, 2), take_steps(stage, short, 0, 2)
    assert 0 < abs(float(found["loss"] - exact["loss"])) < 0.05 * float(exact["loss"])
    for tensors in stage.pieces().values():
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("method", ["sid", "sida", "dmd2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_network_of_an_update_has_gradients_and_changes(make, method, precision, monkeypatch):
    """And all of it has: the casts of a call without gradients do not stand in for those of one with."""
    machine = {"activation_checkpointing": True, "micro_batch_size": 2, "precision": precision}
    config = make(method=method, num_steps=2, trained_steps="one", **machine, **AT_ONCE[method])
    stage, touched = build(config), []
    networks = {"teacher": stage._teacher.model, "fake": stage._fake.module, "generator": stage._generator.module}
    assert not any(parameter.requires_grad for parameter in networks["teacher"].parameters())
    for name, network in networks.items():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: touched.append(name))

    def values() -> dict[str, list]:
        return {name: [p.tolist() for p in network.parameters()] for name, network in networks.items()}

    updates = []
    for name, player in (("fake", stage._fake), ("generator", stage._generator)):

        def step(lr, name=name, real=player.engine.step):
            idle = [network for other, network in networks.items() if other != name]
            assert all(parameter.grad is None for network in idle for parameter in network.parameters())
            assert set(touched) == {name} and len(touched) == 2 * len(list(networks[name].parameters()))
            before, found = values(), real(lr)
            assert [other for other, weights in values().items() if weights != before[other]] == [name]
            updates.append(name)
            touched.clear()
            return found

        monkeypatch.setattr(player.engine, "step", step)
    take_steps(stage, config, 0, 2)
    assert updates == ["fake", "generator"] * 2
    for network in networks.values():
        assert all(parameter.grad is None for parameter in network.parameters())
    assert all(p.requires_grad for name in ("fake", "generator") for p in networks[name].parameters())


@pytest.mark.parametrize("changes", [CASES[name] for name in ("sid, another recipe", "sida", "dmd2")])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_goes_on_from_pieces_bit_for_bit(make, changes, stop):
    config = make(**changes)
    whole = build(config)
    rows = take_steps(whole, config)
    first = build(config)
    take_steps(first, config, 0, stop)
    state = {group: {name: tensor.clone() for name, tensor in part.items()} for group, part in first.pieces().items()}
    second = build(config)
    second.load(Held(state))
    assert take_steps(second, config, stop) == rows[stop:]
    wanted, found = whole.pieces(), second.pieces()
    assert found.keys() == wanted.keys() == {"model", "ema", "optimizer", "fake_model", "fake_optimizer"}
    for group, tensors in wanted.items():
        assert found[group].keys() == tensors.keys()
        assert all(torch.equal(found[group][name], tensor) for name, tensor in tensors.items())


class Told:
    """Stands for an engine, and notes what it is told."""

    def __init__(self, name: str, engine, log: list[str]) -> None:
        self.__dict__.update(name=name, engine=engine, log=log)

    def __getattr__(self, name):
        found = getattr(self.engine, name)
        if name in ("backward", "step", "rest", "wake", "load"):
            return lambda *arguments: (self.log.append(f"{self.name} {name}"), found(*arguments))[1]
        return found


def test_idle_networks_rest(make):
    """Between its steps each of them, from the beginning, and in a run that goes on from the first step."""
    config, log = make(fake_updates=2, micro_batch_size=2), []
    built = build(config)

    def told() -> ScoreDistillationStage:
        players = [
            Trained(Told(name, player.engine, log), player.module)
            for name, player in (("generator", built._generator), ("fake", built._fake))
        ]
        return ScoreDistillationStage(config, *players, built._teacher, WORLD)

    stage = told()
    take_steps(stage, config, 0, 2)
    pieces = {group: {name: tensor.clone() for name, tensor in part.items()} for group, part in stage.pieces().items()}
    told().load(Held(pieces))
    both = ["generator rest", "fake rest"]
    updates = [
        [f"{name} {what}" for what in (*["backward"] * 2, "wake", "step", "rest")] for name in ("fake", "generator")
    ]
    assert log == [*both, *updates[0], *updates[0], *updates[1], *both, "generator load", "fake load", *both]


def test_fp16_skips_what_overflows(make):
    """Each network by its own loss scale, from 2^16 on; a step of which a part is void counts as skipped."""
    config, meter = make(precision="fp16", fake_updates=2), Meter(WORLD)
    stage, skips, whole = build(config), 0, 0
    players = {"fake_loss_scale": stage._fake, "loss_scale": stage._generator}
    for step in range(28):
        before = {name: [p.tolist() for p in player.module.parameters()] for name, player in players.items()}
        (row,) = take_steps(stage, config, step, step + 1)
        voids = []
        for name, player in players.items():
            assert (name in row) == (name == "fake_loss_scale" or step % 2 == 1)
            if name in row:
                changed = [p.tolist() for p in player.module.parameters()] != before[name]
                voids.append(not changed)
                assert changed == bool(player.engine._loss_scale.scale == row[name])
        assert bool(row["skipped"]) == any(voids)
        skips += any(voids)
        whole += step % 2 == 1 and not any(voids)
        meter.update(row, step + 1)
    assert skips > 0 and whole > 0
    meter.check()
    means = meter.means()
    assert means["skipped_steps"] == skips and math.isfinite(means["generator_loss"])
    assert means["loss_scale"] == float(row["loss_scale"]) < 2.0**16


def test_a_generator_that_makes_no_images_any_more_has_no_loss(make):
    config, meter = make(), Meter(WORLD)
    stage = build(config)
    with torch.no_grad():
        stage._generator.module.head.bias.fill_(torch.nan)
    (row,) = take_steps(stage, config, 0, 1)
    assert row["finite_share"] == 0 and row["generator_loss"].isnan()
    meter.update(row, 1)
    with pytest.raises(TrainingDivergedError, match="generator_loss became NaN or infinite at step 1"):
        meter.check()


def test_a_generator_that_makes_some_images_learns_from_those(make, monkeypatch):
    """Micro-batches weigh what they have: of 1, 2 and 2 images, the first makes none."""
    config = make(batch_size=5, micro_batch_size=2)
    stage = build(config)
    real, calls = distill.Generator.for_training, []

    def for_training(generator, labels, **draw):
        calls.append(1)
        images = real(generator, labels, **draw)
        return torch.where((draw["slots"] == 0)[:, None, None], torch.nan, images)

    monkeypatch.setattr(distill.Generator, "for_training", for_training)
    (row,) = take_steps(stage, config, 0, 1)
    assert len(calls) == 6
    assert float(row["finite_share"]) == pytest.approx(0.8)
    assert all(torch.isfinite(value).all() for value in row.values() if not isinstance(value, tuple))
    assert all(p.isfinite().all() for player in (stage._fake, stage._generator) for p in player.module.parameters())


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("method", ["sid", "sida", "dmd2"])
def test_an_image_that_overflows_in_the_generator_costs_an_update_at_most(make, monkeypatch, method, micro_batch_size):
    """With the clipping of imagenet64-dmd2, too. What overflows is the network, so its derivative is no number."""
    options = {"micro_batch_size": micro_batch_size, "max_grad_norm": 10.0, "weight_decay": 0.0, **AT_ONCE[method]}
    config = make(method=method, **options)
    stage, real = build(config), distill.Generator._noise

    def noise(generator, *arguments, **draw):
        return torch.where((draw["slots"] == 1)[:, None, None], 1e38, real(generator, *arguments, **draw))

    before = [parameter.clone() for parameter in stage._generator.module.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(distill.Generator, "_noise", noise)
        (row,) = take_steps(stage, config, 0, 1)
    assert row["finite_share"] == 0.75 and row["generator_loss"].isfinite() and row["generator_grad_norm"].isfinite()
    for player in (stage._fake, stage._generator):
        assert all(parameter.isfinite().all() for parameter in player.module.parameters())
    kept = [torch.equal(a, b) for a, b in zip(before, stage._generator.module.parameters(), strict=True)]
    assert sum(kept) > 0.8 * len(kept)
    take_steps(stage, config, 1, 2)
    assert not any(map(torch.equal, before, stage._generator.module.parameters()))


def test_no_preset_can_lose_its_weights_to_an_image():
    stages = [preset().stage for preset in PRESETS.values() if isinstance(preset(), RunConfig)]
    score = [stage for stage in stages if isinstance(stage, ScoreDistillationConfig)]
    assert len(score) > 10 and all(stage.max_grad_value is not None for stage in score)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_previews_are_samples_of_the_average(make, num_classes):
    config = make(num_steps=2, num_classes=num_classes)
    stage = build(config)
    take_steps(stage, config)
    tensors = {which: stage.pieces()[which] for which in ("ema", "model")}
    wanted = {which: generate(config, found, 5, device=WORLD.device) for which, found in tensors.items()}
    assert torch.equal(stage.preview(5), wanted["ema"]) and not torch.equal(wanted["ema"], wanted["model"])
    if num_classes:
        labels = torch.arange(5) % 3
        assert torch.equal(stage.preview(5, labels=labels), wanted["ema"])
        assert not torch.equal(stage.preview(5, labels=labels.flip(0)), wanted["ema"])


def test_learning_rates_warm_up_together(make):
    stage = build(make(lr=1e-3, fake_lr=4e-3, warmup_images=16))
    assert [stage.lr(step) for step in range(5)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert [stage.fake_lr(step) for step in range(5)] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3])


def test_a_fake_update_alone_costs_less(make):
    """SiD: 4 evaluations of a network, and 7 more where the generator is updated."""
    config = make(fake_updates=2)
    flops = [build(config).flops_per_image(step) for step in range(4)]
    assert flops[:2] == flops[2:] and flops[1] / flops[0] == pytest.approx(11 / 4, rel=0.1)


def test_what_cannot_be_built(make):
    with pytest.raises(ValueError, match=r"cuda_graph .*not distillation; leave out --cuda-graph"):
        build(make(cuda_graph=True))
    for options in ({}, {"method": "dmd2", "adversarial": 0.0, "fake_adversarial": 0.0}):
        with pytest.raises(ValueError, match=r"hflip is 0\.5, but method (sid|dmd2) has no discriminator and"):
            build(make(hflip=0.5, **options))
    config = make()
    with pytest.raises(ValueError, match="a distillation needs a teacher"):
        build_stage(config, WORLD, None, None)
    teacher = teacher_of(config)
    other = replace(teacher, config=replace(teacher.config, model=replace(config.model, dim=32)))
    with pytest.raises(ValueError, match=r"another network than its teacher teacher: dim 32 -> 16"):
        build_stage(config, WORLD, None, other)
    for name, value in (("schedule", "linear"), ("prediction", "eps")):
        diffusion = replace(config.diffusion, **{name: value})
        other = replace(teacher, config=replace(teacher.config, diffusion=diffusion))
        with pytest.raises(ValueError, match=f"{name} {value}"):
            build_stage(config, WORLD, None, other)
