from .config import (
    RunCLI as RunCLI,
    find_checkpoint as find_checkpoint,
    read_hparams as read_hparams,
)
from .options import (
    TASKS as TASKS,
    AutoTimmCLI as AutoTimmCLI,
    RunArguments as RunArguments,
    TaskClasses as TaskClasses,
    parse_arguments as parse_arguments,
)
from .run import (
    run_evaluation as run_evaluation,
    run_fit as run_fit,
)
