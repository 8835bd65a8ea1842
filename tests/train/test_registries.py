"""What has one entry for each kind of stage."""

import typing

from maskdm_fast.train import generation, plan
from maskdm_fast.train.config import AnyStage
from maskdm_fast.train.stages import STAGES


def test_every_stage_is_in_every_registry():
    """One that is left out would train, and fail where its cost is asked for or its images are drawn."""
    stages = set(typing.get_args(AnyStage))
    for registry in (STAGES, plan._PLANS, generation._DRAW):
        assert set(registry) == stages
