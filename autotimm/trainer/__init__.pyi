from .setup import DEFAULT_EPOCHS as DEFAULT_EPOCHS
from .trainer import AutoTrainer as AutoTrainer
