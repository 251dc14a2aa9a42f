from .optimizers import (
    NEEDS_MORE as NEEDS_MORE,
    accepted_arguments as accepted_arguments,
    check_arguments as check_arguments,
    create_optimizer as create_optimizer,
    list_optimizers as list_optimizers,
    name_or_class as name_or_class,
    parameter_groups as parameter_groups,
)
from .schedulers import (
    add_groups as add_groups,
    create_scheduler as create_scheduler,
    list_schedulers as list_schedulers,
    step_scheduler as step_scheduler,
)
