from .app import (
    create_app as create_app,
    serve as serve,
)
from .batching import (
    InferenceQueue as InferenceQueue,
    Limits as Limits,
    Refusal as Refusal,
)
from .page import photo_page as photo_page
