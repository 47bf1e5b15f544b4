"""All operators that are timed, by name; a subject is a file of benchmarks with one or more of them."""

from . import attention_providers, masked_tokens, nearest_code, residual_norm, token_loss
from .providers import Operator

SUBJECTS: dict[str, tuple[Operator, ...]] = {
    "rel_pos_attention": attention_providers.OPERATORS,
    "residual_norm": residual_norm.OPERATORS,
    "token_loss": token_loss.OPERATORS,
    "nearest_code": nearest_code.OPERATORS,
    "masked_tokens": masked_tokens.OPERATORS,
}
OPERATORS = {operator.name: operator for operators in SUBJECTS.values() for operator in operators}
SUBJECT_OF = {operator.name: subject for subject, operators in SUBJECTS.items() for operator in operators}
