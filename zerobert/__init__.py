"""What the stages share: file formats, the model, optimizers, the engine."""

__version__ = "0.1.0"
