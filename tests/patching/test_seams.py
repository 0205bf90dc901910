import copy
import dataclasses
import gc
import inspect
import os
import pickle
import subprocess
import sys
import types

import cloudpickle
import pytest
import yaml
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs

from glm5_patch.patching.seams import Seams
from glm5_patch.patching.wrapper import host_wrapper

NAME = "get_transformer_block_with_experimental_attention_variant_spec"


@dataclasses.dataclass
class Provider:
    """Holds the block-spec function as Megatron-Bridge's providers do."""

    transformer_layer_spec: object


@pytest.fixture
def wrapped():
    return getattr(specs, NAME)


def test_it_is_the_hosts_function_by_name(wrapped):
    assert isinstance(wrapped, types.FunctionType)
    assert (wrapped.__module__, wrapped.__qualname__) == (specs.__name__, NAME)
    assert inspect.unwrap(wrapped) is not wrapped
    assert inspect.unwrap(wrapped).__code__.co_filename == specs.__file__


@pytest.mark.parametrize(
    "through",
    [
        copy.copy,
        copy.deepcopy,
        lambda f: pickle.loads(pickle.dumps(f)),
        lambda f: cloudpickle.loads(cloudpickle.dumps(f)),
        lambda f: copy.deepcopy(Provider(f)).transformer_layer_spec,
        lambda f: dataclasses.asdict(Provider(f))["transformer_layer_spec"],
    ],
    ids=["copy", "deepcopy", "pickle", "cloudpickle", "deepcopied provider", "asdict"],
)
def test_it_survives_as_itself(through, wrapped):
    assert through(wrapped) is wrapped


def test_no_name_of_this_package_is_written(wrapped):
    for data in (pickle.dumps(wrapped), cloudpickle.dumps(wrapped)):
        assert b"glm5_patch" not in data
        assert NAME.encode() in data


def test_yaml_writes_the_hosts_name(wrapped):
    """As Megatron-Bridge does: a representer for the exact type of functions."""

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(
        types.FunctionType,
        lambda dumper, f: dumper.represent_str(f"{f.__module__}.{f.__qualname__}"),
    )
    assert yaml.dump({"spec": wrapped}, Dumper=Dumper, width=999) == (
        f"spec: {specs.__name__}.{NAME}\n"
    )


def test_a_pickle_loads_where_the_plugin_is_off(wrapped):
    code = "import pickle, sys; f = pickle.load(sys.stdin.buffer); print(f.__code__.co_filename)"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=pickle.dumps(wrapped),
        capture_output=True,
        env={**os.environ, "GLM5_PATCH": "0"},
        check=True,
    )
    assert result.stdout.decode().strip() == specs.__file__


def host():
    module = types.ModuleType("a_host")
    module.function = lambda x: x + 1

    class Thing:
        def method(self, x):
            return x * 2

        @staticmethod
        def static(x):
            return x * 3

    module.Thing = Thing
    return module


def add_ten(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) + 10


def test_functions_methods_and_static_methods_are_wrapped_and_put_back():
    module = host()
    before = {**vars(module)}, {**vars(module.Thing)}
    seams = Seams()
    seams.wrap(module, "function", add_ten)
    seams.wrap(module.Thing, "method", add_ten)
    seams.wrap(module.Thing, "static", add_ten)
    assert module.function(1) == 12
    assert module.Thing().method(1) == 12
    assert module.Thing.static(1) == module.Thing().static(1) == 13
    seams.undo()
    assert (vars(module), vars(module.Thing)) == before
    assert all(vars(module.Thing)[k] is v for k, v in before[1].items())


@pytest.mark.parametrize("frozen", [False, True])
def test_aliases_are_rebound_only_where_they_are_the_same_object(frozen):
    module, user = host(), types.ModuleType("a_user")
    user.renamed, user.other = module.function, lambda x: x
    original, other = module.function, user.other
    sys.modules["a_user"] = user
    if frozen:
        gc.freeze()
    try:
        seams = Seams(late=True)
        seams.wrap(module, "function", add_ten)
        assert user.renamed is module.function is not original
        assert user.other is other
        seams.undo()
        assert user.renamed is module.function is original
    finally:
        gc.unfreeze()
        del sys.modules["a_user"]


def test_what_someone_else_put_there_since_stays():
    module = host()
    seams = Seams()
    seams.wrap(module, "function", add_ten)
    assert seams.lost() is None
    module.function = theirs = lambda x: x
    assert seams.lost() == "function"
    seams.undo()
    assert module.function is theirs


def test_an_absent_seam_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="Thing.* has no attribute 'gone' of its own"):
        Seams().wrap(host().Thing, "gone", add_ten)


def test_the_wrapper_sees_instance_and_arguments():
    seen = []

    def around(wrapped, instance, args, kwargs):
        seen.append((instance, args, kwargs))
        return wrapped(*args, **kwargs)

    class Thing:
        def method(self, a, b=0):
            return a + b

    Thing.method = host_wrapper(Thing.method, around, method=True)
    thing = Thing()
    assert thing.method(1, b=2) == 3
    assert seen == [(thing, (1,), {"b": 2})]
