"""Every setting of a run, defined once: name, type, default, bounds and help in one field.

The YAML file, the flags and overrides of the command line, ``LoraConfig`` and the reference page are all made from these
classes. Values are frozen. The complete :class:`RunConfig` is saved in the run's folder and suffices to repeat the run.
The command line reads this module to answer ``--help``, so it does not import torch.
"""

from lorakeet.config.adalora import AdaLoraConfig
from lorakeet.config.base import DEFAULT_MODEL, FLOATING_BITS, QUANTIZED_FORMATS, BaseSettings, bits_choices
from lorakeet.config.data import DataSettings
from lorakeet.config.lora import LoraSettings
from lorakeet.config.run import RunConfig, make_run, read_run
from lorakeet.config.task import TaskName, TaskSettings
from lorakeet.config.train import TrainSettings
from lorakeet.config.vera import VeraConfig

__all__ = [
    "DEFAULT_MODEL",
    "FLOATING_BITS",
    "QUANTIZED_FORMATS",
    "AdaLoraConfig",
    "BaseSettings",
    "DataSettings",
    "LoraSettings",
    "RunConfig",
    "TaskName",
    "TaskSettings",
    "TrainSettings",
    "VeraConfig",
    "bits_choices",
    "make_run",
    "read_run",
]
