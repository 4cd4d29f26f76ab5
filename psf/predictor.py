"""Prediction of single images from a config."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from psf.data import build_augmentations
from psf.weights import Checkpointer


class Predictor(DefaultPredictor):
    """Detectron2's ``DefaultPredictor``, whose weights may be in a format of others, too."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: with ``MODEL.WEIGHTS``, and the data set with the classes in ``DATASETS.TEST``.
        """
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg).eval()
        Checkpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        (self.aug,) = build_augmentations(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT
