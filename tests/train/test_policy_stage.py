"""A step of DxMI under an engine: the mathematics of `maskdm_fast.distill`, and nothing besides."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskdm_fast import distill, ops, random
from maskdm_fast.diffusion import Denoiser, patchify
from maskdm_fast.distill.dxmi_rollout import draw
from maskdm_fast.models import UViT
from maskdm_fast.optim import AdamWEMA, LambEMA
from maskdm_fast.random import Stream
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.generation import generate
from maskdm_fast.train.pieces import Held, Part
from maskdm_fast.train.stages import PolicyDistillationStage, build_stage
from maskdm_fast.train.stages.parts import Trained
from tests.train.by_hand import WORLD, batch_of, build, take_steps, teacher_of
from tests.train.policy_toys import CASES, VIT, make_policy_run

HARNESS = Path(__file__).with_name("zero_harness.py")


@pytest.fixture
def make(make_student):
    return functools.partial(make_policy_run, make_student)


class ByHand:
    """The same without an engine: the loop of `maskdm_fast.distill.dxmi` on whole batches."""

    def __init__(self, config: RunConfig) -> None:
        self.config, stage = config, config.stage
        schedule = config.diffusion.noise_schedule(config.model)
        self.network = UViT(config.model)
        self.network.load_state_dict(teacher_of(config).tensors)
        steps = stage.steps(schedule)
        self.start_std, self.method = steps.start_std, stage.method()
        student = Denoiser(self.network, schedule, config.diffusion.prediction)
        self.policy = distill.make_policy(student, steps, num_fixed=stage.fixed_sigmas)
        self.value = stage.make_value(config.model, seed=config.seed)
        self.networks = distill.DxMINetworks(self.policy, self.value)
        self.s2 = torch.tensor([step.std**2 for step in steps.steps])

        def optimizer(parameters, decay: float, norm: float | None, average: float | None) -> AdamWEMA:
            clip = {"max_grad_norm": norm, "ema_decay": average}
            return AdamWEMA(parameters, betas=stage.betas, weight_decay=decay, **clip)

        self.optimizers = {
            "policy": optimizer(self.network.parameters(), stage.weight_decay, 0.1, stage.ema_decay),
            "sigma": optimizer([self.policy.log_sigma], 0.0, None, stage.ema_decay),
            "value": optimizer(self.value.parameters(), stage.weight_decay, stage.value_max_grad_norm, None),
        }
        sigma_lr = 100 * stage.lr if stage.sigma_lr is None else stage.sigma_lr
        self.lrs = {"policy": stage.lr, "sigma": sigma_lr, "value": stage.value_lr}

    def _step(self, name: str, step: int) -> float:
        stage, optimizer = self.config.stage, self.optimizers[name]
        warm = min(1.0, (step + 1) * stage.batch_size / stage.warmup_images) if stage.warmup_images else 1.0
        for group in optimizer.param_groups:
            group["lr"] = warm * self.lrs[name]
        optimizer.step()
        optimizer.zero_grad()
        return float(optimizer.grad_norm)

    def step(self, step: int) -> dict[str, float]:
        """What a stage has to log."""
        config, model, batch = self.config, self.config.model, batch_of(self.config, step)
        where = {"seed": config.seed, "step": step, "slots": batch.slots}
        flips = random.uniform(1, stream=Stream.FLIP, **where)[:, 0] < config.stage.hflip
        images = [image.flip(1) if flip else image for image, flip in zip(batch.images, flips, strict=True)]
        data = patchify(torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0, model.patch_size)
        draws = draw(self.method, (model.num_tokens, model.token_dim), **where)
        labels = batch.labels if model.num_classes else None
        trajectory = distill.rollout(self.policy, self.start_std * draws.start, draws.rollout, labels)
        self.s2 = distill.adapt_velocity(self.s2, trajectory.moves, config.stage.avr_decay)
        sigmas = self.policy.all_log_sigma().exp().tolist()
        rows: dict[str, list[float]] = {f"sigma/{t}": [sigma] for t, sigma in enumerate(sigmas)}
        for update in self.method.updates():
            of_policy = update.network == "policy"
            with distill.frozen(self.value if of_policy else self.policy):
                loss, found = distill.update_loss(
                    update, self.method, self.networks, data=data, trajectory=trajectory, s2=self.s2, draws=draws
                )
            loss.backward()
            found[{"energy": "loss", "value": "value_loss", "policy": "policy_loss"}[update.network]] = loss.detach()
            if of_policy:
                found["grad_norm"] = self._step("policy", step)
                self._step("sigma", step)
            else:
                found["value_grad_norm"] = self._step("value", step)
            for name, value in found.items():
                rows.setdefault(name, []).append(float(value))
        return {name: sum(values) / len(values) for name, values in rows.items()}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_steps_are_the_mathematics(make, changes):
    """In micro-batches or not: the mean move, to which the others are compared, is that of the whole batch."""
    config = make(**changes)
    stage, hand = build(config), ByHand(config)
    for step, row in enumerate(take_steps(stage, config, 0, 3)):
        wanted = hand.step(step)
        assert next(iter(row)) == "loss" and row.keys() == wanted.keys()
        assert wanted["grad_norm"] > 1e-4 and wanted["value_grad_norm"] > 1e-4
        assert {name: float(value) for name, value in row.items()} == pytest.approx(wanted, rel=2e-4, abs=1e-5)
    groups = stage.pieces()
    assert sorted(groups) == ["ema", "model", "optimizer", "value_model", "value_optimizer", "velocity"]
    torch.testing.assert_close(groups["velocity"]["s2"], hand.s2, rtol=1e-4, atol=1e-7)
    sigmas = hand.policy.log_sigma, hand.policy.fixed_log_sigma
    names = [*(f"sigmas.{name}" for name in ("log_sigma", "fixed_log_sigma"))]
    kept = {**hand.network.state_dict(), **dict(zip(names, sigmas, strict=True))}
    averages = list(hand.optimizers["policy"].ema_parameters())
    averaged = dict(zip(dict(hand.network.named_parameters()), averages, strict=True))
    averaged |= dict(zip(names, (next(iter(hand.optimizers["sigma"].ema_parameters())), sigmas[1]), strict=True))
    for group, tensors in {"model": kept, "ema": averaged, "value_model": hand.value.state_dict()}.items():
        assert groups[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(groups[group][name], tensor, rtol=1e-3, atol=2e-5, msg=f"{group} {name}")
    start = [step.std for step in config.stage.steps(config.diffusion.noise_schedule(config.model)).steps]
    moved = (kept["sigmas.log_sigma"].exp() / torch.tensor(start[: len(sigmas[0])])).log().abs()
    assert moved.min() > 1e-3 and not torch.equal(averaged["sigmas.log_sigma"], kept["sigmas.log_sigma"])


def _copy(stage: PolicyDistillationStage) -> dict[str, dict[str, torch.Tensor]]:
    return {group: {name: tensor.clone() for name, tensor in part.items()} for group, part in stage.pieces().items()}


@pytest.mark.parametrize("changes", [CASES[name] for name in ("as published", "a value that knows the time")])
@pytest.mark.parametrize("stop", [0, 2])
def test_goes_on_from_pieces_bit_for_bit(make, changes, stop):
    config = make(**changes)
    whole, first, second = build(config), build(config), build(config)
    rows = take_steps(whole, config, 0, 3)
    take_steps(first, config, 0, stop)
    second.load(Held(_copy(first)))
    assert take_steps(second, config, stop, 3) == rows[stop:]
    found = second.pieces()
    for group, tensors in whole.pieces().items():
        assert found[group].keys() == tensors.keys()
        assert all(torch.equal(found[group][name], tensor) for name, tensor in tensors.items())


def test_zero_does_the_same(make, tmp_path):
    """With the policy's noise beside it, whole; a run goes on under another engine; also with weights of 16 bits."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'maskdm_fast[deepspeed]')")
    short = {**VIT, "value_time": True, "precision": "bf16", "value_precision": "run"}
    configs = [make(micro_batch_size=2, resample=True, **changes) for changes in ({}, short)]
    command = [sys.executable, str(HARNESS), str(tmp_path / "results"), *(json.dumps(c.to_dict()) for c in configs)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for config, (rows, *groups) in zip(configs, torch.load(tmp_path / "results"), strict=True):
        close = {"rel": 1e-3, "abs": 1e-4} if config.precision == "fp32" else {"rel": 0.1, "abs": 0.02}
        stage = build(config)
        for step, (row, pieces) in enumerate(zip(rows, groups, strict=True)):
            (wanted,) = take_steps(stage, config, step, step + 1)
            found = {name: float(value) for name, value in row.items()}
            assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, **close)
            for group, tensors in stage.pieces().items():
                assert pieces[group].keys() == tensors.keys()
                if group in ("model", "ema", "velocity"):
                    for name, tensor in tensors.items():
                        torch.testing.assert_close(pieces[group][name], tensor, rtol=0.0, atol=4e-3, msg=name)


