"""What a step of a run does with which networks: from it memory, arithmetic and launches are counted.

A stage of a new kind is counted once there is a function for its configuration in `_PLANS`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from maskdm_fast.distill import Critic, CriticHead, GuidedNetwork
from maskdm_fast.distill.costs import Pass, fake_passes, generator_passes
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.ops.adamw_ema import cost as adamw_ema
from maskdm_fast.ops.lamb_ema import cost as lamb_ema
from maskdm_fast.ops.sid_loss import cost as sid_loss
from maskdm_fast.ops.work import FLOAT, Work
from maskdm_fast.train.config import DenoisingConfig, RunConfig, ScoreDistillationConfig
from maskdm_fast.train.costs import NOTHING, Counts, Part, denoising_parts, visible_counts
from maskdm_fast.train.networks import Network, Wrap
from maskdm_fast.train.policy_config import PolicyDistillationConfig
from maskdm_fast.train.regression_config import RegressionConfig, is_told


@dataclass(frozen=True)
class Update:
    """One optimizer step of one of the networks.

    Attributes:
        network: which is trained.
        passes: what is asked of which network, for a micro-batch.
        loss: whose work besides is counted.
        share: how often it is made in a step, on average.
    """

    network: str
    passes: tuple[Pass, ...]
    loss: Literal["denoising", "sid", "regression"]
    share: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Of a run.

    Attributes:
        networks: the first is the one that is sampled.
        updates: in the order of a step.
        counts: visible patches of an image.
        period: after so many steps the same updates come again.
        trajectory: float32 values that are kept through a step, of all images of a process, for each value of an image.
        note: what else is to be said of the counts.
        early: whether a network's optimizer is awake through its updates, rather than in its steps alone.
    """

    networks: tuple[Network, ...]
    updates: tuple[Update, ...]
    counts: Counts
    period: int = 1
    trajectory: int = 0
    note: str = ""
    early: bool = False

    @property
    def trained(self) -> list[Network]:
        """The networks with an engine."""
        return [network for network in self.networks if network.trained]

    def network(self, name: str) -> Network:
        """The network of this name."""
        return next(network for network in self.networks if network.name == name)

    def evaluations(self, update: Update) -> dict[str, float]:
        """Of one image in one update, in units of a forward pass, by network."""
        found: Counter[str] = Counter()
        for asked in update.passes:
            found[asked.network] += asked.evaluations
        return dict(found)

    def step_parts(
        self,
        batch_size: int,
        *,
        num_micro: int,
        item: int,
        checkpointing: bool,
        optimizer: Literal["adamw", "lamb"] = "adamw",
    ) -> list[Part]:
        """The parts of one optimizer step, of updates that are not made in every step their share.

        Args:
            batch_size: images.
            num_micro: micro-batches that they are cut into.
            item: bytes of an activation: 4, or 2 under bfloat16 autocast.
            checkpointing: compute the blocks twice.
            optimizer: which.
        """
        found = []
        for update in self.updates:
            parts = self._micro_parts(update, batch_size / num_micro, item=item, checkpointing=checkpointing)
            parts = [dataclasses.replace(part, calls=part.calls * num_micro) for part in parts]
            network = self.network(update.network)
            if num_micro > 1:
                sums = Work(bytes=3 * FLOAT * network.values)
                parts.append(Part("sums of micro-batches", "rest", num_micro - 1, sums))
            parts.append(_optimizer_part(network, optimizer))
            found += [dataclasses.replace(part, calls=part.calls * update.share) for part in parts]
        return _merged(found)

    def _micro_parts(self, update: Update, images: float, *, item: int, checkpointing: bool) -> list[Part]:
        """Forward and backward passes of a micro-batch."""
        found = []
        for asked in update.passes:
            network = self.network(asked.network)
            parts = network.parts(self.counts, images, asked, item=item, checkpointing=checkpointing)
            if item < FLOAT and network.trained and network.value_of is None:
                # Every matrix is cast in every call, and its gradient back.
                cast = Work(bytes=(FLOAT + item) * sum(part.calls * part.matrix for part in parts) / asked.calls)
                back = cast if asked.gradients in ("weights", "both") else NOTHING
                parts.append(Part("casts of weights", "casts", asked.calls, cast, back))
            found += parts
        return [*found, *_loss_parts(update.loss, self.network(update.network).model, self.counts, images)]


def plan_of(config: RunConfig) -> Plan:
    """The plan of a run; with one class where their number is not known before the data set is read."""
    return _PLANS[type(config.stage)](config, model_of(config))


def model_of(config: RunConfig) -> UViTConfig:
    """The network of a run; with one class where their number is not known before the data set is read."""
    model = config.model
    return dataclasses.replace(model, num_classes=1) if config.class_conditional and not model.num_classes else model


def num_parameters(config: RunConfig) -> int:
    """Parameters of the network that a run is for."""
    return plan_of(config).networks[0].values


def _denoising(config: RunConfig, model: UViTConfig) -> Plan:
    side = model.image_size // model.patch_size
    network = _trained("network", config, model)
    update = Update("network", (Pass("network", "weights"),), "denoising")
    return Plan((network,), (update,), visible_counts(config.stage, (side, side)))


def _score_distillation(config: RunConfig, model: UViTConfig) -> Plan:
    stage = config.stage
    method = stage.make()
    steps = stage.num_steps, stage.trained_steps
    every = stage.num_fake_updates
    head = stage.method == "dmd2" and method.needs_images
    note = ""
    if stage.method == "sida":
        all_count = max(method.freeze_images, method.adversarial_from)
        note = f"counted as from image {all_count:,} on, when all losses are there"
    return Plan(
        (
            _trained("generator", config, model),
            dataclasses.replace(
                _trained("fake", config, model, _judged if head else None, stage.fake_betas or stage.betas),
                average=False,
            ),
            Network("teacher", model, trained=False),
        ),
        (
            Update("fake", fake_passes(method, *steps), "regression"),
            Update("generator", generator_passes(method, *steps), "sid", 1.0 / every),
        ),
        [(model.num_tokens, 1.0)],
        every,
        note=note,
    )


