"""Training: a recipe goes in; a plain HF folder with e2llm.json, metrics and a Record come out."""

from e2llm.train.run import TrainResult, train, train_loaded

__all__ = ["TrainResult", "train", "train_loaded"]
