"""Exported files: what damages them, and what they cannot be written as."""

import json

import pytest
import torch
from safetensors.torch import save_file

from maskdm_fast.train import CheckpointError, export, load_weights, train


@pytest.fixture
def exported(make_config, tmp_path):
    train(make_config(num_images=4), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


def test_a_cut_off_file_is_called_damaged(exported, make_config, tmp_path):
    """It was said not to be an export, or, as the start of a run, to be no checkpoint of the official codes."""
    whole = exported.read_bytes()
    for end in (len(whole) - 1, len(whole) // 2, 500, 64):
        exported.write_bytes(whole[:end])
        with pytest.raises(
            CheckpointError, match=r"run\.safetensors was written by maskdm-fast export and is damaged or"
        ):
            load_weights(exported)
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            train(make_config(init_from=exported.name), tmp_path / "second")
    for beginning in (b"", whole[:20], b"weights"):
        exported.write_bytes(beginning)
        with pytest.raises(ValueError, match="was not written by maskdm-fast export"):
            load_weights(exported)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("{}", "damaged: no which and no config"),
        (json.dumps({"which": "ema"}), "damaged: no config"),
        ("{oops", "damaged or truncated: Expecting property name"),
        ("3", "damaged or truncated: "),
    ],
)
def test_a_broken_state_is_called_damaged(tmp_path, state, words):
    save_file({"a": torch.zeros(1)}, tmp_path / "broken.safetensors", metadata={"maskdm_fast": state})
    with pytest.raises(CheckpointError, match=words):
        load_weights(tmp_path / "broken.safetensors")


def test_a_dtype_that_no_export_has(exported, tmp_path):
    with pytest.raises(ValueError, match=r"dtype is torch\.float64, want one of torch\.float32, torch\.bfloat16, "):
        export(tmp_path / "run", tmp_path / "other.safetensors", dtype=torch.float64)
    assert not (tmp_path / "other.safetensors").exists()
