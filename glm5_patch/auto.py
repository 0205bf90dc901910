"""``import glm5_patch.auto``: the explicit way in, where entry points are not wanted or not seen
(``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, a frozen application, a source tree on ``PYTHONPATH``)."""

from . import enable

enable()
