"""What surrounds the graphs, without a GPU; tests/gpu/test_cuda_graph.py replays real ones."""

import pytest
import torch
from torch import nn

from maskdm_fast.diffusion.masking import NoMask, PatchMask
from maskdm_fast.train import cuda_graph
from maskdm_fast.train.cuda_graph import MicroBatchGraphs, check_cuda_graph, flat_gradients

CUDA = torch.device("cuda")


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
    graphs = MicroBatchGraphs(make_work(replayed), gradients, recorder)
    for constant, tensors in batches():
        wanted = make_work(eager)(constant, tensors)
        found = graphs(constant, tensors)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        for one, other in zip(eager.parameters(), replayed.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
    assert (recorder.recorded, recorder.replayed) == (3, 6)


def test_a_graph_reads_only_what_was_copied_for_it():
    """The tensors of the first call may be gone, or changed, when the graph is replayed."""
    model, recorder = make_model(), Deferred()
    graphs = MicroBatchGraphs(make_work(model), flat_gradients(model.parameters()), recorder)
    x = torch.ones(4, 3)
    first = graphs(1.0, (x, torch.tensor(1)))["loss"].clone()
    x.fill_(7.0)
    assert torch.equal(graphs(1.0, (torch.ones(4, 3), torch.tensor(1)))["loss"], first)


def test_few_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    model, recorder = make_model(), Deferred()
    graphs = MicroBatchGraphs(make_work(model), flat_gradients(model.parameters()), recorder)
    tensors = (torch.ones(4, 3), torch.tensor(1))
    for constant in (1.0, 2.0, 1.0, 3.0, 1.0):  # 2.0 is the one that was not used for longest
        graphs(constant, tensors)
    assert recorder.recorded == 3
    graphs(2.0, tensors)
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
        graphs = MicroBatchGraphs(make_work(model), flat_gradients(model.parameters()), recorder)
        with pytest.raises(error, match=message):
            graphs(1.0, (torch.ones(4, 3), torch.tensor(1)))


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
    check_cuda_graph(make_config(), CUDA, "plain")
    check_cuda_graph(make_config(mask=NoMask()), CUDA, "ddp")
    for config, device, engine, message in (
        (make_config(), torch.device("cpu"), "plain", "needs a GPU"),
        (make_config(), CUDA, "zero1", "engine is zero1"),
        (make_config(mask=PatchMask(0.5, 0.9)), CUDA, "plain", "range of ratios"),
        (make_config(unmasked_share=0.1), CUDA, "plain", "unmasked_share 0.1"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            check_cuda_graph(config, device, engine)
        assert "leave out --cuda-graph" in str(raised.value)
