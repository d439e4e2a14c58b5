"""The losses by name, and the place for yours: one short class each, found by what `config/loss/NAME.yaml` says.

To add one, subclass `PairedPreferenceTrainer` or `UnpairedPreferenceTrainer` here and write `loss`; it is given what
the names of its arguments ask for, and reads its hyper-parameters from `self.config.loss` (see `scoring.LossTrainer`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arguments import Losses
from loop import BasicTrainer
from losses.paired import (
    AlphaDPOTrainer,
    AOTTrainer,
    APODownTrainer,
    APOZeroTrainer,
    BCOPairTrainer,
    CDPOTrainer,
    DiscoPOPTrainer,
    DPOSigmoidTrainer,
    DPOTrainer,
    EXOTrainer,
    ForwardKLDPOTrainer,
    HingeTrainer,
    HumanlineDPOTrainer,
    IPOTrainer,
    JSDPOTrainer,
    LengthDesensitisedDPOTrainer,
    NCATrainer,
    RobustDPOTrainer,
    SPPOTrainer,
)
from losses.ppo import PPOTrainer
from losses.reference_free import (
    BradleyTerryTrainer,
    CPOTrainer,
    ORPOTrainer,
    SFTTrainer,
    SimPOTrainer,
    SLiCTrainer,
)
from losses.unpaired import (
    AOTUnpairedTrainer,
    BCOTrainer,
    HumanlineKTOTrainer,
    KTOLogSigmoidTrainer,
    KTOSurprisalTrainer,
    KTOTrainer,
    KTOZeroTrainer,
    SimpleKTOTrainer,
)
from scoring import LossTrainer, PairedPreferenceTrainer, UnpairedPreferenceTrainer
from utils import UserError, nearest


def find_trainer(name: str) -> type[BasicTrainer]:
    """The trainer class that a loss's YAML names."""
    trainers = {key: value for key, value in globals().items()
                if isinstance(value, type) and issubclass(value, BasicTrainer)}
    if name not in trainers:
        raise UserError(f"loss.trainer: no trainer {name!r} in trainers.py (have {', '.join(trainers)})"
                        f"{nearest(name, trainers)}")
    return trainers[name]
