"""fedqc: federated quality control of medical image segmentations."""

__version__ = "0.1.0"
