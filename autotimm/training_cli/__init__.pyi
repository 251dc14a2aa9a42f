from .config import (
    RunCLI as RunCLI,
    find_checkpoint as find_checkpoint,
    read_hparams as read_hparams,
)
from .options import (
    AutoTimmCLI as AutoTimmCLI,
    RunArguments as RunArguments,
    TASKS as TASKS,
    TaskClasses as TaskClasses,
    parse_arguments as parse_arguments,
)
from .run import (
    run_evaluation as run_evaluation,
    run_fit as run_fit,
)
