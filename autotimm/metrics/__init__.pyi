from .config import (
    DETECTION_TASKS as DETECTION_TASKS,
    LoggingConfig as LoggingConfig,
    MeanAveragePrecision as MeanAveragePrecision,
    MetricConfig as MetricConfig,
    STAGES as STAGES,
    build_metric as build_metric,
    coco_backend as coco_backend,
    default_metrics as default_metrics,
)
from .manager import (
    MetricManager as MetricManager,
    MetricStages as MetricStages,
    check_configs as check_configs,
    confusion_matrix as confusion_matrix,
    metric_input as metric_input,
)
from .processes import (
    EpochMeans as EpochMeans,
    deal_in_turn as deal_in_turn,
    gather_processes as gather_processes,
    joined_states as joined_states,
    means_of as means_of,
)
