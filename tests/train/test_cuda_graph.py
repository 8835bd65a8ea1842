"""What surrounds the graphs, without a GPU; tests/gpu/test_cuda_graph.py replays real ones."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.masking import NoMask, PatchMask
from maskdm_fast.models import UViT
from maskdm_fast.train import cuda_graph
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.cuda_graph import GraphEngine, MicroBatchGraphs, flat_gradients
from maskdm_fast.train.engine import EngineSettings, OptimizerSettings
from maskdm_fast.train.engine_choice import check_engine
from maskdm_fast.train.stages import Batch, DenoisingStage, build_stage
from maskdm_fast.train.world import World


class Deferred:
    """Stands for `ops.streams.Recorder`: recording runs nothing, and what was recorded sees nothing of a later call but
    the memory of its tensors."""

    def __init__(self) -> None:
        self.warmed, self.recorded, self.replayed = 0, 0, 0

    def warm_up(self, work):
        self.warmed += 1
        return [work() for _ in range(3)][-1]

    def record(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            work()

        return replay


def make_model():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3) / 7)
        model.bias.fill_(0.1)
    return model


def make_work(model):
    def work(constants, tensors):
        x, step = tensors
        loss = (model(x) * step).square().mean() * constants
        loss.backward()
        return {"loss": loss.detach(), "mean": x.mean()}

    return work


def batches():
    """Two shapes and two constants, out of order."""
    for number, (rows, constant) in enumerate([(4, 1.0), (3, 1.0), (4, 1.0), (4, 0.5), (3, 1.0), (4, 1.0)]):
        yield constant, (torch.linspace(-1, 1, 3 * rows).view(rows, 3) + number, torch.tensor(number))


def test_replays_give_the_numbers_of_eager_calls():
    eager, replayed, recorder = make_model(), make_model(), Deferred()
    gradients = flat_gradients(replayed.parameters())
    graphs, work = MicroBatchGraphs(gradients, recorder), make_work(replayed)
    for constant, tensors in batches():
        wanted = make_work(eager)(constant, tensors)
        found = graphs.run(work, constant, tensors)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        for one, other in zip(eager.parameters(), replayed.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    assert (recorder.recorded, recorder.replayed) == (3, 6)


def test_a_graph_reads_only_what_was_copied_for_it():
    """The tensors of the first call may be gone, or changed, when the graph is replayed."""
    model, recorder = make_model(), Deferred()
    graphs, work = MicroBatchGraphs(flat_gradients(model.parameters()), recorder), make_work(model)
    x = torch.ones(4, 3)
    first = graphs.run(work, 1.0, (x, torch.tensor(1)))["loss"].clone()
    x.fill_(7.0)
    assert torch.equal(graphs.run(work, 1.0, (torch.ones(4, 3), torch.tensor(1)))["loss"], first)


def test_few_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    model, recorder = make_model(), Deferred()
    graphs, work = MicroBatchGraphs(flat_gradients(model.parameters()), recorder), make_work(model)
    tensors = (torch.ones(4, 3), torch.tensor(1))
    for constant in (1.0, 2.0, 1.0, 3.0, 1.0):  # 2.0 is the one that was not used for longest
        graphs.run(work, constant, tensors)
    assert recorder.recorded == 3
    graphs.run(work, 2.0, tensors)
    assert recorder.recorded == 4


def test_what_cannot_be_recorded_says_so():
    model = make_model()

    class Refuses(Deferred):
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    class Full(Deferred):
        def record(self, work):
            raise torch.OutOfMemoryError("CUDA out of memory")

    for recorder, error, message in (
        (Refuses(), RuntimeError, "cannot be recorded in a CUDA graph: operation .* capturing; leave out --cuda-graph"),
        (Full(), torch.OutOfMemoryError, "CUDA out of memory"),
    ):
        graphs, work = MicroBatchGraphs(flat_gradients(model.parameters()), recorder), make_work(model)
        with pytest.raises(error, match=message):
            graphs.run(work, 1.0, (torch.ones(4, 3), torch.tensor(1)))


def test_gradients_are_parts_of_one_tensor():
    model = nn.ModuleList([nn.Linear(3, 5), nn.Linear(33, 1)])
    flat = flat_gradients(model.parameters())
    assert flat.shape == (32 + 32 + 64 + 32,) and not flat.any() and not flat.requires_grad
    for _ in range(2):
        (model[0](torch.ones(1, 3)).sum() + model[1](torch.ones(1, 33)).sum()).backward()
    starts = [parameter.grad.storage_offset() for parameter in model.parameters()]
    assert starts == [0, 32, 64, 128]
    assert all(parameter.grad.is_contiguous() for parameter in model.parameters())
    assert flat.sum() == 2 * sum(parameter.numel() for parameter in model.parameters())
    flat.zero_()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_what_is_refused(make_config):
    def check(config: RunConfig, engine: str, place: str) -> None:
        machine = replace(config.machine, cuda_graph=True)
        check_engine(replace(config, machine=machine), engine, 1 if engine == "plain" else 2, place)

    check(make_config(), "plain", "cuda")
    check(make_config(mask=NoMask()), "ddp", "cuda")
    for config, engine, place, message in (
        (make_config(), "plain", "cpu", "needs a GPU"),
        (make_config(), "zero1", "cuda", "engine is zero1"),
        (make_config(mask=PatchMask(0.5, 0.9)), "plain", "cuda", "range of ratios"),
        (make_config(unmasked_share=0.1), "plain", "cuda", "unmasked_share 0.1"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            check(config, engine, place)
        assert "leave out --cuda-graph" in str(raised.value)


CHANGES = {
    "a ratio that falls": {"mask_schedule": MaskSchedule("steps", ((0.25, 8),)), "micro_batch_size": 3},
    "bf16": {"precision": "bf16", "hflip": 0.5},
    "fp16": {"precision": "fp16", "micro_batch_size": 2},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_stage_trains_as_it_does_without_graphs(make_config, changes):
    """5 steps, bit for bit, of batches that go into micro-batches of two sizes."""
    config, world, recorder = make_config(batch_size=5, **changes), World(torch.device("cpu")), Deferred()
    stage = config.stage
    optimizer = OptimizerSettings(stage.betas, stage.weight_decay, stage.max_grad_norm, stage.ema_decay)
    settings = EngineSettings(config.precision)
    engine = GraphEngine("plain", UViT(config.model, seed=config.seed), optimizer, settings, world, recorder)
    graphed, eager = DenoisingStage(config, engine, world), build_stage(config, world)
    slots, places = world.micro_batches(stage.batch_size, config.machine.micro_batch_size), addresses(engine)
    for step in range(5):
        images = torch.arange(5 * 8 * 8 * 3).mul(step + 3).to(torch.uint8).view(5, 8, 8, 3)
        batches = [Batch(images[part], torch.full_like(part, -1), part) for part in slots]
        found, wanted = graphed.step(batches, step), eager.step(batches, step)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert_equal(graphed.pieces(), eager.pieces())
    assert addresses(engine) == places  # where graphs read and write
    assert recorder.recorded == len({len(part) for part in slots}) * len({stage.mask_at(step) for step in range(5)})
    assert recorder.replayed == 5 * len(slots)


def addresses(engine):
    tensors = [tensor for parameter in engine.model.parameters() for tensor in (parameter, parameter.grad)]
    if engine._loss_scale is not None:
        engine._loss_scale.load_state_dict({"scale": torch.tensor(4.0**8), "streak": torch.tensor(0)})
        tensors.append(engine._loss_scale.scale)
    return [tensor.data_ptr() for tensor in tensors]


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for group in wanted:
        assert found[group].keys() == wanted[group].keys()
        for name, value in wanted[group].items():
            assert torch.equal(found[group][name], value), (group, name)


def test_number_of_processes_is_that_of_the_engine():
    settings = OptimizerSettings((0.9, 0.99), 0.0, None, 0.9), EngineSettings()
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="engine plain is one process"):
        GraphEngine("plain", make_model(), *settings, World(cpu, 0, 2), Deferred())
    with pytest.raises(ValueError, match="engine ddp is for several"):
        GraphEngine("ddp", make_model(), *settings, World(cpu), Deferred())
    GraphEngine("ddp", make_model(), *settings, World(cpu, 0, 2), Deferred())


def test_processes_average_what_their_micro_batches_added_up(monkeypatch):
    """Two of them in turn; in place of the network between them stands the mean of their gradients."""
    cpu, settings = torch.device("cpu"), (OptimizerSettings((0.9, 0.99), 0.0, None, 0.9), EngineSettings())
    x = torch.linspace(-1, 1, 24).view(8, 3)

    def loss_of(engine):
        def work(constants, tensors):
            loss = engine.model(tensors[0]).square().mean()
            engine.backward(loss * constants)
            return {"loss": loss.detach()}

        return work

    engines = [GraphEngine("ddp", make_model(), *settings, World(cpu, rank, 2), Deferred()) for rank in (0, 1)]
    for engine, share in zip(engines, x.chunk(2), strict=True):
        for part in share.chunk(2):
            engine.run(loss_of(engine), 0.5, (part,))
    gradients = [torch.cat([p.grad.flatten() for p in engine.model.parameters()]) for engine in engines]
    sums = [engine._gradients.clone() for engine in engines]
    monkeypatch.setattr(cuda_graph.dist, "all_reduce", lambda flat: flat.copy_((sums[0] + sums[1]) / 2))
    norms = [engine.step(lr=0.1)["grad_norm"] for engine in engines]
    whole = make_model()
    whole(x).square().mean().backward()
    wanted = torch.cat([p.grad.flatten() for p in whole.parameters()])
    assert not torch.allclose(*gradients)
    for norm, engine in zip(norms, engines, strict=True):
        torch.testing.assert_close(norm, wanted.norm())
        assert not any(p.grad.any() for p in engine.model.parameters())
    for one, other in zip(*(engine.model.parameters() for engine in engines), strict=True):
        assert torch.equal(one, other)
