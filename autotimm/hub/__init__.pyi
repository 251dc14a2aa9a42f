from .formats import FORMATS as FORMATS
from .push import push_to_hub as push_to_hub
from .save import (
    TASKS as TASKS,
    convert_checkpoint as convert_checkpoint,
    find_task as find_task,
    folder_to_checkpoint as folder_to_checkpoint,
    is_pretrained_folder as is_pretrained_folder,
    load_pretrained as load_pretrained,
    save_pretrained as save_pretrained,
    task_from_hparams as task_from_hparams,
)
