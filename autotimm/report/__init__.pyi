from .page import (
    Card as Card,
    Section as Section,
    to_page as to_page,
)
from .sections import (
    model_sections as model_sections,
    write_report as write_report,
)