def test_lamb_goes_on_from_pieces(make):
    config = make(optimizer="lamb")
    whole, first, second = build(config), build(config), build(config)
    rows = take_steps(whole, config, 0, 2)
    take_steps(first, config, 0, 1)
    second.load(Held(_copy(first)))
    assert take_steps(second, config, 1, 2) == rows[1:]
    kinds = [type(player.engine._optimizer) for player in (whole._policy, whole._value, whole._sigmas)]
    assert kinds == [LambEMA, LambEMA, AdamWEMA]


def test_a_part_of_the_tensors():
    values = torch.arange(6.0).view(2, 3)
    both = Held({"model": {"a": values, "in.a": values + 1, "in.b": values[0]}})
    inside, outside = Part(both, "in."), Part(both, "in.", rest=True)
    assert list(inside.names("model")) == ["a", "b"] and list(outside.names("model")) == ["a"]
    assert list(inside.names("ema")) == []
    assert torch.equal(inside.tensor("model", "a"), values + 1) and torch.equal(outside.tensor("model", "a"), values)
    assert inside.shape("model", "b") == (3,)
    assert inside.fragment("model", "a", 2, 4).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("changes", [{"micro_batch_size": 2, "resample": True}, {**VIT, "precision": "bf16"}])
def test_only_the_network_of_an_update_has_gradients_and_changes(make, changes, monkeypatch):
    config = make(activation_checkpointing=True, num_policy_updates=2, **changes)
    stage, touched = build(config), set()
    players = {"policy": stage._policy, "sigmas": stage._sigmas, "value": stage._value}
    for name, player in players.items():
        for parameter in player.module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: touched.add(name))

    def values() -> dict[str, list]:
        return {name: [p.tolist() for p in player.module.parameters()] for name, player in players.items()}

    steps = []
    for name, player in players.items():

        def step(lr, name=name, real=player.engine.step):
            together = {"value"} if name == "value" else {"policy", "sigmas"}
            assert touched == together
            for other in players.keys() - together:
                assert all(parameter.grad is None for parameter in players[other].module.parameters())
            before, found = values(), real(lr)
            assert [other for other, weights in values().items() if weights != before[other]] == [name]
            steps.append(name)
            if name != "policy":
                touched.clear()
            return found

        monkeypatch.setattr(player.engine, "step", step)
    take_steps(stage, config, 0, 2)
    assert steps == [*["value"] * 5, *["policy", "sigmas"] * 2] * 2
    for player in players.values():
        assert all(parameter.grad is None and parameter.requires_grad for parameter in player.module.parameters())


