"""Philox against its published vectors and against C++, and the distributions of what is made of it."""

import shutil
import subprocess
from pathlib import Path

import pytest
import scipy.stats
import torch

from maskdm_fast import random
from maskdm_fast.random import Stream

CSRC = Path(__file__).resolve().parents[1] / "csrc"

# Random123, tests/kat_vectors: (counter, key, output) of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    low, high = _words(key)
    words = random.philox4x32(tuple(torch.tensor(word) for word in _words(counter)), low | high << 32)
    assert [int(word) for word in words] == _words(output)


@pytest.fixture(scope="module")
def philox_program(tmp_path_factory):
    """A plain host program around csrc/common/philox.h: the header needs neither torch nor the library."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("philox")
    source = folder / "main.cpp"
    source.write_text("""
        #include "common/philox.h"
        #include <cstdio>
        int main() {
          unsigned long long c[4], seed;
          while (std::scanf("%llu %llu %llu %llu %llu", &c[0], &c[1], &c[2], &c[3], &seed) == 5) {
            uint64_t word[4] = {c[0], c[1], c[2], c[3]};
            maskdm::isa_host::philox4x32(word, seed);
            for (uint64_t w : word) std::printf("%u ", static_cast<uint32_t>(w));
            std::printf("%.9g\\n", maskdm::isa_host::uniform_of(static_cast<uint32_t>(word[0])));
          }
        }
    """)
    program = folder / "main"
    subprocess.run([compiler, "-std=c++20", f"-I{CSRC}", source, "-o", program], check=True)

    def run(rows):
        text = "\n".join(" ".join(str(value) for value in row) for row in rows)
        output = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
        return [line.split() for line in output.splitlines()]

    return run


def test_cpp_has_the_known_answers(philox_program):
    rows = [(*_words(counter), _words(key)[0] | _words(key)[1] << 32) for counter, key, _ in KNOWN_ANSWERS]
    for (_, _, output), words in zip(KNOWN_ANSWERS, philox_program(rows), strict=True):
        assert [int(word) for word in words[:4]] == _words(output)


def test_cpp_agrees_bit_for_bit(philox_program):
    """Draws of the Python module and of the C++ header, at corners of every word of counter and key."""
    seeds, steps = [0, 1, 2**32, 2**63 - 1], [0, 1, 2**31, 2**32 - 1]
    slots = torch.tensor([0, 1, 12345, 2**31, 2**32 - 1])
    for seed in seeds:
        for step in steps:
            words = random.bits(10, seed=seed, stream=Stream.MASK, step=step, slots=slots)
            uniforms = random.uniform(10, seed=seed, stream=Stream.MASK, step=step, slots=slots)
            rows = [(block, int(slot), step, int(Stream.MASK), seed) for slot in slots for block in range(3)]
            cpp = philox_program(rows)
            got = [int(word) for line in cpp for word in line[:4]]
            assert torch.equal(torch.tensor(got).view(len(slots), 12)[:, :10], words)
            first = torch.tensor([float(line[4]) for line in cpp], dtype=torch.float32).view(len(slots), 3)
            assert torch.equal(first, uniforms[:, ::4])


def test_uniform_never_reaches_zero_or_one():
    extremes = random.bits_to_uniform(torch.tensor([0, 2**32 - 1]))
    assert extremes.tolist() == [2.0**-24, 1.0 - 2.0**-24]


def _slots(num):
    return torch.arange(num)


def test_uniform_distribution():
    u = random.uniform(2000, seed=7, stream=Stream.TIMESTEP, step=3, slots=_slots(50)).double().flatten()
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_distribution(dtype):
    z = random.normal(2000, seed=7, stream=Stream.NOISE, step=3, slots=_slots(50), dtype=dtype)
    assert z.dtype == dtype
    assert scipy.stats.kstest(z.double().flatten(), "norm").pvalue > 1e-3
    for lag in (1, 2, 3):  # within a pair, a block and between blocks
        correlation = (z[:, lag:] * z[:, :-lag]).double().mean()
        assert abs(correlation) < 4 / (50 * 2000) ** 0.5


def test_normals_of_both_precisions_are_the_same_draws():
    arguments = {"seed": 1, "stream": Stream.NOISE, "step": 0, "slots": _slots(4)}
    low = random.normal(999, dtype=torch.float32, **arguments)
    high = random.normal(999, dtype=torch.float64, **arguments)
    torch.testing.assert_close(low.double(), high, rtol=0, atol=5e-6)


@pytest.mark.parametrize("change", [{"seed": 8}, {"stream": Stream.MASK}, {"step": 4}, {"slots": _slots(50) + 50}])
def test_every_coordinate_matters(change):
    base = {"seed": 7, "stream": Stream.NOISE, "step": 3, "slots": _slots(50)}
    a, b = random.normal(2000, **base), random.normal(2000, **(base | change))
    correlation = (a * b).double().mean()
    assert abs(correlation) < 4 / (50 * 2000) ** 0.5
    assert not torch.isin(a, b).float().mean() > 0.01


def test_draws_depend_on_slots_not_on_the_batch():
    """Half batches, reordered slots and longer rows hold the same numbers."""
    arguments = {"seed": 5, "stream": Stream.NOISE, "step": 2}
    whole = random.normal(10, slots=_slots(6), **arguments)
    assert torch.equal(random.normal(10, slots=torch.tensor([4, 1]), **arguments), whole[[4, 1]])
    assert torch.equal(random.normal(13, slots=_slots(6), **arguments)[:, :10], whole)
    steps = torch.full((6,), 2)
    assert torch.equal(random.normal(10, slots=_slots(6), seed=5, stream=Stream.NOISE, step=steps), whole)


def test_permutation():
    first = random.permutation(1000, seed=3, stream=Stream.DATA_ORDER, step=0)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, random.permutation(1000, seed=3, stream=Stream.DATA_ORDER, step=0))
    assert not torch.equal(first, random.permutation(1000, seed=3, stream=Stream.DATA_ORDER, step=1))
    assert random.permutation(0, seed=3, stream=Stream.DATA_ORDER, step=0).shape == (0,)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="want 0 <= seed < 2\\*\\*63"):
        random.uniform(1, seed=seed, stream=Stream.MASK, step=0, slots=_slots(1))


@pytest.mark.parametrize("step", [-1, 2**32])
def test_step_out_of_range(step):
    """Regression: step 2**32 drew the numbers of step 0."""
    with pytest.raises(ValueError, match=f"step is {step}, want 0 <= step < 2\\*\\*32"):
        random.bits(1, seed=0, stream=Stream.MASK, step=step, slots=_slots(1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": torch.tensor(3)}, TypeError, "seed is of type Tensor, want an int"),
        ({"step": 1.0}, TypeError, "step is of type float, want an int"),
        ({"slots": [0, 1]}, TypeError, "slots is of type list, want a tensor"),
        ({"slots": torch.zeros(2)}, TypeError, "slots has dtype float32, want int64"),
        ({"slots": torch.tensor(0)}, ValueError, r"slots has shape \[\], want \[B\]"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        random.bits(1, **({"seed": 0, "stream": Stream.MASK, "step": 0, "slots": _slots(2)} | changes))


def test_streams_keep_their_numbers():
    """The values are part of every saved run: a stream may be added, never renumbered."""
    assert {stream.name: int(stream) for stream in Stream} == {
        "TIMESTEP": 0,
        "MASK": 1,
        "NOISE": 2,
        "LABEL_DROP": 3,
        "FLIP": 4,
        "GENERATOR_NOISE": 5,
        "SAMPLER_NOISE": 6,
        "DATA_ORDER": 7,
        "INIT": 8,
        "LABEL": 9,
        "SUBSET": 10,
        "MASK_RATIO": 11,
        "UNMASKED": 12,
        "GENERATOR_STEP": 13,
        "CRITIC_TIMESTEP": 14,
        "GUIDANCE": 15,
        "POLICY_NOISE": 16,
        "POLICY_UPDATE": 17,
        "POLICY_RESAMPLE": 18,
        "TRANSITION_ORDER": 19,
        "LATENT_NOISE": 20,
        "LATENT_LEVEL": 21,
    }