def _regression(config: RunConfig, model: UViTConfig) -> Plan:
    stage = config.stage
    student = _trained("student", config, model, GuidedNetwork if is_told(stage) else None)
    passes = [Pass("student", "weights")]
    if stage.method == "consistency":
        passes.append(Pass("student", "none"))
    counts = [(model.num_tokens, 1.0)]
    if not stage.asks_teacher:
        return Plan((student,), (Update("student", tuple(passes), "regression"),), counts)
    calls = 2 if stage.method == "progressive" or stage.solver == "heun" else 1
    twice = 2 if stage.strengths is not None or stage.guidance != 1.0 else 1
    passes.append(Pass("teacher", "none", calls * twice, calls))
    networks = student, Network("teacher", model, trained=False)
    note = "counted with a teacher that is guided; one that is told its guidance is asked once where this one is twice"
    told = note if is_told(stage) else ""
    return Plan(networks, (Update("student", tuple(passes), "regression"),), counts, note=told)


def _policy_distillation(config: RunConfig, model: UViTConfig) -> Plan:
    stage = config.stage
    method = stage.method()
    steps, updates = method.num_steps, method.num_policy_updates
    value = dataclasses.replace(_trained("value", config, model), average=False, value_of=stage)
    # Of the images of the data set and of the policy, which has made them before the updates.
    rollout = Pass("policy", "none", steps, steps)
    anew = [Pass("policy", "none")] if method.resample else []
    passes = {
        "energy": (rollout, Pass("value", "weights", 2.0)),
        "value": (*anew, Pass("value", "none"), Pass("value", "weights")),
        "policy": (Pass("policy", "weights"), Pass("value", "inputs")),
    }
    note = ""
    if config.precision != "fp32" and stage.value_precision == "fp32":
        note = f"the value is float32, but its time is told as in {config.precision}"
    return Plan(
        (_trained("policy", config, model), value),
        (
            Update("value", passes["energy"], "regression"),
            Update("value", passes["value"], "regression", steps),
            Update("policy", passes["policy"], "regression", updates),
        ),
        [(model.num_tokens, 1.0)],
        # Images of the data set; states; noise of the start, of every step and of every update.
        note=note,
        trajectory=1 + (steps + 1) + 1 + steps * (2 if method.resample else 1) + updates,
        early=True,
    )


_PLANS: dict[type, Callable[[RunConfig, UViTConfig], Plan]] = {
    DenoisingConfig: _denoising,
    PolicyDistillationConfig: _policy_distillation,
    RegressionConfig: _regression,
    ScoreDistillationConfig: _score_distillation,
}
"""Plans by the configuration of the stage."""


def _trained(
    name: str,
    config: RunConfig,
    model: UViTConfig,
    wrap: Wrap | None = None,
    betas: tuple[float, float] | None = None,
) -> Network:
    """A network with the optimizer of the run, or one of other betas."""
    stage = config.stage
    # Ours leaves out the first moment where it would be the gradient.
    first = stage.optimizer == "lamb" or config.machine.optimizer_kernel == "apex"
    first = first or (betas or stage.betas)[0] != 0.0
    return Network(name, model, wrap, moments=1 + first)


def _judged(network: UViT) -> nn.Module:
    return Critic(network, CriticHead(network.config.dim))


def _loss_parts(loss: str, model: UViTConfig, counts: Counts, images: float) -> list[Part]:
    """What makes the inputs of the networks and what is made of their outputs, of a micro-batch."""
    if loss == "denoising":
        return denoising_parts(model, counts, images)
    values = images * model.num_tokens * model.token_dim
    # Noise is drawn, scaled and added; what a network says is made an estimate of x0.
    noise = Part("noise, estimates", "rest", 1, Work(bytes=12 * values * FLOAT), Work(bytes=4 * values * FLOAT))
    if loss == "regression":
        return [noise, Part("loss", "rest", 1, Work(bytes=5 * values * FLOAT), Work(bytes=3 * values * FLOAT))]
    forward = sid_loss.forward(images, values, FLOAT, weighted=False, mean=False, of_xt=False)
    backward = sid_loss.backward(images, values, FLOAT, mean=False)
    return [noise, Part("loss, generator", "sid_loss", 1, forward, backward)]


def _optimizer_part(network: Network, optimizer: str) -> Part:
    values = network.values
    if optimizer == "adamw":
        update = adamw_ema.step_(values, FLOAT, first_moment=network.moments > 1, average=network.average)
    else:
        update = lamb_ema.step_(values, FLOAT)
    return Part("optimizer, EMA", f"{optimizer}_ema", 1, adamw_ema.global_norm(values, FLOAT) + update)


def _merged(parts: list[Part]) -> list[Part]:
    """Parts of one name as one, whose calls do the mean of their work."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.name, []).append(part)
    merged = []
    for group in groups.values():
        calls = sum(part.calls for part in group)
        if len(group) == 1 or not calls:
            merged.append(group[0])
            continue
        forward, backward = (
            sum((getattr(part, name) * (part.calls / calls) for part in group), NOTHING)
            for name in ("forward", "backward")
        )
        merged.append(dataclasses.replace(group[0], calls=calls, forward=forward, backward=backward))
    return merged