class Told:
    """Stands for an engine, and notes what it is told."""

    def __init__(self, name: str, engine, log: list[str]) -> None:
        self.__dict__.update(name=name, engine=engine, log=log)

    def __getattr__(self, name):
        found = getattr(self.engine, name)
        if name in ("step", "rest", "wake", "load"):
            return lambda *arguments: (self.log.append(f"{self.name} {name}"), found(*arguments))[1]
        return found


def test_idle_networks_rest(make):
    """Between its steps each of the large ones, from the beginning, and in a run that goes on."""
    config, log = make(num_steps=2, alpha_bars=(0.02, 0.5), micro_batch_size=2), []
    built = build(config)
    players = [
        Trained(Told(name, player.engine, log), player.module)
        for name, player in (("policy", built._policy), ("sigmas", built._sigmas), ("value", built._value))
    ]
    stage = PolicyDistillationStage(config, *players, 0.0, WORLD)
    take_steps(stage, config, 0, 1)
    stage.load(Held(_copy(stage)))
    both = ["policy rest", "value rest"]
    wanted = [*both, "value wake", *["value step"] * 3, "value rest"]
    wanted += ["policy wake", "policy step", "sigmas step", "policy rest"]
    wanted += ["policy load", "sigmas load", "value load", *both]
    assert log == wanted


