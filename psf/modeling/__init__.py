"""The model: a plain PyTorch core and the Detectron2 shell around it."""
