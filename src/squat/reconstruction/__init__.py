"""Training one decoder layer at a time against the float model's: a good place to start QAT from."""

from squat.reconstruction.blocks import Reconstruction, reconstruct

__all__ = ["Reconstruction", "reconstruct"]
