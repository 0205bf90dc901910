"""Judge any GLM-5 by its logits, and name its mistakes.

A small random checkpoint (``checkpoint``) is given to the implementation (``candidate``), and its
logits are compared with those of a plain statement of GLM-5 (``reference``), which is itself
compared with Hugging Face's model. A difference is explained (``explain``) by the known faults
(``faults``): each is a change of the reference's conventions. The faults under which the reference
gives the same logits are named (``judge``).
"""

from .judge import Oracle, Verdict

__all__ = ["Oracle", "Verdict"]
