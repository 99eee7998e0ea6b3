"""ulrl: remove backdoors from neural networks."""

__version__ = "0.1.0"