@pytest.mark.parametrize("precision", ["fp32", "run"])
def test_bf16_is_of_the_policy_and_if_wanted_of_the_value(make, precision):
    config = make(value_precision=precision, num_policy_updates=2)
    short, seen = replace(config, precision="bf16"), {"policy": set(), "value": set()}
    stage = build(short)
    for name, layer in (("policy", stage._policy.module.head), ("value", stage._value.module.head)):
        layer.register_forward_hook(lambda module, inputs, out, name=name: seen[name].add(out.dtype))
    exact, found = take_steps(build(config), config, 0, 2), take_steps(stage, short, 0, 2)
    assert seen == {"policy": {torch.bfloat16}, "value": {torch.bfloat16 if precision == "run" else torch.float32}}
    for row, wanted in zip(found, exact, strict=True):
        assert {value.dtype for value in row.values()} == {torch.float32}
        for name in ("loss", "policy_loss", "grad_norm"):
            assert float(row[name]) == pytest.approx(float(wanted[name]), rel=0.1), name
    for tensors in stage.pieces().values():
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("changes", [{}, {"resample": True, "num_policy_updates": 3}, VIT])
def test_flops_are_those_of_all_networks(make, changes):
    """But for the first layer, which has no gradient to its input, and attention, whose backward pass is 2."""
    config = make(**changes)
    config = replace(config, model=replace(config.model, dim=64, depth=5))
    stage, batch = build(config), batch_of(config, 0)
    stage.step([batch], 0)
    ops.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        stage.step([batch], 1)
    assert counter.get_total_flops() / 4 == pytest.approx(stage.flops_per_image(0), rel=0.1)
    assert stage.tokens_per_image(0) == config.model.num_tokens + config.model.num_extras


@pytest.mark.parametrize("num_classes", [0, 3])
def test_previews_are_samples_of_the_average(make, num_classes):
    config = make(num_classes=num_classes)
    stage = build(config)
    take_steps(stage, config)
    tensors = {which: stage.pieces()[which] for which in ("ema", "model")}
    wanted = {which: generate(config, found, 5, device=WORLD.device) for which, found in tensors.items()}
    assert wanted["ema"].shape == (5, 8, 8, 3) and wanted["ema"].dtype == torch.uint8
    assert torch.equal(stage.preview(5), wanted["ema"]) and not torch.equal(wanted["ema"], wanted["model"])
    noisier = tensors["ema"] | {"sigmas.log_sigma": tensors["ema"]["sigmas.log_sigma"] + 0.5}
    assert not torch.equal(generate(config, noisier, 5, device=WORLD.device), wanted["ema"])
    part = generate(config, tensors["ema"], 3, first_slot=2, batch_size=2, device=WORLD.device)
    assert torch.equal(part, wanted["ema"][2:])
    if num_classes:
        labels = torch.arange(5) % 3
        assert torch.equal(stage.preview(5, labels=labels), wanted["ema"])
        assert not torch.equal(stage.preview(5, labels=labels.flip(0)), wanted["ema"])
    for options, message in (({"num_steps": 3}, "a policy of 4 steps"), ({"guidance": 2.0}, "its own sampler")):
        with pytest.raises(ValueError, match=message):
            generate(config, tensors["ema"], 5, device=WORLD.device, **options)


def test_what_cannot_be_built(make):
    with pytest.raises(ValueError, match=r"cuda_graph .*not distillation; leave out --cuda-graph"):
        build(make(cuda_graph=True))
    with pytest.raises(ValueError, match=r"no common loss scale; use --precision bf16"):
        make(precision="fp16").validate()
    config = make()
    with pytest.raises(ValueError, match="a distillation needs a teacher"):
        build_stage(config, WORLD, None, None)
    teacher = teacher_of(config)
    other = replace(teacher, config=replace(teacher.config, model=replace(config.model, dim=32)))
    with pytest.raises(ValueError, match=r"another network than its teacher teacher: dim 32 -> 16"):
        build_stage(config, WORLD, None, other)
