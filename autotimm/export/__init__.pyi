from .int8 import (
    Quantized as Quantized,
    input_batches as input_batches,
    measure_accuracy as measure_accuracy,
    measure_agreement as measure_agreement,
    measure_masks as measure_masks,
    measure_objects as measure_objects,
    quantize_onnx as quantize_onnx,
)
from .objects import (
    ObjectMasks as ObjectMasks,
    Objects as Objects,
    as_exported as as_exported,
    best_first as best_first,
    decode_places as decode_places,
    keep_best as keep_best,
    pick_objects as pick_objects,
    pool_objects as pool_objects,
)
from .onnx import (
    export_checkpoint_to_onnx as export_checkpoint_to_onnx,
    export_to_onnx as export_to_onnx,
    open_session as open_session,
    read_proto as read_proto,
    run_session as run_session,
    write_onnx as write_onnx,
)
from .program import (
    ProgramModel as ProgramModel,
    compare as compare,
    example_inputs as example_inputs,
    export_checkpoint_to_torchscript as export_checkpoint_to_torchscript,
    export_program as export_program,
    export_to_torchscript as export_to_torchscript,
    find_size_step as find_size_step,
    load_program as load_program,
    load_torchscript as load_torchscript,
    name_dims as name_dims,
    resized_inputs as resized_inputs,
    trace_program as trace_program,
    traced_size as traced_size,
    validate_torchscript_export as validate_torchscript_export,
)
from .results import (
    ExportError as ExportError,
    Exported as Exported,
    PixelClasses as PixelClasses,
    Probabilities as Probabilities,
    describe as describe,
    exportable as exportable,
    task_of as task_of,
    to_probabilities as to_probabilities,
)
from .runtime import (
    OnnxFile as OnnxFile,
    OnnxFunction as OnnxFunction,
    OnnxModel as OnnxModel,
    load_onnx as load_onnx,
    to_results as to_results,
    validate_onnx_export as validate_onnx_export,
)
